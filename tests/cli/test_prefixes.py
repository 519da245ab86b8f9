"""What another program reads to write captions: prefixes, and the language model as a checkpoint of its own."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vlv import VLVForConditionalGeneration, hub
from vlv.captioning.batches import Batch
from vlv.captioning.captioner import Captioner, CaptionSettings
from vlv.captioning.inputs import Input
from vlv.captioning.prefixes import read_prefixes
from vlv.cli.main import main


@pytest.fixture
def batch(captioner: VLVForConditionalGeneration, images, processor, tmp_path) -> Batch:
    pixel_values = processor(images[:3]).pixel_values
    inputs = [Input(str(number), tmp_path) for number in range(len(pixel_values))]
    return Batch(inputs, {"pixel_values": pixel_values}, [None] * len(inputs))


@pytest.mark.parametrize("prompt", [None, "a small"])
def test_prefixes_are_what_generate_gives_the_language_model(captioner, processor, batch, prompt, monkeypatch):
    given = []
    generate = captioner.language_model.generate

    def record(**arguments):
        given.append(arguments)
        return generate(**arguments)

    monkeypatch.setattr(captioner.language_model, "generate", record)
    writer = Captioner(captioner, processor, CaptionSettings(max_new_tokens=4, prompt=prompt))
    writer.caption(batch)
    prefixes = read_prefixes(writer, batch)
    assert torch.equal(prefixes, given[0]["inputs_embeds"]) and given[0]["attention_mask"].all()
    assert prefixes.shape[1] == captioner.config.num_query_tokens + (2 if prompt else 0)


def test_the_language_model_alone_writes_the_same_tokens(captioner, processor, batch, tmp_path):
    """`VllmCaptioner` gives a language model in vLLM these prefixes; here transformers takes its place."""
    folder = hub.export_language_model(tmp_path / "lm", captioner, processor)
    alone = AutoModelForCausalLM.from_pretrained(folder).eval()
    settings = CaptionSettings(max_new_tokens=12)
    prefixes = read_prefixes(Captioner(captioner, processor, settings), batch)
    expected = captioner.generate(**batch.tensors, max_new_tokens=12, do_sample=False)
    got = alone.generate(inputs_embeds=prefixes, max_new_tokens=12, do_sample=False)
    assert torch.equal(got, expected) and expected.shape[1] > 4
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert not [name for name in alone.state_dict() if "encoder" in name or "projection" in name]


def test_without_vllm_the_engine_says_what_it_needs(image_folder, model_folder, tmp_path, capsys):
    if not _lacks_vllm():
        pytest.skip("vLLM is installed")
    arguments = ["--shards", "1", "--output-dir", str(tmp_path / "out"), "--model", str(model_folder)]
    assert main(["caption", str(image_folder), *arguments, "--engine", "vllm"]) == 2
    assert "--engine vllm needs vLLM" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def _lacks_vllm() -> bool:
    from importlib.util import find_spec

    return find_spec("vllm") is None
