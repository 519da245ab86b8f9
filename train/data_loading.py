"""How a trainer reads its data: order of an epoch, streams that resume, and the share of unreadable images."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from vlv.files import read_json, write_json

from .data import EpochSampler, StreamCollator, StreamingDataset, TrainingDataset
from .data.collators import count_samples
from .data.streaming import STATE

PROGRESS_FILE = "data_state_{}.json"
"""How far a process is in a stream."""
ENOUGH_IMAGES = 1000
"""The share of unreadable images counts as if at least so many had been read."""


class DataLoadingMixin(Trainer):
    """Reads a `TrainingDataset` or a `StreamingDataset`, so that a resumed run sees the very next sample."""

    _sampler: EpochSampler | None = None
    _read, _unreadable = 0, 0
    batch_names: tuple[str, ...] | list[str] = ()
    """Of the images of the batch that is trained on."""

    def _get_train_sampler(self, train_dataset=None):
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(dataset, TrainingDataset):
            if self.args.train_sampling_strategy == "group_by_length":
                raise ValueError(
                    "train_sampling_strategy 'group_by_length' needs a TrainingDataset, which knows how long "
                    f"captions are, got {type(dataset).__name__}; pass load_pairs(...) or "
                    "TrainingDataset([ListDataset(items)]), or leave it out"
                )
            return super()._get_train_sampler(train_dataset)
        args: Any = self.args
        self._sampler = EpochSampler(
            dataset,
            args.seed if args.data_seed is None else args.data_seed,
            batch_size=args.train_batch_size,
            num_ranks=args.world_size,
            shuffle=args.train_sampling_strategy != "sequential",
            group_by_length=args.train_sampling_strategy == "group_by_length",
        )
        return self._sampler

    def _run_epoch(self, *args, **kwargs):
        self._read, self._unreadable = 0, 0
        if self._sampler is not None:  # accelerate does not reach it behind skipped batches on several processes
            self._sampler.set_epoch(kwargs["epoch"])
        return super()._run_epoch(*args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        dataset = self.train_dataset
        if not isinstance(dataset, StreamingDataset):
            return super().get_train_dataloader()
        args: Any = self.args
        dataset.set_loader(args.train_batch_size, args.dataloader_num_workers, args.process_index, args.world_size)
        return DataLoader(
            dataset,
            batch_size=args.train_batch_size,
            collate_fn=StreamCollator(self.data_collator),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
            generator=torch.Generator().manual_seed(args.seed),  # a resumed run draws what an unbroken one does
        )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        if isinstance(self.train_dataset, StreamingDataset) and resume_from_checkpoint:
            checkpoint = resume_from_checkpoint
            if checkpoint is True:
                checkpoint = get_last_checkpoint(str(self.args.output_dir))
            file = Path(str(checkpoint)) / self._progress_file()
            if not file.is_file():  # of a run on fewer devices, which `set_loader` refuses
                file = file.with_name(PROGRESS_FILE.format(0))
            self.train_dataset.progress = read_json(file, "workers", "ranks", "states")
            self.args.ignore_data_skip = True
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if isinstance(self.train_dataset, StreamingDataset):
            write_json(Path(output_dir) / self._progress_file(), self.train_dataset.progress)

    def _progress_file(self) -> str:
        return PROGRESS_FILE.format(self.args.process_index)

    def count_images(self, inputs: dict[str, Any]) -> int:
        """Takes from a batch what is not for the model, and returns the number of images that could not be read.

        Raises:
            ValueError: If more than `max_bad_share` of an epoch's images of this process, and of 1000, are unreadable.
        """
        num_skipped = inputs.pop("num_skipped", 0)
        if skipped := inputs.pop("skipped", []):
            collator: Any = self.data_collator
            collator.said.update(skipped)
        self.batch_names = inputs.pop("names", [])
        if (state := inputs.pop(STATE, None)) is not None:
            assert isinstance(self.train_dataset, StreamingDataset)
            self.train_dataset.record(state)
        self._unreadable += num_skipped
        self._read += count_samples(inputs) + num_skipped
        share = getattr(self.args, "max_bad_share", 1)
        if self._unreadable > share * max(self._read, ENOUGH_IMAGES):
            raise ValueError(
                f"{self._unreadable} of {self._read} images or captions of this epoch cannot be read (they are named "
                f"above), which is more than max_bad_share ({share:g}) allows; remove them, or raise --max_bad_share"
            )
        return num_skipped
