"""On a GPU, everything gives what it gives on the CPU, and the settings that only a GPU has work.

Skipped where PyTorch finds no GPU. cuDNN may compute convolutions in TF32, so they differ by about 1e-3.
"""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import pipeline

from vlv import hub
from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.diffusion_decoder import Conditioning, family_of
from vlv.miniature.grammar import parse_caption
from vlv.train import stage1, stage2

from .train.two_processes import losses

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no CUDA GPU"),
    pytest.mark.slow,
]
EXAMPLES = Path(__file__).parents[1] / "examples" / "images"
IMAGE = min(EXAMPLES.glob("*.png"))
DTYPES = ("float32", "bfloat16", "float16")


def captions(folder: Path, *options: str) -> list[str]:
    output = folder / "captions.json"
    assert main(["caption", str(EXAMPLES), "--output", str(output), "--overwrite", *options]) == 0
    return list(json.loads(output.read_text()).values())


@pytest.fixture(scope="module")
def captions_of_the_cpu(tmp_path_factory) -> list[str]:
    return captions(tmp_path_factory.mktemp("cpu"), "--device", "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_captions_are_those_of_the_cpu(tmp_path, captions_of_the_cpu, dtype):
    """In half precision, in other words for some images, but of the same scene for all but one."""
    found = captions(tmp_path, "--device", "cuda", "--dtype", dtype)
    if dtype == "float32":
        assert found == captions_of_the_cpu
    assert differing_scenes(found, captions_of_the_cpu) <= 1


def differing_scenes(captions: list[str], expected: list[str]) -> int:
    return sum(parse_caption(own) != parse_caption(other) for own, other in zip(captions, expected, strict=True))


@pytest.mark.parametrize("options", [["--num-workers", "1"], ["--static-cache"], ["--compile"]])
def test_options_of_speed_leave_the_captions_as_they_are(tmp_path, captions_of_the_cpu, options):
    """Images are prefetched into pinned memory; compiled models round in another way, so one caption may differ."""
    (tmp_path / "plain").mkdir()
    expected = captions(tmp_path / "plain", "--device", "cuda")
    found = captions(tmp_path, "--device", "cuda", *options)
    differing = sum(own != other for own, other in zip(found, expected, strict=True))
    assert differing <= ("--compile" in options)


def test_the_pipelines_of_both_libraries_work_on_a_gpu(captions_of_the_cpu):
    captioner = pipeline("image-to-text", str(MINIATURE), trust_remote_code=True, device="cuda")
    assert captioner(str(IMAGE))[0]["generated_text"] == captions_of_the_cpu[0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_reconstructions_are_those_of_the_cpu(dtype):
    """Noise is drawn on the CPU, so that it is the same."""
    image = Image.open(IMAGE)
    found = {}
    for device in ("cpu", "cuda"):
        precision = getattr(torch, dtype) if device == "cuda" else torch.float32
        pipe = DiffusionPipeline.from_pretrained(str(MINIATURE), trust_remote_code=True, torch_dtype=precision)
        pipe.to(device).set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe(image, num_inference_steps=20, generator=generator, output_type="pt").images
        found[device] = images.float().cpu()
    assert (found["cuda"] - found["cpu"]).abs().mean() < (0.01 if dtype == "float32" else 0.06)


def test_offloading_moves_every_part_to_the_gpu_and_back():
    pipe = DiffusionPipeline.from_pretrained(str(MINIATURE), trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    pipe.enable_model_cpu_offload()
    images = pipe(Image.open(IMAGE), num_inference_steps=2, output_type="pt").images
    assert images.isfinite().all()
    assert pipe.unet.device.type == "cpu"


@pytest.mark.parametrize("model", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3"])
def test_the_loss_of_each_family_and_its_gradient_are_those_of_the_cpu(request, model):
    folder = str(request.getfixturevalue(model))
    family = family_of(folder)
    encoders = family.load_text_encoders(folder)
    width = sum(encoder.config.hidden_size for encoder in encoders)
    random = torch.Generator().manual_seed(0)
    found = {}
    states = torch.randn(3, 8, width, generator=random)
    pooled = None
    if family.pooled_conditioning:
        names = [encoders[number] for number in family.pooled_conditioning]
        pooled = torch.randn(3, sum(encoder.config.projection_dim for encoder in names), generator=random)
    pixels = torch.rand(3, 3, 32, 32, generator=random) * 2 - 1
    for device in ("cpu", "cuda"):
        decoder = family.from_pretrained(folder).to(device)
        latents = decoder.sample_latents(decoder.encode_moments(pixels.to(device)).cpu(), random.manual_seed(1))
        noise = torch.randn(latents.shape, generator=random.manual_seed(2))
        own = states.clone().to(device).requires_grad_()
        conditioning = Conditioning(own, None if pooled is None else pooled.to(device))
        loss = decoder.denoising_loss(latents.to(device), conditioning, noise.to(device), torch.tensor([5, 400, 900]))
        loss.backward()
        found[device] = (loss.detach().cpu(), own.grad.cpu())
    (loss, gradient), (loss_of_cpu, gradient_of_cpu) = found["cuda"], found["cpu"]
    torch.testing.assert_close(loss, loss_of_cpu, rtol=1e-2, atol=0)
    assert (gradient - gradient_of_cpu).norm() < 0.05 * gradient_of_cpu.norm()


COMMON = {
    "max_steps": 4,
    "save_steps": 2,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "dataloader_num_workers": 0,
    "disable_tqdm": True,
}


@pytest.fixture(scope="module")
def settings(stage1_checkpoint, stable_diffusion, language_model, image_folder) -> dict:
    common = COMMON | {"model": stage1_checkpoint, "validation_steps": 0, "trainable": "all"}
    own = {"diffusion_model": stable_diffusion, "images": image_folder, "noise_by_sample": True}
    pairs = {"language_model": language_model, "pairs": image_folder, "trainable": "all+vision"}
    return {1: common | own, 2: common | pairs}


def train(settings: dict, stage: int, output: Path, **changes):
    arguments = [f"--{name}={value}" for name, value in (settings[stage] | changes).items()]
    return (stage1 if stage == 1 else stage2).main([*arguments, f"--output_dir={output}"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> dict[int, Path]:
    """Folders of a training of each stage on the GPU."""
    return {stage: tmp_path_factory.mktemp(f"stage{stage}") for stage in (1, 2)}


@pytest.fixture(scope="module")
def losses_of_the_gpu(settings, unbroken) -> dict[int, list[float]]:
    return {stage: losses(train(settings, stage, folder)) for stage, folder in unbroken.items()}


@pytest.mark.parametrize("stage", [1, 2])
def test_training_has_the_losses_of_the_cpu(tmp_path, settings, losses_of_the_gpu, stage):
    """As far as dropout, which each device draws in its own way, lets them."""
    cpu = losses(train(settings, stage, tmp_path, use_cpu=True))
    assert losses_of_the_gpu[stage] == pytest.approx(cpu, rel=0.1)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_resumed_training_repeats_the_unbroken_one(tmp_path, settings, unbroken, losses_of_the_gpu, stage):
    shutil.copytree(unbroken[stage] / "checkpoint-2", tmp_path / "checkpoint-2")
    resumed = losses(train(settings, stage, tmp_path))
    assert resumed == pytest.approx(losses_of_the_gpu[stage], rel=1e-2)


LADDER = {
    "autocast": {"bf16": True},
    "half precision": {"fp16": True},
    "fused": {"bf16": True, "optim": "adamw_torch_fused"},
    "recomputation": {"bf16": True, "encoder_activation_checkpointing": True},
    "compiled": {"bf16": True, "compile_blocks": True},
    "8-bit optimiser": {"bf16": True, "optim": "adamw_torch_8bit"},
    "workers": {"bf16": True, "dataloader_num_workers": 2},
    "averaged": {"bf16": True, "ema_decay": 0.9},
}
OF_STAGE_1 = {
    "denoiser": {"bf16": True, "channels_last": True, "vae_dtype": "bfloat16"},
    "denoiser recomputed": {"bf16": True, "diffusion_gradient_checkpointing": True},
    "validation": {"bf16": True, "validation_steps": 2, "num_validation_images": 2},
}
OF_STAGE_2 = {
    "LoRA": {"bf16": True, "lora_rank": 2, "trainable": "projector+lm"},
    "validation": {"bf16": True, "validation_steps": 2, "num_validation_images": 2},
}
CASES = [(stage, name) for stage, own in ((1, OF_STAGE_1), (2, OF_STAGE_2)) for name in (*LADDER, *own)]


@pytest.mark.parametrize(("stage", "name"), CASES, ids=[f"stage {stage}: {name}" for stage, name in CASES])
def test_each_setting_of_speed_and_memory_trains_as_float32_does(
    tmp_path, settings, losses_of_the_gpu, stage1_checkpoint, stage, name
):
    chosen = (LADDER | (OF_STAGE_1 if stage == 1 else OF_STAGE_2))[name]
    if "8bit" in chosen.get("optim", ""):
        pytest.importorskip("torchao", reason="adamw_torch_8bit needs torchao")
    trainer = train(settings, stage, tmp_path, **chosen)
    assert trainer.args.device.type == "cuda"
    start = load_file(stage1_checkpoint / "model.safetensors")
    trained = {n: p.detach().float().cpu() for n, p in trainer.model.named_parameters() if p.requires_grad}
    encoder = {n.removeprefix("model."): p for n, p in trained.items() if n.removeprefix("model.") in start}
    assert encoder or chosen.get("lora_rank")
    assert all(not torch.equal(p, start[n]) for n, p in encoder.items() if "query_tokens" in n)
    found = losses(trainer)
    assert len(found) == COMMON["max_steps"] and all(math.isfinite(loss) for loss in found)
    # The loss scaling of float16 leaves out the first updates, and LoRA trains other weights.
    compared = 1 if chosen.get("fp16") or chosen.get("lora_rank") else None
    assert found[:compared] == pytest.approx(losses_of_the_gpu[stage][:compared], rel=0.25)


@pytest.mark.parametrize("stage", [1, 2])
def test_cached_moments_and_features_train_as_pixels_do(tmp_path, settings, losses_of_the_gpu, stage):
    caches = {"cache_vision_features": tmp_path / "features", "trainable": "transformer" if stage == 1 else "all"}
    if stage == 1:
        caches["cache_moments"] = tmp_path / "moments"
    plain = {"trainable": caches["trainable"]}
    expected = losses(train(settings, stage, tmp_path / "plain", **plain))
    assert losses(train(settings, stage, tmp_path / "cached", **caches)) == pytest.approx(expected, rel=0.1)


def test_a_model_trained_on_a_gpu_is_used_on_the_cpu(tmp_path, settings):
    train(settings, 2, tmp_path, bf16=True)
    model, _ = hub.load_captioner(tmp_path)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
