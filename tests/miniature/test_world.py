"""The world: its splits, its grammar, its rendered images and its scores."""

import hashlib
import random

import numpy as np
import pytest

from vlv.miniature import render as render_module
from vlv.miniature.data import SceneDataset, partial_scene
from vlv.miniature.grammar import MAX_WORDS, parse_caption, write_caption
from vlv.miniature.render import IMAGE_SIZE, openmoji_artwork, render
from vlv.miniature.scoring import score_scenes
from vlv.miniature.tokenizer import TEXT_POSITIONS, build_tokenizer
from vlv.miniature.world import (
    BACKGROUNDS,
    CODEPOINTS,
    COLOURS,
    OBJECTS,
    PLACES,
    SPLITS,
    Scene,
    SceneObject,
    sample_scenes,
)


def sample(split: str | None, n: int = 300, seed: int = 0) -> list[Scene]:
    scenes = sample_scenes(random.Random(seed), split)
    return [next(scenes) for _ in range(n)]


def held_out(scene: Scene) -> list[bool]:
    return [
        (7 * OBJECTS.index(o.name) + 3 * COLOURS.index(scene.background) + 5 * PLACES.index(o.place)) % 10 == 0
        for o in scene.objects
    ]


@pytest.mark.slow
def test_train_and_test_have_no_held_out_triple_and_combo_has_no_other():
    for split in ("train", "test"):
        assert not any(any(held_out(scene)) for scene in sample(split))
    assert all(all(held_out(scene)) for scene in sample("combo"))


def test_the_hash_of_a_scene_decides_between_train_and_test():
    def first_byte(scene: Scene) -> int:
        return hashlib.sha256(scene.text.encode()).digest()[0]

    assert all(first_byte(scene) < 26 for scene in sample("test"))
    assert all(first_byte(scene) >= 26 for scene in sample("train"))


@pytest.mark.slow
def test_every_split_has_one_two_and_three_objects_equally_often():
    for split in SPLITS:
        counts = [len(scene.objects) for scene in sample(split, 600)]
        assert all(150 < counts.count(n) < 250 for n in (1, 2, 3))


def test_places_differ_and_only_a_single_object_is_at_the_centre():
    for scene in sample(None, 1000):
        places = [o.place for o in scene.objects]
        assert len(set(places)) == len(places)
        assert places == sorted(places, key=PLACES.index)
        assert "centre" not in places or len(places) == 1


def test_the_same_seed_gives_the_same_scenes():
    assert sample("train", 50, seed=3) == sample("train", 50, seed=3)
    assert sample("train", 50, seed=3) != sample("train", 50, seed=4)


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="'validation'"):
        next(sample_scenes(random.Random(0), "validation"))


def test_captions_are_parsed_into_the_scenes_that_they_describe():
    rng = random.Random(1)
    phrasings = set()
    for scene in sample(None, 1500):
        caption = write_caption(scene, rng)
        assert parse_caption(caption) == scene
        assert len(caption.replace(",", " ,").split()) <= MAX_WORDS
        phrasings.add(caption.split(scene.objects[0].name)[0])
    assert len(phrasings) > 20


def test_without_a_random_generator_the_plain_sentence_is_written():
    scene = Scene(
        "light blue", (SceneObject("apple", "large", "top left"), SceneObject("dog", "small", "bottom right"))
    )
    assert (
        write_caption(scene)
        == "a large apple at the top left and a small dog at the bottom right, on a light blue background"
    )


def test_a_partial_caption_omits_parts_of_the_scene_and_adds_nothing():
    rng = random.Random(5)
    empty = complete = 0
    for scene in sample("train", 400):
        described = partial_scene(scene, rng)
        caption = write_caption(described, rng)
        assert parse_caption(caption) == described
        assert set(described.objects) <= set(scene.objects) and described.background in (None, scene.background)
        empty += caption == ""
        complete += described == scene
    assert empty > 20 and complete > 20


@pytest.mark.parametrize("caption", ["", "nothing of this world", "a large at the", "a green background"])
def test_a_caption_of_nothing_in_the_world_gives_an_empty_scene(caption):
    assert parse_caption(caption) == Scene(None, ())


def test_captions_fit_the_text_encoder_and_have_no_unknown_words():
    tokenizer = build_tokenizer(for_text_encoder=True)
    rng = random.Random(2)
    for scene in sample(None, 300):
        caption = write_caption(scene, rng)
        ids = tokenizer(caption).input_ids
        assert len(ids) <= TEXT_POSITIONS
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_images_show_the_background_and_the_objects_at_their_places():
    rng = random.Random(3)
    for background, colour in BACKGROUNDS.items():
        scene = Scene(background, (SceneObject("heart", "large", "top left"),))
        image = render(scene, rng)
        assert image.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and image.dtype == np.uint8
        assert np.abs(image[50:, 50:].astype(int) - colour).max() <= 6
        assert np.abs(image[16, 16].astype(int) - colour).max() > 20


def test_rendered_sizes_are_in_the_range_of_their_name():
    rng = random.Random(4)
    for size, (low, high) in {"small": (18, 22), "large": (28, 32)}.items():
        for name in OBJECTS:
            image = render(Scene("white", (SceneObject(name, size, "centre"),)), rng).astype(int)
            rows, columns = np.nonzero(np.abs(image - image[0, 0]).max(axis=2) > 12)
            extent = max(np.ptp(rows), np.ptp(columns)) + 1
            assert low - 2 <= extent <= high


def test_every_object_has_artwork_of_its_own():
    assert len({openmoji_artwork(name).tobytes() for name in CODEPOINTS}) == len(OBJECTS) == 16


def test_a_scene_dataset_gives_the_same_item_for_the_same_index():
    data = SceneDataset(20, split="test", fields=("pixels", "caption", "scene"))
    items = [data[i] for i in (7, 3, 7)]
    assert items[0]["pixels"].equal(items[2]["pixels"]) and items[0]["scene"] == items[2]["scene"]
    assert not items[0]["pixels"].equal(items[1]["pixels"])
    with pytest.raises(IndexError):
        data[20]


def test_scores_count_the_objects_that_agree():
    apple, dog = SceneObject("apple", "large", "top left"), SceneObject("dog", "small", "bottom right")
    truth = [Scene("white", (apple, dog)), Scene("pink", (apple,))]
    assert set(score_scenes(truth, truth).values()) == {1.0}
    found = [Scene("white", (SceneObject("apple", "small", "top left"),)), Scene("grey", (apple,))]
    assert score_scenes(found, truth) == {
        "background": 0.5,
        "object_f1": 0.8,  # 2 of 2 predicted objects are right, 2 of 3 true ones are found
        "object_place_f1": 0.8,
        "object_size_place_f1": 0.4,
        "exact": 0.0,
    }
    with pytest.raises(ValueError, match="at least one; got 0 and 0"):
        score_scenes([], [])
    with pytest.raises(ValueError, match="got 1 and 2"):
        score_scenes(found[:1], truth)


def test_premultiplied_colours_are_at_most_the_opacity():
    """Otherwise the half transparent edges of artwork would be brighter than artwork and background."""
    for name in OBJECTS:
        for side in (18, 22, 28, 32):
            colour, opacity = render_module._sprite(name, side, render_module.openmoji_artwork)
            assert (colour <= 255 * opacity + 2).all(), name
