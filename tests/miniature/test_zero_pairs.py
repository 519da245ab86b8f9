"""Proposals without image-caption pairs."""

import json
import random

import pytest
import torch

from vlv import hub
from vlv.checkpoints import MINIATURE
from vlv.miniature.data import evaluation_items
from vlv.miniature.grammar import parse_caption
from vlv.miniature.score_ranking import load_scorer
from vlv.miniature.scoring import count_agreement
from vlv.miniature.world import CORNERS, OBJECTS, PLACES, Scene, SceneObject, sample_scenes
from vlv.miniature.zero_pairs import (
    additions,
    describe,
    free_places,
    nearest_words,
    search_captions,
    search_scene,
    text_conditioning,
)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_search_finds_the_scene_that_a_score_without_errors_prefers(count):
    (truth,) = (next(sample_scenes(random.Random(f"{count}"), None, n_objects=count)),)

    def score(scenes):
        """Right facts, less wrong ones."""
        agreements = [count_agreement(scene, truth) for scene in scenes]
        names = ("object_f1", "object_place_f1", "object_size_place_f1", "background")
        return [
            sum(own[name][0] for name in names) - 0.5 * len(scene.objects)
            for own, scene in zip(agreements, scenes, strict=True)
        ]

    assert parse_caption(describe(search_scene(score))) == truth


def test_an_object_is_added_at_a_free_place():
    one = Scene("pink", (SceneObject("dog", "small", "bottom left"),))
    assert free_places(one) == [place for place in CORNERS if place != "bottom left"]
    assert free_places(Scene("pink", ())) == list(PLACES)
    assert free_places(Scene("pink", (SceneObject("dog", "small", "centre"),))) == []
    found = additions(one, "small")
    assert len(found) == 3 * len(OBJECTS) and {scene.objects[0].name for scene in found} == {"dog"}
    assert all(parse_caption(describe(scene)).text.count("small") == 2 for scene in found)


def test_a_search_goes_on_after_the_captions_that_a_file_has(tmp_path):
    _, scorer = load_scorer(MINIATURE, num_pairs=2, batch_size=128)
    images, truth = evaluation_items("combo", 2)
    file = tmp_path / "found" / "captions.jsonl"
    file.parent.mkdir()
    file.write_text(json.dumps("of the first image") + '\n"a pink backgr')  # a kill has cut off the second line
    first, second = search_captions(scorer, images, 2, file)
    assert first == "of the first image"
    assert parse_caption(second).background == truth[1].background
    assert search_captions(scorer, iter(()), 2, file) == [first, second]


def test_nearest_words_and_the_conditioning_of_texts_are_of_each_caption_embedding():
    encoder, _ = hub.load_encoder(MINIATURE)
    images, truth = evaluation_items("combo", 8)
    tokenizer = load_scorer(MINIATURE)[0].tokenizer
    found = nearest_words(encoder, tokenizer, images)
    assert all(len(words.split()) <= encoder.config.num_query_tokens for words in found)
    named = [item.name in words for words, scene in zip(found, truth, strict=True) for item in scene.objects]
    assert sum(named) > len(named) / 3
    conditioning = text_conditioning(encoder, tokenizer, ["a pink background", "a white background"])
    assert conditioning.shape == (2, encoder.config.num_query_tokens, encoder.config.caption_embed_dim)
    assert not torch.allclose(conditioning[0], conditioning[1])
