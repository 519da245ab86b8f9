"""The measurement of words beside an image."""

import pytest
import torch

from vlv.checkpoints import MINIATURE
from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE
from vlv.miniature.scene_classifier import SceneClassifier
from vlv.miniature.words import measure, scenes_with_words, share_shown
from vlv.miniature.world import Scene, SceneObject
from vlv.pipelines import load_reconstruction

APPLE, FROG = SceneObject("apple", "large", "top left"), SceneObject("frog", "small", "top right")


def test_the_words_ask_for_an_object_at_a_place_that_the_image_leaves_empty():
    items = list(scenes_with_words(12))
    for pixels, scene, words in items:
        assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.uint8
        places = [item.place for item in (*scene.objects, *words.objects)]
        assert len(set(places)) == len(places) == 3 and "centre" not in places and scene.split() == "test"
    assert [item[1:] for item in scenes_with_words(12)] == [item[1:] for item in items]


def test_the_share_counts_objects_that_are_shown_at_their_place():
    both, moved = Scene("pink", (APPLE, FROG)), Scene("pink", (SceneObject("apple", "large", "bottom left"),))
    assert share_shown([both, both], [both, Scene(None, (APPLE,))]) == 1.0
    assert share_shown([Scene(None, (FROG,))], [both]) == 0.5
    assert share_shown([moved], [Scene(None, (APPLE,))]) == 0.0


@pytest.mark.slow
def test_words_alone_show_their_object_and_the_whole_image_alone_its_own():
    pipeline = load_reconstruction(MINIATURE)
    pipeline.set_progress_bar_config(disable=True)
    scene_classifier = SceneClassifier.load(MINIATURE / SCENE_CLASSIFIER_FILE)
    (none, image, words, *_), (every, kept_image, kept_words, *_) = measure(pipeline, scene_classifier, (0, 24), 2, 6)
    assert (none, every) == (0, 24)
    assert words == 1.0 and image < 0.5
    assert kept_image > 0.5 and kept_words < 1.0
