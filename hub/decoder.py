"""The text-to-image model of a trained VLV: its own, in the same folder, or another one that it refers to.

A training leaves the frozen model where it is. `model_index.json` then has the entry
`"diffusion_model": {"source": ..., "revision": ..., "fingerprint": ...}` in place of the components.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusers import __version__ as diffusers_version

from vlv.files import read_json, write_json

from .fingerprint import UNKNOWN, fingerprint
from .layout import DIFFUSION_FILES, MODEL_INDEX_FILE, PIPELINE_PARTS, RECONSTRUCTION_CLASSES


@dataclass(frozen=True)
class DiffusionModel:
    """A text-to-image model outside of the folder that refers to it.

    Attributes:
        source: Absolute path of a folder, or a repo id.
        revision: Commit of the repository; None for a folder.
        fingerprint: As `vlv.hub.fingerprint` gives it; of a folder, of the parts that decode.
    """

    source: str
    revision: str | None
    fingerprint: str

    @property
    def is_known(self) -> bool:
        """Whether its files could be read when the reference was made: a folder, or a repository in the cache."""
        return self.fingerprint != UNKNOWN

    def check(self, referrer: str | os.PathLike) -> None:
        """Raises if a folder is gone or has changed. A repository is loaded at its revision.

        Args:
            referrer: The model that refers to it, for the message.

        Raises:
            FileNotFoundError: If there is no such folder.
            ValueError: If it has another fingerprint.
        """
        if self.revision is not None or (not Path(self.source).is_dir() and not os.path.isabs(self.source)):
            return
        remedy = f"`vlv push {referrer} ORG/NAME --diffusion-model DIR_OR_REPO --output FOLDER` joins it with another"
        if not Path(self.source).is_dir():
            raise FileNotFoundError(
                f"{referrer} was trained with the text-to-image model {self.source}, which is not there; {remedy}"
            )
        if (present := fingerprint(self.source, DIFFUSION_FILES)) != self.fingerprint:
            raise ValueError(
                f"{referrer} was trained with another text-to-image model than {self.source} is now: its fingerprint "
                f"was {self.fingerprint[:12]} and is {present[:12]}; {remedy}"
            )


def find_diffusion_model(source: str | os.PathLike) -> DiffusionModel:
    """The reference to a text-to-image model: to `source`, or to what the VLV `source` refers to.

    Args:
        source: A folder, or a repo id of which files are in the cache.

    Raises:
        FileNotFoundError: If the folder refers to a folder that is gone.
        ValueError: If it refers to a folder that has changed.
    """
    if not Path(source).is_dir():
        found = fingerprint(source)
        return DiffusionModel(os.fspath(source), found if found != UNKNOWN else None, found)
    if (referred := referred_diffusion_model(Path(source))) is not None:
        referred.check(source)
        return referred
    return DiffusionModel(str(Path(source).resolve()), None, fingerprint(source, DIFFUSION_FILES))


def has_own_diffusion_model(folder: Path) -> bool:
    """Whether the components of a text-to-image model are in the folder of a model."""
    return (folder / MODEL_INDEX_FILE).is_file() and referred_diffusion_model(folder) is None


def referred_diffusion_model(folder: Path) -> DiffusionModel | None:
    """The text-to-image model that the folder of a model refers to, or None.

    Raises:
        ValueError: If `model_index.json` is damaged.
    """
    if not (folder / MODEL_INDEX_FILE).is_file():
        return None
    reference = read_json(folder / MODEL_INDEX_FILE).get("diffusion_model")
    if reference is None:
        return None
    if not isinstance(reference, dict) or not isinstance(reference.get("source"), str):
        raise ValueError(f"{folder / MODEL_INDEX_FILE}: diffusion_model is not an object with a source")
    return DiffusionModel(reference["source"], reference.get("revision"), str(reference.get("fingerprint")))


def diffusion_model_of(source: str | os.PathLike, folder: Path) -> DiffusionModel | None:
    """The text-to-image model of a VLV: the one it refers to, itself if it holds one, else None.

    Args:
        source: Folder or repo id of the VLV.
        folder: Its files.
    """
    if has_own_diffusion_model(folder):
        return find_diffusion_model(source)
    return referred_diffusion_model(folder)


def refer_to(folder: Path, diffusion_model: DiffusionModel) -> None:
    """Writes a `model_index.json` that refers to the text-to-image model."""
    index = {
        "_diffusers_version": diffusers_version,
        **RECONSTRUCTION_CLASSES,
        **{name: [None, None] for name in PIPELINE_PARTS},
        "diffusion_model": asdict(diffusion_model),
    }
    write_json(folder / MODEL_INDEX_FILE, index)
