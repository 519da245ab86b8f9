"""The second recipe's teacher: two CLIP text encoders and an MMDiT, trained by flow matching.

It takes the place of Stable Diffusion 3.5. The result is a diffusers `StableDiffusion3Pipeline` without T5; stages 1
and 2 keep it frozen. Autoencoder and first text encoder are those of the first recipe, frozen, as Stable
Diffusion 3 has pretrained and frozen text encoders. The second text encoder is trained with the MMDiT.
"""

import os
import random
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from torch import nn
from torch.utils.data import Dataset
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, PreTrainedTokenizerBase

from vlv.diffusion_decoder import Conditioning, StableDiffusion3Decoder

from .data import SceneDataset, partial_scene
from .folding import fold_empty_positions
from .grammar import write_caption
from .latents import SCENE_SEED, load_latents
from .scene_classifier import SceneClassifier
from .teacher import CAPTION_DROPOUT, CaptionCollator, PromptAlignmentCallback, build_text_encoder, mix_embeddings
from .tokenizer import build_tokenizer
from .training import MovingAverageCallback, train_module

SECOND_TEXT_WIDTH = 64
WIDTH, LAYERS, HEADS = 160, 5, 5
EVALUATION_IMAGES = 32_000  # between two evaluations
SHIFT = 2.0  # more of the timesteps have much noise, where the conditioning matters


def build_text_encoders(
    tokenizer: PreTrainedTokenizerBase, first: CLIPTextModel | None = None
) -> list[CLIPTextModelWithProjection]:
    """CLIP text models with 3 layers of width 128 and 2 layers of width 64.

    The first one's projection is the identity, and the second one's embeddings are as large as its other states; with
    CLIP's initial scale of 0.02, the words hardly count.

    Args:
        first: A text encoder with 3 layers of width 128, whose weights the first model gets.
    """
    config = build_text_encoder(tokenizer).config.to_dict()
    small = {
        "num_hidden_layers": 2,
        "hidden_size": SECOND_TEXT_WIDTH,
        "projection_dim": SECOND_TEXT_WIDTH,
        "intermediate_size": 4 * SECOND_TEXT_WIDTH,
    }
    encoders = [CLIPTextModelWithProjection(CLIPTextConfig(**{**config, **sizes})) for sizes in ({}, small)]
    nn.init.eye_(encoders[0].text_projection.weight)
    embeddings = encoders[1].text_model.embeddings
    for table in (embeddings.token_embedding, embeddings.position_embedding):
        nn.init.normal_(table.weight)
    if first is not None:
        encoders[0].text_model.load_state_dict(first.state_dict())
    return encoders


def build_transformer(latent_channels: int, joint_width: int) -> SD3Transformer2DModel:
    """An MMDiT of patches of 2 x 2 latents, so an image has 4 x 4 tokens.

    Args:
        joint_width: The widths of both text encoders together.
    """
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=latent_channels,
        out_channels=latent_channels,
        num_layers=LAYERS,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=joint_width,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=joint_width,
        pos_embed_max_size=4,
        qk_norm="rms_norm",
    )


@torch.no_grad()
def initialize_transformer(
    transformer: SD3Transformer2DModel, text_encoders: Sequence[CLIPTextModelWithProjection]
) -> None:
    """Changes an untrained MMDiT's weights so that it starts close to a plain transformer.

    - Modulation does not depend on timestep and pooled state at first (as in DiT), and each gate is 0.5.
    - The output is zero.
    - The context embedder reads the first text encoder's states about as its final layer norm would scale them.
    """
    width = transformer.inner_dim
    for block in transformer.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
            if norm.linear.out_features == 6 * width:  # shift, scale and gate of attention, then of the feed-forward
                norm.linear.bias.view(6, width)[[2, 5]] = 0.5
    for layer in (transformer.norm_out.linear, transformer.proj_out):
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    first = text_encoders[0].text_model
    scale = first.final_layer_norm.weight / 6.5  # the standard deviation of the states
    columns = len(scale)
    nn.init.normal_(transformer.context_embedder.weight, std=columns**-0.5)
    transformer.context_embedder.weight[:, :columns] *= scale


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Flow matching with a fixed shift."""
    return FlowMatchEulerDiscreteScheduler(shift=SHIFT)


def assemble_pipeline(
    autoencoder: AutoencoderKL,
    text_encoders: Sequence[CLIPTextModelWithProjection],
    transformer: SD3Transformer2DModel,
    tokenizer: PreTrainedTokenizerBase,
) -> StableDiffusion3Pipeline:
    """The teacher as a diffusers pipeline, without T5 and without a progress bar."""
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=build_scheduler(),
        vae=autoencoder,
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class MMDiTTeacherLoss(nn.Module):
    """The flow-matching loss of latents with their captions as conditioning.

    The first text encoder is frozen. Noise and target are those of the family's decoder. The autoencoder is no
    submodule, so it is not in the checkpoints.

    Args:
        embedding_mixing: The share of captions whose token embeddings are mixed by `mix_embeddings`.
    """

    def __init__(
        self,
        text_encoders: Sequence[CLIPTextModelWithProjection],
        transformer: SD3Transformer2DModel,
        autoencoder: AutoencoderKL,
        embedding_mixing: float = 0.0,
    ):
        super().__init__()
        self.text_encoders = nn.ModuleList(text_encoders)
        self.text_encoders[0].requires_grad_(False)
        decoder = StableDiffusion3Decoder(autoencoder, transformer, build_scheduler().config, "stratified")
        self.transformer = transformer.requires_grad_(True)
        self.embedding_mixing, self.padding = embedding_mixing, text_encoders[0].config.pad_token_id
        self._decoder = [decoder]  # a list hides it from nn.Module
        for encoder in text_encoders:
            encoder.text_model.embeddings.token_embedding.register_forward_hook(partial(_mix, share=embedding_mixing))

    def forward(self, latents: torch.Tensor, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        decoder, config = self._decoder[0], self._decoder[0].vae.config
        decoder.sigmas = decoder.sigmas.to(latents.device)
        latents = (latents.float() - (config.shift_factor or 0.0)) * config.scaling_factor  # (B, C, 8, 8)
        return {"loss": decoder.denoising_loss(latents, self.encode(self._cut(input_ids)))}

    def encode(self, input_ids: torch.Tensor) -> Conditioning:
        """The conditioning of captions `(B, N)`, as diffusers' pipeline forms it."""
        outputs = [encoder(input_ids=input_ids, output_hidden_states=True) for encoder in self.text_encoders]
        states = torch.cat([output.hidden_states[-2] for output in outputs], dim=2)  # (B, N, 128 + 64)
        return Conditioning(states, torch.cat([output.text_embeds for output in outputs], dim=1))

    def _cut(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The ids without some of the padding and, with embedding mixing, sometimes without the begin token.

        Caption embeddings have neither.
        """
        first = int(torch.rand(()) < self.embedding_mixing)
        longest = int((input_ids != self.padding).sum(dim=1).max())
        if torch.rand(()) < 0.75:
            return input_ids[:, first:longest]
        return input_ids[:, first : int(torch.randint(longest, input_ids.shape[1] + 1, ()))]


def _mix(module: nn.Embedding, args: tuple[torch.Tensor, ...], output: torch.Tensor, share: float) -> torch.Tensor:
    """A forward hook of token embeddings that mixes them in training."""
    if not (module.training and share):
        return output
    return mix_embeddings(args[0], module.weight, share)


class LatentCaptions(Dataset):
    """Latents of scenes with captions. Each pass over the scenes describes them in other words.

    An item is `{"latents": (C, 8, 8) tensor, "caption": str}`.

    Args:
        latents: `(scenes, C, 8, 8)`.
        scenes: The scenes, with the field `scene`.
        length: Number of items.
        partial_captions: The share of captions that are partial, see `SceneDataset`.
    """

    def __init__(self, latents: torch.Tensor, scenes: SceneDataset, length: int, seed: int, partial_captions: float):
        self.latents, self.length, self.seed, self.partial_captions = latents, length, seed, partial_captions
        self.scenes = [scenes[index]["scene"] for index in range(len(latents))]

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < self.length:
            raise IndexError(index)
        rng = random.Random(f"{self.seed}/caption/{index}")
        scene = self.scenes[index % len(self.scenes)]
        described = partial_scene(scene, rng) if rng.random() < self.partial_captions else scene
        return {"latents": self.latents[index % len(self.scenes)], "caption": write_caption(described, rng)}


def train_mmdit_teacher(
    output_dir: str | Path,
    work_dir: str | Path,
    autoencoder_dir: str | Path,
    first_teacher: str | Path,
    scene_classifier_path: str | Path,
    latents_dir: str | Path,
    images: int = 128_000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    seed: int = 0,
    partial_captions: float = 0.0,
    embedding_mixing: float = 0.0,
    initial_teacher: str | Path | None = None,
) -> None:
    """Trains text encoders and MMDiT on scenes of `train` with captions; saves a `StableDiffusion3Pipeline`.

    Args:
        first_teacher: The first recipe's teacher, whose text encoder is the first one here, too.
        latents_dir: The latents of the scenes that it is trained on, as `encode_scenes` writes them.
        images: Number of training images.
        batch_size: Of all processes together.
        partial_captions: The share of captions that are partial, see `SceneDataset`.
        embedding_mixing: The share of captions with mixed token embeddings, see `mix_embeddings`.
        initial_teacher: The teacher whose weights training starts from. By default all but the first text encoder's
            are random.
    """
    torch.manual_seed(seed)
    autoencoder = AutoencoderKL.from_pretrained(autoencoder_dir).eval()
    autoencoder.register_to_config(shift_factor=autoencoder.config.shift_factor or 0.0)  # the pipeline needs a number
    tokenizer = build_tokenizer(for_text_encoder=True)
    if initial_teacher is None:
        text_encoders = build_text_encoders(
            tokenizer, CLIPTextModel.from_pretrained(first_teacher, subfolder="text_encoder")
        )
        width = sum(encoder.config.hidden_size for encoder in text_encoders)
        transformer = build_transformer(autoencoder.config.latent_channels, width)
        initialize_transformer(transformer, text_encoders)
    else:
        text_encoders = [
            CLIPTextModelWithProjection.from_pretrained(initial_teacher, subfolder=name)
            for name in ("text_encoder", "text_encoder_2")
        ]
        transformer = SD3Transformer2DModel.from_pretrained(initial_teacher, subfolder="transformer")
    fold_empty_positions(transformer)
    latents = load_latents(latents_dir)
    scenes = SceneDataset(len(latents), seed=SCENE_SEED, fields=("scene",))
    module = MMDiTTeacherLoss(text_encoders, transformer, autoencoder, embedding_mixing)
    averaging = MovingAverageCallback(nn.ModuleList([*text_encoders, transformer]), decay=0.995)
    *average_encoders, average_transformer = averaging.average
    teacher = assemble_pipeline(autoencoder, average_encoders, average_transformer, tokenizer)
    validation = PromptAlignmentCallback(
        lambda: teacher,
        SceneClassifier.load(scene_classifier_path),
        every=EVALUATION_IMAGES // batch_size,
        folder=Path(work_dir),
        n=32,
        steps=12,
    )
    train_module(
        module,
        LatentCaptions(latents, scenes, images, seed, partial_captions),
        work_dir,
        batch_size=batch_size,
        learning_rate=learning_rate,
        data_collator=CaptionCollator(tokenizer, CAPTION_DROPOUT),
        callbacks=(averaging, validation),
        seed=seed,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=50,
        save_steps=100,
    )
    if not int(os.environ.get("RANK", "0")):
        teacher.save_pretrained(output_dir)
