"""`vlv data dedup` and `vlv data split`."""

import json

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from vlv.cli.main import main
from vlv.preparation.dedup import dedup
from vlv.preparation.duplicates import choose_kept, find_near
from vlv.preparation.records import Records
from vlv.preparation.scan import perceptual_hash
from vlv.preparation.split import part_of, split
from vlv.train import load_images

from .inputs import write_pictures


@pytest.fixture(scope="module")
def hashes():
    """400 random hashes, with neighbours at 0 to 8 bits of the first hundred."""
    random = np.random.default_rng(0)
    far = random.integers(0, 2**64, 300, dtype=np.uint64)
    near = far[:100].copy()
    for number in range(len(near)):
        for bit in random.choice(64, number % 9, replace=False):
            near[number] ^= np.uint64(1) << np.uint64(bit)
    return np.concatenate([far, near])


@pytest.mark.parametrize("distance", [0, 1, 4, 8])
def test_the_index_finds_every_near_pair(hashes, distance):
    different = np.unique(hashes)
    bits = np.bitwise_count(different[:, None] ^ different[None])
    first, second = np.nonzero(np.triu(bits <= distance, 1))
    assert find_near(different, distance).tolist() == np.stack([first, second], axis=1).tolist()
    assert distance == 0 or len(first) > 5


def test_no_two_kept_images_are_near_and_every_other_is_near_its_own(hashes):
    priority = np.random.default_rng(1).permutation(len(hashes))
    stands = choose_kept(hashes, priority, 4)
    kept = np.flatnonzero(stands == np.arange(len(hashes)))
    bits = np.bitwise_count(hashes[kept][:, None] ^ hashes[kept][None])
    assert (bits[~np.eye(len(kept), dtype=bool)] > 4).all() and 300 <= len(kept) < 360
    assert (np.bitwise_count(hashes ^ hashes[stands]) <= 4).all() and set(stands) == set(kept)
    places = np.argsort(priority)
    assert (places[stands] <= places).all()


def test_many_images_of_one_hash_are_one_group():
    stands = choose_kept(np.full(50_000, 7, np.uint64), np.arange(49_999, -1, -1), 4)
    assert (stands == 49_999).all()


def test_a_hash_changes_little_with_size_compression_and_brightness(tmp_path):
    picture = Image.open(write_pictures(tmp_path, 2, side=200) / "00.png")
    changed = ImageEnhance.Brightness(picture.resize((90, 90))).enhance(0.8)
    changed.save(tmp_path / "changed.jpg", quality=40)
    near = perceptual_hash(picture) ^ perceptual_hash(Image.open(tmp_path / "changed.jpg"))
    far = perceptual_hash(picture) ^ perceptual_hash(Image.open(tmp_path / "01.png"))
    assert near.bit_count() <= 4 and far.bit_count() > 16


def test_white_and_off_white_are_the_same():
    white, off_white = (perceptual_hash(Image.new("RGB", (60, 40), (value,) * 3)) for value in (255, 250))
    assert white == off_white


@pytest.mark.parametrize("is_upright", [True, False])
def test_a_gradient_is_near_itself_after_compression(tmp_path, is_upright):
    ramp = np.tile(np.linspace(20, 220, 256).astype(np.uint8), (256, 1))
    picture = Image.fromarray(ramp.T if is_upright else ramp).convert("RGB")
    picture.resize((64, 64)).save(tmp_path / "ramp.jpg", quality=60)
    bits = perceptual_hash(picture) ^ perceptual_hash(Image.open(tmp_path / "ramp.jpg"))
    assert bits.bit_count() <= 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures; of `00` a smaller JPEG and an equal file."""
    folder = write_pictures(tmp_path_factory.mktemp("data") / "pictures", 12, side=96)
    picture = Image.open(folder / "00.png")
    picture.resize((60, 60)).save(folder / "smaller.jpg", quality=70)
    (folder / "a copy.png").write_bytes((folder / "00.png").read_bytes())
    for name in ("smaller", "a copy"):
        (folder / f"{name}.txt").write_text("again\n")
    return folder


def test_the_largest_image_of_a_group_is_kept_and_the_list_can_be_trained_on(folder, tmp_path):
    counts = dedup(Records(str(folder)), tmp_path / "out", distance=6)
    assert (counts["kept"], counts["duplicates"], counts["groups"]) == (12, 2, 1)
    (group,) = json.loads((tmp_path / "out" / "duplicates.json").read_text())["groups"]
    assert group["kept"] == "00.png" and [one["name"] for one in group["duplicates"]] == ["a copy.png", "smaller.jpg"]
    kept = load_images(str(tmp_path / "out" / "kept.jsonl"))
    assert sorted(item["image"].rpartition("/")[2] for item in kept) == [f"{number:02d}.png" for number in range(12)]


def parts_of(folder) -> dict[str, str]:
    found = {}
    for path in folder.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            found[json.loads(line)["file_name"].rpartition("/")[2]] = path.stem
    return found


def test_later_images_move_none_and_another_folder_splits_equally(tmp_path):
    for place, number in (("few", 60), ("elsewhere/many", 90)):
        pictures = write_pictures(tmp_path / place, number)
        split(Records(str(pictures), pairs=True), tmp_path / place / "out", validation=0.3, test=0.2)
    few, many = (parts_of(tmp_path / place / "out") for place in ("few", "elsewhere/many"))
    assert few.items() <= many.items() and len(many) == 90
    assert len(load_images(str(tmp_path / "few" / "out" / "train.jsonl"))) == list(few.values()).count("train")


@pytest.mark.parametrize("by", ["name", "content"])
def test_empty_files_are_left_out_of_the_lists_and_named(tmp_path, by):
    """Other files that are not images are in them: they are not opened."""
    pictures = write_pictures(tmp_path / "in", 2)
    (pictures / "empty.png").touch()
    (pictures / "words.png").write_text("no picture")
    command = ["data", "split", str(pictures), "--output", str(tmp_path / "out"), "--by", by]
    assert main(command) == main(command) == 1
    assert json.loads((tmp_path / "out" / "failed.json").read_text()) == {"empty.png": "the file is empty"}
    assert parts_of(tmp_path / "out").keys() == {"00.png", "01.png", "words.png"}


def test_the_parts_have_their_shares():
    parts = [part_of(str(number).encode(), 0.3, 0.2, seed=0) for number in range(10_000)]
    for part, share in (("validation", 0.3), ("test", 0.2), ("train", 0.5)):
        assert abs(parts.count(part) / 10_000 - share) < 0.015  # three standard deviations


def test_near_duplicates_and_equal_files_are_in_one_part(folder, tmp_path):
    dedup(Records(str(folder)), tmp_path / "dedup", distance=6)
    apart, together = set(), set()
    for seed in range(8):
        plain, grouped, content = (tmp_path / f"{name}-{seed}" for name in ("plain", "grouped", "content"))
        options = {"validation": 0.5, "seed": seed}
        split(Records(str(folder)), plain, **options)
        split(Records(str(folder)), grouped, **options, groups=tmp_path / "dedup" / "duplicates.json")
        split(Records(str(folder)), content, **options, by="content")
        names = ("00.png", "a copy.png", "smaller.jpg")
        apart.add(len({parts_of(plain)[name] for name in names}))
        together.add(len({parts_of(grouped)[name] for name in names}))
        assert parts_of(content)["00.png"] == parts_of(content)["a copy.png"]
    assert apart == {1, 2} and together == {1}


def test_groups_of_another_source_are_refused(folder, tmp_path):
    dedup(Records(str(folder)), tmp_path / "dedup", distance=6)
    other = write_pictures(tmp_path / "other", 2)
    with pytest.raises(ValueError, match=r"duplicates\.json names '.*', which is not in .*other"):
        split(Records(str(other)), tmp_path / "out", groups=tmp_path / "dedup" / "duplicates.json")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("step", "arguments", "expected"),
    [
        ("split", ["--validation", "0.6", "--test", "0.5"], "expected numbers from 0 whose sum is below 1"),
        ("split", ["--groups", "no.json"], "no.json"),
        ("dedup", ["--distance", "9"], "expected 0 to 8"),
        ("inspect", ["--distance", "9"], "expected 0 to 8"),
    ],
)
def test_bad_options_say_what_is_expected(folder, tmp_path, capsys, step, arguments, expected):
    assert main(["data", step, str(folder), "--output", str(tmp_path / "out"), *arguments]) == 2
    assert expected in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_packed_images_cannot_be_split_into_lists(folder, tmp_path, capsys):
    assert main(["data", "pack", str(folder), "--output", str(tmp_path / "packed")]) == 0
    assert main(["data", "split", str(tmp_path / "packed"), "--output", str(tmp_path / "out")]) == 2
    assert "split the images before they are packed" in capsys.readouterr().err
