"""The encoder runs in batches of its own, and once an image where commands share a cache."""

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlv.captioning import encoding
from vlv.captioning.inputs import Input
from vlv.captioning.output import Summary
from vlv.cli.main import main
from vlv.train.caches import settings_fingerprint


@pytest.fixture(scope="module")
def photos(tmp_path_factory, images) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, image in enumerate(images[:5]):
        image.save(folder / f"{number}.png")
    return folder


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of images in each pass of the encoder."""
    passes = []

    def count(model, batch):
        if "pixel_values" in batch.tensors:
            passes.append(len(batch.inputs))
        return encode(model, batch)

    encode = encoding.encode
    monkeypatch.setattr(encoding, "encode", count)
    return passes


def run(command: str, model: Path, photos: Path, *arguments) -> int:
    output = {"reconstruct": ["--num-inference-steps", "1"], "caption": ["--max-new-tokens", "4"]}.get(command, [])
    return main([command, str(photos), "--model", str(model), "--device", "cpu", *output, *map(str, arguments)])


def outputs(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def cache_files(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*.safetensors"))


@pytest.mark.slow
def test_captions_are_equal_and_in_order_whatever_the_batches(model_folder, photos, tmp_path, encoded):
    captions = []
    for number, (batch, encoder_batch) in enumerate(((1, 1), (2, 5), (5, 2), (3, 4))):
        output = tmp_path / f"{number}.json"
        sizes = ("--batch-size", batch, "--encoder-batch-size", encoder_batch)
        assert run("caption", model_folder, photos, "--output", output, *sizes) == 0
        captions.append(list(json.loads(output.read_text()).items()))
    assert encoded == [*[1] * 5, 5, *[2, 2, 1], *[4, 1]]
    assert captions == captions[:1] * 4 and len(set(captions[0])) == 5
    assert [name for name, _ in captions[0]] == [f"{number}.png" for number in range(5)]


@pytest.mark.slow
def test_commands_share_the_embeddings_and_write_what_they_write_without(model_folder, photos, tmp_path, encoded):
    for name, options in (("without", ()), ("shared", ("--embeddings-cache", tmp_path / "cache"))):
        assert run("caption", model_folder, photos, "--output", tmp_path / name / "c.json", *options) == 0
        assert run("encode", model_folder, photos, "--output", tmp_path / name / "z.safetensors", *options) == 0
        assert run("reconstruct", model_folder, photos, "--output-dir", tmp_path / name, *options) == 0
    assert encoded == [5] * 4  # three commands without the cache, and one that fills it
    without, shared = tmp_path / "without", tmp_path / "shared"
    assert run("caption", model_folder, photos, "--output", tmp_path / "c.json", *options) == 0 and len(encoded) == 4
    captions = (without / "c.json").read_bytes()
    assert (tmp_path / "c.json").read_bytes() == (shared / "c.json").read_bytes() == captions
    assert len(outputs(without)) == 10 and outputs(shared) == outputs(without)
    expected, found = (load_file(folder / "z.safetensors") for folder in (without, shared))
    assert all(torch.equal(found[image], expected[image]) for image in expected)


def test_another_precision_has_another_folder(model_folder, photos, tmp_path, encoded):
    for dtype in ("float32", "bfloat16", "float32", "bfloat16"):
        arguments = ("--output", tmp_path / "z.safetensors", "--overwrite", "--embeddings-cache", tmp_path / "cache")
        assert run("encode", model_folder, photos, "--dtype", dtype, *arguments) == 0
        (embeds, *_) = load_file(tmp_path / "z.safetensors").values()
        assert embeds.dtype == getattr(torch, dtype)
    assert encoded == [5, 5] and len(list((tmp_path / "cache").iterdir())) == 2


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"\0" * 40], ids=["cut", "zeros"]
)
def test_a_damaged_file_is_named_and_computed_again(damage, encoder, image_processor, photos, tmp_path, capsys):
    def embeds() -> dict[str, torch.Tensor]:
        cache = encoding.open_embeddings_cache(str(tmp_path), encoder, image_processor)
        return read(encoder, image_processor, photos, cache)

    expected = embeds()
    damaged, *others = cache_files(tmp_path)
    damaged.write_bytes(damage(damaged.read_bytes()))
    found = embeds()
    assert f"{damaged} is damaged" in capsys.readouterr().err and len(others) == 2
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert cache_files(tmp_path) == [damaged, *others]
    embeds()
    assert not capsys.readouterr().err


def read(encoder, image_processor, photos: Path, cache=None, names=range(5)) -> dict[str, torch.Tensor]:
    """The embeddings of images, encoded in batches of two."""
    inputs = [Input(f"{name}.png", photos / f"{name}.png") for name in names]
    batches = encoding.read_encoded_batches(
        inputs, encoder, image_processor, 3, Summary(len(inputs)), encoder_batch_size=2, cache=cache
    )
    return {
        name: row for batch in batches for name, row in zip(batch.names, batch.tensors["caption_embeds"], strict=True)
    }


def test_a_file_that_goes_after_the_cache_was_opened_is_computed_again(
    encoder, image_processor, photos, tmp_path, encoded, capsys
):
    first = encoding.open_embeddings_cache(str(tmp_path), encoder, image_processor)
    expected = read(encoder, image_processor, photos, first)
    lost, *_ = cache_files(tmp_path)
    second = encoding.open_embeddings_cache(str(tmp_path), encoder, image_processor)
    lost.unlink()
    encoded.clear()
    found = read(encoder, image_processor, photos, second)
    assert f"note: {lost} has gone or cannot be read" in capsys.readouterr().err
    assert sum(encoded) in (1, 2)  # the images of that file
    assert list(found) == list(expected)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4)
    assert not capsys.readouterr().err
    encoded.clear()
    read(encoder, image_processor, photos, second)
    assert not encoded and not capsys.readouterr().err


def test_a_cache_that_is_opened_twice_gets_the_images_of_both_and_images_keep_their_order(
    encoder, image_processor, photos, tmp_path, encoded
):
    first, second = (encoding.open_embeddings_cache(str(tmp_path), encoder, image_processor) for _ in range(2))
    read(encoder, image_processor, photos, first, [1, 3])
    read(encoder, image_processor, photos, second, [3])
    encoded.clear()
    both = encoding.open_embeddings_cache(str(tmp_path), encoder, image_processor)
    found = read(encoder, image_processor, photos, both)
    assert list(found) == [f"{number}.png" for number in range(5)] and encoded == [1, 1, 1]
    alone = {name: read(encoder, image_processor, photos, None, [name])[f"{name}.png"] for name in range(5)}
    for name, embeds in alone.items():
        torch.testing.assert_close(found[f"{name}.png"], embeds, rtol=1e-4, atol=1e-4)
    assert min(torch.dist(alone[0], alone[name]) for name in range(1, 5)) > 0.1


def test_another_model_or_preprocessing_has_another_folder(encoder, image_processor, tmp_path):
    def folder(processor=image_processor) -> Path:
        return encoding.open_embeddings_cache(str(tmp_path), encoder, processor).folder

    before = folder()
    assert folder() == before
    other = copy.deepcopy(image_processor)
    other.image_mean = [value + 0.1 for value in other.image_mean]
    other_pixels = folder(other)
    encoder.config.task_prompt_ids = [0, 2]
    other_prompt = folder()
    with torch.no_grad():
        encoder.query_tokens[..., -1] += 1
    other_weights = folder()
    encoder.config.image_encoder_config.text_config.activation_function = "relu"
    assert len({before, other_pixels, other_prompt, other_weights, folder()}) == 5


def test_embeddings_of_another_encoder_are_not_shared_which_a_note_says(
    encoder, image_processor, photos, tmp_path, capsys
):
    cache = encoding.open_embeddings_cache(str(tmp_path), encoder, image_processor)
    read(encoder, image_processor, photos, cache, [0])
    encoding.open_embeddings_cache(str(tmp_path), encoder, image_processor)
    assert not capsys.readouterr().err
    with torch.no_grad():
        encoder.query_tokens[..., -1] += 1
    encoding.open_embeddings_cache(str(tmp_path), encoder, image_processor)
    assert "has embeddings of another encoder" in capsys.readouterr().err


def test_the_library_that_wrote_a_configuration_is_none_of_its_settings(encoder):
    config = encoder.config.image_encoder_config
    before = settings_fingerprint(config, None)
    config.transformers_version, config._name_or_path = "4.0.0", "elsewhere"
    assert settings_fingerprint(config, None) == before
    config.text_config.activation_function = "relu"
    assert settings_fingerprint(config, None) != before


@pytest.mark.parametrize("option", ["--embeddings-cache", "--encoder-batch-size"])
def test_options_of_images_are_refused_beside_embeddings(option, tmp_path, capsys):
    assert main(["caption", "--embeddings", "z.safetensors", option, "1", "--output", str(tmp_path / "c.json")]) == 2
    assert f"{option} is for images" in capsys.readouterr().err


def test_a_cache_that_cannot_be_a_folder_is_named(model_folder, photos, tmp_path, capsys):
    (tmp_path / "file").touch()
    options = ("--output", tmp_path / "c.json", "--embeddings-cache", tmp_path / "file")
    assert run("caption", model_folder, photos, *options) == 2
    assert f"--embeddings-cache {tmp_path / 'file'} cannot be used" in capsys.readouterr().err
