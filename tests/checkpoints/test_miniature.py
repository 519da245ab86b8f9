"""The embedded miniature: its files, its captions and its reconstructions."""

import json
import random

import pytest
import torch
from safetensors import safe_open

from vlv import hub
from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.miniature.data import evaluation_items
from vlv.miniature.evaluation import (
    SCENE_CLASSIFIER_FILE,
    caption_embeddings,
    caption_images,
    encode_images,
    reconstruct_images,
)
from vlv.miniature.grammar import parse_caption
from vlv.miniature.instructions import INSTRUCTIONS, score_obedience
from vlv.miniature.scene_classifier import SceneClassifier, measure_scene_classifier
from vlv.miniature.scoring import score_scenes
from vlv.pipelines import load_reconstruction

N = 24  # scenes: enough to notice a broken part in a short time


@pytest.fixture(scope="module")
def captioner():
    return hub.load_captioner(MINIATURE)


def test_files_are_small_safe_and_in_half_precision():
    files = list(MINIATURE.rglob("*"))
    assert not [f for f in files if f.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt")]
    for path in MINIATURE.rglob("*.safetensors"):
        assert path.stat().st_size < 20e6
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                assert tensors.get_tensor(name).dtype in (torch.float16, torch.int64)


@pytest.mark.parametrize("split", ["test", "combo"])
def test_captions_describe_the_scenes(captioner, split):
    pixels, scenes = evaluation_items(split, N)
    scores = score_scenes([parse_caption(c) for c in caption_images(*captioner, pixels)], scenes)
    assert scores["background"] >= 0.97 and scores["object_place_f1"] >= 0.93, scores


def test_captions_follow_instructions(captioner):
    model, processor = captioner
    assert model.config.instructions == [instruction.text for instruction in INSTRUCTIONS]
    pixels, scenes = evaluation_items("combo", 24)
    embeds = encode_images(model, processor, pixels)
    for instruction in INSTRUCTIONS:
        texts = caption_embeddings(model, processor, embeds, instruction.text)
        scores = score_obedience(instruction, texts, scenes)
        assert scores["form"] >= 0.95 and scores["content_f1"] >= 0.93, (instruction.text, scores)


def test_captions_end_with_the_end_token(captioner):
    model, processor = captioner
    pixels, _ = evaluation_items("test", 16)
    ids = model.generate(processor(images=pixels).pixel_values, max_new_tokens=100)
    assert ((ids == processor.tokenizer.eos_token_id).any(dim=1)).float().mean() >= 0.9


@pytest.mark.slow
def test_reconstructions_show_the_scenes():
    scene_classifier = SceneClassifier.load(MINIATURE / SCENE_CLASSIFIER_FILE)
    assert measure_scene_classifier(scene_classifier, "combo", N)["exact"] >= 0.98
    pipeline = load_reconstruction(MINIATURE)
    pipeline.set_progress_bar_config(disable=True)
    pixels, scenes = evaluation_items("test", N)
    images = reconstruct_images(pipeline, pixels, 2.0, steps=10)
    scores = score_scenes(scene_classifier.predict_scenes(images), scenes)
    assert scores["background"] >= 0.9 and scores["object_place_f1"] >= 0.85, scores


@pytest.mark.slow
def test_commands_without_a_model_use_the_miniature_and_say_so(tmp_path, capsys):
    from PIL import Image

    from vlv.miniature.render import render
    from vlv.miniature.world import OBJECTS, sample_scenes

    rng = random.Random(0)
    for number, scene in zip(range(5), sample_scenes(rng, "test"), strict=False):
        Image.fromarray(render(scene, rng)).save(tmp_path / f"{number}.png")
    captions = []
    for number, size in enumerate((1, 5, 5)):
        output = tmp_path / f"captions-{number}.json"
        assert main(["caption", str(tmp_path), "--output", str(output), "--batch-size", str(size)]) == 0
        captions.append(json.loads(output.read_text()))
    assert captions[0] == captions[1] == captions[2]
    assert all(any(name in caption for name in OBJECTS) for caption in captions[0].values())
    assert capsys.readouterr().err.count("using the embedded miniature") == 3
