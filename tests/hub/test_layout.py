"""A folder in the Hub layout stores each weight once, and its parts load unchanged."""

import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vlv import VLVConfig, VLVForConditionalGeneration, VLVModel, hub
from vlv.miniature.tokenizer import build_tokenizer
from vlv.modeling_vlv import RENAMED_CONFIG_FIELDS
from vlv.pipelines import load_reconstruction


@pytest.fixture
def exported(tmp_path, captioner, processor, stable_diffusion):
    return hub.export(tmp_path / "vlv", captioner=captioner, processor=processor, diffusion_model=stable_diffusion)


def test_the_captioner_loads_unchanged(exported, captioner, processor, images):
    model, loaded_processor = hub.load_captioner(exported)
    before, after = captioner.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    pixels = processor(images=images).pixel_values
    assert torch.equal(loaded_processor(images=images).pixel_values, pixels)
    plain = VLVForConditionalGeneration.from_pretrained(exported)
    assert torch.equal(plain.generate(pixels, max_new_tokens=4), captioner.generate(pixels, max_new_tokens=4))


@pytest.mark.slow
def test_weights_that_stay_on_disk_give_the_same_captions(exported, captioner, processor, images, tmp_path):
    pixels = processor(images=images[:2]).pixel_values
    expected = captioner.generate(pixels, max_new_tokens=4)
    placed = {"device_map": "auto", "max_memory": {"cpu": "100KB"}}
    model = VLVForConditionalGeneration.from_pretrained(exported, offload_folder=tmp_path / "a", **placed)
    assert "disk" in model.hf_device_map.values()
    assert torch.equal(model.generate(pixels, max_new_tokens=4), expected)
    encoder = VLVModel.from_pretrained(exported, offload_folder=tmp_path / "b", **placed)
    assert "disk" in encoder.hf_device_map.values()
    assert torch.equal(encoder(pixels).caption_embeds, captioner.model(pixels).caption_embeds)


def to_older_layout(folder) -> None:
    """The layout of version 0.2.0, where all of the captioner's own weights were in one file."""
    tensors = {}
    for path in (folder / "captioner.safetensors", folder / "encoder_captioner.safetensors"):
        if path.is_file():
            tensors |= load_file(path)
            path.unlink()
    save_file(tensors, folder / "language_model.safetensors", metadata={"format": "pt"})
    for path in folder.glob("*index*.json"):
        path.write_text(re.sub(r"\b(encoder_)?captioner\.", "language_model.", path.read_text()))


def test_an_older_repository_loads_and_is_replaced_by_an_export(exported, captioner, processor, images):
    to_older_layout(exported)
    pixels = processor(images=images).pixel_values
    model, _ = hub.load_captioner(exported)
    assert torch.equal(model.generate(pixels, max_new_tokens=4), captioner.generate(pixels, max_new_tokens=4))
    assert not [part.name for part in hub.describe(exported).parts if part.name.startswith("other")]
    hub.export(exported, captioner=captioner, processor=processor)
    assert not (exported / "language_model.safetensors").exists()
    hub.load_captioner(exported)


@pytest.mark.parametrize("older", [False, True])
def test_two_encoders_load_each_for_its_purpose(older, tmp_path, captioner, encoder, processor):
    with torch.no_grad():
        encoder.query_tokens.add_(1)
    folder = hub.export(tmp_path / "two", captioner=captioner, encoder=encoder, processor=processor)
    if older:
        to_older_layout(folder)
    else:
        with safe_open(folder / "encoder_captioner.safetensors", "pt") as tensors:
            assert list(tensors.keys()) == ["model.query_tokens"]
    assert hub.has_two_encoders(folder)
    expected = captioner.model.query_tokens
    assert torch.equal(hub.load_encoder(folder, for_captions=True)[0].query_tokens, expected)
    assert torch.equal(hub.load_encoder(folder)[0].query_tokens, encoder.query_tokens)
    assert torch.equal(VLVForConditionalGeneration.from_pretrained(folder).model.query_tokens, expected)
    hub.export(folder, captioner=captioner, processor=processor)
    assert not hub.has_two_encoders(folder)
    assert not (folder / "language_model.safetensors").exists()
    assert not (folder / "encoder_captioner.safetensors").exists()


def test_no_weight_is_stored_twice(exported):
    names: list[str] = []
    for path in exported.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            names += [f"{path.parent.name if path.parent.name in ('unet', 'vae') else ''}/{n}" for n in tensors.keys()]  # noqa: SIM118
    assert len(names) == len(set(names))
    assert not [name for name in names if "lm_head" in name]  # tied to the word embeddings


def test_no_path_of_the_diffusion_model_is_stored(exported, stable_diffusion):
    for path in exported.rglob("*.json"):
        assert str(stable_diffusion) not in path.read_text(encoding="utf-8"), path


def test_no_path_of_a_sub_config_is_stored(tmp_path, captioner, processor):
    captioner.config.text_encoder_config._name_or_path = "/home/user/text_encoder"
    captioner.config.text_config._name_or_path = "/home/user/language-model"
    folder = hub.export(tmp_path / "vlv", captioner=captioner, processor=processor)
    for path in folder.rglob("*.json"):
        assert "/home/user" not in path.read_text(encoding="utf-8"), path


def test_weights_stored_in_half_precision_load_as_float32(tmp_path, captioner, processor, stable_diffusion):
    folder = hub.export(
        tmp_path / "half",
        captioner=captioner,
        processor=processor,
        diffusion_model=stable_diffusion,
        dtype=torch.float16,
    )
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as tensors:
            assert {tensors.get_tensor(name).dtype for name in list(tensors.keys())} <= {torch.float16, torch.int64}
    model, _ = hub.load_captioner(folder)
    assert model.dtype == torch.float32
    assert VLVForConditionalGeneration.from_pretrained(folder).dtype == torch.float32


def test_a_stage_1_export_reconstructs_and_refuses_to_caption(
    tmp_path, encoder, image_processor, stable_diffusion, images
):
    folder = hub.export(
        tmp_path / "s", encoder=encoder, image_processor=image_processor, diffusion_model=stable_diffusion
    )
    pipeline = load_reconstruction(folder)
    pipeline.set_progress_bar_config(disable=True)
    assert len(pipeline(images[:2], num_inference_steps=1).images) == 2
    with pytest.raises(ValueError, match=r"s is a stage-1 model, .* \(vlv train stage2 --model .*s --pairs"):
        hub.load_captioner(folder)


def test_missing_and_damaged_weights_are_an_error(exported):
    path = exported / "encoder" / "model.safetensors"
    weights = load_file(path)
    del weights["model.query_tokens"]
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 weights .* are missing .*query_tokens"):
        hub.load_encoder(exported)
    path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match="damaged"):
        hub.load_encoder(exported)


def test_a_model_of_another_type_is_refused(language_model):
    with pytest.raises(ValueError, match="has the model type 'qwen2'; expected a VLV model"):
        hub.load_captioner(language_model)


@pytest.mark.parametrize("old", RENAMED_CONFIG_FIELDS)
def test_config_fields_of_version_0_1_are_refused_with_the_new_name(old, exported):
    new = RENAMED_CONFIG_FIELDS[old]
    config = json.loads((exported / "config.json").read_text())
    config[old] = config.pop(new)
    (exported / "config.json").write_text(json.dumps(config))
    message = f"has a field '{old}', which is called '{new}'"
    with pytest.raises(ValueError, match=re.escape(str(exported / "config.json")) + f" {message}"):
        hub.load_captioner(exported)
    with pytest.raises(ValueError, match=message):
        VLVConfig.from_pretrained(exported)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere", "nowhere"])
def test_a_missing_folder_is_named_in_the_error(source):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        hub.load_captioner(source)


def test_tokenizers_load_unchanged(exported, language_model):
    text = "a small dog at the top left, a large umbrella at the bottom right"
    saved = build_tokenizer(for_text_encoder=False)
    expected = saved(text).input_ids
    assert len(set(expected)) > 8
    for tokenizer in (hub.load_tokenizer(language_model), hub.load_captioner(exported)[1].tokenizer):
        assert tokenizer(text).input_ids == expected
        assert tokenizer.decode(expected) == saved.decode(expected) == text
    prompts = hub.load_diffusion_components(exported)["tokenizer"]
    assert prompts("a small dog").input_ids == build_tokenizer(for_text_encoder=True)("a small dog").input_ids


def test_exporting_another_model_removes_stale_files(exported, encoder, image_processor):
    hub.export(exported, encoder=encoder, image_processor=image_processor)
    assert not (exported / "captioner.safetensors").exists() and not (exported / "tokenizer.json").exists()
    assert (exported / "unet").is_dir()  # the diffusion model stays if none is given
    model, _ = hub.load_encoder(exported)
    assert torch.equal(model.query_tokens, encoder.query_tokens)


def test_every_file_has_the_same_permissions(exported):
    mode = {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()}
    assert len(mode) == 1, mode


def test_files_that_are_not_replaced_stay(exported, captioner, processor, tmp_path):
    (exported / "other").mkdir()
    kept = [exported / "unet" / "diffusion_pytorch_model.fp16.safetensors", exported / "other" / "a.fp16.safetensors"]
    for path in kept:
        path.write_bytes(b"other")
        path.chmod(0o600)
    hub.export(exported, captioner=captioner, processor=processor)
    assert all(path.read_bytes() == b"other" and path.stat().st_mode & 0o777 == 0o600 for path in kept)
    with pytest.raises(FileNotFoundError):  # before anything is removed
        hub.export(
            exported,
            encoder=captioner.model,
            image_processor=processor.image_processor,
            diffusion_model=tmp_path / "x",
        )
    assert (exported / "captioner.safetensors").is_file()


def test_an_unknown_precision_is_named_in_the_error(exported):
    path = exported / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({name: t.to(torch.float8_e4m3fn) for name, t in load_file(path).items()}, path)
    with pytest.raises(ValueError, match=r"F8_E4M3.*float16"):
        hub.load_diffusion_components(exported)


def test_a_disk_that_is_too_small_leaves_the_earlier_model(
    captioner, processor, stable_diffusion, tmp_path, monkeypatch
):
    parts = {"captioner": captioner, "processor": processor, "diffusion_model": stable_diffusion}
    folder = hub.export(tmp_path / "model", **parts)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    weights = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(weights * 0.9)))
    with pytest.raises(OSError, match=r"its disk has .* GB free") as error:
        hub.export(folder, **parts)
    assert error.value.filename == str(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=int(weights * 1.1)))
    hub.export(folder, **parts)
