"""The metrics as modules of `evaluate`: each script is loaded by path, without a network, and computes."""

import importlib.util
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch

from vlv.evaluation.caption_metrics import cider_d
from vlv.evaluation.distances import frechet_distance
from vlv.evaluation.statistics import FeatureStatistics

SCRIPTS = Path(__file__).parent.parent.parent / "evaluation" / "metrics"
CAPTIONS, REFERENCES = ["a red dog", "two cats sleep"], [["a dog", "a red dog runs"], ["cats sleep"]]
FEATURES = np.random.RandomState(0).randn(2, 30, 4).astype("float32")
FEATURE_METRICS = ["cmmd", "feature_cosine", "fid", "kid"]
IMAGE_METRICS = ["dreamsim", "lpips", "psnr", "ssim"]
REFERENCE_METRICS = ["bert_score", "bleu", "cider_d", "meteor", "rouge_l"]
OTHERS = ["caption_statistics", "chair", "clip_score"]


def load(name: str) -> evaluate.EvaluationModule:
    return evaluate.load(str(SCRIPTS / name))


def test_every_script_has_a_test():
    named = FEATURE_METRICS + IMAGE_METRICS + REFERENCE_METRICS + OTHERS
    assert sorted(path.name for path in SCRIPTS.iterdir()) == sorted(named)


@pytest.mark.parametrize("name", FEATURE_METRICS)
def test_metrics_of_features_take_arrays(name):
    module = load(name)
    result = module.compute(predictions=FEATURES[0], references=FEATURES[1])
    assert np.isfinite(result[name]) and module.description


def test_fid_takes_batches_and_sets_of_different_sizes():
    sets = [FeatureStatistics.of(torch.tensor(features)) for features in FEATURES]
    module = load("fid")
    for generated, reference in zip(*FEATURES.reshape(2, 3, 10, 4), strict=True):
        module.add_batch(predictions=generated, references=reference)
    assert module.compute()["fid"] == pytest.approx(frechet_distance(*sets))
    fewer = FeatureStatistics.of(torch.tensor(FEATURES[1][:20]))
    result = module.compute(predictions=FEATURES[0], references=FEATURES[1][:20])
    assert result["fid"] == pytest.approx(frechet_distance(sets[0], fewer))


@pytest.mark.parametrize("name", IMAGE_METRICS)
def test_metrics_of_images_take_pictures_or_name_their_package(name, images):
    module, pair = load(name), {"predictions": [images[0]], "references": [images[3]]}
    if name in ("lpips", "dreamsim") and importlib.util.find_spec(name) is None:
        with pytest.raises(ImportError, match=f"pip install {name}"):
            module.compute(**pair)
    else:
        assert np.isfinite(module.compute(**pair)[name])


@pytest.mark.parametrize("name", [name for name in REFERENCE_METRICS if name not in ("bert_score", "bleu")])
def test_metrics_of_captions_have_a_mean_and_one_score_for_each(name):
    result = load(name).compute(predictions=CAPTIONS, references=REFERENCES)
    assert result[name] == pytest.approx(np.mean(result["scores"])) and len(result["scores"]) == 2
    if name == "cider_d":
        assert result["scores"] == pytest.approx(cider_d(CAPTIONS, REFERENCES))


def test_bleu_has_four_orders():
    assert load("bleu").compute(predictions=["a b c d"], references=[["a b c d"]]) == pytest.approx(
        {f"bleu_{order}": 1 for order in (1, 2, 3, 4)}
    )


def test_bert_score_takes_any_text_encoder_and_the_best_reference(bert_model):
    captions, references = ["a small dog", "a cat"], [["a large apple", "a small dog"], ["a large apple"]]
    result = load("bert_score").compute(predictions=captions, references=references, model=str(bert_model))
    assert result["scores"][0] == pytest.approx(1, abs=1e-5) and result["scores"][1] < 0.999


def test_chair_and_caption_statistics_and_clip_score_compute(images, clip_model):
    vocabulary = {"dog": [], "cat": ["kitten"]}
    chair = load("chair").compute(predictions=CAPTIONS, references=[["dog"], ["dog"]], vocabulary=vocabulary)
    assert chair == {"chair_i": 0.5, "chair_s": 0.5, "chair_recall": 0.5}
    assert load("caption_statistics").compute(predictions=CAPTIONS)["words"] == 3
    scores = load("clip_score").compute(predictions=["a dog"], references=images[:1], model=str(clip_model))
    assert 0 <= scores["clip_score"] <= 2.5
