"""Stage 1: train caption embeddings from images alone, by the loss of a frozen text-to-image model.

    vlv train stage1 CONFIG.yaml --learning_rate 1e-4
    accelerate launch -m vlv.train.stage1 CONFIG.yaml

`configs/stage1.yaml` is the paper's recipe.
"""

import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from transformers import Florence2Config, set_seed

from vlv import VLVImageProcessor, VLVModel, hub
from vlv.diffusion_decoder import DiffusionDecoder, family_of
from vlv.modeling_vlv import examine_backbone, image_encoder_config
from vlv.tokenizer import load_tokenizer
from vlv.vision_backbone import backbone_image_processor

from .caches import open_moments, open_vision_features
from .callbacks import disable_loading_bars
from .data import load_images
from .dry_run import dry_run
from .encoder_lora import add_encoder_lora, merge_encoder_lora
from .evaluating import find_evaluation_set
from .freezing import freeze_for_stage1
from .parsing import errors_in_one_line, parse_config
from .running import fingerprints, not_loaded, output_folder, provenance, say_how_to_use, train_and_save
from .saving import loading_whole_models
from .stage1_trainer import DIFFUSION_MODEL, FLORENCE_IMAGE_SIZE, IMAGE_ENCODER, Stage1Config, Stage1Trainer

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
    with errors_in_one_line(PROGRAM, config), dry_run(config) as rehearsal, output_folder(config):
        set_seed(config.seed)
        disable_loading_bars()
        if config.images is None:
            raise ValueError(
                "images is not set: give a folder, a list, parquet, tar files or a data set (--images ...)"
            )
        dataset = load_images(config.images, **config.data_options())
        diffusion_model, folder = find_diffusion_model(config)
        with loading_whole_models():
            family = family_of(folder)
            diffusion_decoder = family.from_pretrained(
                str(folder),
                dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32,
                vae_dtype=getattr(torch, config.vae_dtype),
                **config.decoder_options(),
            )
            config.timestep_sampling = diffusion_decoder.timestep_sampling
            model, image_processor = load_model(config, folder, family)
            family.check_model(
                diffusion_decoder.denoiser, model.config, config.model or "the model", diffusion_model.source
            )
            if config.model is not None and config.diffusion_model is not None:
                hub.check_text_encoders(model, folder, config.model, diffusion_model.source)
            freeze_for_stage1(model, config.trainable)
            if config.encoder_lora_rank:
                add_encoder_lora(model, config.encoder_lora_rank)
            tokenizers = {
                name: load_tokenizer(folder / name)
                for name in family.tokenizers[: len(model.config.text_encoder_configs)]
            }
            family.check_tokenizers(tokenizers, model.config, config.model or "the model", diffusion_model.source)
            evaluation = find_evaluation_set(config, dataset, load_images)
            all_data = [dataset] if evaluation is None else [dataset, evaluation]
            moments = open_moments(config, all_data, image_processor, diffusion_decoder)
            features = open_vision_features(config, all_data, image_processor, model)
        trainer = Stage1Trainer(
            model,
            diffusion_decoder,
            config,
            dataset,
            image_processor,
            tokenizers,
            eval_dataset=evaluation,
            moments=moments,
            features=features,
        )
        start = "image_encoder" if config.model is None else "model"
        sources = {
            "images": {"source": config.images, "fingerprint": dataset.fingerprint()},
            "diffusion_model": {
                "source": diffusion_model.source,
                "fingerprint": hub.fingerprint(folder),
            },
            **fingerprints(config, start),
        }
        trainer.settings = {**config.result_settings(), **sources}
        trainer.provenance = provenance("stage1", config.model, sources, diffusion_model)

        if rehearsal is not None:
            rehearsal.run(trainer)
            return trainer
        train_and_save(trainer, config)
        if config.encoder_lora_rank:
            merge_encoder_lora(model)
        say_how_to_use(config, "reconstruct")
    return trainer


def find_diffusion_model(config: Any) -> tuple[hub.DiffusionModel, Path]:
    """The text-to-image model that is set, or else that of the model to continue from, and the folder of its files.

    Args:
        config: Of stage 1 or 3.

    Raises:
        OSError: If it could not be loaded; the message names the setting.
        ValueError: If none is set and the model does not name one, or the one that it names has changed.
    """
    if config.diffusion_model is not None:
        found = hub.find_diffusion_model(config.diffusion_model)
    else:
        assert config.model is not None
        own_folder = hub.resolve(config.model, allow_patterns=["*.json"])
        hub.read_config(own_folder)  # raises for a model of another type
        own = hub.diffusion_model_of(config.model, own_folder)
        if own is None:
            raise ValueError(
                f"diffusion_model is not set, and {config.model} does not name the one that it was trained with; set "
                "it to a diffusers folder or repo id"
            )
        own.check(config.model)
        found = own
    patterns = list(hub.DIFFUSION_FILES)
    if config.diffusion_model is not None:  # for a new model, or to compare with those of the one to continue from
        patterns += hub.COMPARED_FILES
    if getattr(config, "t5_text_encoder", False):  # a setting of stage 1 alone
        patterns += hub.OPTIONAL_TEXT_ENCODER_FILES
    try:
        folder = hub.resolve(found.source, revision=found.revision, allow_patterns=patterns, pickles_allowed=True)
    except FileNotFoundError as error:
        if config.diffusion_model is None:  # the message names the one of `model`
            raise
        raise not_loaded(config, "diffusion_model", DIFFUSION_MODEL, error, _advice(config)) from error
    if not found.is_known:  # its files were not in the cache
        found = hub.find_diffusion_model(found.source)
    return found, folder


def _advice(config: Any) -> str:
    return "" if config.model is not None else "To try the stage without a download: --model checkpoints/vlv-miniature"


def load_model(
    config: Stage1Config, diffusion_model: Path, family: type[DiffusionDecoder]
) -> tuple[VLVModel, VLVImageProcessor]:
    """The model to continue from, or a new one from an image encoder and the diffusion model's text encoders.

    Args:
        diffusion_model: Folder with the text encoders.
        family: Of the diffusion model.

    Raises:
        OSError: If a model could not be loaded.
        ValueError: If a model is damaged, or `check_t5` or `check_shape_settings` fails.
    """
    if config.model is not None:
        model, image_processor = hub.load_encoder(config.model)
        check_shape_settings(config, model, image_processor)
        return model, image_processor
    settings: dict[str, Any] = {"attend_all_queries": config.attend_all_queries}
    if config.num_query_tokens is not None:
        settings["num_query_tokens"] = config.num_query_tokens
    assert config.image_encoder is not None
    if config.t5_text_encoder:
        check_t5(family, diffusion_model, str(config.diffusion_model))
    text_encoders = family.load_text_encoders(str(diffusion_model), with_optional=config.t5_text_encoder)
    vision, image_processor = start_of(config)
    if not isinstance(vision, Florence2Config):
        settings["query_decoder_config"] = config.query_decoder()
    settings |= family.text_settings(len(text_encoders))
    model = VLVModel.from_vision_text_pretrained(config.image_encoder, text_encoders, **settings)
    return model, image_processor


def start_of(config: Stage1Config) -> tuple[Any, VLVImageProcessor]:
    """The configuration of the Florence-2 or vision backbone to start from, and the image processor for it.

    Raises:
        OSError: If there is no such folder or repository.
        ValueError: If the model gives no features of patches, or not for images of the size that is set.
    """
    assert config.image_encoder is not None
    try:
        vision = image_encoder_config(config.image_encoder)
    except OSError as error:
        raise not_loaded(config, "image_encoder", IMAGE_ENCODER, error, _advice(config)) from error
    if isinstance(vision, Florence2Config):
        own = {field.name: field.default for field in fields(config) if field.name.startswith("query_decoder_")}
        if wrong := [name for name, default in own.items() if getattr(config, name) != default]:
            raise ValueError(
                f"{wrong[0]} is set, but image_encoder {config.image_encoder} is a Florence-2, which has a decoder of "
                "its own; leave it out"
            )
        size = dict.fromkeys(("height", "width"), config.encoder_image_size or FLORENCE_IMAGE_SIZE)
        return vision, VLVImageProcessor(size=size, pre_crop_size=config.pre_crop_size)
    processor = backbone_image_processor(config.image_encoder, config.encoder_image_size, config.pre_crop_size)
    try:
        examine_backbone(vision, processor.size["height"], processor.size["width"])
    except ValueError as error:
        raise ValueError(f"image_encoder {config.image_encoder} does not fit: {error}") from error
    return vision, processor


def check_t5(family: type[DiffusionDecoder], folder: Path, source: str) -> None:
    """Refuses `t5_text_encoder` for a text-to-image model that has no T5.

    Raises:
        ValueError: If the family has no such text encoder, or the folder does not hold it.
    """
    if not family.optional_text_encoders:
        raise ValueError(
            f"t5_text_encoder is set, but {source} is a {family.title}, which reads no T5; leave t5_text_encoder out"
        )
    missing = [
        name for name in (*family.optional_text_encoders, family.tokenizers[-1]) if not (folder / name).is_dir()
    ]
    if missing:
        raise ValueError(
            f"t5_text_encoder is set, but {source} has no {' and no '.join(missing)}; give a folder with T5, or leave "
            "t5_text_encoder out"
        )


def check_shape_settings(config: Stage1Config, model: VLVModel, image_processor: VLVImageProcessor) -> None:
    """Refuses settings that contradict the model to continue from, whose shape and image sizes are fixed.

    Raises:
        ValueError: If a setting is neither the default nor the model's own value.
    """
    decoder = model.get_query_decoder().config
    own = {
        "num_query_tokens": model.config.num_query_tokens,
        "attend_all_queries": model.config.attend_all_queries,
        "t5_text_encoder": model.config.text_encoder_3_config is not None,
        "query_decoder_layers": decoder.decoder_layers,
        "query_decoder_width": decoder.d_model,
        "query_decoder_heads": decoder.decoder_attention_heads,
        "query_decoder_dropout": decoder.dropout,
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
