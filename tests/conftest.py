"""Fixtures of all tests: real components, built small and untrained."""

import gc
import os

if gc.isenabled():
    gc.disable()  # imports leave many objects and little garbage
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded; a test that needs a hub starts one

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import Qwen2ForCausalLM

from vlv import VLVForConditionalGeneration, VLVImageProcessor, VLVModel, VLVProcessor
from vlv.hub import convert
from vlv.miniature.tokenizer import build_tokenizer

from .builders import (
    GOLDEN,
    POSITIONS,
    QUERIES,
    VOCABULARY,
    language_model_config,
    stable_diffusion_3_parts,
    stable_diffusion_parts,
    stable_diffusion_text_encoder,
    stable_diffusion_xl_parts,
    vlv_config,
    with_text_encoder,
)

gc.freeze()
gc.enable()
torch.set_num_threads(1)
LONG_FILES = ("train/test_scale.py", "hub/test_push_and_load.py", "train/test_families.py", "hub/test_saved_parts.py")
NOBODY = 65534  # the user without privileges


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files run first, then those with slow tests, so that parallel workers end at about the same time."""
    slow_files = {item.path for item in items if item.get_closest_marker("slow")}
    first = {Path(__file__).parent / name: number for number, name in enumerate(LONG_FILES)}
    # Stable: each file keeps its order.
    items.sort(key=lambda item: (first.get(item.path, len(first)), item.path not in slow_files))


def pytest_collection_finish() -> None:
    """No garbage collection visits the hundreds of thousands of objects of the imported libraries again."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def folder_of_nobody() -> Iterator[Path]:
    """A folder that a user without privileges owns; for root, who may read everything, the test runs as that user."""
    folder = Path(tempfile.mkdtemp())
    is_root = os.geteuid() == 0
    if is_root:
        os.chown(folder, NOBODY, NOBODY)
        os.seteuid(NOBODY)
    try:
        yield folder
    finally:
        if is_root:
            os.seteuid(0)
        for path in [folder, *folder.rglob("*")]:
            if path.is_dir():
                path.chmod(0o700)
        shutil.rmtree(folder)


@pytest.fixture
def encoder() -> VLVModel:
    torch.manual_seed(0)
    return with_text_encoder(VLVModel(vlv_config()).eval())


@pytest.fixture
def captioner() -> VLVForConditionalGeneration:
    torch.manual_seed(0)
    model = VLVForConditionalGeneration(vlv_config(text_config=language_model_config())).eval()
    with_text_encoder(model.model)
    model.config.image_token_id = VOCABULARY  # of the processor's tokenizer
    return model


@pytest.fixture(scope="session")
def image_processor() -> VLVImageProcessor:
    return VLVImageProcessor(size={"height": 64, "width": 64})


@pytest.fixture(scope="session")
def processor(image_processor) -> VLVProcessor:
    return VLVProcessor(image_processor, build_tokenizer(for_text_encoder=False), image_seq_length=QUERIES)


@pytest.fixture(scope="session")
def images() -> list[Image.Image]:
    """Eight different images of different shapes."""
    random = np.random.default_rng(0)
    shapes = [(64, 64), (40, 90), (90, 40), (64, 64), (33, 65), (128, 100), (64, 64), (20, 20)]
    return [
        Image.fromarray(
            np.kron(random.integers(0, 256, (h // 4 + 1, w // 4 + 1, 3)), np.ones((4, 4, 1))).astype("uint8")
        )
        for h, w in shapes
    ]


@pytest.fixture(scope="session")
def stable_diffusion(tmp_path_factory) -> Path:
    """A Stable-Diffusion-type model in diffusers' folder format."""
    folder = tmp_path_factory.mktemp("stable-diffusion")
    parts = stable_diffusion_parts()
    pipeline = StableDiffusionPipeline(
        **parts,
        text_encoder=stable_diffusion_text_encoder(),
        tokenizer=build_tokenizer(for_text_encoder=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.tokenizer.model_max_length = POSITIONS
    pipeline.save_pretrained(folder)
    return folder


def text_tokenizers(*names: str) -> dict:
    """A tokenizer for each text encoder. The second pads with another token than the first, as in SDXL."""
    tokenizers = {name: build_tokenizer(for_text_encoder=True) for name in names}
    for tokenizer in tokenizers.values():
        tokenizer.model_max_length = POSITIONS
    tokenizers["tokenizer_2"].pad_token = tokenizers["tokenizer_2"].bos_token
    return tokenizers


@pytest.fixture(scope="session")
def stable_diffusion_xl(tmp_path_factory) -> Path:
    """A Stable-Diffusion-XL-type model in diffusers' folder format."""
    folder = tmp_path_factory.mktemp("stable-diffusion-xl")
    tokenizers = text_tokenizers("tokenizer", "tokenizer_2")
    pipeline = StableDiffusionXLPipeline(**stable_diffusion_xl_parts(), **tokenizers, add_watermarker=False)
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stable_diffusion_3(tmp_path_factory) -> Path:
    """A Stable-Diffusion-3-type model, with T5, in diffusers' folder format."""
    folder = tmp_path_factory.mktemp("stable-diffusion-3")
    tokenizers = text_tokenizers("tokenizer", "tokenizer_2", "tokenizer_3")
    StableDiffusion3Pipeline(**stable_diffusion_3_parts(), **tokenizers).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def language_model(tmp_path_factory) -> Path:
    """A causal language model with its tokenizer."""
    folder = tmp_path_factory.mktemp("language-model")
    torch.manual_seed(2)
    Qwen2ForCausalLM(language_model_config()).save_pretrained(folder)
    build_tokenizer(for_text_encoder=False).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def stage1_checkpoint(tmp_path_factory, image_processor) -> Path:
    """An untrained encoder with its image processor."""
    folder = tmp_path_factory.mktemp("stage1")
    torch.manual_seed(3)
    with_text_encoder(VLVModel(vlv_config())).save_pretrained(folder)
    image_processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory, images) -> Path:
    """Sixteen images with captions as sidecars, in two folders."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(16):
        target = folder / ("a" if number % 2 else "b") / f"{number}.png"
        target.parent.mkdir(exist_ok=True)
        images[number % len(images)].rotate(90 * number).save(target)
        caption = "a small dog" if number % 2 else "a large apple at the top left"
        target.with_suffix(".txt").write_text(caption + "\n")
    return folder


@pytest.fixture(scope="session")
def golden() -> dict[str, torch.Tensor]:
    """The values that the authors' code computed (tests/golden/README.md)."""
    return load_file(GOLDEN / "golden.safetensors")


@pytest.fixture(scope="session")
def golden_metadata() -> dict:
    return json.loads((GOLDEN / "golden.json").read_text())


@pytest.fixture(scope="session")
def converted(tmp_path_factory) -> Path:
    """The authors' two checkpoints, converted."""
    folder = tmp_path_factory.mktemp("converted") / "vlv"
    parts = GOLDEN / "components"
    convert(
        folder,
        stage1=GOLDEN / "stage1",
        stage2=GOLDEN / "stage2",
        stable_diffusion=parts / "stable-diffusion",
        florence=parts / "Florence2large",
        language_model=parts / "qwen",
    )
    return folder
