"""The world's splits, its grammar and its pictures are what the design says."""

import hashlib
import random

import numpy as np
import pytest

from vlv.miniature import render as render_module
from vlv.miniature.grammar import MAX_WORDS, parse_caption, write_caption
from vlv.miniature.render import IMAGE_SIZE, artwork, render
from vlv.miniature.scoring import score_scenes
from vlv.miniature.tokenizer import TEXT_POSITIONS, build_tokenizer
from vlv.miniature.training import SceneDataset, leave_out
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


def some(split: str | None, n: int = 300, seed: int = 0) -> list[Scene]:
    scenes = sample_scenes(random.Random(seed), split)
    return [next(scenes) for _ in range(n)]


def held_out(scene: Scene) -> list[bool]:
    return [
        (7 * OBJECTS.index(o.name) + 3 * COLOURS.index(scene.background) + 5 * PLACES.index(o.place)) % 10 == 0
        for o in scene.objects
    ]


def test_no_part_trains_on_a_held_out_triple_and_combo_holds_nothing_else():
    for split in ("train", "test"):
        assert not any(any(held_out(scene)) for scene in some(split))
    assert all(all(held_out(scene)) for scene in some("combo"))


def test_test_scenes_are_those_whose_hash_says_so():
    def first_byte(scene: Scene) -> int:
        return hashlib.sha256(scene.text.encode()).digest()[0]

    assert all(first_byte(scene) < 26 for scene in some("test"))
    assert all(first_byte(scene) >= 26 for scene in some("train"))


def test_every_split_draws_the_number_of_objects_evenly():
    for split in SPLITS:
        counts = [len(scene.objects) for scene in some(split, 600)]
        assert all(150 < counts.count(n) < 250 for n in (1, 2, 3))


def test_places_differ_and_the_centre_is_for_one_alone():
    for scene in some(None, 1000):
        places = [o.place for o in scene.objects]
        assert len(set(places)) == len(places)
        assert places == sorted(places, key=PLACES.index)
        assert "centre" not in places or len(places) == 1


def test_the_same_state_gives_the_same_scenes():
    assert some("train", 50, seed=3) == some("train", 50, seed=3)
    assert some("train", 50, seed=3) != some("train", 50, seed=4)


def test_an_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="'validation'"):
        next(sample_scenes(random.Random(0), "validation"))


def test_captions_read_back_as_the_scenes_they_describe():
    rng = random.Random(1)
    phrasings = set()
    for scene in some(None, 1500):
        caption = write_caption(scene, rng)
        assert parse_caption(caption) == scene
        assert len(caption.replace(",", " ,").split()) <= MAX_WORDS
        phrasings.add(caption.split(scene.objects[0].name)[0])
    assert len(phrasings) > 20


def test_the_plain_sentence_is_the_one_of_the_design():
    scene = Scene(
        "light blue", (SceneObject("apple", "large", "top left"), SceneObject("dog", "small", "bottom right"))
    )
    assert (
        write_caption(scene)
        == "a large apple at the top left and a small dog at the bottom right, on a light blue background"
    )


def test_a_careless_caption_leaves_things_out_and_adds_nothing():
    rng = random.Random(5)
    empty = whole = 0
    for scene in some("train", 400):
        told = leave_out(scene, rng)
        caption = write_caption(told, rng)
        assert parse_caption(caption) == told
        assert set(told.objects) <= set(scene.objects) and told.background in (None, scene.background)
        empty += caption == ""
        whole += told == scene
    assert empty > 20 and whole > 20


@pytest.mark.parametrize("caption", ["", "nothing of this world", "a large at the", "a green background"])
def test_a_caption_that_says_nothing_gives_an_empty_scene(caption):
    assert parse_caption(caption) == Scene(None, ())


def test_captions_fit_the_text_encoder_and_have_no_unknown_words():
    tokenizer = build_tokenizer(for_text_encoder=True)
    rng = random.Random(2)
    for scene in some(None, 300):
        caption = write_caption(scene, rng)
        ids = tokenizer(caption).input_ids
        assert len(ids) <= TEXT_POSITIONS
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == caption


def test_pictures_show_the_background_and_the_objects_where_they_are():
    rng = random.Random(3)
    for background, colour in BACKGROUNDS.items():
        scene = Scene(background, (SceneObject("heart", "large", "top left"),))
        picture = render(scene, rng)
        assert picture.shape == (IMAGE_SIZE, IMAGE_SIZE, 3) and picture.dtype == np.uint8
        assert np.abs(picture[50:, 50:].astype(int) - colour).max() <= 6
        assert np.abs(picture[16, 16].astype(int) - colour).max() > 20


def test_sizes_are_those_of_the_design():
    rng = random.Random(4)
    for size, (low, high) in {"small": (18, 22), "large": (28, 32)}.items():
        for name in OBJECTS:
            picture = render(Scene("white", (SceneObject(name, size, "centre"),)), rng).astype(int)
            rows, columns = np.nonzero(np.abs(picture - picture[0, 0]).max(axis=2) > 12)
            extent = max(np.ptp(rows), np.ptp(columns)) + 1
            assert low - 2 <= extent <= high


def test_every_concept_has_a_drawing_of_its_own():
    drawings = {artwork(name).tobytes() for name in CODEPOINTS}
    assert len(drawings) == len(OBJECTS) == 16


def test_a_scene_dataset_can_make_any_item_anew():
    data = SceneDataset(20, split="test", fields=("pixels", "caption", "scene"))
    items = [data[i] for i in (7, 3, 7)]
    assert items[0]["pixels"].equal(items[2]["pixels"]) and items[0]["scene"] == items[2]["scene"]
    assert not items[0]["pixels"].equal(items[1]["pixels"])
    with pytest.raises(IndexError):
        data[20]


def test_scores_count_what_agrees():
    apple, dog = SceneObject("apple", "large", "top left"), SceneObject("dog", "small", "bottom right")
    truth = [Scene("white", (apple, dog)), Scene("pink", (apple,))]
    assert set(score_scenes(truth, truth).values()) == {1.0}
    found = [Scene("white", (SceneObject("apple", "small", "top left"),)), Scene("grey", (apple,))]
    assert score_scenes(found, truth) == {
        "background": 0.5,
        "object_f1": 0.8,  # 2 of 2 said, 2 of 3 there
        "object_place_f1": 0.8,
        "object_size_place_f1": 0.4,
        "exact": 0.0,
    }
    with pytest.raises(ValueError):
        score_scenes([], [])


def test_artwork_is_blended_with_what_is_below():
    """At its edges a drawing lets the background through: nowhere is a picture brighter than both."""
    for name in OBJECTS:
        for side in (18, 22, 28, 32):
            colour, opacity = render_module._sprite(name, side, render_module.artwork)
            assert (colour <= 255 * opacity + 2).all(), name
