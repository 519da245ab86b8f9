"""Each sample is seen once an epoch, on several ranks with several workers, and a resumed run sees the very next."""

import tracemalloc
from collections import Counter
from itertools import islice

import datasets
import numpy as np
import pyarrow as pa
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler, prepare_data_loader, skip_first_batches
from pyarrow import parquet
from torch.utils.data import DataLoader

from vlv.train import load_images, load_pairs
from vlv.train.data import (
    EpochSampler,
    ListDataset,
    Source,
    StreamCollator,
    StreamingDataset,
    StreamSource,
    TrainingDataset,
)
from vlv.train.data.streaming import STATE

from .data_files import write_tar

RANKS, WORKERS, BATCH = 2, 2, 4


class Numbers(Source):
    """Rows whose image is their number, in shards of given sizes, or without shards."""

    def __init__(self, size: int, shards: tuple[int, ...] = (), start: int = 0):
        self.size, self.shards, self.start = size, shards, start

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, number: int) -> dict:
        return {"image": self.start + number}

    def shard_sizes(self) -> tuple[int, ...]:
        return self.shards


def read(items: list[dict]) -> dict:
    """Collates: the images of a batch, and the worker that read it."""
    info = torch.utils.data.get_worker_info()
    return {"images": [item["image"] for item in items], "worker": info.id if info else 0}


def loader(dataset, rank: int, epoch: int = 0, workers: int = WORKERS, drop_last: bool = False, shuffle: bool = True):
    """The data loader of a rank, as `Trainer` and accelerate build it."""
    sampler = EpochSampler(dataset, seed=5, batch_size=BATCH, num_ranks=RANKS, shuffle=shuffle)
    plain = DataLoader(
        dataset, batch_size=BATCH, sampler=sampler, num_workers=workers, collate_fn=read, drop_last=drop_last
    )
    prepared = prepare_data_loader(plain, num_processes=RANKS, process_index=rank, use_seedable_sampler=True)
    assert isinstance(prepared.batch_sampler, BatchSamplerShard)
    prepared.set_epoch(epoch)
    sampler.set_epoch(epoch)
    return prepared, sampler


@pytest.fixture(scope="module")
def shards() -> TrainingDataset:
    return TrainingDataset([Numbers(512, (10, 6, 12, 4) * 16)])


@pytest.mark.slow
def test_two_ranks_with_two_workers_see_each_sample_of_shards_once_an_epoch(shards):
    batches = [list(loader(shards, rank, epoch=1)[0]) for rank in range(RANKS)]
    assert Counter(n for rank in batches for batch in rank for n in batch["images"]) == Counter(range(512))
    assert {batch["worker"] for rank in batches for batch in rank} == {0, 1}
    ends = np.cumsum(shards.parts[0].source.shard_sizes())
    readers: dict[int, set[tuple[int, int]]] = {}
    for rank, own in enumerate(batches):
        for batch in own:
            for number in batch["images"]:
                readers.setdefault(int(np.searchsorted(ends, number, "right")), set()).add((rank, batch["worker"]))
    assert np.mean([len(found) for found in readers.values()]) < 1.5  # of four: most shards have one reader


def test_an_epoch_that_does_not_divide_into_batches_ends_with_samples_of_its_beginning():
    dataset = TrainingDataset([Numbers(50, (10, 7, 12, 4, 17))])
    ranks = [[batch["images"] for batch in loader(dataset, rank, workers=0)[0]] for rank in range(RANKS)]
    assert [[len(images) for images in batches] for batches in ranks] == [[BATCH] * 7] * RANKS
    order = dataset.order(0, batch_size=BATCH, num_ranks=RANKS, seed=5).tolist()
    in_turns = [n for batches in zip(*ranks, strict=True) for images in batches for n in images]
    assert in_turns == order + order[:6] and sorted(order) == list(range(50))
    dropping = [list(loader(dataset, rank, workers=0, drop_last=True)[0]) for rank in range(RANKS)]
    assert [n for batches in zip(*dropping, strict=True) for batch in batches for n in batch["images"]] == order[:48]


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_resumed_rank_gets_the_very_next_batches(shards, epoch):
    for rank in range(RANKS):
        unbroken = [batch["images"] for batch in loader(shards, rank, epoch, workers=0)[0]]
        prepared, sampler = loader(shards, rank, epoch, workers=0)
        resumed = skip_first_batches(prepared, 5)
        sampler.set_epoch(epoch)  # as the trainer does; accelerate's own call does not pass the skipped batches
        assert [batch["images"] for batch in resumed] == unbroken[5:] and len(unbroken) == 64


def test_shards_and_the_samples_in_them_come_in_an_order_of_seed_and_epoch(shards):
    orders = [
        shards.order(epoch, batch_size=4, seed=seed).tolist() for epoch, seed in ((0, 0), (1, 0), (0, 1), (0, 0))
    ]
    assert orders[0] == orders[3] and len({tuple(order) for order in orders}) == 3
    assert all(sorted(order) == list(range(512)) for order in orders)
    sequential = list(EpochSampler(shards, 0, shuffle=False))
    assert sequential == [(0, place) for place in range(512)]


def test_without_shards_the_order_is_that_of_accelerates_seeded_sampler():
    dataset = TrainingDataset([Numbers(50)])
    theirs = SeedableRandomSampler(dataset, data_seed=7)
    ours = EpochSampler(dataset, seed=7)
    for epoch in range(3):
        theirs.set_epoch(epoch)
        ours.set_epoch(epoch)
        assert [place for _, place in ours] == list(theirs)


@pytest.mark.parametrize("shards", [(), (5, 10, 5)])
def test_a_weight_is_the_number_of_times_that_a_source_is_seen_in_an_epoch(shards):
    dataset = TrainingDataset([Numbers(20, shards), Numbers(10, start=100), Numbers(20, shards, 200)], [1, 2, 0.4])
    assert len(dataset) == 20 + 20 + 8
    drawn = []
    for epoch in range(3):
        sampler = EpochSampler(dataset, seed=1, batch_size=2)
        sampler.set_epoch(epoch)
        seen = Counter(dataset[index]["image"] for index in sampler)
        assert all(seen[n] == 1 for n in range(20)) and all(seen[n] == 2 for n in range(100, 110))
        drawn.append({n for n in seen if n >= 200})
        assert len(drawn[-1]) == 8 and set(seen.values()) <= {1, 2}
    assert drawn[0] != drawn[1] and len(drawn[0] | drawn[1] | drawn[2]) > 10
    first = [dataset[0, place]["image"] >= 100 for place in dataset.order(0, batch_size=2)[:24]]
    assert 4 < sum(first) < 20  # sources are mixed


def test_sources_and_weights_are_given_as_text_or_mappings(tmp_path, image_folder):
    (tmp_path / "b@2").symlink_to(image_folder)  # a name, not a weight
    dataset = load_images([str(image_folder) + "@0.5", {"source": str(tmp_path / "b@2"), "weight": 2}])
    assert dataset.weights == [0.5, 2] and len(dataset) == 8 + 32
    assert dataset.fingerprint() != load_images([str(image_folder), str(tmp_path / "b@2")]).fingerprint()
    for wrong in (str(image_folder) + "@0", {"source": "x", "weight": "many"}, {"folder": "x"}, []):
        with pytest.raises(ValueError, match=r"the weight of|a source is"):
            load_images(wrong)


def test_all_captions_of_an_image_stay_in_its_shard(tmp_path):
    table = [{"image": f"{n}.png", "text": ["a"] * (n % 3)} for n in range(12)]
    parquet.write_table(pa.Table.from_pylist(table), tmp_path / "a.parquet", row_group_size=4)
    part = load_pairs(str(tmp_path / "a.parquet"), caption_lines="all").parts[0]
    assert len(part) == 12 and part.shard_ends().tolist() == [3, 7, 12]  # 0+1+2+0, 1+2+0+1, 2+0+1+2 captions


def test_augmentation_depends_on_the_epoch_and_the_sample_alone(image_folder):
    first, again = (load_images(str(image_folder), horizontal_flip=True, random_crop=True, seed=2) for _ in range(2))
    drawn = [first[epoch, 3]["augmentation"] for epoch in range(10)]
    assert {a["flip"] for a in drawn} == {True, False} and len({a["crop"] for a in drawn}) == 10
    assert drawn == [again[epoch, 3]["augmentation"] for epoch in range(10)]
    assert all(0 <= share < 1 for a in drawn for share in a["crop"])


def test_a_sample_takes_bytes_and_no_objects_of_python():
    count, text = 20_000, "x" * 60
    tracemalloc.start()
    try:
        items = ListDataset({"image": f"{text}{n}.png", "caption": [text, str(n)]} for n in range(count))
        assert tracemalloc.get_traced_memory()[0] < count * (2 * 60 + 100)
        tracemalloc.reset_peak()
        for sizes in ((), (100,) * (count // 100)):
            before = tracemalloc.get_traced_memory()[0]
            order = TrainingDataset([Numbers(count, sizes), Numbers(10)]).order(0, batch_size=4, num_ranks=2)
            assert order.nbytes == 8 * (count + 10)
            assert tracemalloc.get_traced_memory()[1] - before < 80 * count
    finally:
        tracemalloc.stop()
    assert [items[n] for n in (0, 7, -1)] == [
        {"image": f"{text}{n}.png", "caption": [text, str(n)]} for n in (0, 7, count - 1)
    ]
    with pytest.raises(IndexError):
        items[count]


# --- streams -------------------------------------------------------------------------------------------------------


def stream(num_shards: int = 8, rows: int = 48, **options) -> StreamingDataset:
    table = datasets.Dataset.from_dict({"image": [f"{n}.png" for n in range(rows)]})
    source = StreamSource(table.to_iterable_dataset(num_shards), "numbers", "image", None)
    return StreamingDataset([source], seed=3, **options)


def batches_of(dataset: StreamingDataset, rank: int, workers: int, count: int) -> list[dict]:
    """The next batches; the data set notes their states as the trainer does."""
    dataset.set_loader(BATCH, workers, rank, RANKS)
    found = []
    for batch in DataLoader(dataset, batch_size=BATCH, num_workers=workers, collate_fn=StreamCollator(read)):
        dataset.record(batch[STATE])
        found.append(batch)
        if len(found) == count:
            return found
    raise AssertionError("the stream ended")


@pytest.mark.slow
@pytest.mark.parametrize("num_shards", [8, 3])
def test_two_ranks_with_two_workers_see_each_sample_of_a_stream_once_a_pass(num_shards):
    seen = Counter(
        image
        for rank in range(RANKS)
        for batch in batches_of(stream(num_shards), rank, WORKERS, 6)
        for image in batch["images"]
    )
    assert seen == Counter(f"{n}.png" for n in range(48))


def mixture() -> StreamingDataset:
    """Streams of 48 and of 12 samples, and 16 samples in shards, which have a quarter, a quarter and a half."""
    few = datasets.Dataset.from_dict({"image": [f"few {n}" for n in range(12)]}).to_iterable_dataset()
    sources = [stream().parts[0].source, StreamSource(few, "few", "image", None), Numbers(16, (8, 8))]
    return StreamingDataset(sources, [1, 1, 2], seed=3)


@pytest.mark.slow
@pytest.mark.parametrize(("build", "workers", "before"), [(stream, 2, 5), (stream, 0, 9), (mixture, 0, 9)])
def test_a_resumed_stream_gives_the_very_next_samples(build, workers, before):
    unbroken = [batch["images"] for batch in batches_of(build(), 1, workers, 14)]  # more than a pass of 6
    assert unbroken[:6] != unbroken[6:12]  # the order of shards differs between passes
    broken, resumed = build(), build()
    batches_of(broken, 1, workers, before)
    resumed.progress = broken.progress
    assert [batch["images"] for batch in batches_of(resumed, 1, workers, 14 - before)] == unbroken[before:]
    with pytest.raises(ValueError, match="dataloader_num_workers cannot be 3"):
        resumed.set_loader(BATCH, 3, 1, RANKS)
    with pytest.raises(ValueError, match="was read on 2 devices, so that their number cannot be 4"):
        resumed.set_loader(BATCH, workers, 1, 4)


def test_sources_of_a_mixture_have_their_shares_and_each_sample_is_seen_once_a_pass():
    seen: dict[str, list[list]] = {".png": [], "few": [], "": []}
    for rank in range(4):
        dataset = mixture()
        dataset.set_loader(BATCH, 0, rank, 4)
        images = [item["image"] for item in islice(dataset, 96)]
        first = [isinstance(image, int) for image in images[:8]]
        assert 3 <= sum(first) <= 5  # of any few samples each source has its share
        for kind, own in seen.items():
            own.append([image for image in images if str(image).strip("0123456789 ") == kind])
    assert all(23 <= len(own) <= 25 for kind in (".png", "few") for own in seen[kind])
    for kind, size in ((".png", 12), ("few", 3), ("", 4)):  # of each reader's pass
        passes = [Counter(image for own in seen[kind] for image in own[n : n + size]) for n in (0, size)]
        assert passes[0] == passes[1] and set(passes[0].values()) == {1} and len(passes[0]) == 4 * size
    again = mixture()
    again.set_loader(BATCH, 0, 3, 4)
    assert [item["image"] for item in islice(again, 96)] == images


def test_each_caption_of_a_row_of_a_stream_is_a_sample_and_a_state_may_lie_between_them():
    rows = {"image": [f"{n}.png" for n in range(4)], "text": [["a", "b", "c"], [], ["d"], ["e", " ", "f"]]}
    table = datasets.Dataset.from_dict(rows)

    def pairs() -> StreamingDataset:
        source = StreamSource(table.to_iterable_dataset(2), "pairs", "image", "caption")
        return StreamingDataset([source], caption_lines="all", shuffle=False)

    dataset = pairs()
    items = list(islice(dataset, 14))
    captions = [item["caption"] for item in items]
    assert captions[:7] == ["a", "b", "c", [], "d", "e", "f"] and captions[7:] == captions[:7]
    assert [item["image"] for item in items[:4]] == ["0.png"] * 3 + ["1.png"]
    for number, item in enumerate(items[:-1]):
        resumed = pairs()
        resumed.record(item[STATE])
        assert next(iter(resumed))["caption"] == captions[number + 1]


def test_data_other_than_that_of_a_checkpoint_is_read_from_its_beginning(caplog):
    broken, other = stream(), mixture()
    batches_of(broken, 0, 0, 3)
    other.progress = broken.progress
    assert batches_of(other, 0, 0, 1)[0]["images"] == batches_of(mixture(), 0, 0, 1)[0]["images"]
    assert "is read from its beginning" in caplog.text


def test_a_stream_needs_samples_for_every_reader():
    short = stream(num_shards=1, rows=1)
    short.set_loader(1, 0, 1, 2)
    with pytest.raises(ValueError, match="numbers has no samples for reader 2 of 2"):
        next(iter(short))
    indexed = StreamingDataset([Numbers(1)], names=["list.csv"])
    indexed.set_loader(1, 0, 1, 2)
    with pytest.raises(ValueError, match=r"list\.csv has no samples for reader 2 of 2"):
        next(iter(indexed))


def test_a_folder_of_parquet_is_a_stream_with_captions(tmp_path):
    table = pa.Table.from_pylist([{"image": f"{n}.png", "text": ["", f"caption {n}"]} for n in range(3)])
    parquet.write_table(table, tmp_path / "a.parquet")
    pairs = iter(load_pairs(str(tmp_path), streaming=True, shuffle=False))
    assert [next(pairs)["caption"] for _ in range(4)] == ["caption 0", "caption 1", "caption 2", "caption 0"]


def test_streams_are_mixed_with_lists_and_folders_of_images(tmp_path, image_folder):
    write_tar(tmp_path / "tars" / "a.tar", range(3), {1: (".txt", b"caption 1\nein Bild")})
    (tmp_path / "list.jsonl").write_text(f'{{"image": "{image_folder}/a/1.png", "caption": ["x", "y"]}}')
    sources = [f"{tmp_path}/tars@2", str(tmp_path / "list.jsonl"), {"source": str(image_folder), "weight": 5}]
    pairs = load_pairs(sources, streaming=True, caption_lines="all", seed=1)
    assert [type(part).__name__ for part in pairs.parts] == ["StreamPart", "IndexedPart", "IndexedPart"]
    assert pairs.shares() == pytest.approx([0.25, 0.125, 0.625])
    counts = Counter(item["caption"] for item in islice(pairs, 64))
    assert {counts[text] for text in ("caption 0", "caption 1", "ein Bild", "caption 2")} == {4}
    assert counts["x"] + counts["y"] in (8, 9) and set(counts) >= {"x", "a small dog", "a large apple at the top left"}
    with pytest.raises(ValueError, match="none of the sources can be read with streaming"):
        load_pairs(sources[1:], streaming=True)
