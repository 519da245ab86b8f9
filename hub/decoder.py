"""The text-to-image model of a trained VLV: its own, in the same folder, or another one that it refers to.

A training leaves the frozen model where it is. `model_index.json` then has the entry
`"diffusion_model": {"source": ..., "revision": ..., "fingerprint": ..., "family": ...}` in place of the components.
"""

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusers import __version__ as diffusers_version
from huggingface_hub import try_to_load_from_cache

from vlv.diffusion_decoder import FAMILIES, DiffusionDecoder, family_of, find_family
from vlv.files import read_json, write_json

from .fingerprint import UNKNOWN, fingerprint
from .layout import DIFFUSION_FILES, MODEL_INDEX_FILE, reconstruction_classes


@dataclass(frozen=True)
class DiffusionModel:
    """A text-to-image model outside of the folder that refers to it.

    Attributes:
        source: Absolute path of a folder, or a repo id.
        revision: Commit of the repository; None for a folder.
        fingerprint: As `vlv.hub.fingerprint` gives it; of a folder, of the parts that decode.
        family: The `family` of its `DiffusionDecoder`; None where its files could not be read.
    """

    source: str
    revision: str | None
    fingerprint: str
    family: str | None = None

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
        if found == UNKNOWN:
            return DiffusionModel(os.fspath(source), None, found)
        index = try_to_load_from_cache(os.fspath(source), MODEL_INDEX_FILE, revision=found)
        family = find_family(read_json(index), source).family if isinstance(index, str) else None
        return DiffusionModel(os.fspath(source), found, found, family)
    if (referred := referred_diffusion_model(Path(source))) is not None:
        referred.check(source)
        return referred
    family = find_family(read_json(Path(source) / MODEL_INDEX_FILE), source).family
    return DiffusionModel(str(Path(source).resolve()), None, fingerprint(source, DIFFUSION_FILES), family)


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
    fields = {name: reference.get(name) for name in ("revision", "family")}
    return DiffusionModel(reference["source"], fingerprint=str(reference.get("fingerprint")), **fields)


def diffusion_model_of(source: str | os.PathLike, folder: Path) -> DiffusionModel | None:
    """The text-to-image model of a VLV: the one it refers to, itself if it holds one, else None.

    Args:
        source: Folder or repo id of the VLV.
        folder: Its files.
    """
    if has_own_diffusion_model(folder):
        return find_diffusion_model(source)
    return referred_diffusion_model(folder)


def family_of_reference(diffusion_model: DiffusionModel) -> type[DiffusionDecoder]:
    """The family of a text-to-image model that a folder refers to.

    Raises:
        OSError: If the reference does not say, and the model could not be read.
        ValueError: If the family is not known.
    """
    for family in FAMILIES:
        if family.family == diffusion_model.family:
            return family
    if diffusion_model.family is not None:
        known = ", ".join(family.family for family in FAMILIES)
        raise ValueError(
            f"the family of {diffusion_model.source} is {diffusion_model.family!r}; this version knows {known}"
        )
    return family_of(diffusion_model.source, revision=diffusion_model.revision)


def refer_to(folder: Path, diffusion_model: DiffusionModel) -> None:
    """Writes a `model_index.json` that refers to the text-to-image model."""
    family = family_of_reference(diffusion_model)
    index = {
        "_diffusers_version": diffusers_version,
        **reconstruction_classes(family),
        **{name: [None, None] for name in family.component_names()},
        "diffusion_model": asdict(diffusion_model) | {"family": family.family},
    }
    write_json(folder / MODEL_INDEX_FILE, index)
