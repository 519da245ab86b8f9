"""Training steps of both stages on this machine's CPU: throughput, time outside the model, and the estimate beside it.

    python benchmarks/training.py --output benchmarks/training.md

Two sizes: the embedded miniature, and a `medium` model of random weights whose layers are large enough for their FLOPs
to decide the time. The trainers are those of `vlv train`, with image files as data. Each process computes on one
thread. Shares and step times are CPU time of the training process, which other programs on the machine change little;
images a second are wall-clock time of the fastest step. The speed of the CPU is measured between the steps, on one
transformer layer and two convolution blocks, and the estimate uses it. It fails if an estimate of the medium model is
not within 25% of the measurement.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from PIL import Image
from transformers import BartConfig, CLIPTextConfig, Qwen2Config, TrainerCallback
from transformers.models.bart.modeling_bart import BartEncoderLayer

from vlv import VLVConfig, VLVForConditionalGeneration, VLVImageProcessor, VLVModel, VLVProcessor, hub
from vlv.checkpoints import MINIATURE
from vlv.diffusion_decoder import StableDiffusionDecoder, load_diffusion_decoder
from vlv.miniature.data import SceneDataset
from vlv.train import (
    Stage1Config,
    Stage1Trainer,
    Stage2Config,
    Stage2Trainer,
    freeze_for_stage1,
    freeze_for_stage2,
    load_images,
    load_pairs,
)
from vlv.train.caches import open_moments, open_vision_features
from vlv.train.counting import count_step
from vlv.train.estimate import count_training_step, speed_estimate

SIZES = ("miniature", "medium")
TOLERANCE = 0.25
WARM_UP = 2  # steps that are not measured
CACHES = {"1, cached moments": ("moments",), "1, cached moments and features": ("moments", "vision_features")}
STAGES = (1, *CACHES, 2)
SCHEDULE = DDPMScheduler(beta_schedule="scaled_linear", clip_sample=False)


def medium_config() -> VLVConfig:
    """An encoder and captioner for 128 x 128 pixels, about a tenth of the width and depth of the full size."""
    florence = {
        "vision_config": {
            "depths": (1, 1, 2, 1),
            "embed_dim": (64, 128, 256, 512),
            "num_heads": (2, 4, 8, 16),
            "num_groups": (2, 4, 8, 16),
            "window_size": 8,
            "projection_dim": 512,
            "drop_path_rate": 0.0,
        },
        "text_config": {
            "model_type": "bart",
            "vocab_size": 10,
            "d_model": 512,
            "encoder_layers": 3,
            "decoder_layers": 3,
            "encoder_attention_heads": 8,
            "decoder_attention_heads": 8,
            "encoder_ffn_dim": 2048,
            "decoder_ffn_dim": 2048,
            "max_position_embeddings": 128,
            "pad_token_id": 1,
            "bos_token_id": 0,
            "eos_token_id": 2,
            "decoder_start_token_id": 2,
        },
    }
    text_encoder = CLIPTextConfig(
        vocab_size=55,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=8,
        bos_token_id=2,
        eos_token_id=3,
    )
    language_model = Qwen2Config(
        vocab_size=8000,
        hidden_size=640,
        intermediate_size=2560,
        num_hidden_layers=4,
        num_attention_heads=10,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    return VLVConfig(
        image_encoder_config=florence,
        text_encoder_config=text_encoder,
        text_config=language_model,
        num_query_tokens=77,
        task_prompt_ids=[0, 5, 2],
    )


def medium_diffusion_parts() -> tuple[AutoencoderKL, UNet2DConditionModel]:
    vae = AutoencoderKL(
        block_out_channels=(64, 128, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        sample_size=128,
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(128, 256, 256),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=512,
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
    )
    return vae, unet


def write_inputs(folder: Path) -> None:
    """Image files with captions, and the configurations of the medium model."""
    data = SceneDataset(256, fields=("pixels", "caption"))
    (folder / "images").mkdir()
    for number in range(len(data)):
        item = data[number]
        path = folder / "images" / f"{number:03}.png"
        Image.fromarray(item["pixels"].permute(1, 2, 0).numpy()).resize((192, 192)).save(path)
        path.with_suffix(".txt").write_text(item["caption"])
    medium = folder / "medium"
    medium_config().save_pretrained(medium)
    VLVImageProcessor(size={"height": 128, "width": 128}, pre_crop_size=128).save_pretrained(medium)
    for name, part in zip(("vae", "unet"), medium_diffusion_parts(), strict=True):
        part.save_config(medium / name)
    SCHEDULE.save_config(medium / "scheduler")
    shutil.copy(MINIATURE / "model_index.json", medium)


def build_config(stage: int, size: str, folder: Path, workers: int, steps: int, cached: Sequence[str] = ()) -> Any:
    model = str(MINIATURE if size == "miniature" else folder / "medium")
    settings: dict[str, Any] = {
        "model": model,
        "output_dir": str(folder / "run"),
        "max_steps": steps,
        "per_device_train_batch_size": 64 if size == "miniature" else 4,
        "dataloader_num_workers": workers,
        "validation_steps": 0,
        "logging_steps": 10,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    settings |= {f"cache_{name}": str(folder / f"{name}-{size}") for name in cached}
    if stage == 1:
        return Stage1Config(diffusion_model=model, trainable="transformer", **settings)
    captions: dict[str, Any] = {"max_caption_tokens": 32}
    if size == "medium":
        captions = {"max_caption_tokens": 128, "pad_to_max_length": True}
    return Stage2Config(trainable="all", **captions, **settings)


def build_trainer(config: Any, size: str, folder: Path) -> Any:
    """The trainer of `vlv train`, with the miniature's weights or with random ones."""
    images = str(folder / "images")
    torch.manual_seed(0)
    if isinstance(config, Stage1Config):
        if size == "miniature":
            model, processor = hub.load_encoder(MINIATURE)
            decoder = load_diffusion_decoder(str(MINIATURE))
        else:
            model, processor = VLVModel(medium_config()), VLVImageProcessor.from_pretrained(folder / "medium")
            decoder = StableDiffusionDecoder(*medium_diffusion_parts(), dict(SCHEDULE.config))
        freeze_for_stage1(model, config.trainable)
        dataset = load_images(images)
        moments = open_moments(config, [dataset], processor, decoder)
        features = open_vision_features(config, [dataset], processor, model)
        return Stage1Trainer(model, decoder, config, dataset, processor, moments=moments, features=features)
    captioner, captioner_processor = hub.load_captioner(MINIATURE)
    if size == "medium":
        captioner = VLVForConditionalGeneration(medium_config())
        captioner_processor = VLVProcessor(
            VLVImageProcessor.from_pretrained(folder / "medium"), captioner_processor.tokenizer
        )
    freeze_for_stage2(captioner, config.trainable)
    return Stage2Trainer(captioner, config, load_pairs(images), captioner_processor)


class Calibration:
    """One transformer layer, one block of the denoiser and one of the autoencoder, of the widths of the model.

    Forward and backward, and of the autoencoder forward alone, as in a training step.
    """

    def __init__(self, size: str):
        width, channels, groups, side, batch = (128, 80, 16, 8, 64) if size == "miniature" else (512, 128, 32, 16, 4)
        tokens = 64 if size == "miniature" else 200
        vae = AutoencoderKL.load_config(MINIATURE, subfolder="vae") if size == "miniature" else {}
        first = vae.get("block_out_channels", (64,))[0]
        pixels, vae_groups = (64, vae["norm_num_groups"]) if size == "miniature" else (128, 32)
        runs: dict[str, dict[str, tuple[Any, Any]]] = {}
        for device in ("meta", "cpu"):
            with torch.device(device):
                bart = BartConfig(d_model=width, encoder_ffn_dim=4 * width, encoder_attention_heads=width // 64)
                bart._attn_implementation = "sdpa"
                runs[device] = {
                    "matmul": (BartEncoderLayer(bart), torch.ones(batch, tokens, width, requires_grad=True)),
                    "convolution": (
                        ResnetBlock2D(in_channels=channels, temb_channels=None, groups=groups),
                        torch.ones(batch, channels, side, side, requires_grad=True),
                    ),
                    "autoencoder": (
                        ResnetBlock2D(in_channels=first, temb_channels=None, groups=vae_groups).requires_grad_(False),
                        torch.ones(batch, first, pixels, pixels),
                    ),
                }
        self.layers = runs["cpu"]
        self.flops = {kind: self._count(*run) for kind, run in runs["meta"].items()}

    @staticmethod
    def _count(layer: Any, x: torch.Tensor) -> int:
        def loss() -> torch.Tensor:
            y = layer(x, None).sum()
            return y if y.requires_grad else y + torch.zeros((), device="meta", requires_grad=True)

        return count_step(loss, {}, [layer]).total()

    def rates(self, repeats: int = 5) -> dict[str, float]:
        """FLOP/s of each layer at this moment."""
        return {kind: self.flops[kind] / median(self._seconds(kind) for _ in range(repeats)) for kind in self.flops}

    def _seconds(self, kind: str) -> float:
        layer, x = self.layers[kind]
        started = time.process_time()
        y = layer(x, None)
        if y.requires_grad:
            y.sum().backward()
        return time.process_time() - started


def rates_by_part(rates: dict[str, float]) -> dict[str, dict[str, float]]:
    """The speed of each part and kind of operation, from those of the calibration's layers."""
    others = {"matmul": rates["matmul"], "attention": rates["matmul"], "convolution": rates["convolution"]}
    return {"": others, "vae_encoder": dict.fromkeys(others, rates["autoencoder"])}


class Clock(TrainerCallback):
    """CPU time of each step and of the model's forward and backward pass in it."""

    def __init__(self, trainer: Any, calibration: Calibration):
        self.model_seconds = 0.0
        self.steps: list[dict[str, Any]] = []
        self.calibration = calibration
        trainer.compute_loss = self._timed(trainer.compute_loss)
        trainer.accelerator.backward = self._timed(trainer.accelerator.backward)

    def _timed(self, function):
        def timed(*args, **kwargs):
            started = time.process_time()
            result = function(*args, **kwargs)
            self.model_seconds += time.process_time() - started
            return result

        return timed

    def on_train_begin(self, args, state, control, **kwargs):
        self.speed = self.calibration.rates()
        self._restart()

    def on_step_end(self, args, state, control, **kwargs):
        step = {"cpu": time.process_time() - self.cpu, "wall": time.perf_counter() - self.wall}
        before, self.speed = self.speed, self.calibration.rates()
        rates = {kind: (before[kind] + self.speed[kind]) / 2 for kind in before}
        self.steps.append({**step, "model": self.model_seconds, "rates": rates})
        self._restart()

    def _restart(self) -> None:
        self.model_seconds, self.cpu, self.wall = 0.0, time.process_time(), time.perf_counter()


def measure(stage: int, size: str, folder: Path, workers: int, steps: int, cached: Sequence[str]) -> dict[str, Any]:
    """Trains for `steps` steps. The figures are medians over the measured steps."""
    config = build_config(stage, size, folder, workers, steps + WARM_UP, cached)
    trainer = build_trainer(config, size, folder)
    calibration = Calibration(size)
    clock = Clock(trainer, calibration)
    trainer.add_callback(clock)
    trainer.train()
    measured = clock.steps[WARM_UP:]
    return {
        "images": config.per_device_train_batch_size,
        "wall": min(step["wall"] for step in measured),  # the step that other programs disturbed least
        "cpu": median(step["cpu"] for step in measured),
        "outside": median(1 - step["model"] / step["cpu"] for step in measured),
        "steps": [{"cpu": step["cpu"], "rates": step["rates"]} for step in measured],
    }


def in_processes(count: int, folder: Path, *arguments: str) -> dict[str, Any]:
    """`measure` in processes of its own, of which several share the training by torch.distributed (gloo)."""
    result = folder / "result.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"] if count > 1 else []
    command = [sys.executable, *launcher, __file__, "--worker", *arguments, "--folder", str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(result.read_text())


def number_of(stage: int | str) -> list[str]:
    """The number of a stage, and the option of a stage 1 with caches."""
    return ["1", "--cached", *CACHES[stage]] if isinstance(stage, str) else [str(stage)]


def report(sizes: list[str], steps: int, repeats: int, output: str) -> tuple[str, list[str]]:
    """All tables, as Markdown, and the cases whose estimate is too far from the measurement."""
    cases = [(size, stage) for size in sizes for stage in STAGES]
    kinds = {"one": (1, 0), "two": (2, 0), "workers": (1, 1)}  # processes, workers of the data loader
    found: dict[Any, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_inputs(folder)
        for number in range(repeats):
            for size, stage in cases:
                for kind, (processes, workers) in kinds.items():
                    arguments = ["--stage", *number_of(stage), "--sizes", size, "--workers", workers, "--steps", steps]
                    row = in_processes(processes, folder, *map(str, arguments))
                    found.setdefault((size, stage, kind), []).append(row)
                    print(f"{number + 1}/{repeats}", size, f"stage {stage}", kind, row, file=sys.stderr, flush=True)
        counted = {
            (size, stage): count_training_step(
                build_config(int(number_of(stage)[0]), size, folder, 0, 1, CACHES.get(stage, ()))
            ).count
            for size, stage in cases
        }

    def figure(*key: Any) -> dict[str, Any]:
        rows = found[key]
        values = {name: median(row[name] for row in rows) for name in ("images", "cpu", "outside")}
        values["wall"] = min(row["wall"] for row in rows)
        measured = [step for row in rows for step in row["steps"]]
        rates = {kind: median(step["rates"][kind] for step in measured) for kind in measured[0]["rates"]}
        return {**values, "rates": rates, "steps": measured}

    lines = [
        "# Training steps on a CPU",
        "",
        f"torch {torch.__version__}, {platform.machine()}, one thread a process, float32. Printed by",
        f"`python benchmarks/training.py --sizes {' '.join(sizes)} --steps {steps} --repeats {repeats}",
        f"--output {output}`. Medians of interleaved runs; images/s of the fastest step.",
        "",
        "## Throughput, and time outside the model",
        "",
        "Outside the model is everything but the loss (with the autoencoder's encoder in stage 1) and its backward",
        "pass: reading and preparing images, optimiser, gradient norm, logging, the trainer itself. Shares are of the",
        "training process's CPU time. With a worker, a process of its own reads the images.",
        "",
        "| model | stage | images a step | images/s, 1 process | images/s, 2 processes | ratio | outside the model "
        "| with a worker |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for size, stage in cases:
        one, two, worker = (figure(size, stage, kind) for kind in kinds)
        speeds = one["images"] / one["wall"], 2 * two["images"] / two["wall"]
        lines.append(
            f"| {size} | {stage} | {one['images']:.0f} | {speeds[0]:.1f} | {speeds[1]:.1f} | "
            f"{speeds[1] / speeds[0]:.2f} | {one['outside']:.1%} | {worker['outside']:.1%} |"
        )
    lines += [
        "",
        "## The estimate beside the measurement",
        "",
        "`vlv estimate` counts the FLOPs of the step from the configuration. Here they are divided by the speed that",
        "this CPU reached, in the same process and between the same steps, on one transformer layer, one block",
        "of the denoiser and one of the autoencoder. The measured step is the complete one: data, loss, backward,",
        "optimiser. The last column is the median of the steps, each beside the speeds before and after it. On the",
        f"medium model it has to be within {TOLERANCE:.0%} of 1.",
        "",
        "| model | stage | GFLOP a step | transformer layer, GFLOP/s | denoiser block | autoencoder block "
        "| estimate, s | measured, s | estimate / measured |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    wrong = []
    for case in cases:
        row, count = figure(*case, "one"), counted[case]
        seconds = [speed_estimate(count, rates_by_part(step["rates"])) for step in row["steps"]]
        ratio = median(s / step["cpu"] for s, step in zip(seconds, row["steps"], strict=True))
        if case[0] == "medium" and abs(ratio - 1) > TOLERANCE:
            wrong.append(f"{case[0]}, stage {case[1]}: {ratio:.2f}")
        rates = {kind: rate / 1e9 for kind, rate in row["rates"].items()}
        lines.append(
            f"| {case[0]} | {case[1]} | {count.total() / 1e9:.1f} | {rates['matmul']:.1f} | "
            f"{rates['convolution']:.1f} | {rates['autoencoder']:.1f} | {median(seconds):.3f} | {row['cpu']:.3f} | "
            f"{ratio:.2f} |"
        )
    return "\n".join(lines) + "\n", wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="write the report here, too")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--steps", type=int, default=8, help="measured steps of a run (default: 8)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind, interleaved (default: 3)")
    for name in ("--worker", "--cached", "--folder", "--stage", "--workers"):  # of the processes that measure
        kinds: dict[str, dict[str, Any]] = {
            "--worker": {"action": "store_true"},
            "--cached": {"nargs": "+", "default": ()},
        }
        kind = kinds.get(name, {})
        parser.add_argument(name, help=argparse.SUPPRESS, **kind)
    options = parser.parse_args()
    if options.worker:
        folder = Path(options.folder)
        torch.set_num_threads(1)
        workers = int(options.workers)
        row = measure(int(options.stage), options.sizes[0], folder, workers, options.steps, options.cached)
        if int(os.environ.get("RANK", 0)) == 0:
            (folder / "result.json").write_text(json.dumps(row))
        return
    text, wrong = report(options.sizes, options.steps, options.repeats, str(options.output or "FILE"))
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    if wrong:
        sys.exit(f"estimate / measured is not within {TOLERANCE:.0%} of 1: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
