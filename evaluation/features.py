"""Features of images: Inception's, those of any vision backbone of transformers, and CLIP's of images and texts."""

import hashlib
import importlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer

from vlv import hub
from vlv.processing_vlv import to_rgb

Resize = Literal["pytorch-fid", "clean-fid", "torch-fidelity"]
INCEPTION_SIZE = 299
INCEPTION_WEIGHTS = "weights-inception-2015-12-05-*.pth"


class FeatureExtractor(Protocol):
    """Maps images to features.

    Attributes:
        name: What the results call the features.
        fingerprint: Differs if the features of an image differ.
    """

    name: str
    fingerprint: str

    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features `(N, width)` float32 on the CPU, of images `(3, H, W)` uint8 of any sizes."""


def require(package: str, remedy: str = "pip install '.[eval]' in vlv's source folder") -> Any:
    """A package that is not always installed.

    Raises:
        ImportError: If it is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        extra = "metrics need the extra vlv[eval]" if "eval" in remedy else f"this metric needs the package {package}"
        raise ImportError(f"{extra} ({remedy}): {error}") from error


def load_rgb(path: str | Path) -> torch.Tensor:
    """An image file as `(3, H, W)` uint8, upright, on white where it is transparent.

    Raises:
        ValueError: If it cannot be read; the message names it.
    """
    return torch.from_numpy(np.array(to_rgb(str(path)))).permute(2, 0, 1)


class EncoderFeatures(nn.Module):
    """The mean image token of a VLV's vision tower: features for FID and KID if Inception is not available."""

    name, fingerprint = "mean image token of a VLV", ""

    def __init__(self, encoder: Any, image_processor: Any):
        super().__init__()
        self.encoder, self.image_processor = encoder, image_processor
        self.num_features = encoder.config.query_token_dim

    @torch.no_grad()
    def forward(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features `(N, width)` float32 of images `(3, H, W)` uint8."""
        pixels = self.image_processor([image.cpu() for image in images], return_tensors="pt").pixel_values
        return (
            self.encoder.get_image_features(pixels.to(self.encoder.device)).pooler_output[:, 0].float().cpu()
        )  # (N, width)


class AutoModelFeatures:
    """Features of any vision model of transformers: DINOv2, CLIP, SigLIP, ViT, ConvNeXt and so on.

    CLIP and SigLIP give their image embeddings; other models their pooled output, or without one the first token.
    Images are prepared by the model's own image processor.

    Args:
        source: A folder or Hub repo id.
        revision: A branch, tag or commit of the Hub repo.

    Raises:
        OSError: If it cannot be loaded, or has no weights in safetensors.
        ValueError: If the model does not take images.
    """

    def __init__(self, source: str, device: str | torch.device = "cpu", revision: str | None = None):
        settings: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
        config = AutoConfig.from_pretrained(source, **settings)
        try:
            self.image_processor = AutoImageProcessor.from_pretrained(source, **settings)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{source} has no image processor, so its model ({config.model_type}) gives no image features; pass a "
                f"vision model such as facebook/dinov2-large or openai/clip-vit-large-patch14: {error}"
            ) from error
        self.model = load_encoder(source, dtype=torch.float32, **settings).to(device)
        self.source, self.settings = source, settings
        self.name = f"{config.model_type}: {source}"
        self.fingerprint = f"{hub.fingerprint(source)}/{config.model_type}"
        self._tokenizer: Any = None

    @property
    def is_contrastive(self) -> bool:
        """Whether it also embeds texts, in the space of its image embeddings."""
        return hasattr(self.model, "get_text_features")

    @torch.no_grad()
    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features `(N, width)` float32 on the CPU, of images `(3, H, W)` uint8 of any sizes."""
        pictures = [Image.fromarray(image.permute(1, 2, 0).cpu().numpy()) for image in images]
        inputs = self.image_processor(images=pictures, return_tensors="pt").to(self.model.device)
        if hasattr(self.model, "get_image_features"):
            return _pooled(self.model.get_image_features(**inputs))
        return _pooled(self.model(**inputs))

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> tuple[torch.Tensor, list[bool]]:
        """Text embeddings `(N, width)` float32 on the CPU, and of each text whether it was cut at the model's limit.

        Args:
            batch_size: Texts in a batch.

        Raises:
            ValueError: If the model embeds no texts.
        """
        if not self.is_contrastive:
            raise ValueError(f"{self.source} embeds no texts; pass a CLIP or SigLIP model")
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(self.source, **self.settings)
        limit = self.model.config.get_text_config().max_position_embeddings
        settings = {"padding": "max_length", "truncation": True, "max_length": limit, "return_tensors": "pt"}
        embeds = []
        for start in range(0, len(texts), batch_size):
            inputs = self._tokenizer(list(texts[start : start + batch_size]), **settings).to(self.model.device)
            embeds.append(_pooled(self.model.get_text_features(**inputs)))
        lengths = [len(ids) for ids in self._tokenizer(list(texts)).input_ids]
        return torch.cat(embeds), [length > limit for length in lengths]


def load_encoder(source: str, **settings: Any) -> Any:
    """A model of transformers' `AutoModel` in evaluation mode, of weights in safetensors alone.

    Raises:
        OSError: If it cannot be loaded, or has its weights in other files, which may run code when they are read.
    """
    try:
        return AutoModel.from_pretrained(source, use_safetensors=True, **settings).eval()
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise OSError(
            f"{source} has no weights in safetensors, and other files may run code when they are read; pass a model "
            "that has them, or convert this one where you trust it (from_pretrained, then save_pretrained) and pass "
            f"the folder: {error}"
        ) from error


def _pooled(outputs: Any) -> torch.Tensor:
    """The pooled output `(N, width)` of a model; of one without a pooling layer, the first token."""
    pooled = outputs if isinstance(outputs, torch.Tensor) else getattr(outputs, "pooler_output", None)
    if pooled is None:
        pooled = outputs.last_hidden_state[:, 0]
    return pooled.flatten(1).float().cpu()


class InceptionFeatures:
    """The 2048 features of the Inception-v3 of FID (its last average pooling), by torch-fidelity.

    Args:
        resize: How images get 299 x 299 pixels, which FID depends on: `"pytorch-fid"` bilinear without antialiasing;
            `"clean-fid"` bicubic with antialiasing, by Pillow, without rounding; `"torch-fidelity"` as TensorFlow 1.
            The pixels are then scaled as that package does, see `scale_for_inception`.
        weights: The file of weights. By default torch-fidelity's in torch.hub's cache.

    Raises:
        ImportError: If torch-fidelity is not installed.
        FileNotFoundError: If the weights are not on this machine.
    """

    def __init__(
        self,
        resize: Resize = "pytorch-fid",
        device: str | torch.device = "cpu",
        weights: str | Path | None = None,
    ):
        require("torch_fidelity", "pip install torch-fidelity torchvision, or choose the features of another model")
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        path = Path(weights) if weights is not None else next(_inception_weights(), None)
        if path is None or not path.is_file():
            raise FileNotFoundError(
                f"the weights of Inception ({INCEPTION_WEIGHTS}, a release of torch-fidelity) are not in "
                f"{_hub_checkpoints()}; download them there, or pass features of another model"
            )
        self.resize, self.device = resize, device
        self.network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
        self.network.to(device).eval()
        self.name = f"Inception-v3, 2048 features, resized as {resize}"
        self.fingerprint = f"{hub.fingerprint(path)}/{resize}" + ("/255" if resize == "pytorch-fid" else "")

    @torch.no_grad()
    def __call__(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """Features `(N, 2048)` float32 on the CPU, of images `(3, H, W)` uint8 of any sizes."""
        pixels = torch.cat([resize_for_inception(image, self.resize) for image in images]).to(self.device)
        # torch-fidelity's forward takes only uint8, which would round the resized pixels: its first layer gets them.
        network: Any = self.network
        scaled = scale_for_inception(pixels, self.resize)
        hook = network.Conv2d_1a_3x3.register_forward_pre_hook(lambda *_: (scaled,))
        try:
            features = network(pixels.round().to(torch.uint8))[0]
        finally:
            hook.remove()
        return features.flatten(1).float().cpu()


def resize_for_inception(image: torch.Tensor, resize: Resize) -> torch.Tensor:
    """`(3, H, W)` uint8 to `(1, 3, 299, 299)` float32 in 0..255.

    Raises:
        ValueError: If there is no such way to resize.
    """
    size = (INCEPTION_SIZE, INCEPTION_SIZE)
    if resize == "clean-fid":
        channels = [
            np.asarray(Image.fromarray(channel.float().numpy()).resize(size, Image.Resampling.BICUBIC))
            for channel in image.cpu()
        ]
        return torch.from_numpy(np.stack(channels)).clamp(0, 255)[None]
    pixels = image[None].float()
    if resize == "pytorch-fid":
        return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
    if resize == "torch-fidelity":
        module = require("torch_fidelity.interpolate_compat_tensorflow", "pip install torch-fidelity")
        return module.interpolate_bilinear_2d_like_tensorflow1x(pixels, size=size, align_corners=False)
    raise ValueError(f"Inception's images are resized as pytorch-fid, clean-fid or torch-fidelity, not {resize!r}")


def scale_for_inception(pixels: torch.Tensor, resize: Resize) -> torch.Tensor:
    """Pixels in 0..255 as the network's input: from -1 to 1 in pytorch-fid, `(x - 128) / 128` in the other two."""
    return pixels * 2 / 255 - 1 if resize == "pytorch-fid" else (pixels - 128) / 128


def _hub_checkpoints() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def _inception_weights() -> Iterator[Path]:
    return iter(sorted(_hub_checkpoints().glob(INCEPTION_WEIGHTS)))


def inception_is_available() -> bool:
    """Whether torch-fidelity and its Inception weights are installed, so that nothing has to be downloaded."""
    try:
        importlib.import_module("torch_fidelity")
    except ImportError:  # of itself, or of torchvision, which it needs
        return False
    return next(_inception_weights(), None) is not None


def fingerprint_images(paths: Sequence[Path]) -> str:
    """SHA-256 of the contents of image files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(bytes.fromhex(file_digest(path)))
    return digest.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of the content of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
