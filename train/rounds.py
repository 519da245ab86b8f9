"""The rounds of stage 3 on disk: captions of a slice of the images and their rewards, in parts that survive a kill."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from vlv.files import to_json, write_atomically

from .data.mixture import drawn

ROUNDS_FOLDER = "rounds"
BUFFER_FILE = "buffer.jsonl"
IMAGE_ORDER, PAIR_ORDER, SAMPLE_ORDER = 20, 21, 22  # what random numbers are for


@dataclass
class ScoredCaptions:
    """Captions of one image and their rewards.

    Attributes:
        index: Of the image in the data set.
        name: What messages call it.
        captions: The greedy one, the samples, and, if there is one, the best of earlier rounds.
        rewards: Of each caption; None if it has none: it did not end, is empty, or its loss is not finite.
        num_samples: The captions from place 1 on that were sampled.
        unfinished: How many of the captions did not end within `max_caption_tokens`.
        empty: How many ended without a word.
        not_finite: How many have a loss that is not finite.
        split: How many were scored as several sentences, because the text encoder reads fewer tokens.
        cut: How many sentences are too long for it.
        sampled_log_probs, start_log_probs: Of each sample's tokens, for `grpo`; empty without a reward.
    """

    index: int
    name: str
    captions: list[str]
    rewards: list[float | None]
    num_samples: int
    unfinished: int = 0
    empty: int = 0
    not_finite: int = 0
    split: int = 0
    cut: int = 0
    sampled_log_probs: list[list[float]] = field(default_factory=list)
    start_log_probs: list[list[float]] = field(default_factory=list)

    @property
    def sample_rewards(self) -> list[float | None]:
        return self.rewards[1 : 1 + self.num_samples]

    def best(self) -> tuple[str, float] | None:
        """The caption with the highest reward, the first of equal ones, and its reward."""
        found = [(caption, r) for caption, r in zip(self.captions, self.rewards, strict=True) if r is not None]
        return max(found, key=lambda pair: pair[1], default=None)


class RoundFile:
    """The finished parts of a round: a line of JSON for each.

    Several processes have a file each, and each reads all of them. A line that a kill has cut off is left out.

    Args:
        folder: `OUTPUT_DIR/rounds`.
        number: Of the round, from 0.
        parts: The indices of the images of each part of the complete round; None if the file says how many there are.
        made_of: Settings, data and weights that the captions depend on; parts that were made of others, or hold other
            images, are left out. None reads parts whatever they were made of.
        rank: Of this process.

    Attributes:
        found_made_of: What the part that was read last was made of; None if there is no part.
    """

    def __init__(
        self,
        folder: str | Path,
        number: int,
        parts: Sequence[Sequence[int]] | None,
        made_of: Mapping[str, Any] | None,
        rank: int = 0,
    ):
        self.folder, self.number, self.made_of = Path(folder), number, made_of
        self.indices = None if parts is None else [list(part) for part in parts]
        self.num_parts = 0 if parts is None else len(parts)
        self.found_made_of: dict[str, Any] | None = None
        self.path = self.folder / f"round-{number:04d}.rank-{rank}.jsonl"
        self.parts: dict[int, list[ScoredCaptions]] = {}
        self.unreadable: dict[int, int] = {}
        self.read()

    def read(self) -> None:
        """Reads what all processes have written so far."""
        self.parts.clear()
        for path in files_of_round(self.folder, self.number):
            for row in read_rows(path):
                if self._is_of_this_round(row):
                    self.parts[row["part"]] = [ScoredCaptions(**image) for image in row["images"]]
                    self.unreadable[row["part"]] = row["unreadable"]
                    self.found_made_of = row["made_of"]
                    if self.indices is None:
                        self.num_parts = row["num_parts"]

    def remove_others(self) -> None:
        """Removes the parts that were made of other settings, data or weights, in the files of all processes."""
        for path in files_of_round(self.folder, self.number):
            kept = [row for row in read_rows(path) if self._is_of_this_round(row)]
            content = b"".join(to_json(row, indent=None) + b"\n" for row in kept)
            if content != path.read_bytes():
                write_atomically(path, partial(Path.write_bytes, data=content))

    def _is_of_this_round(self, row: Mapping[str, Any]) -> bool:
        """Whether a part belongs to this round as it is configured."""
        if self.made_of is not None and row["made_of"] != self.made_of:
            return False
        if self.indices is None:
            return True
        place = row["part"]
        return row["num_parts"] == self.num_parts and row["indices"] == self.indices[place]

    @property
    def missing(self) -> list[int]:
        return [part for part in range(self.num_parts) if part not in self.parts]

    def add(self, part: int, images: Sequence[ScoredCaptions], unreadable: int) -> None:
        """Appends a part, on the disk when this returns."""
        row = {
            "part": part,
            "num_parts": self.num_parts,
            "indices": None if self.indices is None else self.indices[part],
            "made_of": self.made_of,
            "unreadable": unreadable,
            "images": [asdict(image) for image in images],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(to_json(row, indent=None) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.parts[part], self.unreadable[part] = list(images), unreadable

    def images(self) -> list[ScoredCaptions]:
        """Those of all parts, in their order.

        Raises:
            ValueError: If a part is missing.
        """
        if self.missing or not self.num_parts:
            raise ValueError(
                f"{self.folder} lacks parts of round {self.number}, which this run has trained on; restore the files "
                "round-*.jsonl, or pass --overwrite_output_dir to start anew"
            )
        return [image for part in range(self.num_parts) for image in self.parts[part]]


def files_of_round(folder: Path, number: int) -> list[Path]:
    """The files of all processes."""
    return sorted(folder.glob(f"round-{number:04d}.rank-*.jsonl"))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The parts in a file of a round. A line that a kill has cut off, within a character even, is left out."""
    for line in path.read_bytes().split(b"\n"):  # `str.splitlines` would split captions at U+2028 and others
        try:
            yield json.loads(line.decode())
        except ValueError:
            continue


def summarise(images: Sequence[ScoredCaptions], unreadable: int) -> dict[str, float]:
    """Means and counts of a round.

    Args:
        unreadable: Images that could not be read.

    Returns:
        `images`, and of them those that were `unreadable` (beside them), have `equal_groups` (the samples with a
        reward are all the same text) or are `without_reward`; captions that are `unfinished`, `empty` or `not_finite`;
        captions that were `split` into sentences, and sentences that were `cut`; means of `reward_greedy`,
        `reward_sampled` and `reward_best`, and of the words in the greedy and the best captions.
    """
    counted = ("unfinished", "empty", "not_finite", "split", "cut")
    counts = {name: sum(getattr(i, name) for i in images) for name in counted}
    best = [own for image in images if (own := image.best()) is not None]
    samples = [r for image in images for r in image.sample_rewards if r is not None]
    equal = sum(
        len({c for c, r in zip(i.captions[1:], i.sample_rewards, strict=False) if r is not None}) == 1 for i in images
    )
    means: dict[str, list[Any]] = {
        "reward_greedy": [i.rewards[0] for i in images if i.rewards[0] is not None],
        "reward_sampled": samples,
        "reward_best": [reward for _, reward in best],
        "words_greedy": [len(i.captions[0].split()) for i in images],
        "words_best": [len(caption.split()) for caption, _ in best],
    }
    return {
        "images": len(images),
        "unreadable": unreadable,
        "equal_groups": equal,
        "without_reward": len(images) - len(best),
        **counts,
        **{name: round(sum(values) / len(values), 6) for name, values in means.items() if values},
    }


@dataclass
class BufferEntry:
    """The best caption of an image so far, its reward, and the round in which it was found or confirmed."""

    image: int
    name: str
    caption: str
    reward: float
    round: int


def update_buffer(buffer: dict[int, BufferEntry], images: Iterable[ScoredCaptions], number: int) -> None:
    """Takes the best caption of each image of a round. An image without a reward keeps the caption that it has."""
    for image in images:
        if (best := image.best()) is not None:
            buffer[image.index] = BufferEntry(image.index, image.name, *best, number)


def write_buffer(path: Path, buffer: Mapping[int, BufferEntry]) -> None:
    """Writes the buffer as lines `{"image": name, "caption": ..., "reward": ..., "round": ...}`, atomically.

    Where images are files, their paths are absolute, and `vlv train stage2 --pairs` reads the buffer.
    """
    rows = [
        {
            "image": os.path.abspath(own.name) if os.path.isfile(own.name) else own.name,
            "caption": own.caption,
            "reward": own.reward,
            "round": own.round,
        }
        for own in buffer.values()
    ]
    content = b"".join(to_json(row, None) + b"\n" for row in rows)
    write_atomically(path, partial(Path.write_bytes, data=content))


def images_of_round(count: int, size: int, number: int, seed: int) -> list[int]:
    """The indices of the images of a round: the next `size` of one shuffled pass after the other over `count`.

    Each is there once; in a round that crosses the end of a pass, there may be fewer than `size`.
    """
    size = min(size, count)
    places = range(number * size, (number + 1) * size)
    orders = {each: drawn(seed, IMAGE_ORDER, each).permutation(count) for each in {p // count for p in places}}
    return list(dict.fromkeys(int(orders[place // count][place % count]) for place in places))


def shuffled_passes(count: int, needed: int, *seed: int) -> list[int]:
    """`needed` places below `count`: one shuffled pass after the other."""
    passes = -(-needed // count)
    return [int(place) for each in range(passes) for place in drawn(*seed, each).permutation(count)][:needed]


class RoundDataset(Dataset):
    """What a round trains on: as many samples as its steps read. `fill` gives each round its own.

    Args:
        images: Items with `image`.
        length: Samples of a round.
        pairs: Image-caption pairs that are mixed in.
    """

    def __init__(self, images: Any, length: int, pairs: Any = None):
        self.images, self.length, self.pairs = images, length, pairs
        self._samples: list[tuple[Any, int, dict[str, Any]]] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Any]:
        source, index, more = self._samples[place]
        return {**source[index], **more}

    def fill(
        self, groups: Sequence[Sequence[tuple[int, dict[str, Any]]]], number: int, seed: int, share: float
    ) -> None:
        """Chooses the samples of a round.

        Args:
            groups: Samples that stay together, each the index of an image and what is added to its item.
            number: Of the round.
            share: Of the samples, that are pairs.

        Raises:
            ValueError: If there are no groups.
        """
        if not groups:
            raise ValueError(
                f"round {number} leaves nothing to train on: no caption has a reward, or all captions of each image "
                "are equal; raise --temperature, --num_captions or --max_caption_tokens (docs/stage3.md)"
            )
        num_pairs = round(share * self.length) if self.pairs is not None else 0
        smallest = min(map(len, groups))
        order = shuffled_passes(len(groups), -(-self.length // smallest), seed, SAMPLE_ORDER, number)
        own = [(self.images, *sample) for place in order for sample in groups[place]][: self.length - num_pairs]
        if num_pairs:
            mixed = shuffled_passes(len(self.pairs), num_pairs, seed, PAIR_ORDER, number)
            own += [(self.pairs, place, {}) for place in mixed]
            own = [own[int(place)] for place in drawn(seed, PAIR_ORDER, number).permutation(len(own))]
        self._samples = own
