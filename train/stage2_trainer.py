"""Configuration and trainer of stage 2."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch.nn import functional as F

from vlv import VLVForConditionalGeneration, VLVProcessor
from vlv.files import write_json
from vlv.pipelines import generate_captions
from vlv.tokenizer import check_tokenizer

from .caches import CONDITIONING_DTYPES
from .caption_score import token_f1
from .checkpoints import say
from .data import Stage2Collator, prompts_of, readable_items
from .data.feature_cache import FeatureCache
from .freezing import freeze_for_stage2
from .packing import base_of, can_pack_fast, pack_captions, unpack_captions
from .parsing import GatherAction
from .stage_config import StageConfig
from .trainer import VLVTrainer
from .unfreezing import scheduled_unfreezing

LANGUAGE_MODEL = "Qwen/Qwen2.5-3B"


@dataclass
class Stage2Config(StageConfig):
    """Stage 2. Defaults are the paper's (VLV paper, sec. 4.1), for 8 devices; other options are `TrainingArguments`.

    Raises:
        ValueError: If a setting has a value that the stage cannot use, or two settings contradict each other.
    """

    TRAINABLE = ("projector", "projector+lm", "projector+lm+query_decoder", "all", "all+vision")
    RECIPES: ClassVar[tuple[str, ...]] = ("stage2*.yaml", "miniature-*.yaml")

    model: str | None = field(
        default=None,
        metadata={"help": "The stage-1 checkpoint, or a captioner to continue from: folder or repo id."},
    )
    language_model: str | None = field(
        default=None,
        metadata={
            "help": f"A causal language model: folder, repo id or GGUF file; by default {LANGUAGE_MODEL}. Not where "
            "`model` is a captioner, which has its own, unless replace_language_model is set."
        },
    )
    gguf_file: str | None = field(
        default=None, metadata={"help": "Name of a GGUF file in the folder or repository `language_model`."}
    )
    replace_language_model: bool = field(
        default=False,
        metadata={
            "help": "Where `model` is a captioner: use its encoder with `language_model`, and a new projection."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Load `language_model` in 4 bits (NF4, by bitsandbytes) and train it by LoRA (QLoRA); needs "
            "lora_rank. The trained model has dequantised weights."
        },
    )
    export_decoder: bool = field(
        default=False,
        metadata={
            "help": "Copy the text-to-image model of stage 1 into output_dir at the end; by default it is referred to."
        },
    )
    pairs: str | None = field(
        default=None,
        metadata={
            "help": "Where images and captions are: a folder with .txt or .caption files, a list (.jsonl, .json, "
            ".csv, .tsv), parquet or tar files, or a data set such as org/name; several with weights as `a b@0.5`, in "
            "YAML as [a, {source: b, weight: 0.5}].",
            "nargs": "+",
            "action": GatherAction,
        },
    )
    eval_pairs: str | None = field(
        default=None,
        metadata={
            "help": "Where the pairs for evaluation are, as for `pairs`; see also eval_share and eval_steps.",
            "nargs": "+",
            "action": GatherAction,
        },
    )
    caption_column: str = field(
        default="caption",
        metadata={"help": "Caption column of a table or list; without 'caption', 'text' and others."},
    )
    prompt_column: str = field(
        default="prompt",
        metadata={
            "help": "Column of instructions such as 'as tags', which the model reads before it writes the caption of "
            "the row. Used where a table, a list or a tar's JSON has it; '' reads none. A row may have none."
        },
    )
    caption_lines: str = field(
        default="first",
        metadata={
            "help": "Of the lines of a sidecar and the entries of a list in a column, which are captions: 'first', "
            "'random' (one, drawn anew each epoch), 'all' (each is a sample) or 'whole' (joined). A text in a table "
            "is one caption."
        },
    )
    on_bad_caption: str = field(
        default="skip",
        metadata={"help": "Captions that are missing, empty or not text: 'skip' (counted and named) or 'error'."},
    )
    trainable: str = field(
        default="all",
        metadata={
            "help": "'projector', 'projector+lm', 'projector+lm+query_decoder' (and Florence-2's decoder), 'all' (and "
            "its encoder, as the authors' script; VLV paper, table 4: each step helps), or 'all+vision'."
        },
    )
    lora_rank: int = field(
        default=0,
        metadata={"help": "Above 0: train the language model by LoRA of this rank, merged into it at the end."},
    )
    unfreeze: str | None = field(
        default=None,
        metadata={
            "help": "Train parts from a later step on, such as '0: projector, 1000: projector+lm, 5000: all', by "
            "values of `trainable`, which is then the last of them."
        },
    )
    language_model_activation_checkpointing: bool = field(
        default=False,
        metadata={"help": "Recompute the language model's activations to save memory."},
    )
    merge_lora_checkpoints: bool = field(
        default=False,
        metadata={
            "help": "Make each checkpoint of a LoRA run a complete model, with merged weights; by default it holds "
            "the LoRA layers and all but the language model. Checkpoints of other runs are complete models."
        },
    )
    max_caption_tokens: int = field(
        default=300, metadata={"help": "Longer captions are cut to this length, and then have no EOS."}
    )
    append_eos: bool = field(
        default=True,
        metadata={
            "help": "End captions with EOS, so that the model learns where to stop. False as in the authors' script, "
            "which cuts generated captions instead."
        },
    )
    pad_to_max_length: bool = field(
        default=False,
        metadata={
            "help": "Pad captions to max_caption_tokens, as the authors' script, and not to the batch's longest."
        },
    )
    packing: bool | None = field(
        default=None,
        metadata={
            "help": "Let the language model read the captions of a batch in one row, each after its own image, at its "
            "own positions and with its own attention, instead of in padded rows: the same loss in less time. By "
            "default on CPUs, where the language model can, and pad_to_max_length, compile_blocks and torch_compile "
            "are off."
        },
    )
    cache_conditioning: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a cache: of each image what the language projection reads, which a frozen encoder "
            "gives, in conditioning_dtype. What is missing is computed before the training, once; then only the "
            "projection and the language model run. For trainable 'projector' and 'projector+lm'."
        },
    )
    conditioning_dtype: str = field(
        default="bfloat16",
        metadata={
            "help": "Precision of cache_conditioning: 'bfloat16' (0.16 MB an image at full size; in bf16 training the "
            "losses are those without the cache) or 'float32' (0.32 MB; in float32 training, too)."
        },
    )
    validation_steps: int = field(
        default=1000, metadata={"help": "Write captions of validation images every this many steps; 0: never."}
    )
    num_validation_images: int = field(default=8, metadata={"help": "Number of validation images."})

    output_dir: str = field(
        default="runs/stage2", metadata={"help": "Folder of checkpoints, validation samples and the trained model."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of AdamW."})
    lr_scheduler_type: str = field(default="linear", metadata={"help": "Schedule of the learning rate."})
    max_steps: int = field(default=100_000, metadata={"help": "Number of optimiser steps."})
    per_device_train_batch_size: int = field(
        default=8, metadata={"help": "Pairs per device; the paper's total is 64."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.merge_lora_checkpoints and self.save_only_trainable:
            raise ValueError("merge_lora_checkpoints does not work with save_only_trainable; leave one of them out")
        self._check_packing()
        if self.conditioning_dtype not in CONDITIONING_DTYPES:
            raise ValueError(
                f"conditioning_dtype is {self.conditioning_dtype!r}; expected one of {CONDITIONING_DTYPES}"
            )
        if self.cache_conditioning is not None and self.cache_vision_features is not None:
            raise ValueError(
                "cache_conditioning and cache_vision_features are given, but with the first nothing reads the second; "
                "leave one of them out"
            )
        if self.unfreeze is not None and self.lora_rank:
            raise ValueError("unfreeze does not work with lora_rank; leave one of them out")
        if self.load_in_4bit and not self.lora_rank:
            raise ValueError(
                "load_in_4bit is set, but weights in 4 bits cannot be trained themselves; pass --lora_rank, such as "
                "16, or leave load_in_4bit out"
            )
        if self.gguf_file is not None and self.language_model is None:
            raise ValueError(f"gguf_file is {self.gguf_file}, but language_model is not set; name its folder or repo")

    def rounding_caches(self) -> dict[str, bool]:
        """As in `StageConfig`. Conditioning in bfloat16 changes nothing where it would be rounded so in any case."""
        rounded = self.cache_conditioning is not None and self.conditioning_dtype == "bfloat16"
        return super().rounding_caches() | ({} if getattr(self, "bf16") else {"cache_conditioning": rounded})  # noqa: B009

    def _check_packing(self) -> None:
        """Turns packing off where it does not go with other settings. Raises `ValueError` if it is asked for."""
        for name in ("pad_to_max_length", "compile_blocks", "torch_compile"):
            if getattr(self, name) and self.packing:
                why = "pads what packing leaves out" if name == "pad_to_max_length" else "needs rows of one length"
                raise ValueError(f"packing does not work with {name}, which {why}; leave one of them out")
            if getattr(self, name):
                self.packing = False


class Stage2Trainer(VLVTrainer):
    """Trains a `VLVForConditionalGeneration` by the next-token loss of captions.

    Args:
        model: The captioner, frozen in part by `freeze_for_stage2`. One without `config.image_token_id` is given the
            processor's.
        args: The configuration.
        train_dataset: Items with `image` and `caption`.
        processor: Prepares both in the data loader's workers; saved with every checkpoint.
        validation_dataset: Source of the validation images; by default `eval_dataset`, or else `train_dataset`.
        eval_dataset: Items with `image` and `caption`, for the evaluation.
        features: The cache of `cache_vision_features`.
        conditioning: The cache of `cache_conditioning`.
    """

    def __init__(
        self,
        model: VLVForConditionalGeneration,
        args: Stage2Config,
        train_dataset,
        processor: VLVProcessor,
        validation_dataset=None,
        features: FeatureCache | None = None,
        conditioning: FeatureCache | None = None,
        **kwargs,
    ):
        check_tokenizer(processor.tokenizer, model.language_model)
        if model.config.image_token_id is None:
            model.config.image_token_id = processor.image_token_id
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
                features=features,
                conditioning=conditioning,
            ),
            processing_class=processor,
            **kwargs,
        )
        self.speed.is_packed = self._choose_packing()
        if args.unfreeze is not None:
            self.add_callback(scheduled_unfreezing(model, args.unfreeze, args.TRAINABLE, freeze_for_stage2))
        if args.validation_steps:
            self.validation_items = readable_items(
                validation_dataset or kwargs.get("eval_dataset") or train_dataset,
                args.num_validation_images,
                processor.image_processor,
            )
            if self.validation_items:
                self.add_validation(self.save_captions)

    def _choose_packing(self) -> bool:
        """Whether the language model packs its captions in training. Raises `ValueError` if it has to and cannot."""
        packing, language_model = self.args.packing, self.model.language_model
        if packing is None and self.args.device.type == "cpu":
            packing = can_pack_fast(language_model)
            if not packing:
                name = type(base_of(language_model)).__name__
                say(f"packing needs sdpa or FlashAttention, which {name} does not have; captions are padded")
        if not packing:
            unpack_captions(language_model)
            return False
        try:
            pack_captions(language_model)
        except ValueError as error:
            if self.args.packing:
                raise ValueError(f"{error}; leave packing out") from error
            say(f"{error}; captions are padded")
            return False
        return True

    def train(self, *args, **kwargs):
        language_model = self.model.language_model
        (pack_captions if self.speed.is_packed else unpack_captions)(language_model)  # as another trainer left it
        try:
            return super().train(*args, **kwargs)
        finally:
            unpack_captions(language_model)

    def save_captions(self, model: VLVForConditionalGeneration, step: int, folder: Path) -> None:
        """Writes `step-N.json`, a list of `{"generated", "reference", "token_f1"}`, and logs the mean of the scores.

        Captions are generated greedily, as the `"prompt"` of an item asks for it, and compared with those of the data
        by `token_f1`.
        """
        processor = self.processing_class
        pixel_values = processor(images=[item["image"] for item in self.validation_items]).pixel_values
        captions = generate_captions(
            model,
            processor,
            pixel_values=pixel_values,
            text=prompts_of(self.validation_items),
            max_new_tokens=self.args.max_caption_tokens,
        )
        rows = [
            {
                **({"prompt": item["prompt"]} if item.get("prompt") else {}),
                "generated": caption,
                "reference": item["caption"],
                "token_f1": round(token_f1(caption, item["caption"]), 4),
            }
            for caption, item in zip(captions, self.validation_items, strict=True)
        ]
        write_json(folder / f"step-{step:07d}.json", rows)
        if self.is_world_process_zero():
            self.report("validation/captions", rows, step)
            should_log = self.control.should_log  # logging turns it off
            self.log({"validation_token_f1": round(sum(row["token_f1"] for row in rows) / len(rows), 4)})
            self.control.should_log = should_log

    def evaluate_batch(self, model, inputs, places, counted) -> torch.Tensor:
        """The next-token loss: its mean is one over all tokens of the evaluation set."""
        labels = inputs["labels"]
        logits = model(**inputs, return_dict=True).logits  # (B, L, vocab)
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")  # (B, L), 0 where padded
        used = (labels != -100) & counted[:, None]
        assert self._evaluation is not None
        self._evaluation.add("loss", losses[used].sum(), used.sum())
        return losses.sum() / (labels != -100).sum()
