"""The miniature's encoder: Florence-2's architecture at 64 x 64, trained by stage 1 on images alone."""

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from transformers import CLIPTextConfig, PreTrainedTokenizerBase

from vlv import VLVConfig, VLVImageProcessor, VLVModel
from vlv.diffusion_decoder import StableDiffusionDecoder
from vlv.pipelines import VLVReconstructionPipeline
from vlv.train import Stage1Config, Stage1Trainer, ValidationCallback, freeze_for_stage1, last_checkpoint

from .evaluation import evaluation_items, reconstruct
from .scene_classifier import SceneClassifier
from .scoring import score_scenes
from .teacher import build_scheduler
from .training import ON_THIS_MACHINE, SceneDataset, share_of

NUM_QUERY_TOKENS = 24
GRID = 8  # the vision tower leaves 8 x 8 places
INITIALIZER_RANGE = 0.09  # 1 / sqrt(width): at the usual 0.02 an untrained encoder this narrow hardly sees its image
MIN_TIMESTEP = 400  # below it a wrong caption costs the teacher a fifth of what it costs above (README, "Stage 1")


def build_encoder_config(text_encoder_config: CLIPTextConfig, num_query_tokens: int = NUM_QUERY_TOKENS) -> VLVConfig:
    """A vision tower of 8 x 8 places and one mean token, three encoder and two decoder layers, 128 wide, no dropout.

    At 64 x 64 Florence-2's own strides would leave 2 x 2 places, hence `patch_stride`.
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
    )


@torch.no_grad()
def initialise(model: VLVModel, position_scale: float = 3.0, branch_scale: float = 0.1) -> None:
    """Gives an untrained encoder what pretraining gives a Florence-2: a sense of place.

    By the library's own initial weights positions are 150 times fainter than what the vision tower sees, and every
    residual branch of the transformer is as loud as what it is added to. So queries see the mean of the picture, and
    even when told the truth learn no object within 12,800 pictures; from these weights they name 0.86 of all.

    - Position embeddings become as strong as the features that they are added to (`position_scale`).
    - Self-attention and feed-forward layers start near zero (`branch_scale`), so that tokens pass as they are.
    - Every query starts as the position code of one of 24 places (fewer queries take every so-manieth of them), and
      cross-attention as the likeness of the two.
    """
    projector, transformer = model.image_encoder.multi_modal_projector, model.image_encoder.language_model
    positions = projector.image_position_embed
    for embedding in (positions.row_embeddings, positions.column_embeddings):
        nn.init.normal_(embedding.weight, std=position_scale)
    blank = torch.zeros(1, projector.vision_embedding_dim, GRID, GRID)
    places = positions(blank).flatten(2).transpose(1, 2)  # (1, 64, d)
    codes = projector.image_proj_norm(projector.image_projection(places))[0]  # (64, d_model)
    anchors = [row * GRID + column for row in (1, 2, 5, 6) for column in (0, 1, 3, 4, 6, 7)]
    chosen = anchors[:: len(anchors) // model.config.num_query_tokens][: model.config.num_query_tokens]
    model.query_tokens.copy_(codes[chosen][None])
    for layer in transformer.decoder.layers:
        layer.encoder_attn.q_proj.weight.copy_(layer.encoder_attn.k_proj.weight)
    for layer in [*transformer.encoder.layers, *transformer.decoder.layers]:
        layer.self_attn.out_proj.weight.mul_(branch_scale)
        layer.fc2.weight.mul_(branch_scale)


def build_image_processor() -> VLVImageProcessor:
    """64 x 64, no crop."""
    return VLVImageProcessor(size={"height": 64, "width": 64})


class ImagesOnly(SceneDataset):
    """Pictures of scenes as stage 1 wants them: `{"image": (3, 64, 64) uint8 tensor}` and nothing else."""

    def __getitem__(self, index: int) -> dict:
        return {"image": super().__getitem__(index)["pixels"]}


def scoring(
    decoder: StableDiffusionDecoder, tokenizer: PreTrainedTokenizerBase, scene_classifier_path: str | Path, n: int = 48
) -> Callable[[VLVModel, int, Path], None]:
    """What a `ValidationCallback` calls to print how much of unseen scenes is found in their reconstructions."""
    scene_classifier = SceneClassifier.load(scene_classifier_path)

    def score(model: VLVModel, step: int, folder: Path) -> None:
        pipeline = VLVReconstructionPipeline(
            model, decoder.vae, decoder.unet, decoder.scheduler, build_image_processor(), tokenizer
        )
        pipeline.scheduler = build_scheduler()
        pipeline.set_progress_bar_config(disable=True)
        for split in ("test", "combo"):
            pixels, scenes = evaluation_items(split, n)
            found = scene_classifier.read(reconstruct(pipeline, pixels, guidance_scale=2.0, steps=15))
            print(f"step {step}, {split}: {score_scenes(found, scenes)}", flush=True)

    return score


def train_encoder(
    output_dir: str | Path,
    work_dir: str | Path,
    teacher_dir: str | Path,
    scene_classifier_path: str | Path,
    images: int = 240_000,
    batch_size: int = 64,
    learning_rate: float = 1e-3,
    num_query_tokens: int = NUM_QUERY_TOKENS,
    seed: int = 0,
    **arguments,
) -> None:
    """Stage 1 by the project's own trainer: encoder from random weights, teacher frozen, images of `train`."""
    teacher = StableDiffusionPipeline.from_pretrained(teacher_dir, safety_checker=None)
    torch.manual_seed(seed)
    model = VLVModel(build_encoder_config(teacher.text_encoder.config, num_query_tokens))
    model.text_encoder.load_state_dict(teacher.text_encoder.state_dict())
    initialise(model)
    freeze_for_stage1(model, "all")
    config = Stage1Config(
        output_dir=str(work_dir),
        trainable="all",
        pre_crop_size=None,
        max_steps=images // batch_size,
        per_device_train_batch_size=share_of(batch_size),
        learning_rate=learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=300,
        timestep_sampling="stratified",
        min_timestep=MIN_TIMESTEP,
        logging_steps=25,
        save_steps=250,
        validation_steps=500,
        num_validation_images=16,
        seed=seed,
        **ON_THIS_MACHINE,
        **arguments,
    )
    decoder = StableDiffusionDecoder(
        teacher.vae, teacher.unet, teacher.scheduler.config, config.timestep_sampling, config.min_timestep
    )
    trainer = Stage1Trainer(
        model,
        decoder,
        config,
        ImagesOnly(images, seed=seed + 2),
        build_image_processor(),
        teacher.tokenizer,
        validation_dataset=ImagesOnly(16, split="test", seed=31),
    )
    trainer.add_callback(ValidationCallback(scoring(decoder, teacher.tokenizer, scene_classifier_path), every=500))
    trainer.train(resume_from_checkpoint=last_checkpoint(work_dir))
    if trainer.is_world_process_zero():
        model.save_pretrained(output_dir)
        build_image_processor().save_pretrained(output_dir)
