"""Stage 3: improve a captioner from images alone, by how well its captions explain them to the frozen decoder.

    vlv train stage3 CONFIG.yaml --images photos/ --model runs/stage2
    accelerate launch -m vlv.train.stage3 CONFIG.yaml

`configs/stage3/` has recipes; docs/stage3.md says what happens.
"""

import sys
from collections.abc import Sequence

import torch
from transformers import set_seed

from vlv import hub
from vlv.diffusion_decoder import family_of
from vlv.pipelines import DiffusionScorer
from vlv.tokenizer import load_tokenizer

from .caches import diffusion_image_size, open_conditioning, open_vision_features
from .callbacks import disable_loading_bars
from .data import load_images, load_pairs
from .dry_run import dry_run
from .evaluating import find_evaluation_set
from .freezing import freeze_for_stage2
from .lora import add_lora, merge_lora
from .parsing import errors_in_one_line, parse_config
from .running import fingerprints, output_folder, provenance, say_how_to_use, train_and_save
from .saving import loading_whole_models
from .stage1 import find_diffusion_model
from .stage3_config import Stage3Config
from .stage3_trainer import Stage3Trainer

PROGRAM = "vlv train stage3"


def main(
    arguments: Sequence[str] | None = None, scorer_class: type[DiffusionScorer] = DiffusionScorer
) -> Stage3Trainer:
    """Trains and saves the model in `output_dir`. Resumes from the last checkpoint there, if there is one.

    Args:
        arguments: `[CONFIG.yaml] [--name value ...]`; by default the command line.
        scorer_class: What gives the rewards.

    Returns:
        The trainer, after training.

    Raises:
        SystemExit: With a message of one line, if a setting is wrong or something could not be loaded.
    """
    config = parse_config(Stage3Config, sys.argv[1:] if arguments is None else arguments, PROGRAM)
    with errors_in_one_line(PROGRAM, config), dry_run(config) as rehearsal, output_folder(config):
        set_seed(config.seed)
        disable_loading_bars()
        if config.images is None:
            raise ValueError(
                "images is not set: give a folder, a list, parquet, tar files or a data set (--images ...)"
            )
        if config.model is None:
            raise ValueError("model is not set: give the captioner to start from (--model runs/stage2)")
        images = load_images(config.images, **config.data_options())
        if set(images.weights) != {1.0}:
            raise ValueError(
                "images have weights (@...), but stage 3 goes through all images in turn; leave the weights out, and "
                "name lists of the images that it shall see"
            )
        columns = {
            "caption_column": config.caption_column,
            "prompt_column": config.prompt_column,
            "caption_lines": config.caption_lines,
            "on_bad_caption": config.on_bad_caption,
        }
        pairs = None if config.pairs is None else load_pairs(config.pairs, **columns, **config.data_options())
        evaluation = find_evaluation_set(config, images, load_pairs, **columns)
        with loading_whole_models():
            own = hub.read_config(hub.resolve(config.model, allow_patterns=["*.json"]))  # raises for other kinds
            if own.get("text_config") is None:
                raise ValueError(
                    f"{config.model} is a stage-1 model, which writes no captions; train stage 2 from it first"
                )
            model, processor = hub.load_captioner(config.model)
            diffusion_model, folder = find_diffusion_model(config)
            family = family_of(folder)
            decoder = family.from_pretrained(
                str(folder),
                dtype=torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32,
                vae_dtype=getattr(torch, config.vae_dtype),
            )
            family.check_model(decoder.denoiser, model.config, config.model, diffusion_model.source)
            hub.check_text_encoders(model.model, folder, config.model, diffusion_model.source)
            tokenizers = {
                name: load_tokenizer(folder / name)
                for name in family.tokenizers[: len(model.config.text_encoder_configs)]
            }
            family.check_tokenizers(tokenizers, model.config, config.model, diffusion_model.source)
            scorer = scorer_class(
                model.model,
                decoder,
                tokenizers,
                num_pairs=config.reward_num_pairs,
                timestep_range=(config.reward_min_timestep, config.reward_max_timestep),
                batch_size=config.reward_batch_size,
            )
            freeze_for_stage2(model, config.trainable)
            if config.lora_rank:
                add_lora(model, config.lora_rank)
            all_data = [data for data in (images, pairs, evaluation) if data is not None]
            features = open_vision_features(config, all_data, processor.image_processor, model.model)
            conditioning = open_conditioning(config, all_data, processor.image_processor, model.model)
        sources = {
            "images": {"source": config.images, "fingerprint": images.fingerprint()},
            **({"pairs": {"source": config.pairs, "fingerprint": pairs.fingerprint()}} if pairs is not None else {}),
            "diffusion_model": {
                "source": diffusion_model.source,
                "fingerprint": hub.fingerprint(folder),
            },
            **fingerprints(config, "model"),
        }
        trainer = Stage3Trainer(
            model,
            config,
            images,
            processor,
            scorer,
            diffusion_image_size(config, processor.image_processor, decoder),
            sources["diffusion_model"]["fingerprint"],
            pairs,
            eval_dataset=evaluation,
            features=features,
            conditioning=conditioning,
        )
        trainer.settings = {**config.result_settings(), **sources, "scorer": scorer.settings()}
        trainer.provenance = provenance("stage3", config.model, sources, diffusion_model)

        if rehearsal is not None:
            rehearsal.run(trainer)
            return trainer
        train_and_save(trainer, config)
        if config.lora_rank:
            merge_lora(model)
        say_how_to_use(config, "caption")
    return trainer


if __name__ == "__main__":
    main()
