"""Images and captions of the miniature's evaluation in files, as the other commands of `vlv evaluate` take them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from vlv.evaluation.features import FeatureExtractor
from vlv.evaluation.image_sets import compare_sets, cosine_similarities, extract_statistics, pair_figures
from vlv.files import write_json

from .grammar import write_caption
from .metrics import DISTANCES
from .world import Scene

ORIGINALS, CAPTIONS_FILE, REFERENCES_FILE = "originals", "captions.json", "references.json"


class KeptImages:
    """The files of one split: `originals/`, `reconstructions-guidance-1/` and so on, `captions.json` and
    `references.json` with a true caption of each image.

    Image `i` is in `0000i.png` of each folder, so the order of the names is that of the scenes.

    Args:
        folder: Of the split.
        pixels: The originals, `(N, 3, 64, 64)` uint8.
        scenes: What they show.
    """

    def __init__(self, folder: Path, pixels: torch.Tensor, scenes: Sequence[Scene]):
        self.folder = folder
        self.names = [f"{number:05}.png" for number in range(len(scenes))]
        self._originals = self._write(ORIGINALS, pixels)
        references = {name: [write_caption(scene)] for name, scene in zip(self.names, scenes, strict=True)}
        write_json(folder / REFERENCES_FILE, references)

    def add_captions(self, captions: Sequence[str]) -> None:
        """Writes the captions, one for each original."""
        write_json(self.folder / CAPTIONS_FILE, dict(zip(self.names, captions, strict=True)))

    def add_reconstructions(
        self, guidance: float, images: torch.Tensor, extractor: FeatureExtractor
    ) -> dict[str, float]:
        """Writes reconstructions `(N, 3, 64, 64)` uint8.

        Returns:
            The Fréchet distance of their features from those of the originals, and the mean cosine.

        Raises:
            ValueError: If there are fewer than 2 images.
        """
        paths = self._write(f"reconstructions-guidance-{guidance:g}", images)
        generated, reference = (extract_statistics(own, extractor) for own in (paths, self._originals))
        figures, _ = compare_sets(generated, reference, extractor, samples=0)
        cosines, _ = pair_figures({"cosine": cosine_similarities(generated.features, reference.features)}, samples=0)
        return {key: (figures | cosines)[key]["value"] for key in DISTANCES}

    def _write(self, name: str, images: torch.Tensor) -> list[Path]:
        folder = self.folder / name
        folder.mkdir(parents=True)
        paths = [folder / name for name in self.names]
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
        return paths
