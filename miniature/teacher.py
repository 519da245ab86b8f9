"""The miniature's text-to-image model: a CLIP text encoder and a UNet, trained together on captioned pictures.

It plays Stable Diffusion's part: what comes out is a plain diffusers `StableDiffusionPipeline`, frozen ever after.
"""

import os
import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import nn
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.masking_utils import create_causal_mask

from .scene_classifier import SceneClassifier
from .scoring import score_scenes
from .tokenizer import BEGIN, END, PAD, TEXT_POSITIONS, build_tokenizer
from .training import MovingAverage, SceneDataset, train_module

CAPTION_DROPOUT = 0.1  # the share of pictures shown with an empty caption, for classifier-free guidance


def build_text_encoder(tokenizer: PreTrainedTokenizerBase) -> CLIPTextModel:
    """CLIP's text model, 128 wide and 3 layers deep."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=TEXT_POSITIONS,
        projection_dim=128,
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        bos_token_id=tokenizer.convert_tokens_to_ids(BEGIN),
        eos_token_id=tokenizer.convert_tokens_to_ids(END),
    )
    return CLIPTextModel(config)


def build_unet(latent_channels: int, text_width: int = 128) -> UNet2DConditionModel:
    """Two levels, 8 x 8 and 4 x 4, with cross-attention in both. (`attention_head_dim` is the number of heads.)"""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=(80, 160),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=(4, 8),
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """v-prediction with zero terminal SNR: at the last timestep nothing of the picture is left, as in sampling."""
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


def blur_words(input_ids: torch.Tensor, table: torch.Tensor, share: float) -> torch.Tensor:
    """Word embeddings `(B, L, d)`, of a share of the rows mixed with other words' or with nothing.

    Of each such row, a share of the words drawn evenly from 0 to 1 becomes `a * right + (1 - a) * other`: `a` is even
    from 0 to 1, and `other` a random word's embedding or, half of the time, zero. So the denoiser learns what half a
    word is worth.
    """
    embeds = table[input_ids]
    shape = input_ids.shape
    rate = torch.rand(shape[0], 1) * (torch.rand(shape[0], 1) < share)
    weight = torch.where(torch.rand(shape) < rate, torch.rand(shape), torch.ones(shape))[..., None]
    other = table[torch.randint(len(table), shape)] * (torch.rand(shape) < 0.5)[..., None]
    return weight * embeds + (1 - weight) * other


def encode_embeds(text_encoder: CLIPTextModel, embeds: torch.Tensor) -> torch.Tensor:
    """The text encoder's last hidden state for embeddings in place of words."""
    hidden = text_encoder.embeddings(inputs_embeds=embeds)
    mask = create_causal_mask(
        config=text_encoder.config, inputs_embeds=hidden, attention_mask=None, past_key_values=None
    )
    states = text_encoder.encoder(inputs_embeds=hidden, attention_mask=mask, is_causal=True).last_hidden_state
    return text_encoder.final_layer_norm(states)


class TeacherLoss(nn.Module):
    """Denoising loss of latents under their captions; the autoencoder stands outside, frozen."""

    def __init__(
        self,
        text_encoder: CLIPTextModel,
        unet: UNet2DConditionModel,
        autoencoder: AutoencoderKL,
        blurred: float = 0.0,
    ):
        super().__init__()
        self.text_encoder, self.unet, self.blurred = text_encoder, unet, blurred
        self.scheduler = build_scheduler()
        self._autoencoder = [autoencoder.eval().requires_grad_(False)]  # in a list: no submodule, in no checkpoint

    def forward(self, pixels: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        with torch.no_grad():
            posterior = self._autoencoder[0].encode(pixels.float() / 127.5 - 1).latent_dist
            latents = posterior.sample().float() * self._autoencoder[0].config.scaling_factor  # (B, C, 8, 8)
        noise = torch.randn_like(latents)
        steps = self.scheduler.config.num_train_timesteps
        strata = (torch.arange(len(latents)) + torch.rand(len(latents))) / len(latents)
        timesteps = (strata * steps).long().clamp(max=steps - 1)  # one from each part of the schedule
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps)
        if self.blurred:
            context = self._blurred_context(input_ids)
        else:
            context = self.text_encoder(input_ids=input_ids).last_hidden_state  # (B, 48, 128)
        predicted = self.unet(noisy, timesteps, context).sample
        return {"loss": F.mse_loss(predicted.float(), target)}

    def _blurred_context(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The context of captions with blurred words; batches lose their begin token and some padding at random.

        Caption embeddings have neither.
        """
        first = int(torch.rand(()) < 0.5)
        longest = int((input_ids != self.text_encoder.config.pad_token_id).sum(dim=1).max())
        input_ids = input_ids[:, first : int(torch.randint(longest, input_ids.shape[1] + 1, ()))]
        embeds = blur_words(input_ids, self.text_encoder.embeddings.token_embedding.weight, self.blurred)
        return encode_embeds(self.text_encoder, embeds)


class CaptionCollator:
    """Pictures and token ids, captions dropped with probability `dropout`, every row padded to all positions."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, dropout: float = 0.0):
        self.tokenizer, self.dropout = tokenizer, dropout

    def __call__(self, items: list[dict]) -> dict[str, torch.Tensor]:
        captions = ["" if random.random() < self.dropout else item["caption"] for item in items]
        ids = self.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return {"pixels": torch.stack([item["pixels"] for item in items]), "input_ids": ids}


def assemble_pipeline(
    autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The teacher as diffusers knows it."""
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=build_tokenizer(for_text_encoder=True),
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def prompt_alignment(
    pipeline: StableDiffusionPipeline,
    scene_classifier: SceneClassifier,
    split: str = "test",
    n: int = 500,
    guidance_scale: float = 2.0,
    num_inference_steps: int = 25,
    seed: int = 42,
    batch_size: int = 64,
) -> tuple[dict[str, float], np.ndarray]:
    """What the scene classifier finds of each prompt in the picture drawn for it.

    Returns:
        Scores as of `score_scenes`, and the pictures `(n, 64, 64, 3)` uint8.
    """
    data = SceneDataset(n, split=split, seed=29, fields=("caption", "scene"))
    items = [data[i] for i in range(n)]
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for start in range(0, n, batch_size):
        drawn = pipeline(
            [item["caption"] for item in items[start : start + batch_size]],
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            generator=generator,
            output_type="np",
        ).images
        pictures.append((drawn * 255).round().astype(np.uint8))
    images = np.concatenate(pictures)
    found = scene_classifier.read(torch.from_numpy(images).permute(0, 3, 1, 2))
    return score_scenes(found, [item["scene"] for item in items]), images


class AlignmentCallback(TrainerCallback):
    """Every so many steps, prints how far prompts are obeyed and saves a sheet of pictures."""

    def __init__(
        self,
        averaged: nn.Module,
        autoencoder: AutoencoderKL,
        scene_classifier: SceneClassifier,
        every: int,
        folder: Path,
    ):
        self.averaged, self.autoencoder, self.scene_classifier = averaged, autoencoder, scene_classifier
        self.every, self.folder = every, folder

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        from PIL import Image

        pair = dict(self.averaged.named_children())
        random_state = torch.get_rng_state()
        pipeline = assemble_pipeline(self.autoencoder, pair["text_encoder"], pair["unet"])
        scores, images = prompt_alignment(pipeline, self.scene_classifier, n=64)
        torch.set_rng_state(random_state)
        print(f"step {state.global_step}: {scores}", flush=True)
        sheet = images[:32].reshape(4, 8, 64, 64, 3).transpose(0, 2, 1, 3, 4).reshape(256, 512, 3)
        Image.fromarray(sheet).save(self.folder / "samples.png")


def train_teacher(
    output_dir: str | Path,
    work_dir: str | Path,
    autoencoder_dir: str | Path,
    scene_classifier_path: str | Path,
    images: int = 230_400,
    batch_size: int = 128,
    learning_rate: float = 1.5e-3,
    seed: int = 0,
    partial: float = 0.0,
    blurred: float = 0.0,
    start: str | Path | None = None,
) -> None:
    """Trains text encoder and UNet on captioned scenes of `train`; saves a `StableDiffusionPipeline`.

    Args:
        partial: The share of captions that leave things out.
        blurred: The share of captions of which words are blurred, see `blur_words`.
        start: A teacher to go on from.
    """
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_dir)
    tokenizer = build_tokenizer(for_text_encoder=True)
    text_encoder, unet = build_text_encoder(tokenizer), build_unet(autoencoder.config.latent_channels)
    if start is not None:
        text_encoder = CLIPTextModel.from_pretrained(start, subfolder="text_encoder")
        unet = UNet2DConditionModel.from_pretrained(start, subfolder="unet")
    module = TeacherLoss(text_encoder, unet, autoencoder, blurred)
    trained = nn.ModuleDict({"text_encoder": text_encoder, "unet": unet})
    Path(work_dir).mkdir(parents=True, exist_ok=True)
    averaging = MovingAverage(trained, decay=0.998)
    judging = AlignmentCallback(
        averaging.average, autoencoder, SceneClassifier.load(scene_classifier_path), 300, Path(work_dir)
    )
    train_module(
        module,
        SceneDataset(images, seed=seed + 1, fields=("pixels", "caption"), partial=partial),
        work_dir,
        batch_size=batch_size,
        learning_rate=learning_rate,
        data_collator=CaptionCollator(tokenizer, CAPTION_DROPOUT),
        callbacks=(averaging, judging),
        seed=seed,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
    )
    if int(os.environ.get("RANK", "0")):
        return
    average = dict(averaging.average.named_children())
    assemble_pipeline(autoencoder, average["text_encoder"], average["unet"]).save_pretrained(output_dir)
