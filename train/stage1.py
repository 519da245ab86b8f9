"""Stage 1: train caption embeddings from images alone, by the loss of a frozen text-to-image model.

    vlv train stage1 CONFIG.yaml --learning_rate 1e-4
    accelerate launch -m vlv.train.stage1 CONFIG.yaml

`configs/stage1.yaml` is the paper's recipe.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from transformers import set_seed

from vlv import VLVImageProcessor, VLVModel, hub
from vlv.diffusion_decoder import load_diffusion_decoder
from vlv.tokenizer import load_tokenizer

from .callbacks import disable_loading_bars
from .data import load_images
from .dry_run import dry_run
from .encoder_lora import add_encoder_lora, merge_encoder_lora
from .evaluating import find_evaluation_set
from .freezing import freeze_for_stage1
from .parsing import errors_in_one_line, parse_config
from .running import fingerprints, finish, output_folder, provenance
from .stage1_trainer import Stage1Config, Stage1Trainer

PROGRAM = "vlv train stage1"


def main(arguments: Sequence[str] | None = None) -> Stage1Trainer:
    """Trains and saves the model in `output_dir`. Resumes from the last checkpoint there, if there is one.

    Args:
        arguments: `[CONFIG.yaml] [--name value ...]`; by default the command line.

    Returns:
        The trainer, after training.

    Raises:
        SystemExit: With a message of one line, if a setting is wrong or something could not be loaded.
    """
    config = parse_config(Stage1Config, sys.argv[1:] if arguments is None else arguments, PROGRAM)
    with errors_in_one_line(PROGRAM), dry_run(config) as rehearsal, output_folder(config):
        set_seed(config.seed)
        disable_loading_bars()
        if config.images is None:
            raise ValueError(
                "images is not set: give a folder, a list, parquet, tar files or a data set (--images ...)"
            )
        dataset = load_images(config.images, **config.data_options())
        diffusion_model = find_diffusion_model(config)
        diffusion_decoder = load_diffusion_decoder(
            diffusion_model.source,
            revision=diffusion_model.revision,
            dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32,
            timestep_sampling=config.timestep_sampling,
            min_timestep=config.min_timestep,
            max_timestep=config.max_timestep,
            snr_gamma=config.snr_gamma,
            loss=config.loss,
            vae_dtype=getattr(torch, config.vae_dtype),
        )
        model, image_processor = load_model(config)
        freeze_for_stage1(model, config.trainable)
        if config.encoder_lora_rank:
            add_encoder_lora(model, config.encoder_lora_rank)
        revision = diffusion_model.revision or "main"
        tokenizer = load_tokenizer(diffusion_model.source, subfolder="tokenizer", revision=revision)
        evaluation = find_evaluation_set(config, dataset, load_images)
        trainer = Stage1Trainer(
            model, diffusion_decoder, config, dataset, image_processor, tokenizer, eval_dataset=evaluation
        )
        if not diffusion_model.is_known:  # its files were not in the cache
            diffusion_model = hub.find_diffusion_model(diffusion_model.source)
        start = "image_encoder" if config.model is None else "model"
        sources = {
            "images": {"source": config.images, "fingerprint": dataset.fingerprint()},
            "diffusion_model": {"source": diffusion_model.source, "fingerprint": diffusion_model.fingerprint},
            **fingerprints(config, start),
        }
        trainer.settings = {**config.result_settings(), **sources}
        trainer.provenance = provenance("stage1", config.model, sources, diffusion_model)

        if rehearsal is not None:
            rehearsal.run(trainer)
        elif trainer.train_to_end():
            finish(trainer, config)
            if config.encoder_lora_rank:
                merge_encoder_lora(model)
    return trainer


def find_diffusion_model(config: Stage1Config) -> hub.DiffusionModel:
    """The text-to-image model that is set, or else that of the model to continue from.

    Raises:
        ValueError: If none is set, and the model does not name one.
    """
    if config.diffusion_model is None:
        assert config.model is not None
        folder = hub.resolve(config.model, allow_patterns=["*.json"])
        found = hub.diffusion_model_of(config.model, folder)
        if found is None:
            raise ValueError(
                f"diffusion_model is not set, and {config.model} does not name the one that it was trained with; set "
                "it to a diffusers folder or repo id"
            )
        found.check(config.model)
        return found
    return hub.find_diffusion_model(config.diffusion_model)


def load_model(config: Stage1Config) -> tuple[VLVModel, VLVImageProcessor]:
    """The model to continue from, or a new one from a Florence-2 and the diffusion model's text encoder.

    Raises:
        OSError: If a model could not be loaded.
        ValueError: If a model is damaged, or `check_shape_settings` fails.
    """
    if config.model is not None:
        model, image_processor = hub.load_encoder(config.model)
        check_shape_settings(config, model, image_processor)
        return model, image_processor
    settings: dict[str, Any] = {"attend_all_queries": config.attend_all_queries}
    if config.num_query_tokens is not None:
        settings["num_query_tokens"] = config.num_query_tokens
    assert config.image_encoder is not None and config.diffusion_model is not None
    model = VLVModel.from_vision_text_pretrained(config.image_encoder, config.diffusion_model, **settings)
    size = {"height": config.encoder_image_size, "width": config.encoder_image_size}
    return model, VLVImageProcessor(size=size, pre_crop_size=config.pre_crop_size)


def check_shape_settings(config: Stage1Config, model: VLVModel, image_processor: VLVImageProcessor) -> None:
    """Refuses settings that contradict the model to continue from, whose shape and image sizes are fixed.

    Raises:
        ValueError: If a setting is neither the default nor the model's own value.
    """
    own = {
        "num_query_tokens": model.config.num_query_tokens,
        "attend_all_queries": model.config.attend_all_queries,
        "encoder_image_size": image_processor.size["height"],
        "pre_crop_size": image_processor.pre_crop_size or None,
    }
    for setting in fields(config):
        if setting.name in own:
            value = getattr(config, setting.name)
            if value not in (setting.default, own[setting.name]):
                raise ValueError(
                    f"{setting.name} is {value}, but {config.model} has {own[setting.name]}; leave it out, or start "
                    "from image_encoder and diffusion_model"
                )


if __name__ == "__main__":
    main()
