"""The paper's system at full size on a GPU: speed, FLOPs utilisation and memory, one measure after the other.

    python benchmarks/gpu.py --output benchmarks/gpu.md        # a CUDA machine; also writes gpu.json
    python benchmarks/gpu.py --size small                      # the miniature's shapes, also on a CPU, in seconds
    python benchmarks/gpu.py --parts inference --output ...    # a part; the others stay as the file has them

Florence-2-large, Stable Diffusion 2.1 and Qwen2.5-3B with random weights (their values change neither speed nor
memory). Training steps run in the trainers of `vlv train`, each row with the settings of the rows above it; a row that
runs out of memory, or whose optimiser is not installed, says so, and the next one starts without its settings. Batches
lie in memory: reading images is not measured. The clock reads the device before the first and after the last step.
"""

import argparse
import dataclasses
import gc
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers import TrainerCallback
from transformers.initialization import no_init_weights

from vlv import VLVConfig, VLVForConditionalGeneration, VLVImageProcessor, VLVModel, reference_configs
from vlv.checkpoints import MINIATURE
from vlv.diffusion_decoder import StableDiffusionDecoder
from vlv.miniature.tokenizer import build_tokenizer
from vlv.pipelines import VLVReconstructionPipeline
from vlv.train import (
    Stage1Config,
    Stage1Trainer,
    Stage2Config,
    Stage2Trainer,
    freeze_for_stage1,
    freeze_for_stage2,
)
from vlv.train.estimate import count_training_step
from vlv.train.hardware import TERA, gpu_of_device

Row = dict[str, Any]
LADDERS: dict[int, list[Row]] = {
    1: [
        {"name": "float32", "settings": {"optim": "adamw_torch", "diffusion_gradient_checkpointing": True}},
        {"name": "bfloat16 autocast, float32 master weights", "settings": {"bf16": True}},
        {"name": "fused AdamW", "settings": {"optim": "adamw_torch_fused"}},
        {"name": "channels-last denoiser", "settings": {"channels_last": True}},
        {"name": "autoencoder in bfloat16", "settings": {"vae_dtype": "bfloat16"}},
        {"name": "no recomputation in the denoiser", "settings": {"diffusion_gradient_checkpointing": False}},
        {"name": "recomputation in the encoder", "settings": {"encoder_activation_checkpointing": True}},
        {"name": "compiled blocks", "settings": {"compile_blocks": True, "encoder_activation_checkpointing": False}},
        {"name": "8-bit AdamW", "settings": {"optim": "adamw_torch_8bit"}},
    ],
    2: [
        {"name": "bfloat16 autocast, float32 master weights", "settings": {"optim": "adamw_torch", "bf16": True}},
        {"name": "fused AdamW", "settings": {"optim": "adamw_torch_fused"}},
        {"name": "recomputation in the encoder", "settings": {"encoder_activation_checkpointing": True}},
        {"name": "recomputation in the language model", "settings": {"language_model_activation_checkpointing": True}},
        {"name": "8-bit AdamW", "settings": {"optim": "adamw_torch_8bit"}},
        {"name": "LoRA of rank 64", "settings": {"lora_rank": 64}},
        {"name": "compiled blocks", "settings": {"compile_blocks": True}},
    ],
}
"""The measures in their order, by stage. Settings are those of `Stage1Config` and `Stage2Config`."""

PARTS = ("stage 1", "stage 2", "inference")
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}


@dataclasses.dataclass
class Size:
    """What is measured: shapes and batches."""

    encoder: VLVConfig
    captioner: VLVConfig
    diffusion_parts: Callable[[], dict[str, Any]]
    encoder_pixels: int
    diffusion_pixels: int
    batches: dict[int, int]
    caption_tokens: int
    inference_batch: int
    inference_steps: int
    count_as: dict[int, dict[str, Any]]


def full_size() -> Size:
    return Size(
        encoder=reference_configs.vlv_config(language_model=None),
        captioner=reference_configs.vlv_config(),
        diffusion_parts=lambda: reference_configs.diffusion_components("meta"),
        encoder_pixels=768,
        diffusion_pixels=384,
        batches={1: 32, 2: 4},
        caption_tokens=300,
        inference_batch=16,
        inference_steps=30,
        count_as={1: {}, 2: {"model": "florence-community/Florence-2-large"}},
    )


def small_size() -> Size:
    """The miniature's shapes."""
    captioner = VLVConfig.from_pretrained(MINIATURE)
    encoder = VLVConfig.from_pretrained(MINIATURE)
    encoder.text_config = None

    def parts() -> dict[str, Any]:
        with torch.device("meta"):
            return {
                name: part.from_config(part.load_config(MINIATURE, subfolder=name))
                for name, part in (("unet", UNet2DConditionModel), ("vae", AutoencoderKL))
            }

    model = str(MINIATURE)
    return Size(
        encoder,
        captioner,
        parts,
        encoder_pixels=64,
        diffusion_pixels=64,
        batches={1: 2, 2: 2},
        caption_tokens=16,
        inference_batch=2,
        inference_steps=2,
        count_as={1: {"model": model, "diffusion_model": model}, 2: {"model": model}},
    )


SIZES = {"full": full_size, "small": small_size}


def random_weights(build: Callable[[], nn.Module], device: str, dtype: torch.dtype) -> Any:
    """A model with weights of a standard deviation of 0.02, made on the device itself."""
    with no_init_weights(), torch.device("meta"):
        model = build()
    model.to(dtype)
    buffers = {name for name, _ in model.named_buffers()}
    if buffers:  # computed from the configuration, such as rotary frequencies: not to be random
        with no_init_weights(), torch.device(device):
            real = build()
        model = real.to(dtype)
    else:
        model.to_empty(device=device)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(std=0.02)
    return model


def diffusion_decoder(size: Size, device: str, dtype: torch.dtype, **kwargs: Any) -> StableDiffusionDecoder:
    parts = {
        name: random_weights(lambda part=part: type(part).from_config(part.config), device, dtype)
        for name, part in size.diffusion_parts().items()
    }
    return StableDiffusionDecoder(parts["vae"], parts["unet"], SCHEDULE, **kwargs)


class Clock(TrainerCallback):
    """Seconds of the steps after the first `skipped` ones. Nothing waits for the device in between."""

    def __init__(self, skipped: int, device: str):
        self.skipped, self.device = skipped, device

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.skipped:
            self.started = _now(self.device)

    def on_train_end(self, args, state, control, **kwargs):
        self.seconds = (_now(self.device) - self.started) / (state.global_step - self.skipped)


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def build_config(stage: int, size: Size, settings: dict[str, Any], device: str, folder: str, steps: int) -> Any:
    """Raises `TypeError` for a setting that does not exist, `ValueError` for one that does not work here."""
    common = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": size.batches[stage],
        "dataloader_num_workers": 0,
        "validation_steps": 0,
        "logging_steps": steps + 1,
        "logging_nan_inf_filter": False,  # it reads the loss in every step
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": device == "cpu",
        **size.count_as[stage],
        **settings,
    }
    if stage == 1:
        return Stage1Config(**common)
    return Stage2Config(max_caption_tokens=size.caption_tokens, **common)


def build_trainer(stage: int, size: Size, config: Any, device: str) -> Any:
    batch = size.batches[stage]
    pixel_values = torch.rand(batch, 3, size.encoder_pixels, size.encoder_pixels)
    inputs: dict[str, Any] = {"pixel_values": pixel_values}
    data = [{}] * (batch * (config.max_steps + 1))
    if stage == 1:
        model = random_weights(lambda: VLVModel(size.encoder), device, torch.float32)
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        decoder = diffusion_decoder(size, device, dtype, vae_dtype=getattr(torch, config.vae_dtype))
        freeze_for_stage1(model, config.trainable)
        side = size.diffusion_pixels
        inputs["diffusion_pixels"] = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8)
        processor = VLVImageProcessor(size={"height": size.encoder_pixels, "width": size.encoder_pixels})
        trainer: Any = Stage1Trainer(model, decoder, config, data, processor)
    else:
        from vlv import VLVProcessor
        from vlv.train.lora import add_lora

        model = random_weights(lambda: VLVForConditionalGeneration(size.captioner), device, torch.float32)
        freeze_for_stage2(model, config.trainable)
        if config.lora_rank:
            add_lora(model, config.lora_rank)
        inputs["labels"] = torch.randint(4, 50, (batch, size.caption_tokens))
        tokenizer = build_tokenizer(for_text_encoder=False)  # of few words: batches have token ids, not words
        for config_of_end in (model.language_model.config, model.language_model.generation_config):
            config_of_end.eos_token_id = tokenizer.eos_token_id
        processor = VLVProcessor(VLVImageProcessor(), tokenizer)
        trainer = Stage2Trainer(model, config, data, processor)
    trainer.data_collator = lambda items: dict(inputs)
    return trainer


def measure_training(stage: int, size: Size, settings: dict[str, Any], device: str, steps: int) -> Row:
    """Images a second, seconds a step, and peak memory in GB of one row."""
    with tempfile.TemporaryDirectory() as folder:
        skipped = 3 if device == "cuda" else 1
        config = build_config(stage, size, settings, device, folder, steps + skipped)
        trainer = build_trainer(stage, size, config, device)
        clock = Clock(skipped, device)
        trainer.add_callback(clock)
        trainer.train()
    return {"images_per_second": size.batches[stage] / clock.seconds, "seconds": clock.seconds}


TRAINED = ("trainable", "lora_rank")
"""Settings that decide which backward passes there are."""


def model_flops(stage: int, size: Size, trained: Row) -> int:
    """FLOPs of a step without recomputation, so that recomputing does not count as work.

    Args:
        trained: The settings `TRAINED` of the step.
    """
    settings = {"diffusion_gradient_checkpointing": False, **trained} if stage == 1 else trained
    with tempfile.TemporaryDirectory() as folder:
        config = build_config(stage, size, settings, "cpu", folder, 1)
        return count_training_step(config).count.total()


def guarded(run: Callable[[], Row], device: str) -> Row:
    """What `run` returns with the peak memory, or why there is nothing."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        row = run()
    except torch.OutOfMemoryError:
        return {"problem": "out of memory"}
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        return {"problem": str(error).strip().partition("\n")[0][:150]}
    if device == "cuda":
        row["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def climb(stage: int, size: Size, device: str, steps: int, ladder: list[Row] | None = None) -> Iterator[Row]:
    """The rows of a ladder. A row keeps the settings of those before it that worked."""
    peak = peak_of(device)
    flops: dict[str, int] = {}
    settings: dict[str, Any] = {}
    for step in LADDERS[stage] if ladder is None else ladder:
        tried = {**settings, **step["settings"]}
        row = guarded(lambda tried=tried: measure_training(stage, size, tried, device, steps), device)
        if "problem" not in row:
            settings = tried
            trained = {name: value for name, value in tried.items() if name in TRAINED}
            if str(trained) not in flops:
                flops[str(trained)] = model_flops(stage, size, trained)
            row["tflops"] = flops[str(trained)] / row["seconds"] / TERA
            row["utilization"] = None if peak is None else row["tflops"] * TERA / peak
        row = {"name": step["name"], "settings": step["settings"], **row}
        print(f"stage {stage}: {row}", flush=True)
        yield row


def peak_of(device: str) -> float | None:
    """The card's peak in bfloat16, in FLOP/s, if the card is known."""
    if device != "cuda":
        return None
    gpu = gpu_of_device(torch.cuda.get_device_name())
    return None if gpu is None else gpu.bf16 * TERA


def measure_caption(size: Size, device: str) -> Row:
    model = random_weights(lambda: VLVForConditionalGeneration(size.captioner), device, torch.bfloat16).eval()
    shape = (size.inference_batch, 3, size.encoder_pixels, size.encoder_pixels)
    pixels = torch.rand(shape, device=device, dtype=torch.bfloat16)
    lengths = {"max_new_tokens": size.caption_tokens, "min_new_tokens": size.caption_tokens}

    def run() -> None:
        model.generate(pixels, do_sample=False, **lengths)

    seconds = timed(run, device)
    images = size.inference_batch / seconds
    return {"images_per_second": images, "tokens_per_second": images * size.caption_tokens, "seconds": seconds}


def measure_reconstruction(size: Size, device: str) -> Row:
    model = random_weights(lambda: VLVModel(size.encoder), device, torch.bfloat16).eval()
    decoder = diffusion_decoder(size, device, torch.bfloat16)
    tokenizer = build_tokenizer(for_text_encoder=True)
    tokenizer.model_max_length = size.encoder.text_encoder_config.max_position_embeddings
    pipeline = VLVReconstructionPipeline(
        encoder=model,
        vae=decoder.vae,
        unet=decoder.unet,
        scheduler=DDPMScheduler(**SCHEDULE),
        image_processor=VLVImageProcessor(size={"height": size.encoder_pixels, "width": size.encoder_pixels}),
        tokenizer=tokenizer,
    )
    pipeline.set_progress_bar_config(disable=True)
    width = size.encoder.text_encoder_config.hidden_size
    embeds = torch.randn(size.inference_batch, size.encoder.num_query_tokens, width, device=device)

    def run() -> None:
        side = size.diffusion_pixels
        pipeline(
            caption_embeds=embeds, height=side, width=side, num_inference_steps=size.inference_steps, output_type="pt"
        )

    seconds = timed(run, device)
    return {"images_per_second": size.inference_batch / seconds, "seconds": seconds}


def timed(run: Callable[[], None], device: str, repeats: int = 2) -> float:
    run()
    started = _now(device)
    for _ in range(repeats):
        run()
    return (_now(device) - started) / repeats


def machine(device: str) -> dict[str, str]:
    found = {"device": platform.machine() + " CPU", "torch": torch.__version__}
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True).stdout.split()
        found |= {"device": torch.cuda.get_device_name(), "driver": driver[0] if driver else "unknown"}
        found["cuda"] = str(torch.version.cuda)
    return found


def measure(
    size_name: str, device: str, steps: int, parts: Sequence[str] = PARTS, known: dict[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """What is measured so far, as JSON values, after each measurement.

    Args:
        parts: Of `PARTS`.
        known: An earlier result, which keeps the parts that are not measured.

    Raises:
        ValueError: If the earlier result is of another machine or size.
    """
    size = SIZES[size_name]()
    found: dict[str, Any] = {
        "machine": machine(device),
        "size": size_name,
        "batches": {"stage 1": size.batches[1], "stage 2": size.batches[2], "inference": size.inference_batch},
        "caption_tokens": size.caption_tokens,
        "inference_steps": size.inference_steps,
    }
    if known is not None and (other := [name for name, value in found.items() if known[name] != value]):
        raise ValueError(
            f"the earlier result has another {' and '.join(other)}; delete it, or choose another --output"
        )
    found |= {name: dict((known or {}).get(name, {})) for name in ("training", "inference")}
    for stage in (1, 2):
        if f"stage {stage}" in parts:
            rows = found["training"][f"stage {stage}"] = []
            for row in climb(stage, size, device, steps):
                rows.append(row)
                yield found
    if "inference" in parts:
        for name, task in (("caption", measure_caption), ("reconstruction", measure_reconstruction)):
            found["inference"][name] = guarded(lambda task=task: task(size, device), device)
            yield found


def as_markdown(found: dict[str, Any]) -> str:
    named = ", ".join(f"{name} {value}" if name != "device" else value for name, value in found["machine"].items())
    full = found["size"] == "full"
    models = "Florence-2-large, Stable Diffusion 2.1, Qwen2.5-3B" if full else "The miniature's shapes"
    lines = [
        "# The system on a GPU" if full else "# The system at small size",
        "",
        f"{named}. {models}; random weights; batches in memory. Printed by `python benchmarks/gpu.py --size "
        f"{found['size']} --output FILE`.",
        "Each row has the settings of those above it that worked. FLOPs are the model's, without recomputation. Their",
        "share is of the card's peak in bfloat16.",
    ]
    for stage, rows in sorted(found["training"].items()):
        batch = found["batches"][stage]
        lines += ["", f"## Training, {stage}, {batch} images a step", ""]
        lines += ["| measure | images/s | TFLOP/s | of the peak | peak memory, GB |", "|---|---|---|---|---|"]
        for row in rows:
            if "problem" in row:
                lines.append(f"| {row['name']} | {row['problem']} | | | |")
                continue
            share = "" if row["utilization"] is None else f"{row['utilization']:.0%}"
            lines.append(
                f"| {row['name']} | {row['images_per_second']:.1f} | {row['tflops']:.3g} | {share} | {_memory(row)} |"
            )
    if found["inference"]:
        lines += ["", f"## Inference, bfloat16, {found['batches']['inference']} images at a time", ""]
        lines += ["| task | images/s | tokens/s | peak memory, GB |", "|---|---|---|---|"]
    tasks = {
        "caption": f"caption of {found['caption_tokens']} tokens, greedy",
        "reconstruction": f"reconstruction, {found['inference_steps']} steps, guidance 2",
    }
    for name, task in tasks.items():
        row = found["inference"].get(name)
        if row is None:
            continue
        if "problem" in row:
            lines.append(f"| {task} | {row['problem']} | | |")
            continue
        tokens = f"{row['tokens_per_second']:.0f}" if "tokens_per_second" in row else ""
        lines.append(f"| {task} | {row['images_per_second']:.2f} | {tokens} | {_memory(row)} |")
    return "\n".join(lines) + "\n"


def _memory(row: Row) -> str:
    return f"{row['memory_gb']:.1f}" if "memory_gb" in row else ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, help="write the tables here after each row, the figures beside as .json"
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="default: full")
    parser.add_argument("--steps", type=int, default=10, help="measured steps of a row (default: 10)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure (default: all)")
    options = parser.parse_args(arguments)
    diffusers_logging.set_verbosity_error()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.size == "full" and device == "cpu":
        parser.error("the full size needs a CUDA device; --size small runs everywhere")
    figures = options.output and options.output.with_suffix(".json")
    known = None
    if figures and figures.exists() and set(options.parts) != set(PARTS):
        known = json.loads(figures.read_text())
    text = ""
    for found in measure(options.size, device, options.steps, options.parts, known):
        text = as_markdown(found)
        if figures:
            options.output.write_text(text, encoding="utf-8")
            figures.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
