"""Small vision models in transformers' folder format."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, BertConfig, BertModel, CLIPConfig, CLIPImageProcessorPil, CLIPModel

from vlv.miniature.tokenizer import build_tokenizer

from ..builders import VOCABULARY, backbone_configs, text_encoder_config

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
