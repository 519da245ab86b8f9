"""Converts checkpoints of the authors' code into a folder in the Hub layout: what `vlv convert` does."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from vlv.convert_vlv_original_to_hf import convert_checkpoints, convert_florence, existing_folder
from vlv.files import set_default_permissions

from .export import export
from .folders import new_folder


@dataclass
class Conversion:
    """The result of a conversion.

    Attributes:
        folder: The converted model, in the Hub layout.
        dropped: Name of each weight that was left out, with the reason.
    """

    folder: Path
    dropped: dict[str, str] = field(default_factory=dict)


def convert(
    output: str | os.PathLike,
    *,
    stage1: str | os.PathLike | None = None,
    stage2: str | os.PathLike | None = None,
    stable_diffusion: str | os.PathLike | None = None,
    florence: str | os.PathLike | None = None,
    language_model: str | os.PathLike | None = None,
    image_size: int | None = None,
) -> Conversion:
    """Converts a stage-1 checkpoint, a stage-2 checkpoint, or both into one folder in the Hub layout.

    With both, stage 1's encoder serves reconstruction, and stage 2's encoder, which was trained further, captioning.
    Weights that the two share are stored once. With stage 2 alone its encoder serves both. With neither, Florence-2 is
    converted to transformers' format, for `vlv train stage1 --image_encoder`.

    Args:
        output: A new or empty folder. A failure leaves nothing there.
        stage1: `pytorch_model.bin` (which DeepSpeed's `zero_to_fp32.py` writes, also in several parts),
            `checkpoint_N.pt`, or a folder with one of these.
        stage2: `model.pt`, or its folder.
        stable_diffusion: The diffusers folder that the checkpoints were trained with.
        florence: The Florence-2 folder, in Microsoft's or transformers' format. Configuration, preprocessor and
            tokenizer are read, and the weights where neither stage is given.
        language_model: The language model's folder, for stage 2.
        image_size: Side in pixels of the square that images were cropped to in training; by default 384 as in the
            authors' code, or the text-to-image model's own size where that is smaller.

    Raises:
        FileNotFoundError: If a file or folder is missing; the message names it.
        ValueError: If a weight is missing, of another shape, or unknown; the message names it and what was expected.
    """
    with new_folder(output) as folder:
        if stage1 is None and stage2 is None:
            source = existing_folder(florence, "florence", "the Florence-2 folder is needed (--florence)")
            model, dropped = convert_florence(source)
            model.save_pretrained(folder)
            set_default_permissions(*folder.glob("*.safetensors"))
        else:
            converted = convert_checkpoints(
                stage1=stage1,
                stage2=stage2,
                stable_diffusion=stable_diffusion,
                florence=florence,
                language_model=language_model,
                image_size=image_size,
            )
            export(folder, **converted.parts)
            dropped = converted.dropped
    return Conversion(Path(output), dropped)
