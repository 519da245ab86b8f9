"""Stage 2: train a language model to read caption embeddings, from image-caption pairs.

    vlv train stage2 CONFIG.yaml --learning_rate 1e-5
    accelerate launch -m vlv.train.stage2 CONFIG.yaml

`configs/stage2.yaml` is the paper's recipe.
"""

import sys
from collections.abc import Sequence
from typing import Any

from transformers import set_seed

from vlv import VLVConfig, VLVForConditionalGeneration, VLVProcessor, hub
from vlv.tokenizer import load_tokenizer

from .callbacks import disable_loading_bars
from .data import load_pairs
from .freezing import freeze_for_stage2
from .lora import add_lora, merge_lora
from .parsing import errors_in_one_line, parse_config
from .running import fingerprints, output_folder
from .stage2_trainer import Stage2Config, Stage2Trainer
from .training_metadata import write_training_metadata

PROGRAM = "vlv train stage2"


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
    with errors_in_one_line(PROGRAM), output_folder(config):
        set_seed(config.seed)
        disable_loading_bars()
        if config.pairs is None:
            raise ValueError("pairs is not set: give a folder, a list, parquet, tar files or a data set (--pairs ...)")
        if config.model is None:
            raise ValueError("model is not set: give the stage-1 checkpoint (--model ...)")
        dataset = load_pairs(
            config.pairs,
            caption_column=config.caption_column,
            caption_lines=config.caption_lines,
            on_bad_caption=config.on_bad_caption,
            **config.data_options(),
        )
        new_language_model = VLVConfig.from_pretrained(config.model).text_config is None
        if new_language_model:
            encoder, image_processor = hub.load_encoder(config.model)
            model = VLVForConditionalGeneration.from_vlv_text_pretrained(encoder, config.language_model)
            processor = VLVProcessor(image_processor, load_tokenizer(config.language_model))
        else:
            model, processor = hub.load_captioner(config.model)
        freeze_for_stage2(model, config.trainable)
        if config.lora_rank:
            add_lora(model, config.lora_rank)
        trainer = Stage2Trainer(model, config, dataset, processor)
        trainer.settings = {
            **config.result_settings(),
            "pairs": {"source": config.pairs, "fingerprint": dataset.fingerprint()},
            **fingerprints(config, "model", *(["language_model"] if new_language_model else [])),
        }

        if trainer.train_to_end():
            if config.lora_rank:
                merge_lora(model)
            trainer.save_model()
            trainer.save_state()
            sources: dict[str, Any] = {"pairs": config.pairs}
            if new_language_model:
                sources["language_model"] = config.language_model
            write_training_metadata(trainer, "stage2", start=config.model, **sources)
            trainer.save_record()
    return trainer


if __name__ == "__main__":
    main()
