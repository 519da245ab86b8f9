"""The objectives beyond the paper's, by their formulas."""

import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F

from vlv import VLVModel
from vlv.diffusion_decoder import Conditioning, StableDiffusionDecoder
from vlv.diffusion_decoder.timesteps import logit_normal_timesteps, min_snr_weights
from vlv.pipelines import VLVReconstructionPipeline
from vlv.tokenizer import load_tokenizer
from vlv.train import Stage1Config, freeze_for_stage1, stage1
from vlv.train.encoder_lora import add_encoder_lora, merge_encoder_lora, merged_encoder_weights
from vlv.train.objectives import QueryNoise, drop_embeddings
from vlv.train.unfreezing import parse_unfreezing, scheduled_unfreezing

from ..builders import POSITIONS, QUERIES, TEXT_WIDTH, assert_close_to_scale, stable_diffusion_parts
from .test_evaluating import arguments, logged


def build(prediction_type: str = "epsilon", **settings) -> StableDiffusionDecoder:
    parts = stable_diffusion_parts(prediction_type)
    return StableDiffusionDecoder(parts["vae"], parts["unet"], parts["scheduler"].config, **settings)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(3, 4, 8, 8, generator=generator),
        "conditioning": torch.randn(3, 8, TEXT_WIDTH, generator=generator),
        "noise": torch.randn(3, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([20, 500, 999]),
    }


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_the_error_of_each_image(prediction_type, batch):
    weighted, plain = (build(prediction_type, snr_gamma=gamma).denoise(**batch) for gamma in (5.0, 0.0))
    kept = build().scheduler.alphas_cumprod[batch["timesteps"]]
    snr = kept / (1 - kept)
    assert snr[0] > 5 > snr[1]  # both sides of the minimum
    least = torch.minimum(snr, torch.tensor(5.0))
    weights = {"epsilon": least / snr, "v_prediction": least / (snr + 1), "sample": least}[prediction_type]
    assert_close_to_scale(weighted.losses, plain.losses)
    assert_close_to_scale(weighted.loss, (weights * plain.losses).mean())
    assert_close_to_scale(plain.loss, plain.losses.mean())


def test_min_snr_weights_noise_without_a_signal_by_the_limit():
    assert min_snr_weights(torch.tensor([0.0]), 5.0, "epsilon").tolist() == [1]
    assert min_snr_weights(torch.tensor([0.0]), 5.0, "v_prediction").tolist() == [0]
    with pytest.raises(ValueError, match="snr_gamma is -1"):
        build(snr_gamma=-1)


@pytest.mark.parametrize("sampling", ["uniform", "stratified", "logit_normal"])
def test_timesteps_stay_in_their_range(sampling):
    decoder = build(timestep_sampling=sampling, min_timestep=200, max_timestep=299)
    timesteps = decoder.sample_timesteps(2000, torch.Generator().manual_seed(0))
    assert timesteps.min() >= 200 and timesteps.max() <= 299 and timesteps.dtype == torch.int64
    assert decoder.timestep_range == (200, 299)
    with pytest.raises(ValueError, match=r"max_timestep is 100; expected 200 \(min_timestep\) to 999"):
        build(timestep_sampling=sampling, min_timestep=200, max_timestep=100)


def test_logit_normal_timesteps_are_the_sigmoid_of_normal_numbers():
    timesteps = logit_normal_timesteps(20_000, 0, 999, torch.Generator().manual_seed(0))
    for place in (0.1, 0.5, 0.8):  # P(sigmoid(n) < p) = P(n < logit(p))
        expected = torch.special.ndtr(torch.logit(torch.tensor(place))).item()
        assert (timesteps < place * 1000).float().mean().item() == pytest.approx(expected, abs=0.01)


def test_dropped_images_have_the_context_that_reconstructions_steer_away_from(
    encoder, stable_diffusion, image_processor, batch
):
    tokenizer = load_tokenizer(stable_diffusion, subfolder="tokenizer")
    parts = stable_diffusion_parts()
    pipeline = VLVReconstructionPipeline(
        encoder, image_processor, parts["vae"], parts["unet"], parts["scheduler"], tokenizer
    )
    decoder = build()
    unconditional = decoder.unconditional(encoder, {"tokenizer": tokenizer})
    empty = unconditional.hidden_states
    assert torch.equal(empty, pipeline.encode_prompt("")) and empty.shape[1] == POSITIONS > QUERIES

    conditioning = batch["conditioning"].requires_grad_(True)
    dropped = torch.tensor([True, False, True])
    mixed = drop_embeddings(Conditioning(conditioning), unconditional, dropped)
    assert mixed.mask.sum(1).tolist() == [POSITIONS, QUERIES, POSITIONS]
    losses = decoder.denoise(batch["latents"], mixed, batch["noise"], batch["timesteps"]).losses
    for row, drop in enumerate(dropped):
        context = empty if drop else conditioning[row : row + 1]
        alone = {name: batch[name][row : row + 1] for name in ("latents", "noise", "timesteps")}
        assert_close_to_scale(losses[row], decoder.denoising_loss(conditioning=context, **alone))
    decoder.denoise(batch["latents"], mixed, batch["noise"], batch["timesteps"]).loss.backward()
    assert (conditioning.grad.abs().sum(dim=(1, 2)) > 0).tolist() == [False, True, False]

    same = drop_embeddings(Conditioning(conditioning), Conditioning(empty[:, :QUERIES]), dropped)
    assert same.mask is None
    assert torch.equal(same.hidden_states[0], empty[0, :QUERIES])
    assert torch.equal(same.hidden_states[1], conditioning[1])

    pooled = Conditioning(conditioning, torch.randn(3, 5))
    mixed = drop_embeddings(pooled, Conditioning(empty, torch.zeros(1, 5)), dropped)
    assert torch.equal(mixed.pooled, torch.where(dropped[:, None], 0.0, pooled.pooled))


def test_noise_on_queries_has_its_size_and_stays_out_of_evaluations(encoder):
    seen = []
    decoder = encoder.image_encoder.language_model.decoder
    QueryNoise(encoder, 0.1)
    decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    pixels = torch.randn(1, 3, 64, 64).expand(64, -1, -1, -1)
    with torch.no_grad():
        encoder.train()(pixel_values=pixels)
        encoder.eval()(pixel_values=pixels)
    noisy, plain = seen
    assert torch.equal(plain, encoder.query_tokens.expand_as(plain))
    size = encoder.query_tokens.square().mean().sqrt()
    assert ((noisy - plain).std() / size).item() == pytest.approx(0.1, rel=0.05)
    assert not torch.equal(noisy[0], noisy[1])  # each image has its own


def test_noise_on_queries_does_not_depend_on_their_layout_in_memory(encoder):
    noise = QueryNoise(encoder.train(), 0.1)
    queries = torch.randn(3, 8, 24)
    found = []
    for given in (queries, queries.permute(2, 0, 1).contiguous().permute(1, 2, 0)):
        torch.manual_seed(0)
        changed = noise._add(encoder, (), {"inputs_embeds": given})
        assert changed is not None
        found.append(changed[1]["inputs_embeds"])
    assert_close_to_scale(*found)


def test_lora_layers_of_the_encoder_are_trained_and_merged(encoder):
    plain = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    freeze_for_stage1(encoder, "query_decoder")
    add_encoder_lora(encoder, 2)
    trainable = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert {name for name in trainable if not name.startswith(("projector.", "query_tokens"))} == {
        name for name, _ in encoder.named_parameters() if ".lora_" in name
    }
    assert all(".decoder." in name for name in trainable if ".lora_" in name)
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=0.2)
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = encoder(pixel_values=pixels).caption_embeds
        merged = merged_encoder_weights(encoder, encoder.state_dict())
        copy = VLVModel(encoder.config).eval()
        copy.load_state_dict(merged)
        assert_close_to_scale(copy(pixel_values=pixels).caption_embeds, expected)
        assert not torch.allclose(VLVModel(encoder.config).eval()(pixel_values=pixels).caption_embeds, expected)
        merge_encoder_lora(encoder)
        assert_close_to_scale(encoder(pixel_values=pixels).caption_embeds, expected)
    assert set(encoder.state_dict()) == set(plain)
    changed = {name for name, tensor in encoder.state_dict().items() if not torch.equal(tensor, plain[name])}
    assert changed and all(".decoder." in name and name.endswith(".weight") for name in changed)
    freeze_for_stage1(encoder, "projector")
    with pytest.raises(ValueError, match="needs a trainable part of Florence-2"):
        add_encoder_lora(encoder, 2)


@pytest.mark.slow
def test_a_run_with_all_objectives_leaves_a_plain_model_and_resumes(
    tmp_path, image_folder, stage1_checkpoint, stable_diffusion
):
    inputs = {"model": stage1_checkpoint, "diffusion_model": stable_diffusion, "images": image_folder}
    more = {
        "snr_gamma": 5,
        "timestep_sampling": "logit_normal",
        "embedding_dropout": 0.5,
        "query_noise": 0.1,
        "encoder_lora_rank": 2,
        "tail_drop": 0.5,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    unbroken = stage1.main(arguments(tmp_path / "unbroken", **inputs, **more, max_steps=3))
    saving = {"save_strategy": "steps", "save_steps": 2}
    stage1.main(arguments(tmp_path / "run", **inputs, **more, **saving, max_steps=2))
    resumed = stage1.main(arguments(tmp_path / "run", **inputs, **more, **saving, max_steps=3))
    assert logged(resumed, "loss") == logged(unbroken, "loss")
    saved = VLVModel.from_pretrained(tmp_path / "run" / "encoder").eval()
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = unbroken.model.eval()(pixel_values=pixels).caption_embeds
        assert_close_to_scale(saved(pixel_values=pixels).caption_embeds, expected)
    start = VLVModel.from_pretrained(stage1_checkpoint)
    adapted = PeftModel.from_pretrained(start.image_encoder, str(tmp_path / "run" / "adapter"))
    name = "language_model.decoder.layers.0.fc1"
    layer = adapted.base_model.model.get_submodule(name)
    assert_close_to_scale(layer(torch.ones(1, 24)), saved.image_encoder.get_submodule(name)(torch.ones(1, 24)))


def test_a_schedule_of_unfreezing_trains_each_part_from_its_step_on(encoder):
    text = "0: projector, 3: query_decoder, 5: all"
    assert parse_unfreezing(text, Stage1Config.TRAINABLE) == {0: "projector", 3: "query_decoder", 5: "all"}
    sets = {}
    for value in ("projector", "query_decoder", "all"):
        freeze_for_stage1(encoder, value)
        sets[value] = {name for name, p in encoder.named_parameters() if p.requires_grad}
    callback = scheduled_unfreezing(encoder, text, Stage1Config.TRAINABLE, freeze_for_stage1)
    state = type("State", (), {"global_step": 0})
    callback.on_train_begin(None, state, None, model=encoder)
    for step in range(7):
        state.global_step = step
        callback.on_step_end(None, state, None, model=encoder)
        expected = sets["all" if step >= 5 else "query_decoder" if step >= 3 else "projector"]
        assert {name for name, p in encoder.named_parameters() if p.requires_grad} == expected
    config = Stage1Config(output_dir="unused", unfreeze=text, use_cpu=True)
    assert config.trainable == "all"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"unfreeze": "10: projector"}, "from step 0 on"),
        ({"unfreeze": "0: projector, 5: everything"}, "unfreeze has '5: everything'"),
        ({"unfreeze": "0: projector, 5: all", "trainable": "query_decoder"}, "unfreeze ends with 'all'"),
        ({"unfreeze": "0: projector, 5: all", "encoder_lora_rank": 2}, "does not work with encoder_lora_rank"),
        ({"embedding_dropout": 1.5}, "embedding_dropout is 1.5"),
        ({"query_noise": -1.0}, "query_noise is -1.0"),
        ({"stop_loss_factor": -1.0}, "stop_loss_factor is -1.0"),
    ],
)
def test_values_that_cannot_be_used_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Stage1Config(output_dir="unused", use_cpu=True, **settings)


def test_off_the_objectives_change_nothing(batch):
    decoder = build()
    predicted = decoder.unet(
        decoder.scheduler.add_noise(batch["latents"], batch["noise"], batch["timesteps"]),
        batch["timesteps"],
        batch["conditioning"],
    ).sample
    assert torch.equal(decoder.denoising_loss(**batch), F.mse_loss(predicted, batch["noise"]))
