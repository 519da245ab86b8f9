"""The trainer of stage 3."""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import SequentialSampler
from transformers.utils import logging

from vlv import VLVForConditionalGeneration, VLVProcessor
from vlv.diffusion_decoder import DiffusionDecoder
from vlv.files import write_json
from vlv.hub import text_encoders_fingerprint
from vlv.pipelines import DiffusionScorer

from .caches import trained_fingerprint
from .census import format_time
from .checkpoints import say
from .data.collators import diffusion_pixels
from .data.feature_cache import FeatureCache
from .data_loading import ENOUGH_IMAGES
from .evaluating import kept_random_state
from .meters import QUARTILES, Means
from .modes import set_train_mode
from .policy_gradient import PolicyCollator, PolicySamples, policy_loss, token_log_probabilities
from .proposals import ImageParts, Proposer, read_parts
from .reward_cache import RewardCache
from .rounds import (
    BUFFER_FILE,
    ROUNDS_FOLDER,
    BufferEntry,
    RoundDataset,
    RoundFile,
    ScoredCaptions,
    as_caption,
    images_of_round,
    summarise,
    update_buffer,
    write_buffer,
)
from .stage2_trainer import Stage2Trainer
from .stage3_config import Stage3Config
from .trainer import HALF_DTYPES

logger = logging.get_logger(__name__)

SAMPLING_SETTINGS = (
    *("num_captions", "temperature", "top_p", "max_caption_tokens", "append_eos", "seed", "method"),
    *("buffer_rounds", "on_bad_image", "length_penalty", "fluency_floor"),
)
POLICY_SETTINGS = ("temperature", "max_caption_tokens", "append_eos", "measures_start")
"""What the log-probabilities of sampled tokens depend on, besides weights."""
SOURCES = ("images", "model", "diffusion_model")
"""Entries of the run's settings with fingerprints that captions and rewards depend on."""
PROGRESS_LINES = 10  # of a round
ADVICE = {
    "unfinished": "do not end within --max_caption_tokens; raise it",
    "empty": "are empty; lower --temperature, or train stage 2 for longer",
    "not_fluent": "are below --fluency_floor; lower it",
    "not_finite": "have a loss that is not finite; train in --bf16 or float32, and look at the text-to-image model",
}
"""Why captions have no reward, by the names of `rounds.COUNTED`."""


class Stage3Trainer(Stage2Trainer):
    """Trains a captioner on captions that it has sampled itself, by how well they explain the images.

    An epoch of the `Trainer` is a round. Before it trains, each process samples and scores captions of its share of
    the round's images. The finished parts are on disk, and a resumed run does not compute them again: the samples
    depend on the seed, the weights and the images of their part alone.

    TRL's `GRPOTrainer` takes a VLV, too (docs/vision_language_contract.md), but samples inside its training step: what
    a kill interrupts is lost, an image is encoded once a sample, and its runs have none of the instruments and
    rules of this project's. So `grpo` is a loss of this trainer.

    Args:
        model: The captioner, frozen in part by `freeze_for_stage2`.
        args: The configuration.
        images: Items with `image`.
        processor: Of the captioner.
        scorer: Of the frozen text-to-image model, with the captioner's text encoders.
        image_size: Side in pixels of the images that the scorer sees.
        scored_by: Fingerprint of the text-to-image model, for the cache of rewards.
        pairs: Image-caption pairs that are mixed in.
        kwargs: Further arguments of `Stage2Trainer`.

    Raises:
        ValueError: If the run is sharded by FSDP or DeepSpeed.
    """

    args: Any
    length = "rounds"

    def __init__(
        self,
        model: VLVForConditionalGeneration,
        args: Stage3Config,
        images: Any,
        processor: VLVProcessor,
        scorer: DiffusionScorer,
        image_size: int,
        scored_by: str = "",
        pairs: Any = None,
        **kwargs,
    ):
        settings: Any = args
        batch = settings.train_batch_size * settings.gradient_accumulation_steps * settings.world_size
        dataset = RoundDataset(images, args.round_steps * batch, pairs)
        kwargs.setdefault("validation_dataset", kwargs.get("eval_dataset") or images)
        super().__init__(model, args, dataset, processor, **kwargs)
        if self.is_sharded or self.is_deepspeed_enabled:
            raise ValueError(
                "stage 3 generates captions, which FSDP and DeepSpeed make very slow; launch with DDP "
                "(ddp_8gpu.yaml) or one process, and pass --lora_rank to save memory"
            )
        self.images, self.image_size = images, image_size
        scorer.diffusion_decoder.to(args.device)
        scorer.model.to(args.device)
        self.buffer: dict[int, BufferEntry] = {}
        self._rounds_in_buffer = 0  # from the first on
        collator: Any = self.data_collator
        self.conditioning: FeatureCache | None = collator.caches["conditioning"]
        self._starting_weights: dict[str, torch.Tensor] = {}
        if args.fluency_floor is not None or (args.method == "grpo" and args.kl_weight):
            trained = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
            self._starting_weights = {name: parameter.detach().cpu().clone() for name, parameter in trained}
        if args.method == "grpo":
            self.means = Means((*QUARTILES, "kl", "clipped_share"), args.device)
            self.data_collator = PolicyCollator(
                processor,
                args.max_caption_tokens,
                args.on_bad_image,
                append_eos=args.append_eos,
                pad_to_max_length=args.pad_to_max_length,
                features=collator.caches["image_features"],
                conditioning=self.conditioning,
            )
        self.scored_by: dict[str, Any] = {
            **scorer.settings(),
            "diffusion_model": scored_by,
            "text_encoders": text_encoders_fingerprint(scorer.model),
            "image_size": image_size,
            "precision": self.accelerator.mixed_precision,
        }
        folder = args.output_dir if args.dry_run else args.cache_rewards or args.output_dir
        cache = RewardCache(Path(folder or ".") / f"rewards-{settings.process_index}.sqlite", self.scored_by)
        self.proposer = Proposer(args, processor, scorer, cache, self.starting_weights)

    @property
    def diffusion_decoder(self) -> DiffusionDecoder:
        """The frozen text-to-image model."""
        return self.proposer.scorer.diffusion_decoder

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset)  # `RoundDataset.fill` chooses the order

    @contextlib.contextmanager
    def starting_weights(self, model: torch.nn.Module) -> Iterator[None]:
        """A context in which the trained weights of a model are those of the start of the run.

        The others wait in the CPU's memory, so that the GPU holds one set.
        """
        own = {name: p.data for name, p in model.named_parameters() if name in self._starting_weights}
        kept = {name: weights.to("cpu", copy=True) for name, weights in own.items()}
        try:
            for name, weights in own.items():
                weights.copy_(self._starting_weights[name])
            torch.clear_autocast_cache()
            yield
        finally:
            for name, weights in own.items():
                weights.copy_(kept[name])
            torch.clear_autocast_cache()

    def _run_epoch(self, *args, **kwargs):
        started = time.perf_counter()
        with kept_random_state():
            self.start_round(kwargs["epoch"])
        seconds = time.perf_counter() - started
        self.speed.pause(seconds)
        if self.args.dry_run:
            part = len(self._parts_of_round(0)[0]) * self.args.world_size
            images = self.args.rounds * min(self.args.round_images, len(self.images))
            say(
                f"sampling and scoring {part} images took {seconds:.3g} s: {format_time(seconds * images / part)} for "
                f"the {images:,} of all rounds, besides the steps"
            )
        return super()._run_epoch(*args, **kwargs)

    def start_round(self, number: int) -> None:
        """Samples and scores captions of the images of a round, and chooses what it trains on.

        What is on disk is not computed again.

        Raises:
            ValueError: If nothing is left to train on, too many images cannot be read, or an earlier round is of
                other images.
            SystemExit: With code 75 after SIGTERM to one of the processes, 130 after Ctrl-C. Finished parts are on
                disk.
        """
        args: Any = self.args
        resumed = self.state.global_step > number * args.round_steps  # within the round
        if args.method == "best_of_n":
            self._fill_buffer(number)
        if resumed:
            file = self._finished_round(number)
            self._check_resumed(file, number)
        else:
            file = RoundFile(
                Path(args.output_dir) / ROUNDS_FOLDER,
                number,
                list(self._parts_of_round(number).values()),
                self._made_of(),
                args.process_index,
            )
            if self.is_world_process_zero():
                file.remove_others()
            self.accelerator.wait_for_everyone()
            self.collect(file)
            if self.termination.share(args):
                self.end_terminated(f"in round {number}")
            self.accelerator.wait_for_everyone()
            file.read()
        if not resumed:
            self._report_round(number, file)
        groups, load = self._choose(file, number)
        if not groups:
            raise ValueError(f"round {number} leaves nothing to train on: {self._why_nothing_is_left(file)}")
        dataset: Any = self.train_dataset
        dataset.fill(groups, load, number, args.seed, args.pairs_share)

    def _fill_buffer(self, number: int) -> None:
        """Makes the buffer that of the rounds before one, of the last `buffer_rounds`, this one counted."""
        keep: int = self.args.buffer_rounds
        if keep or self._rounds_in_buffer != number:
            self.buffer = {}
            for earlier in range(max(0, number + 1 - keep) if keep else 0, number):
                update_buffer(self.buffer, self._finished_round(earlier).images(), earlier)
        self._rounds_in_buffer = number + 1  # `_choose` adds this one

    def _parts_of_round(self, number: int) -> dict[int, list[int]]:
        """The indices of the images of each part of a round. A dry run has one part."""
        args = self.args
        indices = images_of_round(len(self.images), args.round_images, number, args.seed)
        starts = range(0, args.sample_batch_size if args.dry_run else len(indices), args.sample_batch_size)
        return {part: indices[start : start + args.sample_batch_size] for part, start in enumerate(starts)}

    def _made_of(self) -> dict[str, Any]:
        """What the captions of a round and their rewards depend on, besides the images of a part, as JSON values."""
        args: Any = self.args
        return {
            "weights": trained_fingerprint(self.model),
            **{name: getattr(args, name) for name in SAMPLING_SETTINGS},
            **{name: self.settings[name]["fingerprint"] for name in SOURCES if name in self.settings},
            "scored_by": self.scored_by,
            "measures_start": bool(args.method == "grpo" and args.kl_weight),
            "rounded_conditioning": args.rounding_caches().get("cache_conditioning", False),
        }

    def _check_resumed(self, file: RoundFile, number: int) -> None:
        """Raises `ValueError` if a round has begun to train on captions that these settings cannot go on with."""
        here, then = self._made_of(), file.found_made_of or {}
        names = ("method", *(POLICY_SETTINGS if self.args.method == "grpo" else ()))
        for name in names:
            if name in then and then[name] != here[name]:
                option = "kl_weight" if name == "measures_start" else name
                raise ValueError(
                    f"round {number} has begun with another --{option}; go on with that of then to the end of the "
                    "round, or name another --output_dir"
                )

    def _finished_round(self, number: int) -> RoundFile:
        """The captions of a round that this run has trained on.

        Raises:
            ValueError: If they are of other images, which the present settings do not have at the same places.
        """
        file = RoundFile(Path(self.args.output_dir) / ROUNDS_FOLDER, number, None, None)
        found, images = file.found_made_of or {}, self.settings.get("images", {}).get("fingerprint")
        if found and found.get("images") != images:
            raise ValueError(
                f"round {number} in {self.args.output_dir} is of other images; pass the former --images, or another "
                "--output_dir with --model, to start from what the run has trained"
            )
        return file

    def collect(self, file: RoundFile) -> None:
        """Computes this process's share of the parts that the file lacks. SIGTERM and Ctrl-C end it after a part."""
        args, parts = self.args, self._parts_of_round(file.number)
        missing = {part: parts[part] for part in file.missing[args.process_index :: args.world_size]}
        processor: Any = self.processing_class
        reading = ImageParts(self.images, missing, processor.image_processor, self.image_size, self.conditioning)
        model: Any = self.model
        was_training = model.training
        model.eval()
        try:
            with self._scoring_autocast():
                for done, (part, images) in enumerate(read_parts(reading, args.dataloader_num_workers), start=1):
                    for message in images.unreadable:
                        if args.on_bad_image == "error":
                            raise ValueError(message)
                        logger.warning_once(f"skipped an image: {message}")
                    found = self.proposer.propose(model, images, self.buffer, (args.seed, file.number, part))
                    file.add(part, found, len(images.unreadable))
                    self._check_readable(file)
                    if done * PROGRESS_LINES // len(missing) > (done - 1) * PROGRESS_LINES // len(missing):
                        say(f"round {file.number}: captions of {done} of {len(missing)} batches of images are scored")
                    if self.termination.requested:
                        break
        finally:
            model.train(was_training)

    def _scoring_autocast(self) -> torch.autocast:
        """The precision of captions and losses; the cache of rewards has its name in its key."""
        half = HALF_DTYPES.get(self.accelerator.mixed_precision)
        return torch.autocast(self.args.device.type, dtype=half, enabled=half is not None)

    def _check_readable(self, file: RoundFile) -> None:
        unreadable = file.num_unreadable
        read = unreadable + file.num_images
        if unreadable > self.args.max_bad_share * max(read, ENOUGH_IMAGES):
            raise ValueError(
                f"{unreadable} of {read} images of this round cannot be read (they are named above), which is more "
                f"than max_bad_share ({self.args.max_bad_share:g}) allows; remove them, or raise --max_bad_share"
            )

    def _report_round(self, number: int, file: RoundFile) -> None:
        summary = summarise(file.images(), file.num_unreadable)
        self._skipped += file.num_unreadable
        should_log = self.control.should_log  # logging turns it off
        self.log({"round": number, **summary})
        self.control.should_log = should_log
        if self.is_world_process_zero():
            write_json(Path(self.args.output_dir) / ROUNDS_FOLDER / f"round-{number:04d}.json", summary)
            values = ", ".join(f"{name} {value:g}" for name, value in summary.items() if value)  # most counts are zero
            say(f"round {number}: {values}")

    def _why_nothing_is_left(self, file: RoundFile) -> str:
        counts = summarise(file.images(), file.num_unreadable)
        if not counts["images"]:
            return f"none of its {file.num_unreadable} images can be read (they are named above)"
        if counts["equal_groups"] >= counts["without_reward"]:
            return "no caption of an image is better than the others; raise --temperature or --num_captions"
        most = max(ADVICE, key=lambda name: counts[name])
        return f"{counts[most]} captions {ADVICE[most]}"

    def _choose(self, file: RoundFile, number: int) -> tuple[list, Callable[[Any], dict[str, Any]]]:
        """What a round trains on: `groups` and `load` of `RoundDataset.fill`."""
        if self.args.method == "grpo":
            samples = PolicySamples(file)
            return samples.groups(), samples
        update_buffer(self.buffer, file.images(), number)
        if self.is_world_process_zero():
            write_buffer(Path(self.args.output_dir) / BUFFER_FILE, self.buffer)
        return [[(own.image, own.caption)] for own in self.buffer.values()], as_caption

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if "advantages" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if model.training:
            set_train_mode(model)
        advantages, sampled, start = (
            inputs.pop(name) for name in ("advantages", "sampled_log_probs", "start_log_probs")
        )
        labels = inputs["labels"]
        outputs = model(**inputs, return_logits=True)
        log_probs = token_log_probabilities(outputs.logits, labels, self.args.temperature)
        mask = labels != -100
        found = policy_loss(log_probs, sampled, start, advantages, mask, self.args.clip_range, self.args.kl_weight)
        if self.args.kl_weight:  # without it the start of the run is not measured
            self.means.add("kl", found.kl, found.tokens)
        self.means.add("clipped_share", found.clipped, found.tokens)
        if num_items_in_batch is None:
            loss = found.loss / found.tokens
        else:
            loss = found.loss / num_items_in_batch
            if self.args.average_tokens_across_devices:
                loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def save_captions(self, model: VLVForConditionalGeneration, step: int, folder: Path) -> None:
        """Writes `step-N.json`, a list of `{"generated", "reward", "reference"}`, and logs the mean reward.

        Captions are greedy; one that is empty or does not end has no reward. The reference is there
        where the validation images have captions.
        """
        processor: Any = self.processing_class
        loaded = [item["image"] for item in self.validation_items]
        pixel_values = processor(images=loaded).pixel_values.to(model.device, model.dtype)
        with self._scoring_autocast():
            captions, ended = self.proposer.generate(model, model.model(pixel_values).conditioning)
            scored = [
                ScoredCaptions(place, "", [caption], [0.0 if caption and whole else None], 0)
                for place, (caption, whole) in enumerate(zip(captions, ended, strict=True))
            ]
            self.proposer.reward(diffusion_pixels(loaded, self.image_size), scored)
        rows = [
            {
                "generated": own.captions[0],
                "reward": own.rewards[0],
                **({"reference": item["caption"]} if "caption" in item else {}),
            }
            for own, item in zip(scored, self.validation_items, strict=True)
        ]
        write_json(folder / f"step-{step:07d}.json", rows)
        if self.is_world_process_zero():
            self.report("validation/captions", rows, step)
            rewards = [row["reward"] for row in rows if row["reward"] is not None]
            should_log = self.control.should_log
            if rewards:
                self.log({"validation_reward": round(sum(rewards) / len(rewards), 6)})
            self.control.should_log = should_log
