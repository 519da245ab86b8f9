"""Each family of text-to-image models computes what diffusers' own pipeline computes, from real words' embeddings."""

import json

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionXLPipeline
from torch.nn import functional as F

from vlv import VLVConfig, VLVModel
from vlv.diffusion_decoder import (
    Conditioning,
    StableDiffusionDecoder,
    StableDiffusionXLDecoder,
    family_of,
    load_diffusion_decoder,
)
from vlv.modeling_vlv import TEXT_ENCODERS
from vlv.pipelines import VLVPooledReconstructionPipeline, build_reconstruction

from ..builders import (
    IMAGE_ENCODER_CONFIG,
    POOLED_WIDTH,
    POSITIONS,
    TEXT_2_WIDTH,
    TEXT_WIDTH,
    WEIGHT_SCALE,
    assert_close_to_scale,
    text_encoder_2_config,
    text_encoder_config,
    vlv_config,
)

WORDS = ["a small dog", "a large apple at the top left, a dog and a large red apple at the bottom right"]


@pytest.fixture(scope="module")
def diffusers_pipeline(stable_diffusion_xl) -> StableDiffusionXLPipeline:
    pipeline = StableDiffusionXLPipeline.from_pretrained(stable_diffusion_xl, add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def model(diffusers_pipeline) -> VLVModel:
    encoders = [diffusers_pipeline.text_encoder, diffusers_pipeline.text_encoder_2]
    torch.manual_seed(0)
    config = vlv_config(
        **{f"{name}_config": encoder.config for name, encoder in zip(TEXT_ENCODERS, encoders, strict=False)},
        **StableDiffusionXLDecoder.text_settings(2),
    )
    built = VLVModel(config).eval()
    for own, loaded in zip(built.text_encoders, encoders, strict=True):
        own.load_state_dict(loaded.state_dict())
    return built


@pytest.fixture
def decoder(stable_diffusion_xl) -> StableDiffusionXLDecoder:
    loaded = load_diffusion_decoder(str(stable_diffusion_xl))
    assert isinstance(loaded, StableDiffusionXLDecoder)
    return loaded


@pytest.fixture
def batch(model) -> dict:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        output = model(caption_embeds=torch.randn(3, 8, TEXT_WIDTH + TEXT_2_WIDTH, generator=generator))
    return {
        "latents": torch.randn(3, 4, 8, 8, generator=generator),
        "conditioning": Conditioning.of(output),
        "noise": torch.randn(3, 4, 8, 8, generator=generator),
        "timesteps": torch.tensor([0, 500, 999]),
    }


def ids_of(pipeline, words: list[str]) -> list[torch.Tensor]:
    settings = {"padding": "max_length", "max_length": POSITIONS, "truncation": True, "return_tensors": "pt"}
    return [tokenizer(words, **settings).input_ids for tokenizer in (pipeline.tokenizer, pipeline.tokenizer_2)]


def test_the_family_is_found_by_the_components(stable_diffusion, stable_diffusion_xl):
    assert family_of(stable_diffusion) is StableDiffusionDecoder
    assert family_of(stable_diffusion_xl) is StableDiffusionXLDecoder


@torch.no_grad()
def test_words_give_exactly_what_encode_prompt_gives(model, diffusers_pipeline):
    states, _, pooled, _ = diffusers_pipeline.encode_prompt(WORDS, do_classifier_free_guidance=False)
    ids = ids_of(diffusers_pipeline, WORDS)
    assert not torch.equal(*ids)  # the two pad with different tokens
    output = model(input_ids=ids)
    assert torch.equal(output.conditioning, states) and torch.equal(output.pooled_conditioning, pooled)
    assert states.shape == (2, POSITIONS, TEXT_WIDTH + TEXT_2_WIDTH) and pooled.shape == (2, POOLED_WIDTH)


@torch.no_grad()
def test_embeddings_of_words_give_exactly_what_encode_prompt_gives(model, diffusers_pipeline):
    """The pooled state is that of the last position, so it is the words' where their EOS is the last token."""
    words = WORDS[1:]  # truncated to all positions
    states, _, pooled, _ = diffusers_pipeline.encode_prompt(words, do_classifier_free_guidance=False)
    parts = [
        encoder.get_input_embeddings()(ids)
        for encoder, ids in zip(model.text_encoders, ids_of(diffusers_pipeline, words), strict=True)
    ]
    output = model(caption_embeds=torch.cat(parts, dim=2))
    assert torch.equal(output.conditioning, states) and torch.equal(output.pooled_conditioning, pooled)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_loss_by_the_formulas(prediction_type, decoder, batch):
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


def test_gradients_reach_the_encoder_and_nothing_frozen_changes(model, decoder, batch):
    pixels = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    batch["conditioning"] = Conditioning.of(model(pixel_values=pixels))
    decoder.denoising_loss(**batch).backward()
    half = model.projector.linear_2.weight.grad.split([TEXT_WIDTH, TEXT_2_WIDTH])  # of the first and second encoder
    assert all(part.abs().sum() > 0 for part in half)
    assert all(parameter.grad is None for parameter in decoder.parameters())
    model.zero_grad()


def test_the_pooled_state_alone_has_a_gradient(decoder, batch):
    batch["conditioning"].pooled.requires_grad_(True)
    decoder.denoising_loss(**batch).backward()
    assert batch["conditioning"].pooled.grad.abs().sum() > 0


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_one_sampling_step_by_hand(guidance_scale, model, decoder, diffusers_pipeline, image_processor):
    scheduler = DDIMScheduler.from_config(decoder.scheduler.config)
    components = {
        **decoder.pipeline_components(),
        "scheduler": scheduler,
        "tokenizer": diffusers_pipeline.tokenizer,
        "tokenizer_2": diffusers_pipeline.tokenizer_2,
    }
    pipeline = build_reconstruction(model, image_processor, components)
    assert isinstance(pipeline, VLVPooledReconstructionPipeline)
    pipeline.set_progress_bar_config(disable=True)
    z = torch.randn(2, 8, TEXT_WIDTH + TEXT_2_WIDTH, generator=torch.Generator().manual_seed(2))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    got = pipeline(
        caption_embeds=z,
        latents=noise,
        num_inference_steps=1,
        guidance_scale=guidance_scale,
        output_type="latent",
        height=32,
        width=32,
    ).images
    scheduler.set_timesteps(1)
    (timestep,) = scheduler.timesteps
    given = Conditioning.of(model(caption_embeds=z))
    predicted = decoder.predict(noise, timestep, given)
    if guidance_scale > 1:  # steers away from zeros
        nothing = Conditioning(torch.zeros_like(given.hidden_states), torch.zeros_like(given.pooled))
        without = decoder.predict(noise, timestep, nothing)
        predicted = without + guidance_scale * (predicted - without)
    assert_close_to_scale(got, scheduler.step(predicted, timestep, noise).prev_sample)


def test_a_model_of_another_family_is_an_error_that_names_both(encoder, decoder):
    with pytest.raises(
        ValueError, match=r"runs/a and org/xl do not fit together: org/xl is a Stable Diffusion XL.*80"
    ):
        StableDiffusionXLDecoder.check_model(decoder.unet, encoder.config, "runs/a", "org/xl")


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
