"""Stage 2: teach a language model to read caption embeddings, from image-caption pairs.

    vlv train stage2 CONFIG.yaml --learning_rate 1e-5
    accelerate launch -m vlv.train.stage2 CONFIG.yaml

`configs/stage2.yaml` is the paper's recipe.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlv import VLVConfig, VLVForConditionalGeneration, VLVProcessor, hub
from vlv.files import write_json

from .callbacks import ValidationCallback, readable_items
from .data import Stage2Collator, load_pairs
from .stage import StageConfig, run_stage
from .trainer import VLVTrainer


@dataclass
class Stage2Config(StageConfig):
    """Stage 2. Defaults are the paper's (VLV paper, sec. 4.1), for 8 devices; the rest is `TrainingArguments`."""

    TRAINABLE = ("projector", "projector+lm", "projector+lm+query_decoder", "all", "all+vision")

    model: str | None = field(
        default=None, metadata={"help": "The stage-1 checkpoint, or a captioner to go on from: folder or repo id."}
    )
    language_model: str = field(
        default="Qwen/Qwen2.5-3B", metadata={"help": "Any causal language model; not read where `model` has one."}
    )
    pairs: str | None = field(
        default=None,
        metadata={"help": "Folder with captions (sidecars or .jsonl), parquet files, or a data set."},
    )
    caption_column: str = field(default="caption", metadata={"help": "Column of a data set or parquet file."})
    trainable: str = field(
        default="all",
        metadata={
            "help": "'projector', 'projector+lm', 'projector+lm+query_decoder' (and Florence-2's decoder), 'all' (and its "
            "encoder, as the authors' script; VLV paper, table 4: each step helps), or 'all+vision'."
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={"help": "Above 0: the language model learns by LoRA of this rank, merged when saved at the end."},
    )
    max_caption_tokens: int = field(default=300, metadata={"help": "Longer captions are cut, and then have no EOS."})
    append_eos: bool = field(
        default=True,
        metadata={"help": "Captions learn to end. False as in the authors' script, where they are cut afterwards."},
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={"help": "Pad every caption to max_caption_tokens, as the authors' script; else to the longest."},
    )
    validation_steps: int = field(
        default=1000, metadata={"help": "Write sample captions every so many steps; 0: never."}
    )
    num_validation_images: int = field(default=8, metadata={"help": "How many samples."})

    output_dir: str = field(default="runs/stage2", metadata={"help": "Checkpoints, samples and the model go here."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Of AdamW."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "How the learning rate falls."})
    max_steps: int = field(default=100_000, metadata={"help": "Optimiser steps."})
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Pairs a device; the paper's total is 64."})


def freeze_for_stage2(model: VLVForConditionalGeneration, trainable: str) -> None:
    """Lets learn what `trainable` says (see `Stage2Config`). Queries, φ and text encoder stay frozen."""
    model.requires_grad_(False)
    model.language_projection.requires_grad_(True)
    if trainable != "projector":
        model.language_model.requires_grad_(True)
    florence = model.model.image_encoder
    if trainable == "projector+lm+query_decoder":
        florence.language_model.decoder.requires_grad_(True)
        florence.language_model.shared.requires_grad_(False)
    if trainable in ("all", "all+vision"):
        florence.language_model.requires_grad_(True)
        if not model.config.task_prompt_ids:
            florence.language_model.shared.requires_grad_(False)
    if trainable == "all+vision":
        florence.vision_tower.requires_grad_(True)
        florence.multi_modal_projector.requires_grad_(True)


def add_lora(model: VLVForConditionalGeneration, rank: int) -> None:
    """Puts LoRA layers on every linear layer of the language model; the rest of it is frozen."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError("LoRA needs the extra vlv[train] (pip install '.[train]' in its source folder)") from error
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model.language_model = get_peft_model(model.language_model, settings)


def merge_lora(model: VLVForConditionalGeneration) -> None:
    """Folds LoRA layers into the language model, so that what is saved is a plain model."""
    if hasattr(model.language_model, "merge_and_unload"):
        model.language_model = model.language_model.merge_and_unload()


class Stage2Trainer(VLVTrainer):
    """Trains a `VLVForConditionalGeneration` by the next-token loss of captions, their end included.

    Args:
        model: The captioner; what learns must be set already (`freeze_for_stage2`).
        args: A `Stage2Config`.
        train_dataset: Items with `image` and `caption`.
        processor: Prepares both, in the loader's workers; saved with every checkpoint.
        validation_dataset: Where sample captions come from; by default `train_dataset`.
    """

    def __init__(
        self,
        model: VLVForConditionalGeneration,
        args: Stage2Config,
        train_dataset,
        processor: VLVProcessor,
        validation_dataset=None,
        **kwargs,
    ):
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            data_collator=Stage2Collator(
                processor,
                args.max_caption_tokens,
                args.on_bad_image,
                append_eos=args.append_eos,
                pad_to_max_length=args.pad_to_max_length,
            ),
            processing_class=processor,
            **kwargs,
        )
        if args.validation_steps:
            self.validation_items = readable_items(
                validation_dataset or train_dataset, args.num_validation_images, processor.image_processor.load
            )
            self.add_callback(ValidationCallback(self.write_captions, args.validation_steps))

    def write_captions(self, model: VLVForConditionalGeneration, step: int, folder: Path) -> None:
        """Greedy captions beside the true ones, as `step-N.json`."""
        processor = self.processing_class
        pixels = processor(images=[item["image"] for item in self.validation_items]).pixel_values
        ids = model.generate(
            pixel_values=pixels.to(model.device, model.dtype),
            max_new_tokens=self.args.max_caption_tokens,
            do_sample=False,
        )
        captions = processor.batch_decode(ids, skip_special_tokens=True)
        rows = [
            {"written": written.strip(), "true": item["caption"]}
            for written, item in zip(captions, self.validation_items, strict=True)
        ]
        write_json(folder / f"step-{step:07d}.json", rows)


def build_stage2(config: Stage2Config) -> Stage2Trainer:
    """Loads everything that the configuration names."""
    if config.pairs is None:
        raise ValueError("pairs is not set: give a folder, parquet files or a data set (--pairs ...)")
    if config.model is None:
        raise ValueError("model is not set: give the stage-1 checkpoint (--model ...)")
    dataset = load_pairs(
        config.pairs, split=config.split, image_column=config.image_column, caption_column=config.caption_column
    )
    if VLVConfig.from_pretrained(config.model).text_config is None:
        encoder, image_processor = hub.load_encoder(config.model)
        model = VLVForConditionalGeneration.from_vlv_text_pretrained(encoder, config.language_model)
        processor = VLVProcessor(image_processor, hub.load_tokenizer(config.language_model))
    else:
        model, processor = hub.load_captioner(config.model)
    freeze_for_stage2(model, config.trainable)
    if config.lora_rank:
        add_lora(model, config.lora_rank)
    return Stage2Trainer(model, config, dataset, processor)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, resuming from the last checkpoint in `output_dir` if there is one, and saves the model there."""
    run_stage("stage2", Stage2Config, build_stage2, _facts, arguments, merge_lora)


def _facts(config: Stage2Config) -> dict[str, Any]:
    started_anew = VLVConfig.from_pretrained(config.model).text_config is None  # else it was not read
    return {"pairs": config.pairs, **({"language_model": config.language_model} if started_anew else {})}


if __name__ == "__main__":
    main()
