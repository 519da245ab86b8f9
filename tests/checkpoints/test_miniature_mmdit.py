"""The second miniature, whose text-to-image model is of the family of Stable Diffusion 3.5."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from vlv import hub
from vlv.miniature.data import evaluation_items
from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE, caption_images, reconstruct_images
from vlv.miniature.folding import fold_empty_positions
from vlv.miniature.grammar import parse_caption
from vlv.miniature.metrics import goals_table, scores_table
from vlv.miniature.scene_classifier import SceneClassifier
from vlv.miniature.scoring import score_scenes
from vlv.pipelines import load_reconstruction

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "checkpoints" / "vlv-miniature-mmdit"


def test_its_files_are_small_safe_and_in_half_precision():
    for path in MODEL.rglob("*.safetensors"):
        assert path.stat().st_size < 20e6
        with safe_open(path, "pt") as tensors:
            assert {str(tensors.get_tensor(name).dtype) for name in tensors.keys()} <= {  # noqa: SIM118
                "torch.float16",
                "torch.int64",
            }


def test_its_captions_describe_the_scenes():
    pixels, scenes = evaluation_items("combo", 24)
    captions = caption_images(*hub.load_captioner(MODEL), pixels)
    scores = score_scenes([parse_caption(caption) for caption in captions], scenes)
    assert scores["background"] >= 0.97 and scores["object_place_f1"] >= 0.9, scores


@pytest.mark.slow
@torch.no_grad()
def test_its_reconstructions_show_the_scenes():
    pipeline = load_reconstruction(MODEL)
    pipeline.set_progress_bar_config(disable=True)
    fold_empty_positions(pipeline.transformer)
    pixels, scenes = evaluation_items("combo", 24)
    images = reconstruct_images(pipeline, pixels, 2.0, steps=10)
    found = SceneClassifier.load(MODEL / SCENE_CLASSIFIER_FILE).predict_scenes(images)
    scores = score_scenes(found, scenes)
    assert scores["background"] >= 0.9 and scores["object_place_f1"] >= 0.85, scores


def test_the_pages_tables_equal_the_recorded_evaluation():
    recorded = json.loads((MODEL / "evaluation.json").read_text(encoding="utf-8"))
    page = (ROOT / "miniature" / "README.md").read_text(encoding="utf-8")
    assert scores_table(recorded) in page and goals_table(recorded) in page
