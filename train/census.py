"""The census that opens a run: what the data holds, what is trained, where, for how many steps and how long."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from vlv.files import write_json

from .checkpoints import say
from .data import StreamingDataset, TrainingDataset
from .data.captions import count_alternatives
from .data.streaming import IndexedPart, StreamPart
from .instructions import MOST_RECORDED, count_instructions
from .lora import is_in_4_bits
from .rounds import RoundDataset

CENSUS_FILE = "census.json"
SAMPLE = 10_000
"""Captions whose tokens are counted, drawn by seed where there are more."""
STREAM_SAMPLE = 256
"""Rows at the beginning of a stream whose captions are counted."""
READ_TOGETHER = 256
"""Neighbouring captions that are read together in shards, so that few of these are opened."""
MANY_EPOCHS = 1000
"""Of a run with more passes over its data the census says how to make it shorter."""
WARM_UP_STEPS, TIMED_STEPS = 3, 10


def caption_statistics(
    dataset: TrainingDataset, tokenizer: Any, max_tokens: int, append_eos: bool, seed: int = 0
) -> dict[str, Any]:
    """Counts of captions, and the lengths in tokens of all or of a seeded sample.

    Args:
        max_tokens: Longer captions are cut; EOS counts, if `append_eos`.
    """
    counts = np.concatenate([part.counts for part in dataset.parts])
    places = _sampled_places(dataset, seed)
    items = [dataset.caption(int(place)) for place in places]
    captions = [caption for caption in items if isinstance(caption, str)]
    return {
        **_counts(counts, dataset.caption_lines),
        **_instructions([dataset.prompt(int(place)) for place in places] if dataset.has_prompts else []),
        "left_out": [part.source.name(int(row)) for part in dataset.parts for row in part.left_out],
        **_measures(captions, tokenizer, max_tokens, append_eos),
    }


def stream_statistics(part: StreamPart, tokenizer: Any, max_tokens: int, append_eos: bool) -> dict[str, Any]:
    """What `caption_statistics` gives, of the first `STREAM_SAMPLE` rows. The training reads these rows again.

    Raises:
        ValueError: If none of them has a caption.
    """
    lines = part.rules.caption_lines
    values = part.source.first_captions(STREAM_SAMPLE, lines)
    counts = np.array([count_alternatives(value) for value in values])
    if not (counts > 0).any():
        raise ValueError(
            f"none of the first {len(values)} captions of {part.name} has words; is this the right data? "
            "--caption_column names another column"
        )
    captions: list[str] = []
    for row in np.flatnonzero(counts > 0):
        captions += part.rules.captions(values[row], 0, 0, int(row))
    return {
        "of_the_first": len(values),
        **_counts(counts, lines),
        **_instructions(part.source.first_prompts(STREAM_SAMPLE)),
        **_measures(captions, tokenizer, max_tokens, append_eos),
    }


def _counts(counts: np.ndarray, caption_lines: str) -> dict[str, Any]:
    return {
        "images_with_captions": int((counts > 0).sum()),
        "images_left_out": int((counts < 1).sum()),
        "images_with_several_captions": int((counts > 1).sum()),
        "most_captions_of_an_image": int(counts.max()),
        "caption_lines": caption_lines,
    }


def _instructions(prompts: list[Any]) -> dict[str, Any]:
    """Counts of instructions; empty where the data has no column of them."""
    if not prompts:
        return {}
    counts = count_instructions(prompts)
    few = {"each": dict(counts.most_common())} if len(counts) <= MOST_RECORDED else {}
    return {"instructions": {"of_captions": len(prompts), "with": counts.total(), "different": len(counts), **few}}


def _measures(captions: list[str], tokenizer: Any, max_tokens: int, append_eos: bool) -> dict[str, Any]:
    ids = tokenizer(captions, add_special_tokens=False).input_ids
    lengths = np.array([len(row) + append_eos for row in ids])
    unknown = tokenizer.unk_token_id
    total = sum(map(len, ids))
    return {
        "captions_measured": len(captions),
        "with_line_breaks": sum("\n" in caption.strip() for caption in captions),
        "tokens_median": float(np.median(lengths)),
        "tokens_greatest": int(lengths.max()),
        "cut_at_max_caption_tokens": int((lengths > max_tokens).sum()),
        "share_of_unknown_tokens": sum(row.count(unknown) for row in ids) / max(total, 1)
        if unknown is not None
        else 0,
        "examples": [captions[i] for i in np.linspace(0, len(captions) - 1, min(3, len(captions))).astype(int)],
    }


def _sampled_places(dataset: TrainingDataset, seed: int) -> np.ndarray:
    """All places of an epoch, or `SAMPLE` of them in runs of `READ_TOGETHER`, in ascending order."""
    if len(dataset) <= SAMPLE:
        return np.arange(len(dataset))
    number = -(-len(dataset) // READ_TOGETHER)
    runs = np.random.default_rng(seed).choice(number, SAMPLE // READ_TOGETHER, replace=False)
    places = (np.sort(runs)[:, None] * READ_TOGETHER + np.arange(READ_TOGETHER)).ravel()
    return places[places < len(dataset)]


def sample_prompts(dataset: TrainingDataset | StreamingDataset, seed: int = 0) -> list[str]:
    """The instructions of the captions that the census measures, with "" for those without one."""
    if isinstance(dataset, TrainingDataset):
        return [dataset.prompt(int(place)) for place in _sampled_places(dataset, seed)] if dataset.has_prompts else []
    prompts: list[str] = []
    for part in dataset.parts:
        if isinstance(part, IndexedPart):
            prompts += sample_prompts(part.dataset, seed)
        else:
            prompts += [prompt for prompt in part.source.first_prompts(STREAM_SAMPLE) if isinstance(prompt, str)]
    return prompts


def take_census(trainer: Any) -> dict[str, Any]:
    """What a run has before its first step, as JSON values."""
    args, dataset = trainer.args, trainer.train_dataset
    census: dict[str, Any] = {}
    tokenizer = getattr(trainer.processing_class, "tokenizer", None)
    limits = (tokenizer, getattr(args, "max_caption_tokens", 0), getattr(args, "append_eos", True))
    if isinstance(dataset, StreamingDataset):
        census["images"] = "unknown: a stream"
        census["sources"] = []
        for read, share in zip(dataset.parts, dataset.shares(), strict=True):
            source: dict[str, Any] = {"source": read.name, "share_of_the_samples": share}
            if isinstance(read, IndexedPart):
                source["samples_in_a_pass"] = len(read.dataset)
            if tokenizer is not None and read.has_captions:
                source["captions"] = (
                    stream_statistics(read, *limits)
                    if isinstance(read, StreamPart)
                    else caption_statistics(read.dataset, *limits, args.seed)
                )
            census["sources"].append(source)
    elif isinstance(dataset, RoundDataset):
        census["images"] = len(dataset.images)
        census["rounds"] = {
            "number": args.rounds,
            "images": min(args.round_images, len(dataset.images)),
            "steps": args.round_steps,
            **({} if dataset.pairs is None else {"pairs": len(dataset.pairs)}),
        }
    else:
        census["images_in_an_epoch"] = len(dataset)
    if isinstance(dataset, TrainingDataset):
        census["sources"] = [
            {"images": len(part.source), "weight": part.weight, "in_an_epoch": len(part)} for part in dataset.parts
        ]
        if tokenizer is not None and all(part.source.has_captions for part in dataset.parts):
            census["captions"] = caption_statistics(dataset, *limits, args.seed)
    trainable: dict[str, int] = {}
    frozen = 0
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            part = ".".join(find_part(name))
            trainable[part] = trainable.get(part, 0) + whole_size(parameter)
        else:
            frozen += whole_size(parameter)
    census["trainable_parameters"] = {"all": sum(trainable.values()), **trainable}
    census["frozen_parameters"] = frozen
    census["device"] = f"{args.world_size} x {_device_name(args.device)}"
    census["precision"] = "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32"
    census["steps"] = trainer.last_step()
    batch = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    census["images_in_a_step"] = batch
    if not isinstance(dataset, StreamingDataset | RoundDataset):
        census["epochs"] = round(trainer.last_step() / trainer.steps_per_epoch(), 3)
    return census


def whole_size(parameter: Any) -> int:
    """How many numbers a parameter has, also where ZeRO-3 has left this process none of them, or in 4 bits."""
    if is_in_4_bits(parameter):  # two in a byte
        return parameter.quant_state.shape.numel()
    return getattr(parameter, "ds_numel", parameter.numel())


def find_part(name: str) -> list[str]:
    """The part that a parameter belongs to: the first names of its path, down to those of Florence-2's own parts."""
    names = [part for part in name.split(".")[:-1] or [name] if part not in ("model", "base_model")]
    depth = 1
    if names[:1] == ["image_encoder"]:
        depth = 3 if names[1:2] == ["language_model"] else 2
    return names[:depth] or [name]


def _device_name(device: Any) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device.type)


def format_census(census: dict[str, Any]) -> str:
    """The census as lines of text."""
    lines = []
    sources = census.get("sources", [])
    if rounds := census.get("rounds"):
        mixed = f"; {rounds['pairs']:,} pairs are mixed in" if "pairs" in rounds else ""
        lines.append(
            f"images: {census['images']:,}; {rounds['number']:,} rounds, each samples captions of "
            f"{rounds['images']:,} images and trains {rounds['steps']:,} steps{mixed}"
        )
    elif "images" in census:
        lines.append(f"images: {census['images']}")
        for source in sources:
            if len(sources) > 1:
                passes = f"; {source['samples_in_a_pass']:,} in a pass" if "samples_in_a_pass" in source else ""
                lines.append(f"{source['source']}: {source['share_of_the_samples']:.1%} of all samples{passes}")
            if captions := source.get("captions"):
                lines += _format_captions(captions, source.get("samples_in_a_pass"))
    else:
        detail = "".join(f"; {s['images']:,} x {s['weight']:g}" for s in sources) if len(sources) > 1 else ""
        lines.append(f"images: {census['images_in_an_epoch']:,} in an epoch{detail}")
    if captions := census.get("captions"):
        lines += _format_captions(captions, census["images_in_an_epoch"])
    parameters = census["trainable_parameters"]
    parts = ", ".join(f"{name} {count:,}" for name, count in parameters.items() if name != "all")
    lines.append(f"trainable parameters: {parameters['all']:,} ({parts}); frozen: {census['frozen_parameters']:,}")
    epochs = f", {census['epochs']:g} epochs" if "epochs" in census else ""
    lines.append(f"device: {census['device']}, {census['precision']}")
    lines.append(f"steps: {census['steps']:,} of {census['images_in_a_step']:,} images{epochs}")
    if census.get("epochs", 0) > MANY_EPOCHS:
        lines.append(
            f"note: the run passes over its images {census['epochs']:,.0f} times; --max_steps or --num_train_epochs "
            "makes it shorter"
        )
    lines.append(f"expected time: unknown before the first {WARM_UP_STEPS + TIMED_STEPS} steps")
    return "\n".join(lines)


def _format_captions(captions: dict[str, Any], samples: int | None) -> list[str]:
    """Lines about captions. Args: `samples`: of which they are a part, if that is known."""
    measured, first = captions["captions_measured"], captions.get("of_the_first")
    whose = f"captions of the first {first:,} images of the stream: " if first is not None else "captions: "
    sampled = " of a sample" if samples is not None and measured < samples else ""
    return [
        f"{whose}of {captions['images_with_captions']:,} images; {captions['images_left_out']:,} empty or not "
        f"text, left out; {captions['images_with_several_captions']:,} images with several (at most "
        f"{captions['most_captions_of_an_image']}; caption_lines: {captions['caption_lines']})",
        f"tokens of {measured:,} captions{sampled}: median {captions['tokens_median']:g}, greatest "
        f"{captions['tokens_greatest']}; {captions['cut_at_max_caption_tokens']:,} cut at max_caption_tokens; "
        f"{captions['with_line_breaks']:,} with line breaks; "
        f"unknown tokens {captions['share_of_unknown_tokens']:.2%}",
        *_format_instructions(captions.get("instructions")),
        *(f"  for example: {_shorten(example)}" for example in captions["examples"]),
    ]


def _format_instructions(counts: dict[str, Any] | None) -> list[str]:
    if counts is None:
        return []
    each = ", ".join(f"{_shorten(text)!r} {count:,}" for text, count in counts.get("each", {}).items())
    return [
        f"instructions: before {counts['with']:,} of {counts['of_captions']:,} captions, {counts['different']:,} "
        f"different{f': {each}' if each else ''}"
    ]


def _shorten(text: str) -> str:
    shown = " / ".join(text.split("\n"))
    return shown if len(shown) <= 160 else shown[:157] + "..."


class CensusCallback(TrainerCallback):
    """Prints the census on the first process and writes `census.json`; says the expected time after some steps."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self._census: dict[str, Any] | None = None
        self._first, self._since = 0, 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._first = state.global_step
        if state.is_world_process_zero:
            self._census = take_census(self.trainer)
            say(format_census(self._census))
            self._write(args)

    def on_step_end(self, args, state, control, **kwargs):
        done = state.global_step - self._first
        if self._census is None or done > WARM_UP_STEPS + TIMED_STEPS:
            return
        if done == WARM_UP_STEPS:
            self._since = time.perf_counter()
        elif done == WARM_UP_STEPS + TIMED_STEPS:
            seconds = (time.perf_counter() - self._since) / TIMED_STEPS
            left = seconds * (state.max_steps - state.global_step)
            self._census |= {"seconds_per_step": round(seconds, 4), "expected_hours_left": round(left / 3600, 4)}
            without = "saving and validation" if "rounds" not in self._census else "sampling, scoring and saving"
            say(f"expected time: {format_time(left)} ({seconds:.3g} s a step, without {without})")
            self._write(args)

    def _write(self, args: Any) -> None:
        write_json(Path(args.output_dir) / CENSUS_FILE, self._census)


def format_time(seconds: float) -> str:
    """Such as `2 d 3 h`, `4 h 5 min` or `6 s`."""
    for unit, size, below, smaller in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // smaller)} {below}"
    return f"{seconds:.0f} s"
