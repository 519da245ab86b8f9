"""Each family of text-to-image models computes what diffusers' own pipeline computes, from real words' embeddings."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
)
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3
from torch.nn import functional as F

from vlv import VLVConfig, VLVImageProcessor, VLVModel, hub
from vlv.diffusion_decoder import (
    Conditioning,
    DiffusionDecoder,
    StableDiffusion3Decoder,
    StableDiffusionDecoder,
    StableDiffusionXLDecoder,
    family_of,
    load_diffusion_decoder,
    sd3,
)
from vlv.modeling_vlv import TEXT_ENCODERS
from vlv.pipelines import (
    VLVPooledReconstructionPipeline,
    VLVReconstructionPipeline,
    build_reconstruction,
    load_reconstruction,
    pipeline_vlv_pooled_reconstruction,
)
from vlv.train import freeze_for_stage1
from vlv.train.objectives import drop_embeddings

from ..builders import (
    IMAGE_ENCODER_CONFIG,
    POOLED_WIDTH,
    POSITIONS,
    TEXT_2_WIDTH,
    TEXT_3_WIDTH,
    TEXT_WIDTH,
    WEIGHT_SCALE,
    assert_close_to_scale,
    text_encoder_2_config,
    text_encoder_config,
    vlv_config,
)

WORDS = ["a small dog", "a large apple at the top left, a dog and a large red apple at the bottom right"]
TWO_WIDTHS = (TEXT_WIDTH, TEXT_2_WIDTH)


@dataclass
class Case:
    """A family with some of its text encoders.

    Args:
        text_options: Arguments of diffusers' `encode_prompt`.
        prompt_shape: Of the prompt embeddings of one text.
    """

    family: type[DiffusionDecoder]
    pipeline: type[DiffusionPipeline]
    fixture: str
    widths: tuple[int, ...]
    pooled_width: int
    channels: int
    prompt_shape: tuple[int, int]
    text_options: dict[str, Any]


SD3 = (StableDiffusion3Decoder, StableDiffusion3Pipeline, "stable_diffusion_3")
PROMPTS = {"prompt_2": None, "prompt_3": None}
CASES = {
    "sdxl": Case(
        StableDiffusionXLDecoder,
        StableDiffusionXLPipeline,
        "stable_diffusion_xl",
        TWO_WIDTHS,
        POOLED_WIDTH,
        4,
        (POSITIONS, sum(TWO_WIDTHS)),
        {},
    ),
    "sd3": Case(*SD3, TWO_WIDTHS, 2 * POOLED_WIDTH, 16, (POSITIONS + 256, TEXT_3_WIDTH), PROMPTS),
    "sd3 with T5": Case(
        *SD3,
        (*TWO_WIDTHS, TEXT_3_WIDTH),
        2 * POOLED_WIDTH,
        16,
        (2 * POSITIONS, TEXT_3_WIDTH),
        {**PROMPTS, "max_sequence_length": POSITIONS},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def case(request) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def folder(case, request) -> Path:
    return request.getfixturevalue(case.fixture)


@pytest.fixture(scope="module")
def diffusers_pipeline(case, folder) -> DiffusionPipeline:
    left_out = {} if len(case.widths) == 3 or case.channels == 4 else {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = case.pipeline.from_pretrained(folder, **left_out)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(case, diffusers_pipeline) -> VLVModel:
    encoders = [getattr(diffusers_pipeline, name) for name in TEXT_ENCODERS[: len(case.widths)]]
    torch.manual_seed(0)
    config = vlv_config(
        **{f"{name}_config": encoder.config for name, encoder in zip(TEXT_ENCODERS, encoders, strict=False)},
        **case.family.text_settings(len(encoders)),
    )
    built = VLVModel(config).eval()
    for own, loaded in zip(built.text_encoders, encoders, strict=True):
        own.load_state_dict(loaded.state_dict())
    return built


@pytest.fixture
def decoder(folder) -> DiffusionDecoder:
    return load_diffusion_decoder(str(folder))


@pytest.fixture
def pipeline(case, model, decoder, diffusers_pipeline, image_processor) -> VLVPooledReconstructionPipeline:
    tokenizers = {name: getattr(diffusers_pipeline, name) for name in case.family.tokenizers}
    built = build_reconstruction(model, image_processor, {**decoder.pipeline_components(), **tokenizers})
    assert isinstance(built, VLVPooledReconstructionPipeline)
    built.set_progress_bar_config(disable=True)
    return built


@pytest.fixture
def batch(case, model) -> dict:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        output = model(caption_embeds=torch.randn(3, 8, sum(case.widths), generator=generator))
    return {
        "latents": torch.randn(3, case.channels, 8, 8, generator=generator),
        "conditioning": Conditioning.of(output),
        "noise": torch.randn(3, case.channels, 8, 8, generator=generator),
        "timesteps": torch.tensor([0, 500, 999]),
    }


def ids_of(pipeline, words: list[str], count: int) -> list[torch.Tensor]:
    settings = {"padding": "max_length", "max_length": POSITIONS, "truncation": True, "return_tensors": "pt"}
    tokenizers = [pipeline.tokenizer, pipeline.tokenizer_2, getattr(pipeline, "tokenizer_3", None)][:count]
    return [tokenizer(words, **settings).input_ids for tokenizer in tokenizers]


def test_the_family_is_found_by_the_components(stable_diffusion, stable_diffusion_xl, stable_diffusion_3):
    assert family_of(stable_diffusion) is StableDiffusionDecoder
    assert family_of(stable_diffusion_xl) is StableDiffusionXLDecoder
    assert family_of(stable_diffusion_3) is StableDiffusion3Decoder


@torch.no_grad()
def test_words_give_exactly_what_encode_prompt_gives(case, pipeline, diffusers_pipeline):
    states, _, pooled, _ = diffusers_pipeline.encode_prompt(
        WORDS, do_classifier_free_guidance=False, **case.text_options
    )
    first, second, *_ = ids_of(diffusers_pipeline, WORDS, len(case.widths))
    assert not torch.equal(first, second)  # the two pad with different tokens
    got_states, got_pooled = pipeline.encode_prompt(WORDS)
    assert torch.equal(got_states, states) and torch.equal(got_pooled, pooled)
    assert states.shape == (2, *case.prompt_shape) and pooled.shape == (2, case.pooled_width)


@torch.no_grad()
def test_embeddings_of_words_give_exactly_what_encode_prompt_gives(case, model, pipeline, diffusers_pipeline):
    """The pooled state is that of the last position, so it is the words' where their EOS is the last token."""
    words = WORDS[1:]  # truncated to all positions
    states, _, pooled, _ = diffusers_pipeline.encode_prompt(
        words, do_classifier_free_guidance=False, **case.text_options
    )
    ids = ids_of(diffusers_pipeline, words, len(case.widths))
    parts = [encoder.get_input_embeddings()(own) for encoder, own in zip(model.text_encoders, ids, strict=True)]
    got_states, got_pooled = pipeline.encode_caption_embeds(torch.cat(parts, dim=2))
    assert torch.equal(got_states, states) and torch.equal(got_pooled, pooled)


@pytest.mark.parametrize("width", [sum(TWO_WIDTHS), sum(TWO_WIDTHS) + TEXT_3_WIDTH])
def test_training_and_pipeline_arrange_the_same_sequence_for_the_transformer(width):
    states = torch.randn(2, 5, width)
    arranged = sd3.arrange_conditioning(states, TEXT_3_WIDTH)
    assert torch.equal(arranged, pipeline_vlv_pooled_reconstruction.arrange_conditioning(states, TEXT_3_WIDTH))
    assert arranged.shape == (2, 10 if width > TEXT_3_WIDTH else 261, TEXT_3_WIDTH)


@pytest.mark.parametrize("case", ["sdxl"], indirect=True)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_of_a_noise_schedule_by_the_formulas(prediction_type, decoder, batch):
    config = {**decoder.scheduler.config, "prediction_type": prediction_type}
    decoder = StableDiffusionXLDecoder(decoder.vae, decoder.unet, config)
    kept = decoder.scheduler.alphas_cumprod[batch["timesteps"]].view(3, 1, 1, 1)
    noisy = kept.sqrt() * batch["latents"] + (1 - kept).sqrt() * batch["noise"]
    velocity = kept.sqrt() * batch["noise"] - (1 - kept).sqrt() * batch["latents"]
    conditions = {
        "text_embeds": batch["conditioning"].pooled,
        "time_ids": torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]] * 3),
    }
    predicted = decoder.unet(
        noisy, batch["timesteps"], batch["conditioning"].hidden_states, added_cond_kwargs=conditions
    ).sample
    expected = F.mse_loss(predicted, batch["noise"] if prediction_type == "epsilon" else velocity)
    assert_close_to_scale(decoder.denoising_loss(**batch), expected)


def sequence_by_hand(conditioning: Conditioning) -> torch.Tensor:
    """What the transformer of a Stable Diffusion 3 reads."""
    states = conditioning.hidden_states
    clip, t5 = states[..., : sum(TWO_WIDTHS)], states[..., sum(TWO_WIDTHS) :]
    sequence = torch.zeros(len(states), clip.shape[1] + (t5.shape[1] if t5.numel() else 256), TEXT_3_WIDTH)
    sequence[:, : clip.shape[1], : clip.shape[2]] = clip
    if t5.numel():
        sequence[:, clip.shape[1] :] = t5
    return sequence


@pytest.mark.parametrize("case", ["sd3", "sd3 with T5"], indirect=True)
def test_the_loss_of_flow_matching_with_the_librarys_scheduler(decoder, batch):
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(decoder.scheduler.config)  # its timesteps descend
    places = 999 - batch["timesteps"]
    timesteps, sigmas = scheduler.timesteps[places], scheduler.sigmas[places]
    noisy = scheduler.scale_noise(batch["latents"], timesteps, batch["noise"])
    predicted = decoder.transformer(
        hidden_states=noisy,
        timestep=timesteps,
        encoder_hidden_states=sequence_by_hand(batch["conditioning"]),
        pooled_projections=batch["conditioning"].pooled,
    ).sample
    weights = compute_loss_weighting_for_sd3("logit_normal", sigmas).view(3, 1, 1, 1)
    expected = (weights * (predicted - (batch["noise"] - batch["latents"])) ** 2).mean()
    assert_close_to_scale(decoder.denoising_loss(**batch), expected)
    share = (batch["timesteps"] + 1) / 1000
    assert_close_to_scale(sigmas, 3 * share / (1 + 2 * share))


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
def test_timesteps_of_flow_matching_have_the_published_density(decoder):
    places = compute_density_for_timestep_sampling(
        "logit_normal", 64, logit_mean=0.0, logit_std=1.0, generator=torch.Generator().manual_seed(0)
    )
    timesteps = decoder.sample_timesteps(64, torch.Generator().manual_seed(0))
    assert torch.equal(timesteps, (places * 1000).long())


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
def test_rows_with_fewer_embeddings_are_computed_without_the_others_places(decoder, batch):
    given = batch["conditioning"]
    empty = Conditioning(given.hidden_states[:1, :3], given.pooled[:1])
    mixed = drop_embeddings(given, empty, torch.tensor([False, True, False]))
    assert mixed.mask is not None
    got = decoder.predict(batch["latents"], batch["timesteps"], mixed)
    whole = decoder.predict(batch["latents"], batch["timesteps"], given)
    part = decoder.predict(batch["latents"][1:2], batch["timesteps"][1:2], empty)
    assert_close_to_scale(got, torch.stack([whole[0], part[0], whole[2]]))
    assert (part[0] - whole[1]).abs().max() > 1e-3


def test_gradients_reach_the_encoder_and_nothing_frozen_changes(case, model, decoder, batch):
    trained = copy.deepcopy(model)
    freeze_for_stage1(trained, "all")
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    frozen = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    batch["conditioning"] = Conditioning.of(trained(pixel_values=pixels))
    decoder.denoising_loss(**batch).backward()
    parts = trained.projector.linear_2.weight.grad.split(case.widths)  # of each text encoder
    assert all(part.abs().sum() > 0 for part in parts)
    torch.optim.SGD([*trained.parameters(), *decoder.parameters()], lr=0.1).step()
    changed = {name for name, tensor in trained.state_dict().items() if not torch.equal(tensor, before[name])}
    assert "projector.linear_2.weight" in changed and not any(name.startswith("text_encoder") for name in changed)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in decoder.state_dict().items())


@pytest.mark.parametrize("case", ["sdxl"], indirect=True)
def test_zeros_for_the_empty_prompt_are_a_setting_that_is_kept(case, model, decoder, diffusers_pipeline, tmp_path):
    tokenizers = {name: getattr(diffusers_pipeline, name) for name in case.family.tokenizers}
    nothing = decoder.unconditional(model, tokenizers)
    assert nothing.hidden_states.shape == (1, 8, sum(case.widths)) and not nothing.hidden_states.any()
    assert nothing.pooled.shape[1] == model.text_encoder_2.config.projection_dim and not nothing.pooled.any()
    decoder.force_zeros_for_empty_prompt = False
    empty = decoder.unconditional(model, tokenizers)
    assert empty.hidden_states.any() and empty.hidden_states.shape == nothing.hidden_states.shape
    processor = VLVImageProcessor(size={"height": 64, "width": 64})
    parts = {**decoder.pipeline_components(), **tokenizers}
    hub.export(tmp_path, encoder=model, image_processor=processor, diffusion_model=parts)
    assert load_reconstruction(tmp_path).config.force_zeros_for_empty_prompt is False
    with pytest.raises(ValueError, match=r"load it with VLVPooledReconstructionPipeline\.from_pretrained"):
        VLVReconstructionPipeline.from_pretrained(tmp_path)


def test_the_pooled_state_alone_has_a_gradient(decoder, batch):
    batch["conditioning"].pooled.requires_grad_(True)
    decoder.denoising_loss(**batch).backward()
    assert batch["conditioning"].pooled.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_one_sampling_step_by_hand(guidance_scale, case, model, pipeline, decoder, diffusers_pipeline):
    pipeline.scheduler = scheduler_of(case, decoder)
    z = torch.randn(2, 8, sum(case.widths), generator=torch.Generator().manual_seed(2))
    noise = torch.randn(2, case.channels, 8, 8, generator=torch.Generator().manual_seed(3))
    got = pipeline(
        caption_embeds=z,
        latents=noise,
        num_inference_steps=1,
        guidance_scale=guidance_scale,
        output_type="latent",
        height=32,
        width=32,
    ).images
    conditionings = conditionings_by_hand(case, model, diffusers_pipeline, z)
    expected = denoise_by_hand(case, decoder, noise, *conditionings, [guidance_scale])
    assert_close_to_scale(got, expected)


@torch.no_grad()
@pytest.mark.parametrize("interval", [(0.0, 0.5), (0.25, 0.75)])
def test_guidance_is_limited_to_an_interval_of_the_steps(case, model, pipeline, decoder, diffusers_pipeline, interval):
    pipeline.scheduler = scheduler_of(case, decoder)
    z = torch.randn(2, 8, sum(case.widths), generator=torch.Generator().manual_seed(2))
    noise = torch.randn(4, case.channels, 8, 8, generator=torch.Generator().manual_seed(3))
    rows, steps = [], []
    decoder.denoiser.register_forward_hook(lambda module, given, output: rows.append(len(output[0])))

    def callback(pipeline, step, timestep, tensors):
        steps.append((step, list(tensors)))
        return {}

    settings = {"num_images_per_prompt": 2, "num_inference_steps": 4, "height": 32, "width": 32, "latents": noise}
    settings |= {"guidance_scale": 20.0, "guidance_interval": interval, "output_type": "latent"}
    got = pipeline(caption_embeds=z, **settings, callback_on_step_end=callback).images
    scales = [20.0 if interval[0] <= step / 4 < interval[1] else 1.0 for step in range(4)]
    assert rows == [4 if scale == 1 else 8 for scale in scales]
    assert steps == [(step, ["latents"]) for step in range(4)]
    conditionings = conditionings_by_hand(case, model, diffusers_pipeline, z.repeat_interleave(2, dim=0))
    assert_close_to_scale(got, denoise_by_hand(case, decoder, noise, *conditionings, scales), 1e-4)


@torch.no_grad()
def test_an_interval_of_guidance_that_cannot_be_used_is_an_error(case, pipeline):
    z = torch.zeros(1, 8, sum(case.widths))
    with pytest.raises(ValueError, match="guidance_interval must be two ascending numbers"):
        pipeline(caption_embeds=z, guidance_interval=(0.5, 0.2))
    with pytest.raises(ValueError, match="contains none of 4 steps"):
        pipeline(caption_embeds=z, guidance_interval=(0.3, 0.4), num_inference_steps=4)
    with pytest.raises(ValueError, match=r"callback_on_step_end_tensor_inputs has to be in .* found \['latent'\]"):
        pipeline(caption_embeds=z, guidance_interval=(0.0, 0.5), callback_on_step_end_tensor_inputs=["latent"])
    name, value = ("negative_original_size", (32, 32)) if case.channels == 4 else ("skip_guidance_layers", [0])
    with pytest.raises(ValueError, match=f"does not go with {name}"):
        pipeline(caption_embeds=z, guidance_interval=(0.5, 1.0), **{name: value})


@torch.no_grad()
def test_a_scale_that_a_callback_sets_before_the_interval_holds_in_it(case, pipeline, decoder):
    pipeline.scheduler = scheduler_of(case, decoder)
    z = torch.randn(1, 8, sum(case.widths), generator=torch.Generator().manual_seed(2))
    noise = torch.randn(1, case.channels, 8, 8, generator=torch.Generator().manual_seed(3))

    def callback(pipeline, step, timestep, tensors):
        if step == 0:
            pipeline._guidance_scale = 20.0
        return {}

    settings = {"num_inference_steps": 4, "height": 32, "width": 32, "latents": noise, "output_type": "latent"}
    settings |= {"caption_embeds": z, "guidance_interval": (0.5, 1.0)}
    expected = pipeline(guidance_scale=20.0, **settings).images
    assert_close_to_scale(pipeline(guidance_scale=2.0, **settings, callback_on_step_end=callback).images, expected)
    assert not torch.allclose(pipeline(guidance_scale=2.0, **settings).images, expected, atol=1e-3)


@torch.no_grad()
def test_the_negative_prompt_is_encoded_once_where_it_is_kept(case, pipeline):
    z = torch.zeros(1, 8, sum(case.widths))
    calls: list[int] = []
    table = pipeline.encoder.text_encoders[0].get_input_embeddings()
    hook = table.register_forward_hook(lambda *_: calls.append(1))  # of words alone
    pipeline.keep_prompt()
    for _ in range(3):
        pipeline(caption_embeds=z, negative_prompt="a dog", num_inference_steps=1, height=32, width=32)
    hook.remove()
    pipeline.keep_prompt(False)
    assert len(calls) == 2  # its pooled state is that of all positions, its states are those of eight


def scheduler_of(case: Case, decoder: DiffusionDecoder) -> Any:
    scheduler_class = FlowMatchEulerDiscreteScheduler if case.channels == 16 else DDIMScheduler
    return scheduler_class.from_config(decoder.scheduler.config)


def conditionings_by_hand(case, model, diffusers_pipeline, caption_embeds) -> tuple[Conditioning, Conditioning]:
    """Of the images, and of what guidance steers away from: zeros, or the empty prompt."""
    given = Conditioning.of(model(caption_embeds=caption_embeds))
    if case.channels == 4:
        return given, Conditioning(torch.zeros_like(given.hidden_states), torch.zeros_like(given.pooled))
    words = [""] * len(caption_embeds)
    ids = ids_of(diffusers_pipeline, words, len(case.widths))
    nothing = Conditioning.of(model(input_ids=ids))
    shorter = model(input_ids=[own[:, : caption_embeds.shape[1]] for own in ids]).conditioning
    return given, Conditioning(shorter, nothing.pooled)


def denoise_by_hand(
    case: Case,
    decoder: DiffusionDecoder,
    latents: torch.Tensor,
    given: Conditioning,
    nothing: Conditioning,
    scales: list[float],
) -> torch.Tensor:
    """One guidance scale for each step; 1 is the prediction without guidance."""
    scheduler = scheduler_of(case, decoder)
    scheduler.set_timesteps(len(scales))

    def predict(timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        if case.channels == 4:
            return decoder.predict(latents, timestep, conditioning)
        return decoder.denoiser(
            hidden_states=latents,
            timestep=timestep.expand(len(latents)),
            encoder_hidden_states=sequence_by_hand(conditioning),
            pooled_projections=conditioning.pooled,
        ).sample

    for timestep, scale in zip(scheduler.timesteps, scales, strict=True):
        predicted = predict(timestep, given)
        if scale > 1:
            without = predict(timestep, nothing)
            predicted = without + scale * (predicted - without)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents


@torch.no_grad()
def test_images_are_decoded_where_denoiser_and_autoencoder_differ_in_precision(case, pipeline, decoder):
    z = torch.randn(1, 8, sum(case.widths), generator=torch.Generator().manual_seed(2))
    noise = torch.randn(1, case.channels, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {"caption_embeds": z, "latents": noise, "num_inference_steps": 2, "height": 32, "width": 32}
    full = pipeline(**settings, output_type="pt").images
    decoder.denoiser.bfloat16()
    half = pipeline(**settings, output_type="pt").images
    assert half.shape == (1, 3, 32, 32) and (half - full).abs().mean() < 0.02


@pytest.mark.parametrize("case", ["sdxl", "sd3"], indirect=True)
def test_a_model_of_another_family_is_an_error_that_names_both(case, encoder, decoder):
    both = f"runs/a and org/b do not fit together: org/b is a {case.family.title}"
    with pytest.raises(ValueError, match=rf"{both}.*{case.prompt_shape[1]}.*width 32"):
        case.family.check_model(decoder.denoiser, encoder.config, "runs/a", "org/b")


@pytest.mark.parametrize("case", ["sdxl", "sd3"], indirect=True)
def test_a_pooled_state_of_another_width_is_an_error(case, model, decoder):
    case.family.check_model(decoder.denoiser, model.config, "runs/a", "org/b")
    config = copy.deepcopy(model.config)
    config.text_encoder_2_config.projection_dim += 4
    both = f"reads .* pooled states of width {case.pooled_width}, but .*width {case.pooled_width + 4}"
    with pytest.raises(ValueError, match=both):
        case.family.check_model(decoder.denoiser, config, "runs/a", "org/b")


@pytest.mark.parametrize("case", ["sd3"], indirect=True)
def test_settings_that_flow_matching_cannot_use_are_errors(decoder):
    parts = (decoder.vae, decoder.transformer)
    with pytest.raises(ValueError, match=r"snr_gamma is 5\.0.*leave snr_gamma out"):
        StableDiffusion3Decoder(*parts, decoder.scheduler.config, snr_gamma=5.0)
    with pytest.raises(ValueError, match="set use_dynamic_shifting to false"):
        StableDiffusion3Decoder(*parts, {**decoder.scheduler.config, "use_dynamic_shifting": True})
    with pytest.raises(ValueError, match="DDIMScheduler has no shift"):
        StableDiffusion3Decoder(*parts, {"_class_name": "DDIMScheduler"})
    with pytest.raises(ValueError, match=r"sides divisible by 8, got \(1, 3, 36, 36\)"):  # 4 by the VAE, 2 by patches
        decoder.encode_moments(torch.zeros(1, 3, 36, 36))


def test_settings_that_do_not_fit_the_text_encoders_are_errors():
    two = {"text_encoder_config": text_encoder_config(), "text_encoder_2_config": text_encoder_2_config()}
    with pytest.raises(ValueError, match="expected a list of layers for each of the 2 text encoders"):
        VLVConfig(**two, conditioning_layers=[[-2]], num_query_tokens=4)
    with pytest.raises(ValueError, match=r"conditioning_layers\[0\] is \[-4\], but that text encoder has 2 layers"):
        VLVConfig(**two, conditioning_layers=[[-4], [-1]], num_query_tokens=4)
    with pytest.raises(ValueError, match=r"pooled_conditioning is \[2\]"):
        VLVConfig(**two, pooled_conditioning=[2], num_query_tokens=4)


@torch.no_grad()
def test_a_causal_language_model_can_be_the_text_encoder():
    """Z-Image and FLUX.2 [klein] read hidden states of a language model; the latter of three layers, side by side."""
    text = {"model_type": "qwen3", "vocab_size": 55, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    text |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    config = VLVConfig(
        image_encoder_config=IMAGE_ENCODER_CONFIG,
        text_encoder_config=text,
        conditioning_layers=[[1, 2, -2]],
        num_query_tokens=8,
        initializer_range=WEIGHT_SCALE,
    )
    model = VLVModel(config).eval()
    embeds = torch.randn(2, 8, 32)
    states = model.text_encoder(inputs_embeds=embeds, output_hidden_states=True).hidden_states
    conditioning = model(caption_embeds=embeds).conditioning
    assert torch.equal(conditioning, torch.cat([states[1], states[2], states[3]], dim=2))
    assert config.conditioning_dim == 96 and json.loads(config.to_json_string())["conditioning_layers"] == [[1, 2, -2]]


IMAGE_TO_IMAGE = {
    StableDiffusionXLPipeline: StableDiffusionXLImg2ImgPipeline,
    StableDiffusion3Pipeline: StableDiffusion3Img2ImgPipeline,
}


@torch.no_grad()
@pytest.mark.parametrize("prompt_first", [False, True])
def test_the_words_alone_are_the_prompt_of_diffusers(case, pipeline, diffusers_pipeline, prompt_first):
    z = torch.randn(2, 8, sum(case.widths), generator=torch.Generator().manual_seed(2))
    words = {"prompt": [WORDS[0], "a dog"], "image_tokens": 0, "prompt_first": prompt_first}
    got = pipeline.encode_image(caption_embeds=z, negative_prompt="a large apple", **words)
    expected = diffusers_pipeline.encode_prompt(
        words["prompt"], negative_prompt=["a large apple"] * 2, **case.text_options
    )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, value in zip(names, expected, strict=True):
        assert_close_to_scale(got[name], value)


@torch.no_grad()
def test_embeddings_and_words_are_a_prompt_of_image_to_image(case, pipeline, diffusers_pipeline, images):
    image_to_image = IMAGE_TO_IMAGE[case.pipeline](**diffusers_pipeline.components)
    image_to_image.set_progress_bar_config(disable=True)
    settings = {"image": images[1].resize((32, 32)), "strength": 1.0, "num_inference_steps": 2, "output_type": "np"}
    results = []
    for words in ({}, {"image_tokens": 3}, {"prompt": "a dog"}):
        embeds = pipeline.encode_image(images[0], **words)
        assert embeds["prompt_embeds"].shape == embeds["negative_prompt_embeds"].shape
        results.append(image_to_image(**embeds, **settings, generator=torch.Generator().manual_seed(1)).images)
        assert pipeline(images[0], **words, num_inference_steps=1, height=32, width=32).images[0].size == (32, 32)
    assert not (results[0] == results[1]).all() and not (results[0] == results[2]).all()
    with pytest.raises(ValueError, match="8 caption embeddings and 5 tokens"):
        pipeline(images[0], prompt="a small dog")
