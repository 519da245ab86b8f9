"""Each objective of stage 1 in miniature: short trainings from one start, side by side.

    python -m benchmarks.objectives [--steps 100] [--output benchmarks/objectives.md]

The start is the miniature's encoder, whose query tokens, decoder and projector are disturbed by noise. Each training
mends them on the same images; the scores are those of `vlv.miniature.evaluation`, of reconstructions of unseen scenes.
Seeds decide the order of the images, the noise and the timesteps. Results are appended to a `.jsonl` file beside the
output, and trainings that it has already are not repeated.
"""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Subset

from vlv import VLVModel, hub
from vlv.diffusion_decoder import StableDiffusionDecoder
from vlv.miniature.data import evaluation_items
from vlv.miniature.encoder import ImagesOnly
from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE, reconstruct_images
from vlv.miniature.scene_classifier import SceneClassifier
from vlv.miniature.scoring import score_scenes
from vlv.pipelines import load_reconstruction
from vlv.tokenizer import load_tokenizer
from vlv.train import Stage1Config, Stage1Trainer, freeze_for_stage1
from vlv.train.checkpoints import say
from vlv.train.encoder_lora import add_encoder_lora, merge_encoder_lora

MODEL = Path(__file__).parent.parent / "checkpoints" / "vlv-miniature"
DISTURBED = ("query_tokens", "projector.", "image_encoder.language_model.decoder.")
DISTURBANCE = 0.7
"""Standard deviation of the noise on the start's weights, as a share of a tensor's own root mean square."""
SEEDS = (0, 1)
BASELINE = "baseline"
OBJECTIVES: dict[str, dict[str, Any]] = {
    BASELINE: {},
    "snr_gamma 5": {"snr_gamma": 5.0},
    "timestep_sampling stratified": {"timestep_sampling": "stratified"},
    "timestep_sampling logit_normal": {"timestep_sampling": "logit_normal"},
    "min_timestep 400": {"min_timestep": 400},
    "max_timestep 899": {"max_timestep": 899},
    "embedding_dropout 0.1": {"embedding_dropout": 0.1},
    "query_noise 0.1": {"query_noise": 0.1},
    "tail_drop 0.25": {"tail_drop": 0.25},
    "encoder_lora_rank 8": {"encoder_lora_rank": 8},
    "unfreeze in three steps": {"unfreeze": "0: projector, {third}: query_decoder, {two_thirds}: transformer"},
}


def disturbed_encoder() -> VLVModel:
    """The start of all trainings."""
    model, _ = hub.load_encoder(MODEL)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith(DISTURBED):
                size = parameter.square().mean().sqrt()
                parameter += DISTURBANCE * size * torch.randn(parameter.shape, generator=generator)
    return model


def train(settings: dict[str, Any], seed: int, steps: int, batch_size: int) -> VLVModel:
    """The start, trained with `settings`."""
    if "unfreeze" in settings:
        settings = {"unfreeze": settings["unfreeze"].format(third=steps // 3, two_thirds=2 * steps // 3)}
    model = disturbed_encoder()
    config = Stage1Config(
        output_dir="unused",
        model=str(MODEL),
        trainable="transformer",
        max_steps=steps,
        warmup_steps=steps // 10,
        per_device_train_batch_size=batch_size,
        learning_rate=5e-4,
        logging_steps=25,
        save_strategy="no",
        validation_steps=0,
        seed=seed,
        use_cpu=True,
        dataloader_num_workers=0,
        disable_tqdm=True,
        **settings,
    )
    freeze_for_stage1(model, config.trainable)
    if config.encoder_lora_rank:
        add_encoder_lora(model, config.encoder_lora_rank)
    decoder = StableDiffusionDecoder.from_pretrained(
        str(MODEL),
        timestep_sampling=config.timestep_sampling,
        min_timestep=config.min_timestep,
        max_timestep=config.max_timestep,
        snr_gamma=config.snr_gamma,
    )
    _, image_processor = hub.load_encoder(MODEL)
    images = Subset(ImagesOnly(steps * batch_size, seed=5), range(steps * batch_size))
    torch.manual_seed(seed)
    trainer = Stage1Trainer(
        model, decoder, config, images, image_processor, {"tokenizer": load_tokenizer(MODEL, subfolder="tokenizer")}
    )
    trainer.train()
    if config.encoder_lora_rank:
        merge_encoder_lora(model)
    return model.eval()


@torch.no_grad()
def measure(model: VLVModel, scenes: int, steps: int) -> dict[str, float]:
    """The loss of unseen images, uniform timesteps and fixed noise, and scores of their reconstructions."""
    pixels, true = evaluation_items("test", scenes)
    pipeline = load_reconstruction(MODEL)
    pipeline.register_modules(encoder=model)
    pipeline.set_progress_bar_config(disable=True)
    decoder = StableDiffusionDecoder.from_pretrained(str(MODEL), timestep_sampling="stratified")
    images = pixels.repeat(2, 1, 1, 1)
    generator = torch.Generator().manual_seed(3)
    latents = decoder.encode_images(images.float() / 127.5 - 1, generator)
    noise = torch.randn(latents.shape, generator=generator)
    timesteps = decoder.sample_timesteps(len(images), generator)
    timesteps = timesteps[torch.randperm(len(images), generator=generator)]
    pixel_values = pipeline.image_processor(pixels, return_tensors="pt").pixel_values
    conditioning = model(pixel_values=pixel_values).conditioning.repeat(2, 1, 1)
    losses = decoder.denoise(latents, conditioning, noise, timesteps).losses
    classifier = SceneClassifier.load(MODEL / SCENE_CLASSIFIER_FILE)
    predicted = classifier.predict_scenes(reconstruct_images(pipeline, pixels, guidance_scale=2.0, steps=steps))
    scores = score_scenes(predicted, true)
    return {"loss": losses.mean().item(), **{name: scores[name] for name in ("object_f1", "object_place_f1", "exact")}}


def table(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> str:
    """The results in Markdown."""
    start = next(row for row in rows if row["objective"] == "start")
    done = [row for row in rows if row["objective"] != "start"]
    baseline = [row for row in done if row["objective"] == BASELINE]
    scenes, images = arguments.scenes, arguments.steps * arguments.batch_size
    error = (0.5 * 0.5 / (2 * scenes)) ** 0.5
    lines = [
        "# Objectives of stage 1, in miniature",
        "",
        "`python -m benchmarks.objectives`: the miniature's encoder, with noise on the weights of query tokens, "
        f"Florence-2's decoder and projector ({DISTURBANCE:g} times their root mean square), trained further with "
        f"`trainable: transformer` for {arguments.steps} steps of {arguments.batch_size} images ({images:,} images, "
        f"AdamW 5e-4, cosine, one CPU core). The loss is that of {scenes} unseen scenes, twice each, with stratified "
        "timesteps and fixed noise, without weights, so that all rows compare. F1 of objects with their place is that "
        f"of their reconstructions (guidance 2, {arguments.inference_steps} steps). Values are means over the seeds.",
        "",
        "| objective | loss | object F1 | object + place F1 | exact scene | seeds |",
        "|---|---|---|---|---|---|",
        _row("start, before training", [start], "-"),
    ]
    for name in OBJECTIVES:
        own = [row for row in done if row["objective"] == name]
        if own:
            lines.append(_row(f"`{name}`" if name != BASELINE else name, own, ", ".join(str(r["seed"]) for r in own)))
    spread = "only one seed of the baseline was trained, so that the spread between seeds is not known"
    if len(baseline) > 1:
        losses, scores = ([row[key] for row in baseline] for key in ("loss", "object_place_f1"))
        spread = (
            f"the baseline's loss is {min(losses):.4f} to {max(losses):.4f} over its seeds, and its F1 of objects "
            f"with place {min(scores):.3f} to {max(scores):.3f}"
        )
    lines += [
        "",
        f"How far to trust this: {spread}, and the standard error of an F1 over {scenes} scenes (two objects each) "
        f"is up to {error:.3f}. An objective that draws random numbers of its own also has other noise and timesteps "
        "than the baseline of the same seed. The table shows that each objective trains; it ranks none of them, and "
        "says nothing about a training of full length.",
        "",
    ]
    return "\n".join(lines)


def _row(name: str, rows: list[dict[str, Any]], seeds: str) -> str:
    means = {key: statistics.fmean(row[key] for row in rows) for key in rows[0] if key not in ("objective", "seed")}
    return (
        f"| {name} | {means['loss']:.4f} | {means['object_f1']:.3f} | {means['object_place_f1']:.3f} | "
        f"{means['exact']:.3f} | {seeds} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--scenes", type=int, default=48)
    parser.add_argument("--inference_steps", type=int, default=10)
    parser.add_argument(
        "--seconds", type=float, default=1000, help="no further training starts after so much CPU time"
    )
    parser.add_argument("--table", action="store_true", help="only write the table of what was trained")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".md"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    log = arguments.output.with_suffix(".jsonl")
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []

    def record(objective: str, seed: int, model: VLVModel) -> None:
        row = {"objective": objective, "seed": seed, **measure(model, arguments.scenes, arguments.inference_steps)}
        rows.append(row)
        with log.open("a") as file:
            file.write(json.dumps(row) + "\n")
        say(str(row))

    known = {(row["objective"], row["seed"]) for row in rows}
    if arguments.table:
        arguments.seconds = 0.0
    elif ("start", 0) not in known:
        record("start", 0, disturbed_encoder().eval())
    for seed in SEEDS:
        for objective, settings in OBJECTIVES.items():
            if (objective, seed) not in known and time.process_time() < arguments.seconds:
                record(objective, seed, train(settings, seed, arguments.steps, arguments.batch_size))
    arguments.output.write_text(table(rows, arguments), encoding="utf-8")
    say(f"the table is in {arguments.output}")


if __name__ == "__main__":
    main()
