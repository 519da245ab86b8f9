"""Stage 2 takes its language model from a GGUF file, in 4 bits, and in the place of a captioner's own."""

import json

import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from transformers.utils import is_bitsandbytes_available
from transformers.utils.import_utils import is_gguf_available

from vlv import VLVForConditionalGeneration, hub
from vlv.cli.main import main
from vlv.language_model import load_language_model
from vlv.train import Stage2Config, Stage2Trainer, stage2
from vlv.train.census import whole_size
from vlv.train.four_bits import load_in_4_bits
from vlv.train.lora import add_lora

from ..builders import assert_close_to_scale
from ..gguf_files import END, build_model, write_gguf

needs_gguf = pytest.mark.skipif(not is_gguf_available(), reason="pip install gguf")
needs_bitsandbytes = pytest.mark.skipif(not is_bitsandbytes_available(), reason="pip install bitsandbytes")


@pytest.fixture
def settings(tmp_path, stage1_checkpoint, image_folder) -> list[str]:
    return [
        f"--output_dir={tmp_path / 'run'}",
        f"--model={stage1_checkpoint}",
        f"--pairs={image_folder}",
        "--trainable=projector+lm",
        "--max_steps=2",
        "--save_steps=1",
        "--learning_rate=1e-2",
        "--dataloader_num_workers=0",
        "--validation_steps=0",
        "--use_cpu",
        "--disable_tqdm=true",
    ]


@needs_gguf
@pytest.mark.slow
def test_a_gguf_file_becomes_the_language_model_of_a_captioner(tmp_path, settings, image_folder, capsys):
    file = write_gguf(tmp_path / "small.gguf", build_model())
    stage2.main([*settings, f"--language_model={tmp_path}", "--gguf_file=small.gguf"])
    model, processor = hub.load_captioner(tmp_path / "run")
    assert model.config.text_config.model_type == "qwen2" and processor.tokenizer.pad_token == END
    trained, start = model.language_model.state_dict(), build_model().state_dict()
    changes = [(trained[name] - tensor).abs().max().item() for name, tensor in start.items()]
    assert 0 < max(changes) < 0.1
    record = json.loads((tmp_path / "run" / "training.json").read_text())["stage2"]
    assert record["gguf_file"] == "small.gguf" and record["fingerprints"]["language_model"] == hub.fingerprint(file)
    capsys.readouterr()
    assert main(["info", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    assert f"language model: qwen2\nsource of the language model: {tmp_path}, file small.gguf\n" in said
    assert "precision of the language model: float32\n" in said


@pytest.mark.skipif(is_gguf_available(), reason="the library gguf is installed")
def test_a_gguf_file_without_the_library_is_an_error_that_says_what_to_install(tmp_path):
    (tmp_path / "small.gguf").write_bytes(b"GGUF")
    with pytest.raises(ImportError, match=r"small\.gguf is a GGUF file, which needs the extra vlv\[gguf\] \(pip"):
        load_language_model(tmp_path / "small.gguf")


@pytest.mark.skipif(is_bitsandbytes_available(), reason="the library bitsandbytes is installed")
def test_4_bits_without_the_library_are_an_error_that_says_what_to_install(language_model):
    with pytest.raises(ImportError, match=r"needs the extra vlv\[quantization\] \(pip install bitsandbytes\)"):
        load_in_4_bits(str(language_model))


@needs_bitsandbytes
def test_a_gguf_file_in_4_bits_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"small\.gguf is a GGUF file, whose weights are dequantised; leave load_in"):
        load_in_4_bits(str(tmp_path / "small.gguf"))


@needs_bitsandbytes
@pytest.mark.slow
def test_weights_in_4_bits_are_trained_by_lora_resumed_and_saved_dequantised(
    tmp_path, settings, language_model, monkeypatch, capsys
):
    in_4_bits = [*settings, f"--language_model={language_model}", "--load_in_4bit", "--lora_rank=2"]
    trainer = stage2.main(in_4_bits)
    kinds = {type(p).__name__ for p in trainer.model.language_model.parameters()}
    assert "Params4bit" in kinds
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or name.startswith("language_projection.") for name in trained)
    pixels, labels = torch.randn(2, 3, 64, 64), torch.tensor([[5, 7, 3], [9, 3, -100]])
    saved = VLVForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    with torch.no_grad():
        expected = trainer.model.eval()(pixels, labels=labels).logits
        assert_close_to_scale(saved(pixels, labels=labels).logits, expected, tolerance=1e-4)
    assert saved.config.text_config.to_dict().get("quantization_config") is None
    start = VLVForConditionalGeneration.from_vlv_text_pretrained(saved.model, str(language_model))
    name = "model.layers.0.mlp.up_proj.weight"
    change = (saved.language_model.state_dict()[name] - start.language_model.state_dict()[name]).abs().max()
    assert change > 0.01  # of the rounding to 4 bits

    resumed = [f"--output_dir={tmp_path / 'resumed'}", *in_4_bits[1:]]
    (tmp_path / "resumed").mkdir()
    (tmp_path / "run" / "checkpoint-1").rename(tmp_path / "resumed" / "checkpoint-1")
    stage2.main(resumed)
    again = VLVForConditionalGeneration.from_pretrained(tmp_path / "resumed").state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.state_dict().items())
    capsys.readouterr()
    assert main(["info", str(tmp_path / "run")]) == 0
    assert f"{language_model}, trained by LoRA of rank 2 on weights in 4 bits\n" in capsys.readouterr().out


@needs_bitsandbytes
@pytest.mark.parametrize(("half", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_weights_in_4_bits_compute_in_the_precision_of_the_training(
    tmp_path, settings, language_model, monkeypatch, half, dtype
):
    loaded = {}

    def load(*arguments) -> None:
        loaded["model"] = load_in_4_bits(*arguments)
        raise ValueError("enough is known")

    monkeypatch.setattr(stage2, "load_in_4_bits", load)
    with pytest.raises(SystemExit):
        stage2.main(
            [*settings, f"--language_model={language_model}", "--load_in_4bit", "--lora_rank=2", f"--bf16={half}"]
        )
    layer = loaded["model"].model.layers[0].mlp.up_proj
    assert layer.compute_dtype == dtype and whole_size(layer.weight) == layer.in_features * layer.out_features


@needs_bitsandbytes
def test_4_bits_are_refused_where_weights_are_sharded(tmp_path, encoder, processor, language_model, monkeypatch):
    model = stage2.add_language_model(encoder, str(language_model), load_in_4bit=True)
    add_lora(model, 2)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    AcceleratorState._reset_state(reset_partial_state=True)
    config = Stage2Config(output_dir=str(tmp_path), use_cpu=True, load_in_4bit=True, lora_rank=2)
    assert config.device.type == "cpu"  # the state of accelerate exists from here on
    monkeypatch.setitem(PartialState._shared_state, "distributed_type", DistributedType.MULTI_GPU)
    with pytest.raises(ValueError, match=r"load_in_4bit does not work with FSDP, .* launch with DDP"):
        Stage2Trainer(model, config, [], processor)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_4_bits_that_cannot_be_trained_are_errors(tmp_path, settings, captioner, processor):
    with pytest.raises(ValueError, match=r"weights in 4 bits cannot be trained themselves; pass --lora_rank"):
        Stage2Config(output_dir=str(tmp_path), load_in_4bit=True)
    with pytest.raises(ValueError, match=r"gguf_file is a\.gguf, but language_model is not set"):
        Stage2Config(output_dir=str(tmp_path), gguf_file="a.gguf")
    captioner.save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    continued = [*settings, f"--model={tmp_path / 'captioner'}"]
    with pytest.raises(SystemExit, match=r"is part of a captioner; it is for language_model"):
        stage2.main([*continued, "--load_in_4bit", "--lora_rank=2"])
    with pytest.raises(SystemExit, match=r"which has its own; .* or pass --replace_language_model"):
        stage2.main([*continued, "--language_model=org/other"])


@pytest.mark.slow
def test_a_new_language_model_takes_the_place_of_a_captioners(
    tmp_path, settings, language_model, captioner, processor
):
    captioner.save_pretrained(tmp_path / "captioner")
    processor.save_pretrained(tmp_path / "captioner")
    replaced = [*settings, f"--model={tmp_path / 'captioner'}", f"--language_model={language_model}"]
    stage2.main([*replaced, "--replace_language_model", "--trainable=projector", "--max_steps=1"])
    model, _ = hub.load_captioner(tmp_path / "run")
    expected = load_language_model(language_model).state_dict()
    assert all(torch.equal(model.language_model.state_dict()[name], tensor) for name, tensor in expected.items())
    assert not torch.equal(model.language_projection.linear_1.weight, captioner.language_projection.linear_1.weight)
    assert all(torch.equal(model.model.state_dict()[n], t) for n, t in captioner.model.state_dict().items())
