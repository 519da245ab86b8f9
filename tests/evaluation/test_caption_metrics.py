"""Metrics of captions: equal to the code of coco-caption, and to values counted by hand."""

import json
import math

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertModel

from vlv.evaluation import caption_metrics as cm
from vlv.evaluation.caption_sets import CaptionSet, entries_of, measure_captions, read_captions, read_lists
from vlv.evaluation.features import AutoModelFeatures

CAPTIONS = [
    "a red dog on the grass",
    "two small cats sleeping on a sofa",
    "a man riding a horse near the sea, near the sea",
    "a plate of food",
]
REFERENCES = [
    ["a brown dog runs on the grass", "a dog on grass"],
    ["two cats sleeping on a red sofa", "cats lie on a couch", "two small cats"],
    ["a man rides a horse at the sea", "a person riding a horse near the water"],
    ["a large plate of food on a table", "food on a plate"],
]
# Of pycocoevalcap 1.2 (CiderScorer, and BleuScorer with the closest length) on the words of these captions.
COCO_CIDER_D = [2.71428710400818, 3.0494374600209424, 2.4395877245930087, 3.0141727071819897]
COCO_BLEU = [0.8571428571122449, 0.7791937224738322, 0.6239028369786727, 0.46194262545520737]


def test_cider_d_is_that_of_coco_caption():
    assert cm.cider_d(CAPTIONS, REFERENCES) == pytest.approx(COCO_CIDER_D, abs=1e-9)


def test_bleu_is_that_of_coco_caption():
    bleu = cm.Bleu(CAPTIONS, REFERENCES)
    assert [bleu.score(order) for order in (1, 2, 3, 4)] == pytest.approx(COCO_BLEU, abs=1e-6)


@pytest.mark.parametrize("references", [["a b c d e", "a b c"], ["a b c", "a b c d e"]])
def test_of_two_references_equally_near_in_length_bleu_takes_the_shorter(references):
    assert cm.Bleu(["a b c d"], [references]).score(1) == pytest.approx(1)  # no penalty for brevity


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence_with_the_best_reference():
    # "a dog on grass" is a subsequence of the caption: precision 4/6, recall 1
    assert cm.rouge_l(CAPTIONS[:1], REFERENCES[:1]) == pytest.approx([0.8])


def test_meteor_matches_stems():
    equal, stem, different = cm.meteor(["a dog runs", "a dog running", "a dog sits"], [["a dog runs"]] * 3)
    assert equal > 0.98 and stem == equal and different < 0.7


def test_bert_scores_matching_is_that_of_the_package_bert_score():
    random = np.random.RandomState(11)
    caption, reference = torch.tensor(random.randn(6, 8)), torch.tensor(random.randn(5, 8))
    weights = torch.tensor([0.0, 1, 1, 1, 1, 0]), torch.tensor([0.0, 1, 1, 1, 0])  # 0 for the special tokens
    # greedy_cos_idf of bert-score 0.3.13
    assert cm.greedy_match(caption, weights[0], reference, weights[1]) == pytest.approx(0.2978923338, abs=1e-9)


def test_bert_score_of_a_caption_does_not_depend_on_the_others(bert_model):
    captions, references = (
        ["a small dog", "a cat", "a"],
        [["a large apple", "a small dog"], ["a large apple"], ["a cat"]],
    )
    together = cm.bert_score(captions, references, str(bert_model))
    alone = [cm.bert_score([c], [r], str(bert_model))[0] for c, r in zip(captions, references, strict=True)]
    assert together == pytest.approx(alone, abs=1e-6)
    assert together[0] == pytest.approx(1, abs=1e-5) and max(together[1:]) < 0.999
    tokenizer, model = AutoTokenizer.from_pretrained(bert_model), BertModel.from_pretrained(bert_model)
    with torch.no_grad():
        states = [
            model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0] for text in ("a cat", "a large apple")
        ]
    weights = [torch.tensor([0.0, *[1.0] * (len(state) - 2), 0.0]) for state in states]  # words count, the ends do not
    expected = cm.greedy_match(states[0], weights[0], states[1], weights[1])
    assert together[1] == pytest.approx(expected, abs=1e-6)
    assert cm.bert_score(captions, references, str(bert_model), batch_size=1) == pytest.approx(together, abs=1e-6)
    with pytest.raises(RuntimeError, match="meta"):  # it goes where it is told
        cm.bert_score(captions, references, str(bert_model), device="meta")
    with pytest.raises(ValueError, match="has 2 layers, so there is no layer 3"):
        cm.bert_score(captions, references, str(bert_model), num_layers=3)


def test_words_are_those_of_coco_caption():
    words = cm.tokenize("A dog's bowl isn't here. The t-shirt costs 3.50 (on sale)!")
    assert words == ["a", "dog", "'s", "bowl", "is", "n't", "here", "the", "t-shirt", "costs", "3.50", "on", "sale"]


def test_chair_counts_objects_that_are_not_in_the_image():
    chair = cm.Chair({"dog": ["puppy"], "hot dog": [], "bus": ["coach"], "city": []})
    assert chair.mentions("Two puppies eat hot dogs by buses in cities, a Coach") == [
        "dog", "hot dog", "bus", "city", "bus"
    ]  # fmt: skip
    assert cm.Chair({"bus": [], "bus stop": []}).mentions("a bus at a bus stop") == ["bus", "bus stop"]
    counts = chair.count(["a puppy and a bus", "a hot dog"], [["dog", "city"], ["hot dog"]])
    assert counts.tolist() == [[2, 1, 2, 1], [1, 0, 1, 1]]
    assert cm.chair_scores(counts) == pytest.approx({"chair_i": 1 / 3, "chair_s": 1 / 2, "chair_recall": 2 / 3})


def test_chair_refuses_ambiguous_words_and_unknown_objects():
    with pytest.raises(ValueError, match="'puppy' names two objects: 'dog' and 'toy'"):
        cm.Chair({"dog": ["puppy"], "toy": ["puppy"]})
    with pytest.raises(ValueError, match="'cow' is not an object of the vocabulary"):
        cm.Chair({"dog": []}).count(["a dog"], [["cow"]])


def test_repetition_length_and_distinct_words_are_counted():
    assert cm.repetition(["a b c d a b c d", "a b c d e"]) == pytest.approx([1 / 5, 0])
    assert cm.lengths(["A dog, here."]) == [3]
    assert cm.distinct(["a dog", "a cat"], 1) == 3 / 4
    assert cm.distinct(["a"], 2) == 0


def test_a_caption_ends_by_itself_if_it_has_fewer_tokens_than_the_limit(processor):
    dog, apple = "a small dog", "a large apple at the top left"
    tokens = len(processor.tokenizer(apple, add_special_tokens=False).input_ids)
    assert cm.ended([dog, apple], processor.tokenizer, tokens) == [1, 0]


def test_captions_without_references_of_their_own_are_refused():
    with pytest.raises(ValueError, match="one entry for each of 4 captions, got 1"):
        cm.cider_d(CAPTIONS, REFERENCES[:1])
    with pytest.raises(ValueError, match="entry 0 of the references must be a list of at least one text"):
        cm.cider_d(CAPTIONS[:1], [[]])


def test_an_evaluation_has_figures_with_intervals_for_what_is_given():
    given = CaptionSet([*"abcd"], CAPTIONS, REFERENCES, vocabulary={"dog": [], "cat": [], "horse": [], "plate": []})
    measured = measure_captions(given)
    figures, notes = measured.figures(len(given.captions), samples=200), measured.notes
    assert figures["cider_d"]["value"] == pytest.approx(sum(COCO_CIDER_D) / 4, abs=1e-6)
    low, high = figures["cider_d"]["interval"]
    assert min(COCO_CIDER_D) < low < figures["cider_d"]["value"] < high < max(COCO_CIDER_D)
    assert figures["chair_recall"]["value"] == 1 and "objects that the references mention" in notes[0]
    assert {"bleu_4", "rouge_l", "meteor", "words", "distinct_2", "repetition_4"} <= set(figures)
    assert not {"clip_score", "bert_score", "ended"} & set(figures)


def test_references_are_read_from_lists_and_from_coco(tmp_path):
    coco = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 7, "caption": "a dog"}, {"image_id": 7, "caption": "dogs"}],
    }
    for content in (coco, {"a.jpg": ["a dog", "dogs"]}):
        (tmp_path / "r.json").write_text(json.dumps(content))
        assert read_lists(tmp_path / "r.json") == {"a.jpg": ["a dog", "dogs"]}
    assert entries_of(["x/a.png"], {"a.jpg": 1}, "r.json") == [1]


def test_files_that_do_not_hold_captions_or_lack_an_image_are_named(tmp_path):
    (tmp_path / "c.json").write_text('{"a.png": 3}')
    with pytest.raises(ValueError, match=r"c\.json: the caption of 'a\.png' is not text: 3"):
        read_captions(tmp_path / "c.json")
    (tmp_path / "c.json").write_text("[")
    with pytest.raises(ValueError, match=r"c\.json is not JSON"):
        read_lists(tmp_path / "c.json")
    with pytest.raises(ValueError, match=r"r\.json has no entry for 1 of 2 images: 'b\.png'"):
        entries_of(["a.png", "b.png"], {"a.png": 1}, "r.json")
    with pytest.raises(ValueError, match=r"'a\.png' could be 'x/a\.jpg' or 'y/a\.jpg'"):
        entries_of(["a.png"], {"x/a.jpg": 1, "y/a.jpg": 2}, "r.json")


def test_an_entry_belongs_to_one_image_and_folders_count():
    cats, dogs = "cats/1.png", "dogs/1.png"
    assert entries_of([cats, dogs], {"dogs/1.jpg": 2, "cats/1.jpg": 1}, "r.json") == [1, 2]
    assert entries_of(["1.png", cats], {cats: 1, "1.jpg": 2}, "r.json") == [2, 1]
    with pytest.raises(ValueError, match=r"r\.json: 'cats/1\.png' and 'dogs/1\.png' could both be 'cats/1\.jpg'"):
        entries_of([cats, dogs], {"cats/1.jpg": 1}, "r.json")


@pytest.mark.parametrize(
    ("word", "plural"),
    [("potato", "potatoes"), ("piano", "pianos"), ("knife", "knives"), ("shelf", "shelves"), ("roof", "roofs")],
)
def test_chair_recognises_regular_plurals(word, plural):
    assert cm.Chair({word: []}).mentions(f"two {plural} and one {word}") == [word, word]


def test_chair_takes_no_other_word_for_a_plural():
    assert cm.Chair({"cafe": [], "chef": []}).mentions("caves and cheves") == []


def test_empty_captions_are_measured_by_every_metric(clip_model, bert_model):
    captions, vocabulary = ["a small dog", "", " "], {"dog": ["dog"], "cat": ["cat"]}
    references = [["a small dog", "a dog"], ["two cats"], ["a dog"]]
    clip = AutoModelFeatures(str(clip_model))
    images = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    given = CaptionSet([*"abc"], captions, references, vocabulary=vocabulary, images=images)
    measured = measure_captions(given, clip, bert_model=str(bert_model))
    values = measured.values
    for key in ("cider_d", "rouge_l", "meteor", "words", "repetition_4"):
        assert values[key][1:] == [0, 0], key
    assert all(math.isfinite(value) for each in values.values() for value in each)
    figures = measured.figures(3, 5)
    assert figures["chair_recall"]["value"] == pytest.approx(1 / 3, abs=1e-6) and figures["words"]["value"] == 1
    assert all(math.isfinite(one["value"]) for one in figures.values())
