"""At full size the models equal the authors' in every weight name, shape and count (on the meta device)."""

import json
import re

import pytest
import torch

from vlv import VLVForConditionalGeneration, VLVModel, reference_configs
from vlv.convert_vlv_original_to_hf import DROPPED, captioner_names, encoder_names
from vlv.train.stage1 import freeze_for_stage1
from vlv.train.stage2 import freeze_for_stage2

from ..builders import GOLDEN

REFERENCE = GOLDEN.parent / "reference"
COUNTS = json.loads((REFERENCE / "parameter_counts.json").read_text())
LM_HEAD = 52_519_936  # of Florence-2; the authors' code keeps it untied and never uses it


@pytest.fixture(scope="module")
def models():
    with torch.device("meta"):
        captioner = VLVForConditionalGeneration(reference_configs.vlv_config())
        encoder = VLVModel(reference_configs.vlv_config(language_model=None))
    return {"stage1": encoder, "stage2": captioner, **reference_configs.diffusion_components("meta")}


def parameters(model, trainable: bool = False) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def match(model, names, shapes: dict) -> None:
    """Checks the name and shape of each weight of the model, and removes it from `shapes`."""
    for key, tensor in model.state_dict().items():
        name = next((n for n in names(key) if n in shapes), None)
        assert name is not None, f"{key} is none of {names(key)}"
        shape = shapes.pop(name)
        assert shape == list(tensor.shape) or (name.endswith("image_projection") and shape[::-1] == list(tensor.shape))


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_weight_names_and_shapes_are_the_authors(models, stage):
    shapes = json.loads((REFERENCE / f"{stage}_shapes.json").read_text())
    assert len(shapes) == {"stage1": 2232, "stage2": 1737}[stage]
    match(models[stage], encoder_names if stage == "stage1" else captioner_names, shapes)
    if stage == "stage1":
        for part in ("unet", "vae"):
            match(models[part], lambda key, part=part: [f"{part}.{key}"], shapes)

    assert len(shapes) == 2
    assert all(any(re.search(pattern, name) for pattern in DROPPED) for name in shapes), shapes


def test_parameter_counts_of_each_part_are_the_authors(models):
    parts = COUNTS["per_component"]
    encoder = models["stage1"]
    assert parameters(models["unet"]) == parts["unet"] and parameters(models["vae"]) == parts["vae"]
    assert parameters(encoder.text_encoder) == parts["text_encoder"]
    assert parameters(encoder.image_encoder) + LM_HEAD == parts["model"]
    assert parameters(encoder.image_encoder.vision_tower) == parts["florence.vision_tower"]
    assert parameters(encoder.projector) == parts["language_proj"]
    assert encoder.query_tokens.numel() == parts["query_embed"]
    assert parameters(models["stage2"].language_model) == parts["qwen"]
    assert parameters(models["stage2"].language_projection) == parts["mlp"]


@pytest.mark.parametrize(
    ("mode", "theirs"),
    [("projector", "none"), ("query_decoder", "decoder"), ("transformer", "language_model"), ("all", "all")],
)
def test_trainable_parameters_of_stage_1_are_the_authors(models, mode, theirs):
    expected = COUNTS[f"stage1/{theirs}"]
    copies = LM_HEAD if theirs == "decoder" else 0  # their mode copies the word embeddings, too
    total = sum(parameters(models[part]) for part in ("stage1", "unet", "vae"))
    assert total + LM_HEAD + copies == expected["total_parameters"]
    freeze_for_stage1(models["stage1"], mode)
    unused = LM_HEAD if theirs == "all" else 0  # trainable there, but never has a gradient
    assert parameters(models["stage1"], trainable=True) + unused == expected["trainable_parameters"]


@pytest.mark.parametrize(
    ("mode", "theirs"),
    [
        ("projector+lm", "none"),
        ("projector+lm+query_decoder", "decoder"),
        ("all", "language_model"),
        ("all+vision", "all"),
    ],
)
def test_trainable_parameters_of_stage_2_are_the_authors(models, mode, theirs):
    expected = COUNTS[f"stage2/{theirs}"]
    copies = LM_HEAD if theirs == "decoder" else 0
    assert parameters(models["stage2"]) + LM_HEAD + copies == expected["total_parameters"]
    freeze_for_stage2(models["stage2"], mode)
    unused = LM_HEAD if theirs == "all" else 0
    assert parameters(models["stage2"], trainable=True) + unused == expected["trainable_parameters"]


@pytest.mark.parametrize(
    ("florence", "language_model", "expected"),
    [("large", "1.5B", 1_543_714_304), ("base", "0.5B", 494_032_768), ("base", None, None)],
)
def test_parameter_counts_of_the_other_sizes(florence, language_model, expected):
    config = reference_configs.vlv_config(florence, language_model)
    with torch.device("meta"):
        model = (VLVModel if language_model is None else VLVForConditionalGeneration)(config)
    if language_model is not None:
        assert parameters(model.language_model) == expected  # as on their Hub pages
    assert config.image_encoder_config.text_config.d_model == {"large": 1024, "base": 768}[florence]
    encoder = model if language_model is None else model.model
    assert tuple(encoder.projector.linear_1.weight.shape) == (1024, config.image_encoder_config.text_config.d_model)
