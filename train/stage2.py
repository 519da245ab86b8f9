"""Stage 2: train a language model to read caption embeddings, from image-caption pairs.

    vlv train stage2 CONFIG.yaml --learning_rate 1e-5
    accelerate launch -m vlv.train.stage2 CONFIG.yaml

`configs/stage2.yaml` is the paper's recipe.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import set_seed

from vlv import VLVConfig, VLVForConditionalGeneration, VLVModel, VLVProcessor, hub
from vlv.language_model import load_language_model
from vlv.tokenizer import fit_tokenizer, load_tokenizer

from .caches import open_conditioning, open_vision_features
from .callbacks import disable_loading_bars
from .census import sample_prompts
from .data import load_pairs
from .dry_run import dry_run
from .evaluating import find_evaluation_set
from .four_bits import add_quantised, load_in_4_bits
from .freezing import freeze_for_stage2
from .instructions import count_instructions, record_instructions
from .lora import add_lora, merge_lora
from .parsing import errors_in_one_line, parse_config
from .running import fingerprints, not_loaded, output_folder, provenance, say_how_to_use, train_and_save
from .saving import loading_whole_models
from .stage2_trainer import LANGUAGE_MODEL, Stage2Config, Stage2Trainer

PROGRAM = "vlv train stage2"
WITHOUT_DOWNLOAD = (
    "Pass a folder, repo id or GGUF file (--language_model); to try the stage without a download, go on with a "
    "captioner, which has a language model: --model checkpoints/vlv-miniature"
)


def main(arguments: Sequence[str] | None = None) -> Stage2Trainer:
    """Trains and saves the model in `output_dir`. Resumes from the last checkpoint there, if there is one.

    Args:
        arguments: `[CONFIG.yaml] [--name value ...]`; by default the command line.

    Returns:
        The trainer, after training.

    Raises:
        SystemExit: With a message of one line, if a setting is wrong or something could not be loaded.
    """
    config = parse_config(Stage2Config, sys.argv[1:] if arguments is None else arguments, PROGRAM)
    with errors_in_one_line(PROGRAM, config), dry_run(config) as rehearsal, output_folder(config):
        set_seed(config.seed)
        disable_loading_bars()
        if config.pairs is None:
            raise ValueError("pairs is not set: give a folder, a list, parquet, tar files or a data set (--pairs ...)")
        if config.model is None:
            raise ValueError("model is not set: give the stage-1 checkpoint (--model ...)")
        columns = {
            "caption_column": config.caption_column,
            "prompt_column": config.prompt_column,
            "caption_lines": config.caption_lines,
            "on_bad_caption": config.on_bad_caption,
        }
        dataset = load_pairs(config.pairs, **columns, **config.data_options())
        evaluation = find_evaluation_set(config, dataset, load_pairs, **columns)
        with loading_whole_models():
            is_captioner = VLVConfig.from_pretrained(config.model).text_config is not None
            new_language_model = config.replace_language_model or not is_captioner
            if new_language_model:
                config.language_model = config.language_model or LANGUAGE_MODEL
                encoder, image_processor = hub.load_encoder(config.model)
                try:
                    model = add_language_model(
                        encoder,
                        config.language_model,
                        config.gguf_file,
                        config.load_in_4bit,
                        compute_dtype=torch.bfloat16 if config.bf16 or config.fp16 else torch.float32,
                    )
                    tokenizer = load_tokenizer(config.language_model, config.gguf_file)
                except OSError as error:
                    raise not_loaded(config, "language_model", LANGUAGE_MODEL, error, WITHOUT_DOWNLOAD) from error
                processor = VLVProcessor(
                    image_processor,
                    fit_tokenizer(tokenizer, model.language_model),
                    image_seq_length=model.config.num_query_tokens,
                )
                model.config.image_token_id = processor.image_token_id
            elif config.language_model is not None:
                raise ValueError(
                    f"language_model is {config.language_model}, but {config.model} is a captioner, which has its "
                    "own; leave it out, start from the stage-1 model, or pass --replace_language_model"
                )
            elif config.load_in_4bit:
                raise ValueError(
                    f"load_in_4bit is set, but the language model of {config.model} is part of a captioner; it is for "
                    "language_model, with a stage-1 model or with --replace_language_model"
                )
            else:
                model, processor = hub.load_captioner(config.model)
            record_instructions(model.config, count_instructions(sample_prompts(dataset, config.seed)))
            freeze_for_stage2(model, config.trainable)
            if config.lora_rank:
                add_lora(model, config.lora_rank)
            all_data = [dataset] if evaluation is None else [dataset, evaluation]
            features = open_vision_features(config, all_data, processor.image_processor, model.model)
            conditioning = open_conditioning(config, all_data, processor.image_processor, model.model)
        trainer = Stage2Trainer(
            model,
            config,
            dataset,
            processor,
            eval_dataset=evaluation,
            features=features,
            conditioning=conditioning,
        )
        sources = {
            "pairs": {"source": config.pairs, "fingerprint": dataset.fingerprint()},
            **fingerprints(config, "model", *(["language_model"] if new_language_model else [])),
        }
        if config.gguf_file is not None and (file := Path(str(config.language_model), config.gguf_file)).is_file():
            sources["language_model"]["fingerprint"] = hub.fingerprint(file)
        trainer.settings = {**config.result_settings(), **sources}
        folder = hub.resolve(config.model, allow_patterns=["*.json"])
        diffusion_model = hub.diffusion_model_of(config.model, folder)
        trainer.provenance = provenance("stage2", config.model, sources, diffusion_model)

        if rehearsal is not None:
            rehearsal.run(trainer)
            return trainer
        train_and_save(trainer, config)
        if config.lora_rank and not config.load_in_4bit:  # merging into 4 bits would round the LoRA layers away
            merge_lora(model)
        say_how_to_use(config, "caption")
    return trainer


def add_language_model(
    encoder: VLVModel,
    language_model: str,
    gguf_file: str | None = None,
    load_in_4bit: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> VLVForConditionalGeneration:
    """A captioner of an encoder and a language model: a folder, repo id or GGUF file.

    Args:
        load_in_4bit: Stores the linear layers of the language model in 4 bits.
        compute_dtype: The precision in which those compute.

    Raises:
        ImportError: If a library for 4 bits or GGUF is not installed.
        ValueError: If `language_model` is no causal language model.
    """
    try:
        if load_in_4bit:
            return add_quantised(encoder, load_in_4_bits(language_model, gguf_file, compute_dtype))
        loaded = load_language_model(language_model, gguf_file)
        return VLVForConditionalGeneration.from_vlv_text_pretrained(encoder, loaded)
    except ValueError as error:
        if not str(error).startswith("Unrecognized"):  # the message lists all types of models
            raise
        raise ValueError(
            f"language_model {language_model} is not a causal language model of transformers; name another, such as "
            f"--language_model {LANGUAGE_MODEL}"
        ) from error


if __name__ == "__main__":
    main()
