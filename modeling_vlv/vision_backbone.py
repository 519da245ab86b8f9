"""The image processor of a pretrained vision backbone: its normalisation and its size, by VLV's own processor."""

from typing import Any

from transformers import AutoImageProcessor

from .processing_vlv import VLVImageProcessor

SETTINGS = ("image_mean", "image_std", "resample", "rescale_factor", "do_rescale", "do_normalize")
"""What a VLV image processor takes from the backbone's."""


def backbone_image_processor(
    source: str, size: int | None = None, pre_crop_size: int | None = None
) -> VLVImageProcessor:
    """A VLV image processor with the normalisation of the vision backbone in a folder or Hub repository.

    Args:
        size: Height and width in pixels; by default the backbone's own: its crop, or without one its size.
        pre_crop_size: As `VLVImageProcessor`'s.

    Raises:
        ValueError: If there is no `preprocessor_config.json`, or it does not say how pixels are normalised.
    """
    try:
        given, _ = VLVImageProcessor.get_image_processor_dict(source)
    except OSError as error:
        raise ValueError(
            f"image_encoder {source} has no preprocessor_config.json, which says how its pixels are normalised; save "
            "its image processor there (AutoImageProcessor.from_pretrained(...).save_pretrained(...))"
        ) from error
    try:
        own: Any = vars(AutoImageProcessor.from_pretrained(source, trust_remote_code=False))
    except (ImportError, ValueError, OSError) as error:  # of one that needs torchvision, or that is not known
        own = given
        if missing := [name for name in ("image_mean", "image_std") if name not in given]:
            raise ValueError(
                f"the preprocessor_config.json of image_encoder {source} lacks {' and '.join(missing)}: {error}"
            ) from error
    side = size or _side(own.get("crop_size") if own.get("do_center_crop") else None) or _side(own.get("size"))
    if side is None:
        raise ValueError(
            f"the preprocessor_config.json of image_encoder {source} names no size; set encoder_image_size"
        )
    settings = {name: own[name] for name in SETTINGS if own.get(name) is not None}
    return VLVImageProcessor(size={"height": side, "width": side}, pre_crop_size=pre_crop_size, **settings)


def _side(size: Any) -> int | None:
    """The side of a square of a `size` of transformers' image processors."""
    if size is None or isinstance(size, int):
        return size
    sides = dict(size)
    return sides.get("height") or sides.get("shortest_edge")
