"""The miniature's teacher: a CLIP text encoder and a UNet, trained together on images with captions.

It takes the place of Stable Diffusion. The result is a diffusers `StableDiffusionPipeline`; stages 1 and 2 keep it
frozen.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import make_image_grid
from PIL import Image
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, TrainerCallback

from vlv.diffusion_decoder.timesteps import stratified_timesteps
from vlv.modeling_vlv import encode_text_embeds

from .data import SceneDataset
from .scene_classifier import SceneClassifier
from .scoring import score_scenes
from .tokenizer import BEGIN, END, PAD, TEXT_POSITIONS, build_tokenizer
from .training import MovingAverageCallback, train_module

TEXT_WIDTH = 128
CAPTION_DROPOUT = 0.1  # the share of images with an empty caption, for classifier-free guidance


def build_text_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """CLIP's text model with 3 layers of width 128."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_POSITIONS,
        projection_dim=TEXT_WIDTH,
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        bos_token_id=tokenizer.convert_tokens_to_ids(BEGIN),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    return CLIPTextModel(config)


def build_unet(latent_channels: int) -> UNet2DConditionModel:
    """Two levels, 8 x 8 and 4 x 4, with cross-attention in both."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(80, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(4, 8),  # diffusers takes this as the number of heads
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: at the last timestep the latents are pure noise, as sampling assumes."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def mix_embeddings(input_ids: torch.Tensor, embedding_table: torch.Tensor, share: float) -> torch.Tensor:
    """Token embeddings `(B, L, d)`, in a share of the rows mixed with other embeddings.

    In each mixed row, the share of mixed tokens is sampled uniformly from 0 to 1. A mixed token has the embedding
    `a * own + (1 - a) * other`, with `a` uniform from 0 to 1 and `other` the embedding of a random token or, with a
    probability of one half, zero. This teaches the denoiser to use caption embeddings that are partly right.

    Args:
        input_ids: `(B, L)`.
        embedding_table: `(vocabulary, d)`.
        share: Probability that a row is mixed, 0 to 1.
    """
    embeds = embedding_table[input_ids]
    shape = input_ids.shape
    rate = torch.rand(shape[0], 1) * (torch.rand(shape[0], 1) < share)
    weight = torch.where(torch.rand(shape) < rate, torch.rand(shape), torch.ones(shape))[..., None]
    others, kept = torch.randint(len(embedding_table), shape), (torch.rand(shape) < 0.5)[..., None]
    weight, others, kept = (tensor.to(embeds.device) for tensor in (weight, others, kept))
    other = embedding_table[others] * kept
    return weight * embeds + (1 - weight) * other


class TeacherLoss(nn.Module):
    """The denoising loss of images with their captions as conditioning.

    The autoencoder is frozen and not a submodule, so it is not in the checkpoints.

    Args:
        embedding_mixing: The share of captions whose token embeddings are mixed by `mix_embeddings`.
    """

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        autoencoder: AutoencoderKL,
        embedding_mixing: float = 0.0,
    ):
        super().__init__()
        self.text_encoder, self.unet, self.embedding_mixing = text_encoder, unet, embedding_mixing
        self.scheduler = build_scheduler()
        self._autoencoder = [autoencoder.eval().requires_grad_(False)]  # a list hides it from nn.Module

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            posterior = self._autoencoder[0].encode(pixels.float() / 127.5 - 1).latent_dist
            latents = posterior.sample().float() * self._autoencoder[0].config.scaling_factor  # (B, C, 8, 8)
        noise = torch.randn(latents.shape, device=latents.device)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = stratified_timesteps(len(latents), 0, steps - 1)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        if self.embedding_mixing:
            prompt_embeds = self._encode_mixed_embeddings(input_ids)
        else:
            prompt_embeds = self.text_encoder(input_ids=input_ids).last_hidden_state  # (B, 48, 128)
        velocity_pred = self.unet(noisy, timesteps, prompt_embeds).sample
        return {"loss": F.mse_loss(velocity_pred.float(), target)}

    def _encode_mixed_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The prompt embeddings `(B, L, 128)` of captions with mixed token embeddings.

        The begin token and some of the padding are removed at random, since caption embeddings have neither.
        """
        first = int(torch.rand(()) < 0.5)
        longest = int((input_ids != self.text_encoder.config.pad_token_id).sum(dim=1).max())
        input_ids = input_ids[:, first : int(torch.randint(longest, input_ids.shape[1] + 1, ()))]
        embedding_table = self.text_encoder.embeddings.token_embedding.weight
        embeds = mix_embeddings(input_ids, embedding_table, self.embedding_mixing)
        return encode_text_embeds(self.text_encoder, embeds)


class CaptionCollator:
    """Makes `pixels` `(B, 3, 64, 64)`, or `latents` where items have them, and `input_ids` `(B, 48)`.

    A caption is empty with probability `dropout`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dropout: float = 0.0):
        self.tokenizer, self.dropout = tokenizer, dropout

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        captions = ["" if random.random() < self.dropout else item["caption"] for item in items]
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        name = "latents" if "latents" in items[0] else "pixels"
        return {name: torch.stack([item[name] for item in items]), "input_ids": ids}


def assemble_pipeline(
    autoencoder: AutoencoderKL,
    text_encoder: CLIPTextModel,
    unet: UNet2DConditionModel,
    tokenizer: PreTrainedTokenizerBase,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    """The teacher as a diffusers pipeline, without a progress bar."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def measure_prompt_alignment(
    pipeline: DiffusionPipeline,
    scene_classifier: SceneClassifier,
    split: str = "test",
    n: int = 500,
    guidance_scale: float = 2.0,
    num_inference_steps: int = 25,
    seed: int = 42,
    batch_size: int = 64,
) -> tuple[dict[str, float], np.ndarray]:
    """How well the images that a teacher generates agree with their prompts.

    Args:
        pipeline: The teacher.
        scene_classifier: Predicts the scenes of the generated images.
        n: Number of prompts.
        seed: Seed of the noise.

    Returns:
        The scores of `score_scenes`, and the images `(n, 64, 64, 3)` uint8.
    """
    data = SceneDataset(n, split=split, seed=29, fields=("caption", "scene"))
    items = [data[i] for i in range(n)]
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, n, batch_size):
        batch = pipeline(
            [item["caption"] for item in items[start : start + batch_size]],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type="np",
        ).images
        batches.append((batch * 255).round().astype(np.uint8))
    images = np.concatenate(batches)
    predicted = scene_classifier.predict_scenes(torch.from_numpy(images).permute(0, 3, 1, 2))
    return score_scenes(predicted, [item["scene"] for item in items]), images


class PromptAlignmentCallback(TrainerCallback):
    """Every `every` steps, prints the scores of `measure_prompt_alignment` and saves a grid of images to `folder`.

    Args:
        build_pipeline: Returns the teacher with the averaged weights of that moment.
        n: Number of prompts.
        steps: Number of denoising steps.
    """

    def __init__(
        self,
        build_pipeline: Callable[[], DiffusionPipeline],
        scene_classifier: SceneClassifier,
        every: int,
        folder: Path,
        n: int = 64,
        steps: int = 25,
    ):
        self.build_pipeline, self.scene_classifier = build_pipeline, scene_classifier
        self.every, self.folder, self.n, self.steps = every, folder, n, steps

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        random_state = torch.get_rng_state()
        scores, images = measure_prompt_alignment(
            self.build_pipeline(), self.scene_classifier, n=self.n, num_inference_steps=self.steps
        )
        torch.set_rng_state(random_state)
        print(f"step {state.global_step}: {scores}", flush=True)
        grid = make_image_grid([Image.fromarray(image) for image in images[:32]], rows=4, cols=8)
        grid.save(self.folder / "samples.png")


def train_teacher(
    output_dir: str | Path,
    work_dir: str | Path,
    autoencoder_dir: str | Path,
    scene_classifier_path: str | Path,
    images: int = 230_400,
    batch_size: int = 128,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
    partial_captions: float = 0.0,
    embedding_mixing: float = 0.0,
    initial_teacher: str | Path | None = None,
) -> None:
    """Trains the text encoder and the UNet on scenes of `train` with captions; saves a `StableDiffusionPipeline`.

    Args:
        images: Number of training images.
        batch_size: Of all processes together.
        partial_captions: The share of captions that are partial, see `SceneDataset`.
        embedding_mixing: The share of captions with mixed token embeddings, see `mix_embeddings`.
        initial_teacher: The teacher whose weights training starts from. By default they are random.
    """
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_dir)
    tokenizer = build_tokenizer(for_text_encoder=True)
    text_encoder, unet = build_text_encoder(tokenizer), build_unet(autoencoder.config.latent_channels)
    if initial_teacher is not None:
        text_encoder = CLIPTextModel.from_pretrained(initial_teacher, subfolder="text_encoder")
        unet = UNet2DConditionModel.from_pretrained(initial_teacher, subfolder="unet")
    module = TeacherLoss(text_encoder, unet, autoencoder, embedding_mixing)
    trained = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    averaging = MovingAverageCallback(trained, decay=0.998)
    average = dict(averaging.average.named_children())
    teacher = assemble_pipeline(autoencoder, average["text_encoder"], average["unet"], tokenizer, build_scheduler())
    validation = PromptAlignmentCallback(
        lambda: teacher, SceneClassifier.load(scene_classifier_path), 300, Path(work_dir)
    )
    train_module(
        module,
        SceneDataset(images, seed=seed + 1, fields=("pixels", "caption"), partial_captions=partial_captions),
        work_dir,
        batch_size=batch_size,
        learning_rate=learning_rate,
        data_collator=CaptionCollator(tokenizer, CAPTION_DROPOUT),
        callbacks=(averaging, validation),
        seed=seed,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
    )
    if int(os.environ.get("RANK", "0")):
        return
    teacher.save_pretrained(output_dir)
