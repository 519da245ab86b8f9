"""Checkpoints of the authors' code convert completely, in each of their forms, or an error names the fault."""

import json
import os
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Florence2Model, Qwen2Config

from vlv import VLVConfig, VLVForConditionalGeneration, VLVModel, hub
from vlv.cli.main import main
from vlv.convert_vlv_original_to_hf import (
    build_florence_config,
    captioner_names,
    encoder_names,
    original_florence_name,
)
from vlv.hub import convert
from vlv.pipelines import load_reconstruction

from ..builders import GOLDEN, assert_close_to_scale

PARTS = GOLDEN / "components"
FOLDERS = {
    "stable_diffusion": PARTS / "stable-diffusion",
    "florence": PARTS / "Florence2large",
    "language_model": PARTS / "qwen",
}


@pytest.fixture(scope="module")
def weights1():
    return torch.load(GOLDEN / "stage1" / "pytorch_model.bin", weights_only=True)


@pytest.fixture(scope="module")
def weights2():
    return torch.load(GOLDEN / "stage2" / "model.pt", weights_only=True)


@pytest.fixture(scope="module")
def stable_diffusion_with_weights(tmp_path_factory, weights1):
    """The complete diffusers folder. The golden set holds its weights in the checkpoint alone."""
    folder = tmp_path_factory.mktemp("sd") / "sd"
    shutil.copytree(FOLDERS["stable_diffusion"], folder)
    for part in ("unet", "vae"):
        tensors = {k.removeprefix(part + "."): t for k, t in weights1.items() if k.startswith(part + ".")}
        save_file(tensors, folder / part / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    return folder


def conditioning(folder, golden) -> torch.Tensor:
    with torch.no_grad():
        return hub.load_encoder(folder)[0](pixel_values=golden["pixel_values"]).conditioning


def prefix(folder, golden) -> torch.Tensor:
    with torch.no_grad():
        return hub.load_captioner(folder)[0].get_prefix(golden["pixel_values"])[0]


def test_weights_that_both_checkpoints_share_are_stored_once(converted, weights1, weights2, golden):
    names, weights = [], {}
    for path in (converted / "encoder" / "model.safetensors", converted / "encoder_captioner.safetensors"):
        with safe_open(path, "pt") as tensors:
            found = set(tensors.keys())
            names.append(found)
            weights[path.name] = {key: tensors.get_tensor(key) for key in found}
    twice = names[0] & names[1]
    assert twice and all(name.startswith("model.image_encoder.language_model.") for name in twice)
    for name in twice:  # the weights that stage 2 trained further, and no others
        assert not torch.equal(weights["model.safetensors"][name], weights["encoder_captioner.safetensors"][name])
    assert_close_to_scale(conditioning(converted, golden), golden["text_encoder"], 5e-5)
    assert_close_to_scale(prefix(converted, golden), golden["stage2/prefix"], 5e-5)


@pytest.mark.slow
def test_both_encoders_survive_another_export(converted, golden, tmp_path):
    again = hub.write_repository(converted, tmp_path / "again")
    assert_close_to_scale(conditioning(again, golden), golden["text_encoder"], 5e-5)
    assert_close_to_scale(prefix(again, golden), golden["stage2/prefix"], 5e-5)


@pytest.mark.slow
def test_stage_1_alone(golden, tmp_path):
    result = convert(tmp_path / "vlv", stage1=GOLDEN / "stage1" / "pytorch_model.bin", **FOLDERS)
    assert_close_to_scale(conditioning(result.folder, golden), golden["text_encoder"], 5e-5)
    assert load_reconstruction(result.folder).vae_scale_factor == 8
    assert set(result.dropped) == {"model.language_model.lm_head.weight", "model.language_model.final_logits_bias"}
    with pytest.raises(ValueError, match="stage-1 model"):
        hub.load_captioner(result.folder)


@pytest.mark.slow
def test_stage_2_alone_reconstructs_from_its_own_encoder(golden, stable_diffusion_with_weights, tmp_path):
    folders = FOLDERS | {"stable_diffusion": stable_diffusion_with_weights}
    result = convert(tmp_path / "vlv", stage2=GOLDEN / "stage2", **folders)
    assert_close_to_scale(prefix(result.folder, golden), golden["stage2/prefix"], 5e-5)
    assert_close_to_scale(conditioning(result.folder, golden), golden["stage2/text_encoder"], 5e-5)
    assert type(load_reconstruction(result.folder).scheduler).__name__ == "DDPMScheduler"
    config = json.loads((result.folder / "generation_config.json").read_text())
    assert config["max_new_tokens"] == 300


def save_parts(weights, folder):
    """As newer versions of `zero_to_fp32.py` write large models."""
    names, weight_map = list(weights), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))


FORMS = {
    "one file": lambda w, d: torch.save(w, d / "pytorch_model.bin"),
    "wrapped": lambda w, d: torch.save({"model_state_dict": w, "epoch": 3}, d / "checkpoint_7.pt"),
    "of data-parallel training": lambda w, d: torch.save(
        {f"module.{k}": t for k, t in w.items()}, d / "checkpoint_9.pt"
    ),
    "of old torch": lambda w, d: torch.save(w, d / "pytorch_model.bin", _use_new_zipfile_serialization=False),
    "in parts": save_parts,
    "a folder of parts": lambda w, d: [(d / "pytorch_model.bin").mkdir(), save_parts(w, d / "pytorch_model.bin")],
    "safetensors": lambda w, d: save_file({k: t.clone() for k, t in w.items()}, d / "model.safetensors"),
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_converts(form, weights1, golden, tmp_path):
    source = tmp_path / "checkpoint"
    source.mkdir()
    FORMS[form](weights1, source)
    result = convert(tmp_path / "vlv", stage1=source, **FOLDERS)
    assert_close_to_scale(conditioning(result.folder, golden), golden["text_encoder"], 5e-5)


@pytest.mark.slow
def test_the_checkpoint_with_the_highest_number_is_used(weights1, golden, tmp_path):
    for number in (9, 10):
        torch.save(
            {**weights1, "query_embed": weights1["query_embed"] * (number == 10)}, tmp_path / f"checkpoint_{number}.pt"
        )
    result = convert(tmp_path / "vlv", stage1=tmp_path, **FOLDERS)
    assert_close_to_scale(conditioning(result.folder, golden), golden["text_encoder"], 5e-5)


def test_bfloat16_weights_stay_bfloat16(weights2, golden, stable_diffusion_with_weights, tmp_path):
    torch.save({name: tensor.bfloat16() for name, tensor in weights2.items()}, tmp_path / "model.pt")
    folders = FOLDERS | {"stable_diffusion": stable_diffusion_with_weights}
    result = convert(tmp_path / "vlv", stage2=tmp_path / "model.pt", **folders)
    for name in ("captioner.safetensors", "encoder/model.safetensors"):
        with safe_open(result.folder / name, "pt") as tensors:
            assert {tensors.get_tensor(key).dtype for key in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
    error = (prefix(result.folder, golden) - golden["stage2/prefix"]).abs().max()
    assert 0 < error < 0.1 * golden["stage2/prefix"].abs().max()


@pytest.mark.slow
def test_sizes_are_read_from_the_weights(weights1, golden, tmp_path):
    """Florence-2 has 1024 or 4096 positions, and a checkpoint does not say which one it was trained with."""
    longer = dict(weights1)
    for part in ("encoder", "decoder"):
        name = f"model.language_model.model.{part}.embed_positions.weight"
        longer[name] = torch.cat([weights1[name], torch.randn(100, 64)])
    longer["query_embed"] = weights1["query_embed"][:, :40]
    torch.save(longer, tmp_path / "pytorch_model.bin")
    result = convert(tmp_path / "vlv", stage1=tmp_path, **FOLDERS)
    config = hub.load_encoder(result.folder)[0].config
    assert config.image_encoder_config.text_config.max_position_embeddings == 260 and config.num_query_tokens == 40
    assert_close_to_scale(conditioning(result.folder, golden), golden["text_encoder"][:, :40], 5e-5)


def native_names(weights, prefix):
    """A state dict whose Florence-2 is transformers' own."""
    shapes = {name: tuple(t.shape) for name, t in weights.items()}
    config = build_florence_config(FOLDERS["florence"], shapes, "model.")
    with torch.device("meta"):
        native = list(Florence2Model(config).state_dict())
    florence = {}
    for name in native:
        tensor = weights["model." + original_florence_name(name)]
        florence[prefix + name] = tensor.T.contiguous() if "image_projection" in name else tensor
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith("model.")}
    return rest, florence


@pytest.mark.slow
@pytest.mark.parametrize("prefix_", ["model.", "model.model."])
def test_a_checkpoint_with_transformers_weight_names_converts(prefix_, weights1, golden, tmp_path):
    rest, florence = native_names(weights1, prefix_)
    torch.save({**rest, **florence}, tmp_path / "pytorch_model.bin")
    result = convert(tmp_path / "vlv", stage1=tmp_path, **FOLDERS)
    assert_close_to_scale(conditioning(result.folder, golden), golden["text_encoder"], 5e-5)


@pytest.mark.slow
def test_a_florence_folder_in_transformers_format_is_read(converted, weights1, golden, tmp_path):
    folder = tmp_path / "florence"
    encoder, _ = hub.load_encoder(converted)
    encoder.image_encoder.config.save_pretrained(folder)
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(FOLDERS["florence"] / name, folder)
    result = convert(tmp_path / "vlv", stage1=GOLDEN / "stage1", **FOLDERS | {"florence": folder})
    assert_close_to_scale(conditioning(result.folder, golden), golden["text_encoder"], 5e-5)


@pytest.mark.parametrize("naming", ["Microsoft's", "transformers'"])
def test_florence_alone_converts_for_stage_1(naming, weights1, converted, golden, tmp_path):
    folder = shutil.copytree(FOLDERS["florence"], tmp_path / "florence")
    if naming == "Microsoft's":
        florence = {n.removeprefix("model."): t for n, t in weights1.items() if n.startswith("model.")}
    else:
        florence = native_names(weights1, "model.")[1] | {
            "lm_head.weight": weights1["model.language_model.lm_head.weight"]
        }
    torch.save(florence, folder / "pytorch_model.bin")
    assert main(["convert", "--florence", str(folder), "--output", str(tmp_path / "out")]) == 0
    model = Florence2Model.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        features = model.eval().get_image_features(golden["pixel_values"]).pooler_output
    assert_close_to_scale(features, golden["image_features"], 5e-5)


def changed(weights, change) -> dict:
    weights = dict(weights)
    change(weights)
    return weights


DAMAGE = {
    "a weight is missing": (
        lambda w: w.pop("model.vision_tower.convs.0.proj.bias"),
        r"lacks 1 weights: model\.vision_tower\.convs\.0\.proj\.bias \(16,\)",
    ),
    "an unknown weight": (
        lambda w: w.update({"text_encoder.adapter.weight": torch.zeros(3)}),
        r"1 unknown weights: text_encoder\.adapter\.weight \(3,\)",
    ),
    "another shape": (
        lambda w: w.update({"language_proj.0.weight": torch.zeros(64, 63)}),
        r"language_proj\.0\.weight has the shape \(64, 63\), expected \(64, 64\)",
    ),
    "another UNet": (
        lambda w: w.update({"unet.conv_in.weight": torch.zeros(16, 9, 3, 3)}),
        r"unet\.conv_in\.weight has the shape \(16, 9, 3, 3\), expected \(16, 4, 3, 3\)",
    ),
    "tied weights that differ": (
        lambda w: w.update({"model.language_model.model.decoder.embed_tokens.weight": torch.zeros(1505, 64)}),
        "are one weight in this model, but differ here",
    ),
    "no query tokens": (lambda w: w.pop("query_embed"), r"no query_embed .* not a stage 1 checkpoint"),
    "a module. inside a name": (
        lambda w: w.update({"language_proj.module.0.weight": w.pop("language_proj.0.weight")}),
        r"lacks 1 weights: language_proj\.0\.weight",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_weight_that_does_not_fit_is_named(damage, weights1, tmp_path):
    change, message = DAMAGE[damage]
    torch.save(changed(weights1, change), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "vlv", stage1=tmp_path, **FOLDERS)
    assert not (tmp_path / "vlv").exists()


@pytest.mark.slow
def test_tied_weights_may_be_missing_and_constants_may_be_present(weights1, golden, tmp_path):
    weights = {name: tensor for name, tensor in weights1.items() if not name.endswith("embed_tokens.weight")}
    weights["text_encoder.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    torch.save(weights, tmp_path / "pytorch_model.bin")
    result = convert(tmp_path / "vlv", stage1=tmp_path, **FOLDERS)
    assert "text_encoder.text_model.embeddings.position_ids" in result.dropped
    assert_close_to_scale(conditioning(result.folder, golden), golden["text_encoder"], 5e-5)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/vlv-evil-ran",)


def test_a_pickle_that_would_run_code_is_not_loaded(tmp_path, capsys):
    torch.save({"query_embed": Evil()}, tmp_path / "pytorch_model.bin")
    given = [f"--{name.replace('_', '-')}={path}" for name, path in FOLDERS.items()]
    assert main(["convert", "--stage1", str(tmp_path), *given, "--output", str(tmp_path / "vlv")]) == 2
    assert "could run code" in capsys.readouterr().err
    assert not os.path.exists("/tmp/vlv-evil-ran")


@pytest.mark.slow
def test_a_missing_file_or_option_is_named(tmp_path, capsys):
    def run(*arguments) -> str:
        assert main(["convert", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    florence, stage1 = ("--florence", FOLDERS["florence"]), ("--stage1", GOLDEN / "stage1")
    sd, output = ("--stable-diffusion", FOLDERS["stable_diffusion"]), ("--output", tmp_path / "vlv")
    assert "--stable-diffusion" in run(*stage1, *florence, *output)
    assert "--language-model" in run("--stage2", GOLDEN / "stage2", *sd, *florence, *output)
    assert "no such folder" in run(*stage1, *sd, "--florence", tmp_path / "none", *output)
    assert "no checkpoint" in run("--stage1", tmp_path / "none", *sd, *florence, *output)
    assert "pytorch_model.bin" in run("--stage1", tmp_path, *sd, *florence, *output)
    (tmp_path / "zero_to_fp32.py").write_text("")
    assert re.search(r"in pieces.*python .*zero_to_fp32\.py", run("--stage1", tmp_path, *sd, *florence, *output))
    (tmp_path / "model.pt").write_bytes(b"nothing")
    language_model = ("--language-model", FOLDERS["language_model"])
    stage1_too = (*stage1, *sd, *florence, *output)
    assert "model.pt" in run("--stage2", tmp_path / "model.pt", *language_model, *stage1_too)
    assert "not empty" in run(*stage1, *sd, *florence, "--output", tmp_path)
    assert "model.pt is a file" in run(*stage1, *sd, *florence, "--output", tmp_path / "model.pt")
    assert "stage 1 checkpoint" in run("--stage1", GOLDEN / "stage2" / "model.pt", *sd, *florence, *output)
    wrong = ("--language-model", FOLDERS["florence"])  # its configuration names remote code, which does not run
    assert "Florence2" in run("--stage2", GOLDEN / "stage2", *wrong, *stage1_too)
    assert not list(tmp_path.glob(".vlv*"))
    assert not (tmp_path / "vlv").exists()


@pytest.mark.slow
def test_reconstructions_have_the_size_of_the_cropped_image(tmp_path):
    result = convert(tmp_path / "vlv", stage1=GOLDEN / "stage1", image_size=32, **FOLDERS)
    options = ["--num-inference-steps", "1", "--output-dir", str(tmp_path / "images")]
    assert main(["reconstruct", str(GOLDEN / "images" / "img0.png"), "--model", str(result.folder), *options]) == 0
    written = list((tmp_path / "images").rglob("*.png"))
    assert written and all(Image.open(path).height == 32 for path in written)


@pytest.mark.slow
def test_bfloat16_and_float32_checkpoints_share_untrained_weights(weights2, golden, tmp_path):
    """The authors' scripts save stage 1 in float32 and stage 2 in bfloat16."""
    torch.save({name: tensor.bfloat16() for name, tensor in weights2.items()}, tmp_path / "model.pt")
    mixed = convert(tmp_path / "vlv", stage1=GOLDEN / "stage1", stage2=tmp_path / "model.pt", **FOLDERS).folder
    for folder in (mixed, hub.write_repository(mixed, tmp_path / "again")):
        with safe_open(folder / "encoder_captioner.safetensors", "pt") as tensors:
            own = [name for name in tensors.keys() if name.startswith("model.")]  # noqa: SIM118
            assert own and all(name.startswith("model.image_encoder.language_model.") for name in own)
            assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.bfloat16}  # noqa: SIM118
        assert_close_to_scale(conditioning(folder, golden), golden["text_encoder"], 5e-5)


@pytest.mark.parametrize("missing", ["text_encoder/config.json", "scheduler/scheduler_config.json"])
def test_a_missing_configuration_is_an_error(missing, tmp_path):
    sd = shutil.copytree(FOLDERS["stable_diffusion"], tmp_path / "sd")
    (sd / missing).unlink()
    folder, _, name = missing.partition("/")
    with pytest.raises(FileNotFoundError, match=f"no {name} in .*/{folder}"):
        convert(tmp_path / "vlv", stage1=GOLDEN / "stage1", **FOLDERS | {"stable_diffusion": sd})


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", b"<html>"])
def test_the_error_for_a_damaged_checkpoint_gives_no_dangerous_advice(content, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin") as refused:
        convert(tmp_path / "vlv", stage1=tmp_path, **FOLDERS)
    assert "weights_only" not in str(refused.value)


@pytest.mark.slow
def test_other_folders_beside_the_output_stay_unchanged(tmp_path, monkeypatch):
    (tmp_path / "vlv.unfinished").mkdir()
    (tmp_path / "vlv.unfinished" / "thesis.txt").write_text("text")
    (tmp_path / "vlv").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "vlv")
    convert(tmp_path / "link", stage1=GOLDEN / "stage1", **FOLDERS)
    assert (tmp_path / "vlv" / "encoder" / "model.safetensors").is_file()
    assert (tmp_path / "vlv.unfinished" / "thesis.txt").read_text() == "text"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    convert(".", stage1=GOLDEN / "stage1", **FOLDERS)
    assert (tmp_path / "here" / "model_index.json").is_file()


@pytest.mark.slow
def test_a_checkpoint_that_the_command_converted_captions_and_reconstructs(
    stable_diffusion_with_weights, tmp_path, capsys
):
    folder, images = str(tmp_path / "vlv"), str(GOLDEN / "images")
    given = [f"--{name.replace('_', '-')}={path}" for name, path in FOLDERS.items()]
    checkpoints = ["--stage1", str(GOLDEN / "stage1"), "--stage2", str(GOLDEN / "stage2")]
    assert main(["convert", *checkpoints, *given, "--output", folder]) == 0
    said = capsys.readouterr().out
    assert "left out: model.language_model.lm_head.weight" in said
    assert f"vlv caption IMAGES --as-original --model {folder}" in said
    captions = tmp_path / "captions.json"
    assert main(["caption", images, "--model", folder, "--as-original", "--output", str(captions)]) == 0
    assert set(json.loads(captions.read_text())) == {"img0.png", "img1.png", "img2.png"}
    output = tmp_path / "reconstructions"
    assert (
        main(["reconstruct", images, "--model", folder, "--num-inference-steps", "2", "--output-dir", str(output)])
        == 0
    )
    assert len(list(output.rglob("img*.png"))) >= 3


def save_as_the_authors_do(folder, encoder, captioner, unet, vae):
    """Writes models of any size as checkpoints and component folders in the authors' formats."""
    vision, text = (
        getattr(encoder.config.image_encoder_config, part).to_dict() for part in ("vision_config", "text_config")
    )
    vision["dim_embed"] = vision.pop("embed_dim")
    vision |= {
        "image_feature_source": ["spatial_avg_pool", "temporal_avg_pool"],
        "visual_temporal_embedding": {"type": "COSINE", "max_temporal_embeddings": 100},
        "image_pos_embed": {"type": "learned_abs_2d", "max_pos_embeddings": 50},
    }
    text["max_position_embeddings"] = 4096  # wrong: the weights have another number
    (folder / "florence").mkdir(parents=True)
    config = {"model_type": "florence2", "vision_config": vision, "text_config": text}
    (folder / "florence" / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "preprocessor_config.json"):
        shutil.copy(FOLDERS["florence"] / name, folder / "florence")
    sd = shutil.copytree(FOLDERS["stable_diffusion"], folder / "sd")
    unet.save_pretrained(sd / "unet")
    vae.save_pretrained(sd / "vae")
    encoder.config.text_encoder_config.save_pretrained(sd / "text_encoder")
    captioner.language_model.save_pretrained(folder / "lm")
    for path in FOLDERS["language_model"].glob("*"):
        if "token" in path.name or path.name in ("vocab.json", "merges.txt"):
            shutil.copy(path, folder / "lm")

    def original(model) -> dict:
        state = {}
        for key, tensor in model.state_dict().items():
            name = encoder_names(key)[0]
            state[name] = tensor.T.contiguous() if name.endswith("image_projection") else tensor
        return state

    parts = {"unet": unet, "vae": vae}
    frozen = {f"{name}.{key}": t for name, part in parts.items() for key, t in part.state_dict().items()}
    torch.save(original(encoder) | frozen, folder / "pytorch_model.bin")
    rest = {k: t for k, t in captioner.state_dict().items() if not k.startswith("model.")}
    captioner_only = {captioner_names(key)[0]: tensor for key, tensor in rest.items()}
    torch.save(
        {f"VLV_model.{k}": t for k, t in original(captioner.model).items()} | captioner_only, folder / "model.pt"
    )


@pytest.mark.slow
def test_models_of_other_sizes_convert(tmp_path):
    """Different widths, latents of odd size, untied embeddings, one key head for seven query heads."""
    torch.manual_seed(0)
    shared = {
        "image_encoder_config": {
            "vision_config": {
                "depths": (1, 2, 1, 1),
                "embed_dim": (8, 16, 24, 32),
                "num_heads": (1, 2, 3, 4),
                "num_groups": (1, 2, 3, 4),
                "window_size": 6,
                "projection_dim": 48,
                "initializer_range": 0.3,
            },
            "text_config": {
                "model_type": "bart",
                "vocab_size": 1505,
                "d_model": 48,
                "encoder_layers": 3,
                "decoder_layers": 1,
                "encoder_attention_heads": 3,
                "decoder_attention_heads": 6,
                "encoder_ffn_dim": 64,
                "decoder_ffn_dim": 80,
                "max_position_embeddings": 130,
                "pad_token_id": 1,
                "bos_token_id": 0,
                "eos_token_id": 2,
                "decoder_start_token_id": 2,
                "init_std": 0.3,
            },
        },
        "text_encoder_config": {
            "vocab_size": 707,
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_hidden_layers": 3,
            "num_attention_heads": 5,
            "max_position_embeddings": 77,
        },
        "num_query_tokens": 31,
        "task_prompt_ids": [0, 477, 277, 260, 364, 335, 272, 350, 288, 270, 307, 17, 2],
        "initializer_range": 0.3,
    }
    lm = Qwen2Config(
        vocab_size=400,
        hidden_size=56,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=7,
        num_key_value_heads=1,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=384,
    )
    encoder = VLVModel(VLVConfig(**shared)).eval()
    captioner = VLVForConditionalGeneration(VLVConfig(**shared, text_config=lm)).eval()
    unet = UNet2DConditionModel(
        sample_size=12,
        block_out_channels=(16, 24),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=40,
        attention_head_dim=(2, 3),
        norm_num_groups=8,
    )
    vae = AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    save_as_the_authors_do(tmp_path / "theirs", encoder, captioner, unet, vae)
    theirs = tmp_path / "theirs"
    result = convert(
        tmp_path / "vlv",
        stage1=theirs,
        stage2=theirs / "model.pt",
        stable_diffusion=theirs / "sd",
        florence=theirs / "florence",
        language_model=theirs / "lm",
    )
    pixels = torch.randn(2, 3, 96, 96)
    reconstruction, (model, _) = load_reconstruction(result.folder), hub.load_captioner(result.folder)
    with torch.no_grad():
        z, other = encoder(pixel_values=pixels).conditioning, captioner.model(pixel_values=pixels).conditioning
        assert not torch.allclose(z, other, atol=0.1)
        assert_close_to_scale(reconstruction.encoder(pixel_values=pixels).conditioning, z)
        assert_close_to_scale(model.model(pixel_values=pixels).conditioning, other)
        assert_close_to_scale(model.get_prefix(pixels)[0], captioner.get_prefix(pixels)[0], 5e-5)
        latents, times = torch.randn(2, 4, 13, 11), torch.tensor([3, 700])
        predicted = reconstruction.unet(latents, times, z).sample
        assert_close_to_scale(predicted, unet.eval()(latents, times, z).sample)
        assert_close_to_scale(reconstruction.vae.decode(latents).sample, vae.eval().decode(latents).sample)
    settings = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(pixels, **settings), captioner.generate(pixels, **settings))
    assert model.config.image_encoder_config.text_config.max_position_embeddings == 130
    assert reconstruction.default_size == 24  # 12 latents, doubled by this autoencoder


def test_a_checkpoint_of_the_other_stage_is_recognised(stable_diffusion_with_weights, tmp_path):
    folders = FOLDERS | {"stable_diffusion": stable_diffusion_with_weights}
    with pytest.raises(ValueError, match="looks like the other stage's; pass it as --stage2"):
        convert(tmp_path / "a", stage1=GOLDEN / "stage2" / "model.pt", **folders)
    with pytest.raises(ValueError, match="looks like the other stage's; pass it as --stage1"):
        convert(tmp_path / "b", stage2=GOLDEN / "stage1" / "pytorch_model.bin", **folders)


def test_an_image_size_that_the_autoencoder_does_not_support_is_refused(tmp_path):
    with pytest.raises(ValueError, match="--image-size\\) is 100, which is not divisible by 8"):
        convert(tmp_path / "a", stage1=GOLDEN / "stage1", image_size=100, **FOLDERS)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("Florence2large/config.json", "[]"),
        ("Florence2large/preprocessor_config.json", "{}"),
        ("Florence2large/tokenizer.json", "{}"),
        ("stable-diffusion/scheduler/scheduler_config.json", "{}"),
        ("stable-diffusion/unet/config.json", '{"sample'),
        ("stable-diffusion/vae/config.json", "{}"),
        ("qwen/config.json", '{"model_type": "florence2"}'),
    ],
)
def test_a_damaged_folder_names_the_file(file, content, tmp_path):
    parts = shutil.copytree(PARTS, tmp_path / "parts")
    (parts / file).write_text(content)
    folder, _, name = file.rpartition("/")
    with pytest.raises(ValueError, match=f"{folder}(/{name}| holds a model of type 'florence2')"):
        convert(
            tmp_path / "out",
            stage1=GOLDEN / "stage1",
            stage2=GOLDEN / "stage2",
            stable_diffusion=parts / "stable-diffusion",
            florence=parts / "Florence2large",
            language_model=parts / "qwen",
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_embeddings_are_written_for_one_of_two_encoders(converted, images, tmp_path, capsys):
    image_file, z = tmp_path / "a.png", tmp_path / "z.safetensors"
    images[0].save(image_file)
    encode = ["encode", str(image_file), "--model", str(converted), "--output", str(z)]
    assert main(encode) == 2
    assert "--for caption or --for reconstruct" in capsys.readouterr().err
    assert main([*encode, "--for", "caption"]) == 0
    embeddings = load_file(z)["a.png"]
    model, processor = hub.load_captioner(converted)
    with torch.no_grad():
        expected = model.model.get_caption_embeds(processor(images=images[0]).pixel_values)[0]
    assert torch.equal(embeddings, expected)
    assert main(["reconstruct", "--embeddings", str(z), "--model", str(converted)]) == 2
    assert "holds embeddings for `vlv caption`" in capsys.readouterr().err
    options = ["--model", str(converted), "--output", str(tmp_path / "c.json"), "--max-new-tokens", "2"]
    assert main(["caption", "--embeddings", str(z), *options]) == 0
    assert main([*encode, "--for", "reconstruct", "--overwrite"]) == 0
    assert not torch.equal(load_file(z)["a.png"], embeddings)
