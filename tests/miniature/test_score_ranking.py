"""The diffusion score against the truth: true captions are above false ones, and the measurement counts them right."""

import itertools
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from vlv.checkpoints import MINIATURE
from vlv.miniature.data import evaluation_items
from vlv.miniature.grammar import parse_caption, write_caption
from vlv.miniature.scene_changes import CHANGES, with_wrong_facts
from vlv.miniature.score_alarm import area_under_roc, photo_crops, present_sources, table
from vlv.miniature.score_ranking import captions_with_a_change, load_scorer, measure_ranking
from vlv.miniature.world import PLACES, Scene, SceneObject, sample_scenes

APPLE, FROG = SceneObject("apple", "large", "top left"), SceneObject("frog", "small", "bottom right")


MMDIT = Path(__file__).parents[2] / "checkpoints" / "vlv-miniature-mmdit"
FIELDS = ("name", "size", "place")


def facts(scene: Scene) -> set[tuple]:
    """The background, and each field of each object by the object's number."""
    fields = [(n, field, getattr(o, field)) for n, o in enumerate(scene.objects) for field in FIELDS]
    return {("background", scene.background), *fields}


@pytest.fixture(scope="module")
def combo_scenes() -> list[Scene]:
    return list(itertools.islice(sample_scenes(random.Random(0), "combo"), 24))


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_is_of_one_fact_and_can_be_said(kind, combo_scenes):
    rng, made = random.Random(0), 0
    for scene in combo_scenes:
        changed = CHANGES[kind](scene, rng)
        if changed is None:
            assert kind in ("missing object", "invented object")
            continue
        made += 1
        assert parse_caption(write_caption(changed, rng)) == changed != scene
        places = [o.place for o in changed.objects]
        assert len(set(places)) == len(places) and places == sorted(places, key=PLACES.index)
        if kind in ("missing object", "invented object"):
            smaller, larger = sorted((scene, changed), key=lambda own: len(own.objects))
            assert set(smaller.objects) < set(larger.objects) and len(larger.objects) == len(smaller.objects) + 1
            assert smaller.background == larger.background
        else:
            names, sizes, places = (
                Counter(getattr(o, field) for o in scene.objects)
                != Counter(getattr(o, field) for o in changed.objects)
                for field in FIELDS
            )
            differs = {
                "object": names,
                "size": sizes,
                "place": places,
                "background": scene.background != changed.background,
            }
            assert [fact for fact in differs if differs[fact]] == [kind]
    assert made > 8


def test_wrong_facts_are_counted_and_nested():
    scene = Scene("pink", (APPLE, FROG))
    scenes = [with_wrong_facts(scene, count, random.Random(4)) for count in range(6)]
    assert [len(facts(scene) - facts(other)) for other in scenes] == [0, 1, 2, 3, 4, 5]
    assert all(facts(a) & facts(scene) > facts(b) & facts(scene) for a, b in itertools.pairwise(scenes))


def test_a_change_that_a_scene_does_not_allow_is_not_counted():
    alone = Scene("white", (SceneObject("cat", "small", "centre"),))
    captions, allowed = captions_with_a_change([alone, Scene("pink", (APPLE, FROG))])
    assert allowed.tolist() == [[True] * 4 + [False] * 2, [True] * 6]
    assert captions[0][0] == captions[0][5] == captions[0][6] and len(set(captions[0])) == 5
    assert len(set(captions[1])) == 7


@pytest.mark.slow
@pytest.mark.parametrize("model", [MINIATURE, MMDIT], ids=["UNet", "MMDiT"])
def test_true_captions_are_above_those_with_one_wrong_fact(model):
    _, scorer = load_scorer(model, num_pairs=2)
    pixels, scenes = evaluation_items("combo", 4)
    *kinds, above_all = measure_ranking(scorer, pixels, *captions_with_a_change(scenes))
    assert sum(kinds) / len(kinds) > 0.9 and above_all > 0.7


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order():
    high, low = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 2.0])
    assert area_under_roc(high, low) == pytest.approx((3 + 1.5) / 6)
    assert area_under_roc(high, high - 5) == 1.0 and area_under_roc(high - 5, high) == 0.0


def test_the_table_marks_what_is_below_the_threshold_of_the_own_scenes():
    own = torch.arange(101) / 100
    text, threshold = table([("own", own), ("strange", torch.tensor([-1.0, 0.005, 0.5, 2.0]))])
    assert threshold == pytest.approx(0.01)
    assert text.splitlines()[2:] == [
        "| own | 101 | 0.050 | 0.500 | 0.950 | 0.01 |  |",
        "| strange | 4 | -0.849 | 0.252 | 1.775 | 0.50 | 0.623 |",  # (101 + 100 + 50.5 + 0) of 4 x 101 pairs
    ]


def test_crops_of_photographs_are_squares_of_the_miniatures_size(tmp_path, images):
    images[1].save(tmp_path / "wide.png")
    crops = photo_crops(tmp_path, 3)
    assert crops.shape == (3, 3, 64, 64) and crops.dtype == torch.uint8
    assert not torch.equal(crops[0], crops[1]) and torch.equal(crops, photo_crops(tmp_path, 3))


def test_a_folder_without_photographs_and_a_missing_font_are_left_out(tmp_path, capsys):
    assert present_sources(tmp_path, tmp_path / "font") == {"photos": None, "noto": None}
    said = capsys.readouterr().out
    assert f"{tmp_path} has no images: its images are left out (--photos)" in said and "font does not exist" in said
