"""Small vision models in transformers' folder format."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from vlv.miniature.tokenizer import build_tokenizer

from ..builders import VOCABULARY, backbone_configs, language_model_config, text_encoder_config

CHAT_TEMPLATE = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)
IMAGE_SIZE = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(5)
    config = CLIPConfig(
        text_config=text_encoder_config().to_dict(),
        vision_config=backbone_configs()["clip"].to_dict(),
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    build_tokenizer(for_text_encoder=True).save_pretrained(folder)
    CLIPImageProcessorPil(**IMAGE_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def dinov2_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(6)
    AutoModel.from_config(backbone_configs()["dinov2"]).save_pretrained(folder)
    CLIPImageProcessorPil(**IMAGE_SIZE).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert_model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(7)
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=32, **shape)).save_pretrained(folder)
    tokenizer = build_tokenizer(for_text_encoder=True)
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def llava(tmp_path_factory) -> Path:
    """A LLaVA with its processor, small and untrained: a model of transformers that is not a VLV."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = build_tokenizer(for_text_encoder=False)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    text = language_model_config()
    text.vocab_size = len(tokenizer)
    torch.manual_seed(8)
    config = LlavaConfig(
        vision_config=backbone_configs()["clip"],
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    LlavaProcessor(
        CLIPImageProcessorPil(**IMAGE_SIZE),
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def object_detector(tmp_path_factory) -> Path:
    """A YOLOS with two labels, small and untrained."""
    folder = tmp_path_factory.mktemp("yolos")
    torch.manual_seed(9)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = YolosConfig(
        **shape, image_size=[32, 32], patch_size=8, num_detection_tokens=5, id2label={0: "Cat", 1: "Dog"}
    )
    config.initializer_range = 0.3
    YolosForObjectDetection(config).save_pretrained(folder)
    YolosImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder
