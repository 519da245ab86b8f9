"""The rounds of stage 3 on disk: captions of a slice of the images and their rewards, in parts that survive a kill."""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from vlv.files import to_json, write_atomically

from .data.mixture import drawn
from .policy_gradient import group_advantages

ROUNDS_FOLDER = "rounds"
BUFFER_FILE = "buffer.jsonl"
FIRST_LINE = b'{"part": '  # of a part begins so
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
        not_fluent: How many have no reward because of `fluency_floor`.
        fluency: With `fluency_floor`: of each caption its mean log-probability as text alone, if it was measured.
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
    not_fluent: int = 0
    fluency: list[float | None] = field(default_factory=list)
    sampled_log_probs: list[list[float]] = field(default_factory=list)
    start_log_probs: list[list[float]] = field(default_factory=list)

    @property
    def sample_rewards(self) -> list[float | None]:
        return self.rewards[1 : 1 + self.num_samples]

    def best(self) -> tuple[str, float] | None:
        """The caption with the highest reward, the first of equal ones, and its reward."""
        found = [(caption, r) for caption, r in zip(self.captions, self.rewards, strict=True) if r is not None]
        return max(found, key=lambda pair: pair[1], default=None)


@dataclass(frozen=True)
class StoredPart:
    """Where a finished part is in a file.

    Attributes:
        start, size: Of its lines, in bytes.
        places: Where the line of each of its images begins.
        unreadable: Images that it lacks.
    """

    path: Path
    start: int
    size: int
    places: tuple[int, ...]
    unreadable: int


class RoundFile:
    """The finished parts of a round: a line of JSON for each, and after it a line for each of its images.

    Several processes have a file each, and each reads all of them. A part that a kill has cut off is left out.
    Captions are read from the files when they are needed; the memory holds where each image is.

    Args:
        folder: `OUTPUT_DIR/rounds`.
        number: Of the round, from 0.
        indices: Of the images of each part of the complete round; None if the file says how many there are.
        made_of: Settings, data and weights that the captions depend on; parts that were made of others, or hold other
            images, are left out. None reads parts whatever they were made of.
        rank: Of this process.

    Attributes:
        parts: The finished parts by their number.
        found_made_of: What the part that was read last was made of; None if there is no part.
    """

    def __init__(
        self,
        folder: str | Path,
        number: int,
        indices: Sequence[Sequence[int]] | None,
        made_of: Mapping[str, Any] | None,
        rank: int = 0,
    ):
        self.folder, self.number, self.made_of = Path(folder), number, made_of
        self.indices = None if indices is None else [list(part) for part in indices]
        self.num_parts = 0 if indices is None else len(indices)
        self.found_made_of: dict[str, Any] | None = None
        self.path = self.folder / f"round-{number:04d}.rank-{rank}.jsonl"
        self.parts: dict[int, StoredPart] = {}
        self.read()

    def read(self) -> None:
        """Finds what all processes have written so far."""
        self.parts.clear()
        for path in files_of_round(self.folder, self.number):
            for row, part in parts_in_file(path):
                if self._is_of_this_round(row):
                    self.parts[row["part"]] = part
                    self.found_made_of = row["made_of"]
                    if self.indices is None:
                        self.num_parts = row["num_parts"]

    def remove_others(self) -> None:
        """Removes the parts that were made of other settings, data or weights, in the files of all processes."""
        for path in files_of_round(self.folder, self.number):
            kept = [part for row, part in parts_in_file(path) if self._is_of_this_round(row)]
            if sum(part.size for part in kept) != path.stat().st_size:
                write_atomically(path, partial(_copy_parts, path, kept))
        self.read()

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

    @property
    def num_unreadable(self) -> int:
        return sum(part.unreadable for part in self.parts.values())

    @property
    def num_images(self) -> int:
        """Of the finished parts."""
        return sum(len(part.places) for part in self.parts.values())

    def add(self, part: int, images: Sequence[ScoredCaptions], unreadable: int) -> None:
        """Appends a part, on the disk when this returns."""
        lines = [to_json(asdict(image), indent=None) + b"\n" for image in images]
        row = {
            "part": part,
            "num_parts": self.num_parts,
            "indices": None if self.indices is None else self.indices[part],
            "made_of": self.made_of,
            "unreadable": unreadable,
            "lengths": [len(line) for line in lines],
        }
        header = to_json(row, indent=None) + b"\n"
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            start = file.tell()
            file.writelines([header, *lines])
            file.flush()
            os.fsync(file.fileno())
        self.parts[part] = _stored(self.path, start, len(header), row)

    def read_image(self, part: int, place: int) -> ScoredCaptions:
        """The image at a place of a finished part."""
        stored = self.parts[part]
        with open(stored.path, "rb") as file:
            file.seek(stored.places[place])
            return ScoredCaptions(**json.loads(file.readline()))

    def read_part(self, part: int) -> Iterator[ScoredCaptions]:
        """The images of a finished part, read one after the other."""
        return (self.read_image(part, place) for place in range(len(self.parts[part].places)))

    def images(self) -> Iterator[ScoredCaptions]:
        """Those of all parts, in their order, read one part after the other.

        Raises:
            ValueError: If a part is missing.
        """
        if self.missing or not self.num_parts:
            raise ValueError(
                f"{self.folder} lacks parts of round {self.number}, which this run has trained on; restore the files "
                "round-*.jsonl, or pass --overwrite_output_dir to start anew"
            )
        return (image for part in range(self.num_parts) for image in self.read_part(part))


def files_of_round(folder: Path, number: int) -> list[Path]:
    """The files of all processes."""
    return sorted(folder.glob(f"round-{number:04d}.rank-*.jsonl"))


def parts_in_file(path: Path) -> Iterator[tuple[dict[str, Any], StoredPart]]:
    """The complete parts in a file of a round, each with what its first line says. Images are not parsed.

    A part that a kill has cut off, within a character even, is left out.

    Raises:
        ValueError: If an earlier version wrote the file.
    """
    with open(path, "rb") as file:  # as text, captions would be split at U+2028 and others
        while line := file.readline():
            end = file.tell()
            if not line.startswith(FIRST_LINE) or not line.endswith(b"\n"):
                continue
            try:
                row = json.loads(line)
            except ValueError:  # cut off, and another part begins in the same line
                continue
            if "lengths" not in row:
                raise ValueError(
                    f"{path} was written by an earlier version, with all captions of a part in one line; pass another "
                    "--output_dir with --model, to start from what the run has trained"
                )
            if all(len(file.readline()) == length for length in row["lengths"]):
                yield row, _stored(path, end - len(line), len(line), row)
            else:
                file.seek(end)


def _stored(path: Path, start: int, header: int, row: Mapping[str, Any]) -> StoredPart:
    """Where a part is whose first line begins at a byte and has so many."""
    *places, end = accumulate(row["lengths"], initial=start + header)
    return StoredPart(path, start, end - start, tuple(places), row["unreadable"])


def _copy_parts(source: Path, parts: Sequence[StoredPart], target: Path) -> None:
    """Writes parts of a file into another."""
    with open(source, "rb") as file, open(target, "wb") as copy:
        for part in parts:
            file.seek(part.start)
            copy.write(file.read(part.size))


COUNTED = ("unfinished", "empty", "not_fluent", "not_finite", "split", "cut")
MEANS = (
    *("reward_greedy", "reward_sampled", "reward_best", "words_greedy", "words_best"),
    *("repeated_greedy", "repeated_best", "fluency_greedy", "fluency_best"),
)


def summarise(images: Iterable[ScoredCaptions], unreadable: int) -> dict[str, float]:
    """Means and counts of a round.

    Args:
        unreadable: Images that could not be read.

    Returns:
        `images`, and of them those that were `unreadable` (beside them), have `equal_groups` (no sample with a reward
        is better than another) or are `without_reward`; captions that are `unfinished`, `empty`, `not_fluent`
        or `not_finite`; captions that were `split` into sentences, and sentences that were `cut`; means of
        `reward_greedy`, `reward_sampled` and `reward_best`, and of the greedy and the best captions means of their
        words, of the share of their words that are `repeated`, and of their `fluency`, if it was measured.
    """
    counts = dict.fromkeys(("images", "unreadable", "equal_groups", "without_reward", *COUNTED), 0)
    counts["unreadable"] = unreadable
    sums: defaultdict[str, list[float]] = defaultdict(lambda: [0.0, 0])

    def add(name: str, value: float | None) -> None:
        if value is not None:
            sums[name][0] += value
            sums[name][1] += 1

    for image in images:
        counts["images"] += 1
        for name in COUNTED:
            counts[name] += getattr(image, name)
        has_rewards = any(reward is not None for reward in image.sample_rewards)
        counts["equal_groups"] += has_rewards and not any(group_advantages(image.sample_rewards))
        add("reward_greedy", image.rewards[0])
        for reward in image.sample_rewards:
            add("reward_sampled", reward)
        best = image.best()
        counts["without_reward"] += best is None
        add("reward_best", best and best[1])
        chosen = {"greedy": image.captions[0]} | ({} if best is None else {"best": best[0]})
        for kind, caption in chosen.items():
            add(f"words_{kind}", len(caption.split()))
            add(f"repeated_{kind}", repeated_share(caption))
            if image.fluency:
                add(f"fluency_{kind}", image.fluency[image.captions.index(caption)])
    return {**counts, **{name: round(sums[name][0] / sums[name][1], 6) for name in MEANS if name in sums}}


def repeated_share(caption: str) -> float:
    """The share of three words in a row that are in the caption before, 0 to 1."""
    words = caption.split()
    found = list(zip(words, words[1:], words[2:], strict=False))
    return 1 - len(set(found)) / len(found) if found else 0.0


@dataclass(slots=True)
class BufferEntry:
    """The best caption of an image so far, its reward, and the round in which it was found or confirmed."""

    image: int
    name: str
    caption: str
    reward: float
    round: int


def update_buffer(buffer: dict[int, BufferEntry], images: Iterable[ScoredCaptions], number: int) -> None:
    """Takes the best caption of each image of a round.

    An image without a reward keeps the caption that it has, unless that was judged again and lost its reward.
    """
    for image in images:
        if (best := image.best()) is not None:
            buffer[image.index] = BufferEntry(image.index, image.name, *best, number)
        elif len(image.captions) > 1 + image.num_samples:
            buffer.pop(image.index, None)


def write_buffer(path: Path, buffer: Mapping[int, BufferEntry]) -> None:
    """Writes the buffer as lines `{"image": name, "caption": ..., "reward": ..., "round": ...}`, atomically.

    Where images are files, their paths are absolute, and `vlv train stage2 --pairs` reads the buffer.
    """

    def write(target: Path) -> None:
        with open(target, "wb") as file:
            for own in buffer.values():
                row = {
                    "image": os.path.abspath(own.name) if os.path.isfile(own.name) else own.name,
                    "caption": own.caption,
                    "reward": own.reward,
                    "round": own.round,
                }
                file.write(to_json(row, None) + b"\n")

    write_atomically(path, write)


def as_caption(caption: str) -> dict[str, Any]:
    """What a training item has besides its image, of a caption that is kept in memory."""
    return {"caption": caption}


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
        self._samples: list[tuple[Any, int, Any]] = []
        self._load: Callable[[Any], dict[str, Any]] = dict

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, place: int) -> dict[str, Any]:
        source, index, key = self._samples[place]
        return {**source[index], **(self._load(key) if source is self.images else {})}

    def fill(
        self,
        groups: Sequence[Sequence[tuple[int, Any]]],
        load: Callable[[Any], dict[str, Any]],
        number: int,
        seed: int,
        share: float,
    ) -> None:
        """Chooses the samples of a round.

        Args:
            groups: Samples that stay together, each the index of an image and what `load` gives the caption of.
            load: Gives what is added to an item, `caption` among it, when the item is read. The data loader's workers
                have copies of it.
            number: Of the round.
            share: Of the samples, that are pairs.

        """
        num_pairs = round(share * self.length) if self.pairs is not None else 0
        smallest = min(map(len, groups))
        order = shuffled_passes(len(groups), -(-self.length // smallest), seed, SAMPLE_ORDER, number)
        own = [(self.images, *sample) for place in order for sample in groups[place]][: self.length - num_pairs]
        if num_pairs:
            mixed = shuffled_passes(len(self.pairs), num_pairs, seed, PAIR_ORDER, number)
            own += [(self.pairs, place, None) for place in mixed]
            own = [own[int(place)] for place in drawn(seed, PAIR_ORDER, number).permutation(len(own))]
        self._samples, self._load = own, load
