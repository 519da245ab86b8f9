"""The paper's system at full size on this machine's CPU: does it run, how long, and in how much memory?

    python benchmarks/full_size.py --output benchmarks/full_size.md

Florence-2-large, Stable Diffusion 2.1 and Qwen2.5-3B in bfloat16 with random weights (their values change neither time
nor memory). Each task runs in a process of its own, so that its peak memory is its own. Needs 16 GiB of
memory and no GPU.
"""

import argparse
import atexit
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from diffusers import DDPMScheduler
from PIL import Image
from transformers.initialization import no_init_weights

from vlv import VLVForConditionalGeneration, VLVImageProcessor, VLVModel, reference_configs
from vlv.diffusion_decoder import StableDiffusionDecoder
from vlv.hub import convert
from vlv.train import freeze_for_stage1

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
SIZE = 384
GOLDEN = Path(__file__).parent.parent / "tests" / "golden"


def random_model(model_class, config):
    torch.set_default_dtype(torch.bfloat16)
    with no_init_weights():
        model = model_class(config)
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(std=0.02)
    return model.eval()


def image() -> Image.Image:
    return Image.effect_noise((512, 384), 64).convert("RGB")


def pixels() -> torch.Tensor:
    processor = VLVImageProcessor(pre_crop_size=SIZE)
    return processor(image(), return_tensors="pt").pixel_values.bfloat16()


def diffusion_decoder() -> StableDiffusionDecoder:
    parts = reference_configs.diffusion_components("cpu", torch.bfloat16)
    return StableDiffusionDecoder(parts["vae"], parts["unet"], DDPMScheduler(**SCHEDULE).config)


def caption() -> Callable[[], str]:
    model = random_model(VLVForConditionalGeneration, reference_configs.vlv_config())
    pixel_values = pixels()

    def run() -> str:
        ids = model.generate(pixel_values, max_new_tokens=16, min_new_tokens=16, do_sample=False)
        return f"{ids.shape[1]} tokens"

    return run


def stage1() -> Callable[[], str]:
    model = random_model(VLVModel, reference_configs.vlv_config(language_model=None))
    freeze_for_stage1(model, "transformer")
    decoder, pixel_values = diffusion_decoder(), pixels()
    clean = torch.rand(1, 3, SIZE, SIZE, dtype=torch.float32) * 2 - 1

    def run() -> str:
        latents = decoder.encode_images(clean)
        loss = decoder.denoising_loss(latents, model(pixel_values=pixel_values).conditioning)
        loss.backward()
        trainable = [p for p in model.parameters() if p.requires_grad]
        with_gradient = sum(p.numel() for p in trainable if p.grad is not None)
        return (
            f"loss {loss.item():.3f}, gradients of {with_gradient:,} of {sum(p.numel() for p in trainable):,} weights"
        )

    return run


@torch.no_grad()
def reconstruction() -> Callable[[], str]:
    model = random_model(VLVModel, reference_configs.vlv_config(language_model=None))
    decoder, pixel_values = diffusion_decoder(), pixels()

    @torch.no_grad()
    def run() -> str:
        prompt_embeds = model(pixel_values=pixel_values).conditioning
        negative_prompt_embeds = model(input_ids=torch.zeros(1, 77, dtype=torch.long)).conditioning
        embeds = torch.cat([negative_prompt_embeds, prompt_embeds])
        latents = torch.randn(1, 4, SIZE // 8, SIZE // 8)
        decoder.scheduler.set_timesteps(2)
        for timestep in decoder.scheduler.timesteps:
            noise_pred = decoder.unet(torch.cat([latents] * 2).bfloat16(), timestep, embeds).sample.float()
            noise_pred_uncond, noise_pred_text = noise_pred.chunk(2)
            noise_pred = noise_pred_uncond + 2.0 * (noise_pred_text - noise_pred_uncond)
            latents = decoder.scheduler.step(noise_pred, timestep, latents).prev_sample
        image = decoder.vae.decode(latents.float() / decoder.vae.config.scaling_factor).sample
        return f"{image.shape[-1]} x {image.shape[-2]} pixels"

    return run


def conversion() -> Callable[[], str]:
    """Of a stage-1 checkpoint of random weights in the authors' format, made by another process."""
    folder = Path(tempfile.mkdtemp(prefix="vlv-full-size-"))
    atexit.register(shutil.rmtree, folder)
    subprocess.run([sys.executable, __file__, "--write-checkpoint", str(folder)], check=True)
    size = (folder / "pytorch_model.bin").stat().st_size

    def run() -> str:
        parts = {name: folder / name for name in ("stable_diffusion", "florence")}
        convert(folder / "vlv", stage1=folder / "pytorch_model.bin", **parts)
        written = sum(path.stat().st_size for path in (folder / "vlv").rglob("*") if path.is_file())
        return f"{size / 1e9:.2f} GB read, {written / 1e9:.2f} GB written"

    return run


def write_checkpoint(folder: Path) -> None:
    """`pytorch_model.bin` with the names and shapes of the authors' stage 1, and the folders that go with it."""
    shapes = json.loads((GOLDEN / "reference" / "stage1_shapes.json").read_text())
    weights = {name: torch.rand(shape) for name, shape in shapes.items()}
    inner = "model.language_model.model."
    for part in ("encoder", "decoder"):
        weights[f"{inner}{part}.embed_tokens.weight"] = weights[f"{inner}shared.weight"]
    torch.save(weights, folder / "pytorch_model.bin")
    reference_configs.florence_config().save_pretrained(folder / "florence")
    sd = folder / "stable_diffusion"
    shutil.copytree(GOLDEN / "original-a" / "components" / "stable-diffusion", sd)
    reference_configs.text_encoder_config().save_pretrained(sd / "text_encoder")
    for name, part in reference_configs.diffusion_components("meta").items():
        part.save_config(sd / name)


TASKS = {
    "caption of one image, 16 tokens": caption,
    "stage-1 loss and backward, batch 1": stage1,
    "reconstruction, 2 steps, guidance 2": reconstruction,
    "`vlv convert --stage1`, float32": conversion,
}


def measure(task: str) -> dict:
    started = perf_counter()
    run = TASKS[task]()
    built = perf_counter()
    result = run()
    done = perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts kilobytes
    return {"building": built - started, "seconds": done - built, "gib": peak, "result": result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the report here, too")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    parser.add_argument("--write-checkpoint", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write_checkpoint:
        write_checkpoint(options.write_checkpoint)
        return
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if options.task:
        print(json.dumps(measure(options.task)))
        return
    lines = [
        "# The paper's system at full size",
        "",
        "Florence-2-large, Stable Diffusion 2.1-base at 384 x 384, Qwen2.5-3B; bfloat16 (the autoencoder float32),",
        f"random weights; torch {torch.__version__}, {platform.machine()}, {options.threads} threads, no GPU.",
        "Printed by `python benchmarks/full_size.py --output benchmarks/full_size.md`; each task has a process of its",
        "own. Seconds are of the task alone, with the model built; peak memory includes the building.",
        "",
        "| task | seconds | peak memory, GiB | what came out |",
        "|---|---|---|---|",
    ]
    for task in TASKS:
        command = [sys.executable, __file__, "--task", task, "--threads", str(options.threads)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        lines.append(f"| {task} | {found['seconds']:.0f} | {found['gib']:.1f} | {found['result']} |")
        print(lines[-1], f"(building: {found['building']:.0f} s)", flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
