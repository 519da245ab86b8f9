"""Instructions in the miniature: what they ask for, and how obedience is measured."""

import random

import pytest
import torch

from vlv.miniature.data import SceneDataset
from vlv.miniature.grammar import write_caption
from vlv.miniature.instructed_captioner import InstructedPairs
from vlv.miniature.instructions import AS_JSON, INSTRUCTIONS, NONE, score_obedience
from vlv.miniature.metrics import instructions_table
from vlv.miniature.tokenizer import build_tokenizer
from vlv.miniature.world import Scene, SceneObject, sample_scenes

SCENE = Scene("light blue", (SceneObject("frog", "large", "top left"), SceneObject("sun", "small", "bottom right")))
TEXTS = {
    "briefly": "a large frog and a small sun",
    "in detail": "there is a large frog at the top left. there is a small sun at the bottom right. "
    "the scene has a light blue background.",
    "only the objects": "frog and sun",
    "as tags": "large frog, small sun, light blue background",
    "as JSON": '{"objects": [{"name": "frog", "size": "large", "place": "top left"}, '
    '{"name": "sun", "size": "small", "place": "bottom right"}], "background": "light blue"}',
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(for_text_encoder=False, instructions=True)


def some_scenes(n=60):
    return [scene for scene, _ in zip(sample_scenes(random.Random(3), None), range(n), strict=False)]


def test_each_instruction_asks_for_its_own_text():
    assert {instruction.text: instruction.write(SCENE) for instruction in INSTRUCTIONS} == TEXTS


@pytest.mark.parametrize("instruction", [*INSTRUCTIONS, NONE], ids=lambda instruction: instruction.text or "none")
def test_a_text_states_what_its_instruction_promises(instruction):
    scenes = some_scenes()
    texts = [instruction.write(scene) for scene in scenes]
    scores = score_obedience(instruction, texts, scenes)
    assert scores["form"] == scores["content_f1"] == 1.0
    wrong = score_obedience(instruction, texts[1:] + texts[:1], scenes)
    assert wrong["form"] == 1.0 and wrong["content_f1"] < 0.6


@pytest.mark.parametrize("instruction", INSTRUCTIONS, ids=lambda instruction: instruction.text)
def test_a_text_of_another_form_states_nothing(instruction):
    others = [text for name, text in TEXTS.items() if name != instruction.text]
    others += [write_caption(SCENE), "", TEXTS[instruction.text][:-3], TEXTS[instruction.text] + " and"]
    assert [text for text in others if instruction.parse(text) is not None] == []
    assert score_obedience(instruction, ["a"], [SCENE]) == {"form": 0.0, "content_f1": 0.0, "words": 1.0}


@pytest.mark.parametrize(
    "text",
    [
        '{"objects": [], "background": 3}',
        '{"objects": [{"name": "frog"}], "background": "pink"}',
        "[]",
        '{"objects": 3}',
    ]
    + ['{"objects": [], "background": "pink", "mood": "calm"}'],
)
def test_json_of_another_form_is_not_what_was_asked_for(text):
    assert AS_JSON.parse(text) is None


def test_the_tokenizer_keeps_the_ids_of_words_and_decodes_every_text(tokenizer):
    before = build_tokenizer(for_text_encoder=False)
    assert tokenizer.convert_ids_to_tokens(range(len(before))) == before.convert_ids_to_tokens(range(len(before)))
    assert len(build_tokenizer(for_text_encoder=True)) == len(before)
    for scene in some_scenes():
        caption = write_caption(scene, random.Random(1))
        assert tokenizer(caption).input_ids == before(caption).input_ids
        for text in [caption, *(instruction.write(scene) for instruction in INSTRUCTIONS)]:
            ids = tokenizer(text).input_ids
            assert tokenizer.unk_token_id not in ids and len(ids) < 64
            assert tokenizer.batch_decode([[*ids, tokenizer.eos_token_id]], skip_special_tokens=True) == [text]
    for instruction in INSTRUCTIONS:
        assert tokenizer.unk_token_id not in tokenizer(instruction.text).input_ids


def test_half_of_the_pairs_have_an_instruction():
    pairs = InstructedPairs(SceneDataset(400, fields=("scene",)), torch.zeros(400, 2, 3))
    items = [pairs[i] for i in range(400)]
    prompts = [item["prompt"] for item in items]
    assert 160 <= prompts.count("") <= 240
    assert all(20 <= prompts.count(instruction.text) <= 60 for instruction in INSTRUCTIONS)
    parsers = {instruction.text: instruction.parse for instruction in [*INSTRUCTIONS, NONE]}
    assert all(parsers[item["prompt"]](item["caption"]) is not None for item in items)


def test_the_table_has_the_splits_of_an_instruction_next_to_each_other():
    scores = {"form": 1.0, "content_f1": 0.5, "words": 3.25}
    names = ['"as tags", test', '"briefly", test', '"as tags", combo']
    lines = instructions_table({"captions, test": {"exact": 1.0}} | dict.fromkeys(names, scores)).splitlines()
    assert lines[2:4] == ['| "as tags" | test | 1.000 | 0.500 | 3.2 |', '| "as tags" | combo | 1.000 | 0.500 | 3.2 |']
    assert len(lines) == 5 and instructions_table({}) == ""
