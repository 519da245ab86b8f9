"""Settings for precision, memory and speed have their effect, and change no result that they should not."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerCallback, trainer_optimizer
from transformers.modeling_layers import GradientCheckpointingLayer

from vlv.diffusion_decoder import StableDiffusionDecoder
from vlv.train import Stage1Config, Stage2Config, freeze_for_stage2, set_train_mode, stage1
from vlv.train.average import AVERAGE_FILE, AverageCallback
from vlv.train.evaluating import EvaluationSet
from vlv.train.memory import check_compiler, compile_layers, enable_activation_checkpointing
from vlv.train.optimisers import OPTIMISER_PACKAGES

from ..builders import TEXT_WIDTH, assert_close_to_scale, language_model_config, stable_diffusion_parts
from . import two_processes
from .two_processes import STEPS, losses, trainer_of

LABELS = torch.tensor([[5, 6, 7, 3], [8, 3, -100, -100]])
CPU = torch.device("cpu")
NOISE = {"noise_by_sample": True}


def pixels(side: int = 64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("part", ["encoder", "language_model"])
def test_activation_checkpointing_of_one_part_recomputes_that_part_alone(captioner, part):
    """Gradients are the same."""
    freeze_for_stage2(captioner, "all+vision")
    parts = {"encoder": captioner.model, "language_model": captioner.language_model}
    calls = dict.fromkeys(parts, 0)

    def count(name: str):
        def hook(*arguments) -> None:
            calls[name] += 1

        return hook

    for name, module in parts.items():
        layers = [m for m in module.modules() if isinstance(m, GradientCheckpointingLayer)]
        next(m for m in layers[0].modules() if "Attention" in type(m).__name__).register_forward_hook(count(name))

    def gradients() -> list[torch.Tensor]:
        captioner.zero_grad()
        set_train_mode(captioner)
        torch.manual_seed(0)  # dropout; the recomputation repeats it
        captioner(pixels(), labels=LABELS).loss.backward()
        return [p.grad.clone() for p in captioner.parameters() if p.grad is not None]

    expected = gradients()
    assert calls == {"encoder": 1, "language_model": 1}
    enable_activation_checkpointing(
        captioner, Stage2Config(use_cpu=True, **{f"{part}_activation_checkpointing": True})
    )
    for got, gradient in zip(gradients(), expected, strict=True):
        assert_close_to_scale(got, gradient)
    assert calls == {name: 3 if name == part else 2 for name in parts}


def losses_of_stage1(folder: Path, **settings: Any) -> tuple[Any, list[float]]:
    trainer = trainer_of(1, folder, save_strategy="no", **NOISE, **settings)
    trainer.train()
    return trainer, losses(trainer)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> list[float]:
    return losses_of_stage1(tmp_path_factory.mktemp("alone"))[1]


@pytest.mark.slow
def test_a_denoiser_with_channels_last_and_checkpointing_gives_the_same_losses(tmp_path, alone):
    trainer, found = losses_of_stage1(tmp_path, channels_last=True, diffusion_gradient_checkpointing=True)
    unet = trainer.diffusion_decoder.denoiser
    assert unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last) and unet.is_gradient_checkpointing
    assert not unet.conv_in.weight.is_contiguous()
    assert found == pytest.approx(alone, rel=1e-5)


@pytest.mark.slow
def test_compiled_layers_give_the_same_output(encoder):
    caption_embeds = torch.randn(2, 4, TEXT_WIDTH)
    expected = encoder(caption_embeds=caption_embeds).conditioning
    assert compile_layers(encoder.text_encoder, CPU, backend="eager") == 2
    assert all(layer._compiled_call_impl is not None for layer in encoder.text_encoder.encoder.layers)
    assert_close_to_scale(encoder(caption_embeds=caption_embeds).conditioning, expected)
    with pytest.raises(ValueError, match=r"compile_blocks does not work on cpu: .*absent.*; leave it out"):
        check_compiler(CPU, backend="absent")


def test_the_autoencoder_has_its_own_precision():
    def latents(**settings) -> torch.Tensor:
        parts = stable_diffusion_parts()
        decoder = StableDiffusionDecoder(parts["vae"], parts["unet"].bfloat16(), parts["scheduler"].config, **settings)
        assert decoder.vae.dtype == settings.get("vae_dtype", torch.float32) and decoder.unet.dtype == torch.bfloat16
        with torch.autocast("cpu", dtype=torch.bfloat16):  # which changes nothing
            return decoder.encode_images(pixels(32), torch.Generator().manual_seed(0))

    full, half = latents(), latents(vae_dtype=torch.bfloat16)
    assert full.dtype == half.dtype == torch.float32
    assert 1e-4 < (full - half).abs().max() / full.abs().max() < 0.05


@pytest.mark.slow
def test_bf16_keeps_trained_weights_and_optimiser_in_float32(
    tmp_path, image_folder, stable_diffusion, stage1_checkpoint
):
    trainer = stage1.main(
        [
            f"--output_dir={tmp_path}",
            f"--model={stage1_checkpoint}",
            f"--diffusion_model={stable_diffusion}",
            f"--images={image_folder}",
            *("--bf16", "--max_steps=1", "--per_device_train_batch_size=2", "--dataloader_num_workers=0"),
            *("--validation_steps=0", "--use_cpu", "--disable_tqdm=true"),
        ]
    )
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    states = trainer.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}
    assert (
        trainer.diffusion_decoder.unet.dtype == torch.bfloat16 and trainer.diffusion_decoder.vae.dtype == torch.float32
    )
    assert {t.dtype for t in load_file(tmp_path / "encoder" / "model.safetensors").values()} == {torch.float32}
    assert trainer.optimizer.defaults["fused"] is True


def test_an_optimiser_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"optim is adamw_bnb_8bit, which needs the package bitsandbytes \(pip"):
        Stage1Config(use_cpu=True, optim="adamw_bnb_8bit")
    with pytest.raises(ValueError, match=r"optim is adamw_torch_8bit, which needs the package torchao \(pip"):
        Stage1Config(use_cpu=True, optim="adamw_torch_8bit")


def test_the_packages_of_optimisers_are_those_that_transformers_takes_them_from():
    handlers = trainer_optimizer._OPTIMIZER_HANDLERS.items()
    packages = {
        trainer_optimizer._get_bitsandbytes_optimizer: "bitsandbytes",
        trainer_optimizer._get_torchao_optimizer: "torchao",
    }
    assert {name.value: packages[handler] for name, handler in handlers if handler in packages} == OPTIMISER_PACKAGES


@pytest.mark.slow
@pytest.mark.parametrize("optim", ["adamw_torch_8bit", "adamw_torch_4bit", "adamw_bnb_8bit"])
def test_an_optimiser_of_few_bits_trains_in_few_bits_and_goes_on_exactly(tmp_path, monkeypatch, optim):
    if importlib.util.find_spec(OPTIMISER_PACKAGES[optim]) is None:
        pytest.skip(f"{OPTIMISER_PACKAGES[optim]} is not installed")
    torch.compiler.set_stance("force_eager")  # torchao compiles its steps, which takes a minute
    language_model = language_model_config()
    language_model.intermediate_size = 128  # these optimisers keep tensors of less than 4096 numbers in float32
    monkeypatch.setattr(two_processes, "language_model_config", lambda: language_model)
    try:
        runs = [trainer_of(2, tmp_path / name, optim=name) for name in (optim, "adamw_torch")]
        for run in runs:
            run.train()
        resumed = trainer_of(2, tmp_path / "resumed", optim=optim)
        resumed.train(resume_from_checkpoint=str(tmp_path / optim / "checkpoint-2"))
    finally:
        torch.compiler.set_stance("default")
    few, full = (losses(run) for run in runs)
    assert few == pytest.approx(full, rel=0.02) and few[-1] != full[-1]
    for name, tensor in runs[0].model.state_dict().items():
        assert torch.equal(tensor, resumed.model.state_dict()[name])
    sizes = [(tmp_path / name / "checkpoint-2" / "optimizer.pt").stat().st_size for name in (optim, "adamw_torch")]
    assert sizes[0] < 0.8 * sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
def test_gradient_accumulation_gives_the_losses_and_weights_of_the_large_batch(tmp_path, stage):
    settings: dict[str, Any] = NOISE if stage == 1 else {}
    found = []
    for size, accumulation in ((4, 1), (1, 4)):
        trainer = trainer_of(
            stage,
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            save_strategy="no",
            max_grad_norm=0.5,
            **settings,
        )
        trainer.train()
        found.append([(row["loss"], row["grad_norm"]) for row in trainer.state.log_history if "loss" in row])
    assert found[1] == [pytest.approx(row, rel=1e-5) for row in found[0]] and len(found[0]) == STEPS


@pytest.mark.slow
def test_the_average_is_that_of_the_formula_and_survives_a_resumption(tmp_path):
    decay, name = 0.25, "projector.linear_1.weight"
    trainer = trainer_of(1, tmp_path / "run", ema_decay=decay, **NOISE)
    weights, expected = [], None

    def on_step_end(*arguments):
        weights.append(trainer.model.projector.linear_1.weight.detach().clone())
        return step_end(*arguments)

    step_end = trainer.callback_handler.on_step_end
    trainer.callback_handler.on_step_end = on_step_end
    trainer.train()
    for number, weight in enumerate(weights):
        rate = min((1 + number) / (10 + number), decay) if number else 0
        expected = weight if expected is None else expected - (1 - rate) * (expected - weight)
    assert len(weights) == STEPS
    torch.testing.assert_close(trainer.model.projector.linear_1.weight, expected)
    assert (weights[-1] - expected).abs().max() > 1e-6

    checkpoint = tmp_path / "run" / f"checkpoint-{STEPS}"
    assert torch.equal(load_file(checkpoint / "encoder" / "model.safetensors")["model." + name], weights[-1])
    assert set(load_file(checkpoint / AVERAGE_FILE)) == {
        n for n, p in trainer.model.named_parameters() if p.requires_grad
    }
    resumed = trainer_of(1, tmp_path / "resumed", ema_decay=decay, **NOISE)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert torch.equal(resumed.model.projector.linear_1.weight, trainer.model.projector.linear_1.weight)


@pytest.fixture
def average_of_a_layer() -> tuple[AverageCallback, nn.Module]:
    layer, average = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), AverageCallback(0.9)
    average.start(layer, None)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1)
    return average, layer


def test_an_exchange_with_the_average_that_fails_leaves_both_as_they_were(average_of_a_layer):
    average, layer = average_of_a_layer
    average.ema.shadow_params[2] = average.ema.shadow_params[2][:1, :3]  # of another shape
    before = [tensor.clone() for tensor in (*layer.parameters(), *average.ema.shadow_params)]
    with pytest.raises(RuntimeError, match="size"), average.borrowed(layer):
        pass
    after = [*layer.parameters(), *average.ema.shadow_params]
    assert all(torch.equal(tensor, earlier) for tensor, earlier in zip(after, before, strict=True))


def test_an_exchange_with_the_average_allocates_nothing_as_large_as_a_weight(average_of_a_layer):
    average, layer = average_of_a_layer
    with torch.profiler.profile(profile_memory=True) as profile, average.borrowed(layer):
        pass
    assert sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0) < 2 * 5 * 4


@pytest.mark.slow
def test_a_validation_and_an_evaluation_that_fail_leave_the_weights_without_average(tmp_path):
    trainer = trainer_of(1, tmp_path / "run", ema_decay=0.9, max_steps=2, save_strategy="no", **NOISE)
    seen: list[torch.Tensor] = []

    def look(*arguments) -> None:
        parameters = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
        seen.append(torch.cat(parameters))

    def fail(*arguments) -> None:
        look()
        raise RuntimeError("out of memory")

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            look()

    trainer.args.validation_steps = 1
    trainer.add_callback(Look())
    trainer.add_validation(fail)
    trainer.add_callback(Look())
    trainer.train()
    before, borrowed, after = seen[-3:]
    assert len(seen) == 6 and torch.equal(before, after) and not torch.equal(before, borrowed)
    trainer.evaluate_batch = fail
    trainer.model.projector.linear_1.bias.data.add_(1)  # the training has left the average as weights
    look()
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.evaluate(EvaluationSet(trainer.train_dataset))
    look()
    assert torch.equal(seen[-1], seen[-3]) and not torch.equal(seen[-1], seen[-2])


def test_without_a_setting_there_is_no_average(tmp_path):
    assert trainer_of(1, tmp_path).average is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ema_decay": 1.0}, "ema_decay is 1.0; expected 0"),
        ({"vae_dtype": "float16"}, "vae_dtype is 'float16'; expected one of"),
        ({"noise_by_sample": True, "timestep_sampling": "stratified"}, "noise_by_sample needs independent timesteps"),
        ({"shard_diffusion_model": True, "channels_last": True}, "does not work with channels_last"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Stage1Config(use_cpu=True, **settings)


def test_one_process_cannot_share_the_denoiser(tmp_path):
    with pytest.raises(ValueError, match="shard_diffusion_model needs several processes"):
        trainer_of(1, tmp_path, shard_diffusion_model=True)


@pytest.mark.slow
def test_what_changes_no_result_may_change_when_a_run_goes_on():
    settings = Stage1Config(use_cpu=True).result_settings() | Stage2Config(use_cpu=True).result_settings()
    assert {"ema_decay", "vae_dtype", "noise_by_sample"} <= set(settings)
    free = {"encoder_activation_checkpointing", "language_model_activation_checkpointing", "channels_last"}
    assert not set(settings) & (free | {"compile_blocks", "shard_diffusion_model", "diffusion_gradient_checkpointing"})
