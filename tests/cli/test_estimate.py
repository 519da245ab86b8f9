"""`vlv estimate`: small models in folders, and the recipes of the package."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import Qwen2ForCausalLM

from vlv import hub
from vlv.cli.main import main
from vlv.diffusion_decoder import StableDiffusionDecoder
from vlv.hub.decoder import refer_to

from ..builders import QUERIES, language_model_config, stable_diffusion_parts


@pytest.fixture
def recipe(tmp_path, stable_diffusion, stage1_checkpoint) -> Path:
    path = tmp_path / "stage1.yaml"
    path.write_text(
        f"model: {stage1_checkpoint}\ndiffusion_model: {stable_diffusion}\nimages: none\nbf16: true\nmax_steps: 10\n"
        f"per_device_train_batch_size: 4\noutput_dir: {tmp_path / 'run'}\n"
    )
    return path


def estimate(capsys, *arguments) -> dict:
    assert main(["estimate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.slow
def test_settings_on_the_command_line_override_the_file(recipe, capsys):
    found = estimate(capsys, recipe, "--gpu", "A100", "--count", 2, "--max_steps", 20, "--bf16=false")
    assert (found["stage"], found["gpu"], found["steps"], found["images"]) == (1, "A100", 20, 20 * 4 * 2)
    assert {part["precision"] for part in found["tflop_per_image"].values()} == {"fp32"}
    assert found["dollars"] == pytest.approx(found["gpu_hours"] * 2.5)


@pytest.mark.slow
def test_stage_2_is_counted_with_the_stage_1_recipe_beside_it(recipe, tmp_path, language_model, capsys):
    stage2 = tmp_path / "stage2.yaml"
    stage2.write_text(f"model: {tmp_path / 'run'}\nlanguage_model: {language_model}\npairs: none\nmax_steps: 10\n")
    assert main(["estimate", str(stage2), "--price", "3", "--utilization=0.2", "--utilization=projector=0.1"]) == 0
    printed = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    assert rows["language_model"][3:5] == ["fp32", "20%"] and rows["projector"][3:5] == ["fp32", "10%"]
    assert "10 steps of 64 images (8 a card)" in printed and "at $3.00 a GPU-hour" in printed
    assert {"frozen", "trained", "gradients", "optimizer", "activations"} <= set(rows)
    assert f"note: {tmp_path / 'run'} does not exist: counted as a recipe of stage 1 in {tmp_path}" in printed
    recipe.unlink()
    assert main(["estimate", str(stage2)]) == 2
    assert f"model {tmp_path / 'run'} is not known" in capsys.readouterr().err


@pytest.mark.slow
def test_stage_3_is_counted_with_the_recipes_of_the_stages_before_it(
    recipe, tmp_path, language_model, stage1_checkpoint, stable_diffusion, capsys
):
    """Samples, passes of the denoiser, and the frozen model's memory, beside the same steps of stage 2."""
    stage2 = tmp_path / "stage2.yaml"
    stage2.write_text(
        f"model: {tmp_path / 'run'}\nlanguage_model: {language_model}\npairs: none\nmax_steps: 6\n"
        f"trainable: projector+lm\noutput_dir: {tmp_path / 'run2'}\n"
    )
    (tmp_path / "stage3").mkdir()
    stage3 = tmp_path / "stage3" / "small.yaml"
    stage3.write_text(
        f"model: {tmp_path / 'run2'}\nimages: none\nrounds: 2\nround_images: 100\nround_steps: 3\n"
        "num_captions: 3\nreward_num_pairs: 2\nmax_caption_tokens: 10\nsample_batch_size: 4\n"
    )
    found = estimate(capsys, stage3, "--count", 1)
    before = estimate(capsys, stage2, "--count", 1, "--caption-tokens", 10)
    assert (found["stage"], found["steps"]) == (3, 6)
    assert found["parameters"]["trained"] == before["parameters"]["trained"]
    own = found["round"]
    assert (own["rounds"], own["images"], own["captions_per_image"]) == (2, 100, 3)
    assert own["denoiser_passes_per_image"] == (3 + 2 + 1) * 2  # samples, greedy and best caption, and no words
    hours = 2 * 100 * sum(own["seconds_per_image"].values()) / 3600
    assert own["hours_of_all_rounds"] == pytest.approx(hours)
    assert found["hours"] == pytest.approx(before["hours"] + hours)
    frozen = [figures["memory_bytes"]["frozen_weights"] for figures in (found, before)]
    parts = stable_diffusion_parts()
    denoiser = StableDiffusionDecoder(parts["vae"], parts["unet"], parts["scheduler"].config)
    assert frozen[0] - frozen[1] == sum(parameter.nbytes for parameter in denoiser.parameters())
    named = (stage3, "--model", "nowhere", "--stage2", stage2)
    more = estimate(capsys, *named, "--count", 1, "--num_captions", 7, "--reward_num_pairs", 4)["round"]
    assert more["denoiser_passes_per_image"] == (7 + 2 + 1) * 4
    assert more["cache_bytes"] * 3 == own["cache_bytes"] * 7
    assert more["tflop_per_image"]["vae_encoder"] == own["tflop_per_image"]["vae_encoder"]
    long = estimate(capsys, stage3, "--count", 1, "--max_caption_tokens", 60, "--fluency_floor=-9")["round"]
    assert long["denoiser_passes_per_image"] == (5 * 3 + 1) * 2  # sentences of 25 tokens: 12 positions are fewer
    assert long["seconds_per_image"]["reading"] > own["seconds_per_image"]["reading"]  # fluency
    assert long["seconds_per_image"]["sampling"] == pytest.approx(6 * own["seconds_per_image"]["sampling"])  # launches
    states = torch.zeros(4 * 3, QUERIES + 10, language_model_config().hidden_size)
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
            cache = Qwen2ForCausalLM(language_model_config())(inputs_embeds=states, use_cache=True).past_key_values
        counted = estimate(capsys, stage3, "--count", 1, "--bf16", str(half))["round"]["cache_bytes"]
        assert counted == sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert main(["estimate", str(stage3), "--method", "grpo"]) == 0
    printed = capsys.readouterr().out
    assert "2 rounds of 100 images, 3 samples" in printed and "counted as a recipe of stage 2 will make it" in printed
    assert main(["estimate", str(stage3), "--model", "nowhere"]) == 2
    assert "model nowhere is not known" in (error := capsys.readouterr().err) and "by --stage2" in error
    for model in (stage1_checkpoint, "florence-community/Florence-2-base"):
        assert main(["estimate", str(stage3), "--model", str(model)]) == 2
        assert "is a stage-1 model, which writes no captions" in capsys.readouterr().err
    # The model of stage 1, or the one that it goes on from, exists and says what text-to-image model is its own.
    existing = tmp_path / "existing"
    shutil.copytree(stage1_checkpoint, existing)
    refer_to(existing, hub.find_diffusion_model(str(stable_diffusion)))
    recipe.write_text(f"model: {existing}\nimages: none\nbf16: true\nmax_steps: 10\noutput_dir: {tmp_path / 'run'}\n")
    assert estimate(capsys, stage3, "--count", 1)["round"] == own
    existing.rename(tmp_path / "run")
    found = estimate(capsys, stage3, "--count", 1, "--samples", 30)["round"]
    assert found["seconds_per_image"] == own["seconds_per_image"] and found["images"] == 30


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpu", "V100"], "the GPU 'V100' is not known; expected one of A100, H100"),
        (["--utilization", "much"], "--utilization is 'much'; expected a share, or PART=SHARE"),
        (["--utilization", "unet=0.2"], "utilization names the part 'unet'; expected one of"),
        (["--pairs", "x"], "has settings of two stages (diffusion_model, pairs); give --stage 1, 2 or 3"),
        (["--diffusion_model", "a/b"], "diffusion_model a/b is not known"),
        (["--stage2", "x.yaml"], "stage1.yaml is of stage 1; leave it out"),
    ],
)
def test_wrong_arguments_say_what_is_expected(recipe, arguments, message, capsys):
    assert main(["estimate", str(recipe), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_unknown_settings_and_files_are_refused(recipe, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["estimate", str(recipe), "--max_step", "3"])
    assert exit.value.code == 2 and "did you mean 'max_steps'" in capsys.readouterr().err
    assert main(["estimate", "none.yaml"]) == 2
    assert "none.yaml does not exist" in capsys.readouterr().err
