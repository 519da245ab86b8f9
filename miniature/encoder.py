"""The miniature's encoder: Florence-2's architecture at 64 x 64 pixels, trained by stage 1 on images alone."""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig

from vlv import VLVConfig, VLVImageProcessor, VLVModel, hub
from vlv.diffusion_decoder import family_of
from vlv.pipelines import build_reconstruction
from vlv.train import Stage1Config, Stage1Trainer, ValidationCallback, freeze_for_stage1, last_checkpoint

from .data import SceneDataset, evaluation_items
from .evaluation import reconstruct_images
from .folding import fold_empty_positions
from .scene_classifier import SceneClassifier
from .scoring import score_scenes
from .training import hardware_arguments, per_process_batch_size

NUM_QUERY_TOKENS = 24
GRID = 8  # the vision tower's output has 8 x 8 positions
INITIALIZER_RANGE = 0.09  # 1 / sqrt(width): with the usual 0.02, z hardly depends on the image (README, "Stage 1")
# Below, a wrong caption adds a fifth as much loss as above (README, "Timesteps at which the conditioning matters").
MIN_TIMESTEP = 400
POSITION_STD = 3.0  # the standard deviation of the vision tower's features
BRANCH_SCALE = 0.1


def build_encoder_config(
    text_encoder_config: CLIPTextConfig, num_query_tokens: int = NUM_QUERY_TOKENS, **fields: Any
) -> VLVConfig:
    """A vision tower with 8 x 8 positions and one mean token, three encoder and two decoder layers of width 128.

    There is no dropout. `patch_stride` differs from Florence-2's, which would give 2 x 2 positions at 64 x 64 pixels.

    Args:
        fields: Further fields of `VLVConfig`, such as those of a second text encoder.
    """
    width = 128
    return VLVConfig(
        image_encoder_config={
            "vision_config": {
                "depths": (1, 1, 1, 1),
                "embed_dim": (16, 48, 96, 128),
                "num_heads": (2, 4, 4, 4),
                "num_groups": (2, 4, 4, 4),
                "patch_stride": (4, 2, 1, 1),
                "window_size": 4,
                "drop_path_rate": 0.0,
                "mlp_ratio": 2.0,
                "projection_dim": width,
                "max_position_embeddings": 8,
                "max_temporal_embeddings": 1,
                "initializer_range": INITIALIZER_RANGE,
            },
            "text_config": {
                "model_type": "bart",
                "vocab_size": 4,
                "d_model": width,
                "encoder_layers": 3,
                "decoder_layers": 2,
                "encoder_attention_heads": 4,
                "decoder_attention_heads": 4,
                "encoder_ffn_dim": 384,
                "decoder_ffn_dim": 384,
                "max_position_embeddings": 80,
                "dropout": 0.0,
                "init_std": INITIALIZER_RANGE,
                "attention_dropout": 0.0,
                "activation_dropout": 0.0,
                "pad_token_id": 1,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
            },
            "image_token_id": 3,
        },
        text_encoder_config=text_encoder_config,
        num_query_tokens=num_query_tokens,
        initializer_range=0.04,
        **fields,
    )


@torch.no_grad()
def initialize_encoder(model: VLVModel) -> None:
    """Changes an untrained encoder's weights so that each query token attends to its own part of the image.

    With the library's initial weights, position embeddings are 150 times smaller than the features of the vision
    tower, and each residual branch of the transformer is as large as its input. Query tokens then see the mean of the
    image: trained with true labels they recognize no object within 12,800 images. With these weights they recognize
    0.86 of the objects (README, "Stage 1").

    - Position embeddings have the standard deviation of the features that they are added to (`POSITION_STD`).
    - The outputs of self-attention and feed-forward layers are scaled by `BRANCH_SCALE`, so that tokens pass almost
      unchanged.
    - Each query token is the position embedding of one of 24 positions (with fewer query tokens, every n-th of them),
      and the query projection of cross-attention equals its key projection, so that attention is similarity.
    """
    projector, transformer = model.image_encoder.multi_modal_projector, model.image_encoder.language_model
    positions = projector.image_position_embed
    for embedding in (positions.row_embeddings, positions.column_embeddings):
        nn.init.normal_(embedding.weight, std=POSITION_STD)
    blank = torch.zeros(1, projector.vision_embedding_dim, GRID, GRID)
    embeddings = positions(blank).flatten(2).transpose(1, 2)  # (1, 64, d)
    codes = projector.image_proj_norm(projector.image_projection(embeddings))[0]  # (64, d_model)
    anchors = [row * GRID + column for row in (1, 2, 5, 6) for column in (0, 1, 3, 4, 6, 7)]
    chosen = anchors[:: len(anchors) // model.config.num_query_tokens][: model.config.num_query_tokens]
    model.query_tokens.copy_(codes[chosen][None])
    for layer in transformer.decoder.layers:
        layer.encoder_attn.q_proj.weight.copy_(layer.encoder_attn.k_proj.weight)
    for layer in [*transformer.encoder.layers, *transformer.decoder.layers]:
        layer.self_attn.out_proj.weight.mul_(BRANCH_SCALE)
        layer.fc2.weight.mul_(BRANCH_SCALE)


def build_image_processor() -> VLVImageProcessor:
    """Resizes to 64 x 64 pixels, without a crop."""
    return VLVImageProcessor(size={"height": 64, "width": 64})


class ImagesOnly(SceneDataset):
    """Items as stage 1 reads them: `{"image": (3, 64, 64) uint8 tensor}`."""

    def __getitem__(self, index: int) -> dict:
        return {"image": super().__getitem__(index)["pixels"]}


def print_reconstruction_scores(
    model: VLVModel,
    step: int,
    folder: Path,
    *,
    components: dict[str, Any],
    scene_classifier: SceneClassifier,
    n: int = 48,
) -> None:
    """Prints the scores of reconstructions of `n` unseen scenes of each split. For `ValidationCallback`.

    Args:
        components: Of the teacher, as `vlv.hub.load_diffusion_components` returns them.
    """
    pipeline = build_reconstruction(model, build_image_processor(), components)
    pipeline.set_progress_bar_config(disable=True)
    for split in ("test", "combo"):
        pixels, scenes = evaluation_items(split, n)
        predicted = scene_classifier.predict_scenes(reconstruct_images(pipeline, pixels, guidance_scale=2.0, steps=15))
        print(f"step {step}, {split}: {score_scenes(predicted, scenes)}", flush=True)


def train_encoder(
    output_dir: str | Path,
    work_dir: str | Path,
    teacher_dir: str | Path,
    scene_classifier_path: str | Path,
    images: int = 240_000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    num_query_tokens: int = NUM_QUERY_TOKENS,
    min_timestep: int = MIN_TIMESTEP,
    seed: int = 0,
    **arguments,
) -> None:
    """Trains stage 1 with the trainer of `vlv.train`: a new encoder, a frozen teacher, images of `train`.

    Args:
        images: Number of training images.
        batch_size: Of all processes together.
        min_timestep: Lowest training timestep. `MIN_TIMESTEP` is for the first recipe's teacher.
        arguments: Further settings of `Stage1Config`, such as `tail_drop`.
    """
    family = family_of(teacher_dir)
    text_encoders = family.load_text_encoders(str(teacher_dir))
    first, *others = [encoder.config for encoder in text_encoders]
    fields = {f"text_encoder_{number}_config": config for number, config in enumerate(others, start=2)}
    torch.manual_seed(seed)
    model = VLVModel(
        build_encoder_config(first, num_query_tokens, **fields, **family.text_settings(len(text_encoders)))
    )
    for own, trained in zip(model.text_encoders, text_encoders, strict=True):
        own.load_state_dict(trained.state_dict())
    initialize_encoder(model)
    freeze_for_stage1(model, "all")
    config = Stage1Config(
        output_dir=str(work_dir),
        trainable="all",
        pre_crop_size=None,
        max_steps=images // batch_size,
        per_device_train_batch_size=per_process_batch_size(batch_size),
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=300,
        timestep_sampling="stratified",
        min_timestep=min_timestep,
        logging_steps=25,
        save_steps=250,
        validation_steps=500,
        num_validation_images=16,
        seed=seed,
        **hardware_arguments(),
        **arguments,
    )
    diffusion_decoder = family.from_pretrained(
        str(teacher_dir), timestep_sampling=config.timestep_sampling, min_timestep=config.min_timestep
    )
    components = hub.load_diffusion_components(teacher_dir)
    scheduler = components["scheduler"]
    components |= diffusion_decoder.pipeline_components() | {"scheduler": scheduler}
    if "transformer" in components:
        fold_empty_positions(components["transformer"])
    trainer = Stage1Trainer(
        model,
        diffusion_decoder,
        config,
        ImagesOnly(images, seed=seed + 2),
        build_image_processor(),
        {name: components[name] for name in family.tokenizers if name in components},
        validation_dataset=ImagesOnly(16, split="test", seed=31),
    )
    validate = partial(
        print_reconstruction_scores,
        components=components,
        scene_classifier=SceneClassifier.load(scene_classifier_path),
    )
    trainer.add_callback(ValidationCallback(validate, every=500))
    trainer.train(resume_from_checkpoint=last_checkpoint(work_dir))
    if trainer.is_world_process_zero():
        model.save_pretrained(output_dir)
        build_image_processor().save_pretrained(output_dir)
