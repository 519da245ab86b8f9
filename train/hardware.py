"""Peak speeds and memories of GPUs, and published training speeds to compare.

Peaks are those of NVIDIA's data sheets, which state them with sparsity, twice the dense ones that count here: H100
(SXM 1,979 TFLOP/s in bfloat16, PCIe 1,513, NVL 1,671), H200 (SXM 1,979, NVL 1,671), A100 (624 for SXM and PCIe).
"""

import re
from dataclasses import dataclass

TERA = 1e12


@dataclass(frozen=True)
class Gpu:
    """A card. Speeds are dense (without structured sparsity), in TFLOP/s.

    Args:
        memory: In GB (1e9 bytes).
        fp32: Of the CUDA cores, which multiply float32 matrices where TF32 is not allowed.
        tf32: Of the tensor cores. PyTorch lets float32 convolutions use TF32, and matrix products only on request.
        bf16: Of the tensor cores, with float32 sums. float16 is as fast.
    """

    name: str
    memory: float
    fp32: float
    tf32: float
    bf16: float

    def peak(self, precision: str, kind: str, tf32: bool = False) -> float:
        """FLOP/s for an operation of a part that computes in `precision`, `"fp32"` or `"bf16"`.

        Args:
            kind: `"convolution"`, `"matmul"` or `"attention"`.
            tf32: Whether float32 matrix products may use TF32, too.
        """
        if precision == "bf16":
            return self.bf16 * TERA
        return (self.tf32 if tf32 or kind == "convolution" else self.fp32) * TERA


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("A100", 80, 19.5, 156, 312),  # SXM4, 80 GB
        Gpu("H100", 80, 67, 494.7, 989.4),  # SXM5
        Gpu("H100 PCIe", 80, 51, 378, 756.5),
        Gpu("H100 NVL", 94, 60, 417.5, 835.5),
        Gpu("H200", 141, 67, 494.7, 989.4),  # SXM5
        Gpu("H200 NVL", 141, 60, 417.5, 835.5),
        Gpu("B200", 180, 75, 1125, 2250),  # HGX, one of eight
        Gpu("L40S", 48, 91.6, 183, 362.05),
        Gpu("RTX 4090", 24, 82.6, 82.6, 165.2),
        Gpu("RTX 6000 Ada", 48, 91.1, 182.1, 364.2),
    )
}

HARMLESS_WORDS = r"nvidia|geforce|tesla|generation|pcie|sxm\d?|hbm\d\w?|\d+gb"
"""Words in the name of a device that do not make it another card. Laptop versions, `D` versions and MIG slices are."""

UNET_TRAINING_SPEEDS = {"H100": 140, "A100": 36}
"""Images per second and card of training Stable Diffusion 2's UNet on cached latents of 512 x 512 images.

Published: 135 to 145 in MLPerf Training 4.1, and MosaicML's figure for the A100.
"""


def find_gpu(name: str) -> Gpu:
    """A card by its name, in any case, with or without spaces.

    Raises:
        ValueError: If it is not known; the message lists those that are.
    """
    known = {_plain(gpu): gpu for gpu in GPUS}
    if _plain(name) not in known:
        raise ValueError(f"the GPU {name!r} is not known; expected one of {', '.join(GPUS)}")
    return GPUS[known[_plain(name)]]


def gpu_of_device(name: str) -> Gpu | None:
    """The card of a device, by the name that CUDA gives it, such as `NVIDIA H100 80GB HBM3`; None if it is not known.

    The variants of a card have peaks of their own: an `NVIDIA H100 PCIe` has three quarters of that of an SXM module.
    """
    words = set(name.lower().replace("-", " ").split())
    found = [gpu for key, gpu in GPUS.items() if set(key.lower().split()) <= words]
    gpu = max(found, key=lambda gpu: len(gpu.name), default=None)
    if gpu is None or not all(re.fullmatch(HARMLESS_WORDS, word) for word in words - set(gpu.name.lower().split())):
        return None
    return gpu


def _plain(name: str) -> str:
    return name.lower().replace(" ", "").replace("-", "").replace("_", "").removeprefix("nvidia")
