"""A GGUF file is a language model and its tokenizer."""

import pytest
import torch

from vlv import VLVForConditionalGeneration, hub
from vlv.language_model import load_language_model
from vlv.tokenizer import check_tokenizer, fit_tokenizer, load_tokenizer

from ..gguf_files import END, build_model, write_gguf

pytest.importorskip("gguf", reason="pip install gguf")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "small.gguf", build_model())


def test_a_gguf_file_gives_a_plain_model_that_computes_trains_and_is_saved(file, tmp_path):
    model, original, ids = load_language_model(file), build_model(), torch.tensor([[5, 9, 258]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, original(ids).logits)
    assert not hasattr(model.config, "quantization_config") and model.config.name_or_path == str(file)
    assert all(parameter.requires_grad for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_language_model(tmp_path)(ids).logits, original(ids).logits)
    by_name = load_language_model(file.parent, "small.gguf", dtype=torch.bfloat16)
    assert by_name.dtype == torch.bfloat16


def test_the_tokenizer_of_a_gguf_file_survives_saving_in_a_captioner(file, encoder, image_processor, tmp_path):
    tokenizer = load_tokenizer(file)
    ids = tokenizer(" a dog").input_ids
    assert tokenizer.decode(ids) == " a dog" and len(ids) == 3 and tokenizer.eos_token == END
    model = VLVForConditionalGeneration.from_vlv_text_pretrained(encoder, load_language_model(file))
    check_tokenizer(fit_tokenizer(tokenizer, model.language_model), model)
    model.save_pretrained(tmp_path)
    image_processor.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, processor = hub.load_captioner(tmp_path)
    assert processor.tokenizer(" a dog").input_ids == ids and processor.tokenizer.pad_token == END


def test_damaged_missing_and_unknown_files_are_errors_that_name_them(file, tmp_path):
    data = file.read_bytes()
    for name, content, message in (
        ("text.gguf", b"a text", r"text\.gguf is not a GGUF file: it does not start with the bytes GGUF"),
        ("cut.gguf", data[: len(data) // 2], r"cut\.gguf could not be read; is the file complete\?"),
        ("header.gguf", data[:40], r"header\.gguf could not be read; is the file complete\?"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load_language_model(tmp_path / name)
    with pytest.raises(
        FileNotFoundError, match=r"there is no file .*other\.gguf; for a file in a Hub repository pass"
    ):
        load_language_model(tmp_path / "other.gguf")
    with pytest.raises(FileNotFoundError, match=r"there is no file other\.gguf in "):
        load_language_model(tmp_path, "other.gguf")
    with pytest.raises(ValueError, match=r"small\.gguf is a file, so gguf_file is not needed"):
        load_language_model(file, "small.gguf")
    lacking = write_gguf(tmp_path / "lacking.gguf", build_model(), leave_out="blk.0.ffn_up.weight")
    with pytest.raises(ValueError, match=r"1 weights of .*lacking\.gguf are missing .*, such as .*up_proj\.weight"):
        load_language_model(lacking)
    unknown = write_gguf(tmp_path / "unknown.gguf", build_model(), architecture="nomic-bert")
    with pytest.raises(ValueError, match=r"unknown\.gguf holds a model that transformers does not read from GGUF"):
        load_language_model(unknown)
    with pytest.raises(ValueError, match=r"unknown\.gguf holds a model that transformers does not read from GGUF"):
        load_tokenizer(unknown)
