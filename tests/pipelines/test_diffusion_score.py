"""The score of a caption is the loss that diffusers' own parts compute, whatever the batch."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderTiny, DDPMScheduler, DiffusionPipeline
from torch.nn import functional as F

from vlv import VLVModel
from vlv.diffusion_decoder import build_diffusion_decoder
from vlv.modeling_vlv import TEXT_ENCODERS
from vlv.pipelines import DiffusionScorer, VLVReconstructionPipeline, build_reconstruction, to_pixels
from vlv.pipelines.diffusion_score import split_into_sentences, spread_timesteps

from ..builders import POSITIONS, assert_close_to_scale, vlv_config

CAPTIONS = [["a small dog", "a large apple"], ["a large cat at the top left", "a small dog"], ["", "a small frog"]]
SEEDS = [5, 0, 7]
LONG = "a small dog at the top left. a large apple is on the right! a red car?"  # three sentences, 10 words at most
FAMILIES = {
    "noise": ("stable_diffusion", "epsilon"),
    "velocity": ("stable_diffusion", "v_prediction"),
    "two text encoders": ("stable_diffusion_xl", "epsilon"),
    "flow matching": ("stable_diffusion_3", None),
}


def build_scorer(text_to_image: DiffusionPipeline, image_processor, **settings) -> DiffusionScorer:
    """A scorer with the parts of a text-to-image pipeline, and an untrained image encoder."""
    components = text_to_image.components
    encoders = {name: part for name in TEXT_ENCODERS if (part := components.get(name)) is not None}
    family = type(build_diffusion_decoder(components))
    configs = {f"{name}_config": part.config for name, part in encoders.items()}
    model = VLVModel(vlv_config(**configs, **family.text_settings(len(encoders)))).eval()
    for own, loaded in zip(model.text_encoders, encoders.values(), strict=True):
        own.load_state_dict(loaded.state_dict())
    names = [*family.models, "scheduler", *family.tokenizers[: len(encoders)]]
    pipeline = build_reconstruction(model, image_processor, {name: components[name] for name in names})
    return DiffusionScorer.from_pipeline(pipeline, **settings)


def load_text_to_image(fixture: str, prediction_type: str | None, request) -> DiffusionPipeline:
    pipeline = DiffusionPipeline.from_pretrained(request.getfixturevalue(fixture))
    if prediction_type is not None:
        pipeline.scheduler = DDPMScheduler.from_config(pipeline.scheduler.config, prediction_type=prediction_type)
    return pipeline


def encode_prompt(pipeline: DiffusionPipeline, caption: str | None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Prompt embeddings and pooled ones by diffusers; for None, those that guidance steers away from."""
    options: dict[str, Any] = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    if hasattr(pipeline, "transformer"):
        options |= {"prompt_2": None, "prompt_3": None, "max_sequence_length": POSITIONS}
    encoded = pipeline.encode_prompt("a" if caption is None else caption, **options)
    own = encoded[int(caption is None) :: 2]
    return own[0], own[1] if len(own) > 1 else None


def loss_by_hand(pipeline: DiffusionPipeline, latents, noise, timestep: int, caption: str | None) -> torch.Tensor:
    """The loss of one image `(C, h, w)` by the scheduler's own numbers and the denoiser."""
    embeds, pooled = encode_prompt(pipeline, caption)
    latents, noise = latents[None], noise[None]
    if hasattr(pipeline, "transformer"):
        sigma = pipeline.scheduler.sigmas[len(pipeline.scheduler.sigmas) - 1 - timestep]  # from high to low noise
        noisy, target = (1 - sigma) * latents + sigma * noise, noise - latents
        predicted = pipeline.transformer(noisy, embeds, pooled, sigma[None] * 1000).sample
        return F.mse_loss(predicted, target)
    kept = pipeline.scheduler.alphas_cumprod[timestep]
    noisy = kept.sqrt() * latents + (1 - kept).sqrt() * noise
    velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
    sizes = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]])
    conditions = None if pooled is None else {"text_embeds": pooled, "time_ids": sizes}
    predicted = pipeline.unet(noisy, timestep, embeds, added_cond_kwargs=conditions).sample
    return F.mse_loss(predicted, velocity if pipeline.scheduler.config.prediction_type == "v_prediction" else noise)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_score_is_the_loss_under_no_words_less_that_under_the_caption(family, request, image_processor):
    text_to_image = load_text_to_image(*FAMILIES[family], request)
    scorer = build_scorer(text_to_image, image_processor, num_pairs=2, timestep_range=(0.2, 0.8))
    assert scorer.timesteps.tolist() == [350, 650]
    channels = text_to_image.vae.config.latent_channels
    latents = torch.randn(3, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    found = scorer.score_latents(latents, CAPTIONS, SEEDS)
    noise = scorer.sample_noise(latents.shape[1:], SEEDS)  # (3, 2, C, 8, 8)

    def loss(image: int, caption: str | None) -> float:
        pairs = [
            loss_by_hand(text_to_image, latents[image], noise[image, k], t, caption) for k, t in ((0, 350), (1, 650))
        ]
        return sum(map(float, pairs)) / 2

    nothing = torch.tensor([[loss(image, None)] for image in range(3)])
    losses = torch.tensor([[loss(image, caption) for caption in own] for image, own in enumerate(CAPTIONS)])
    assert_close_to_scale(found.unconditional_losses, nothing)
    assert_close_to_scale(found.losses, losses)
    assert_close_to_scale(found.scores, nothing - losses, tolerance=1e-3)  # small differences of large losses
    assert found.scores.shape == (3, 2) and found.scores.dtype == torch.float32
    assert (found.scores[2, 0] == 0) == (family != "two text encoders")  # no words are zeros there, not empty words


@pytest.fixture(scope="module")
def scorer(request, image_processor) -> DiffusionScorer:
    return build_scorer(load_text_to_image("stable_diffusion", None, request), image_processor)


@pytest.fixture(scope="module")
def pixels(images) -> torch.Tensor:
    return to_pixels([image.resize((32, 32)) for image in images[:3]])


def test_scores_depend_on_neither_the_batch_nor_the_order(scorer, pixels, request, image_processor):
    together = scorer.score(pixels, CAPTIONS).scores
    assert together.flatten().unique().numel() > 4  # otherwise the comparisons below could not fail
    small = build_scorer(load_text_to_image("stable_diffusion", None, request), image_processor, batch_size=3)
    assert_close_to_scale(small.score(pixels, CAPTIONS).scores, together, 1e-4)
    assert_close_to_scale(scorer.score(pixels.flip(0), CAPTIONS[::-1]).scores.flip(0), together, 1e-4)
    alone = torch.cat([scorer.score(pixels[i : i + 1], [CAPTIONS[i][::-1]]).scores.flip(1) for i in range(3)])
    assert_close_to_scale(alone, together, 1e-4)


def test_the_noise_depends_on_the_seed_and_on_the_image(scorer, pixels):
    one, other = scorer.sample_noise((4, 8, 8), [1, 2])
    assert torch.equal(scorer.sample_noise((4, 8, 8), [2])[0], other) and not torch.equal(one, other)
    assert one[0].flatten() @ one[1].flatten() < 100  # independent for each pair: 256 if they were equal
    same, by_index = (scorer.score(pixels, CAPTIONS, seeds).scores for seeds in (None, [0, 1, 2]))
    assert not torch.equal(same, by_index)
    assert torch.equal(same, scorer.score(pixels, CAPTIONS).scores)


def test_a_caption_that_is_too_long_is_scored_as_the_mean_of_its_sentences(scorer, pixels):
    sentences = ["a small dog at the top left.", "a large apple is on the right!", "a red car?"]
    assert scorer.fitting([*sentences, LONG]) == {**dict.fromkeys(sentences, True), LONG: False}
    found = scorer.score(pixels[:1], [[LONG, *sentences]])
    assert found.num_texts.tolist() == [[3, 1, 1, 1]] and not found.num_cut.any()
    assert_close_to_scale(found.scores[0, 0], found.scores[0, 1:].mean(), 1e-4)
    assert len(set(found.scores[0].tolist())) == 4


def test_all_captions_of_an_image_are_split_if_one_of_them_is_too_long(scorer, pixels):
    short = "a small dog. a red car"
    found = scorer.score(pixels[:2], [[LONG, short], [short, "a red car"]])
    assert found.num_texts.tolist() == [[3, 2], [1, 1]]
    sentences = scorer.score(pixels[:1], [["a small dog.", "a red car"]]).scores[0]
    assert_close_to_scale(found.scores[0, 1], sentences.mean(), 1e-4)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("A man at 5 p.m. in a hat. Night.", ["A man at 5 p.m. in a hat.", "Night."]),
        ("1. A dog. 2. Dr. Smith! The end", ["1. A dog.", "2. Dr. Smith!", "The end"]),
        ("a red car. No.\n\n- a house", ["a red car.", "No. - a house"]),
        ("a red car. Ok", ["a red car. Ok"]),
        ("一只狗坐在地上。一只猫在树上。", ["一只狗坐在地上。", "一只猫在树上。"]),
        ("1. 2.", ["1. 2."]),
        ("", [""]),
    ],
)
def test_numbers_and_abbreviations_are_no_sentences(text, sentences):
    assert split_into_sentences(text) == sentences


def test_a_sentence_that_is_too_long_is_cut_and_counted(scorer, pixels):
    read = "a small dog " * 3 + "a"  # 10 words between begin and end
    found = scorer.score(pixels[:1], [[f"{read} frog is here. a cat", f"{read} cat"]])
    assert found.num_cut.tolist() == [[1, 1]] and found.num_texts.tolist() == [[2, 1]]
    kept = scorer.score(pixels[:1], [[read, "a cat"]])
    assert not kept.num_cut.any()
    assert_close_to_scale(found.scores[0, 1], kept.scores[0, 0], 1e-4)
    assert_close_to_scale(found.scores[0, 0], kept.scores[0].mean(), 1e-4)


def test_timesteps_are_the_middles_of_equal_parts_of_the_range():
    assert spread_timesteps(1, 0.45, 0.95, 1000).tolist() == [700]
    assert spread_timesteps(4, 0.5, 0.9, 1000).tolist() == [550, 650, 750, 850]
    assert spread_timesteps(2, 1.0, 1.0, 50).tolist() == [49, 49]


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        ([["a dog"], [], ["a cat"]], "image 1 has no captions"),
        ([["a dog"], ["a cat", "a dog"], ["a cat"]], r"images have \[1, 2\] captions"),
        ([["a dog"]], "1 lists of captions and 3 seeds for 3 images"),
    ],
)
def test_captions_that_do_not_fit_the_images_are_errors(captions, message, scorer, pixels):
    with pytest.raises(ValueError, match=message):
        scorer.score(pixels, captions)


def test_pixels_of_another_kind_are_an_error(scorer, pixels):
    with pytest.raises(ValueError, match=r"\(N, 3, height, width\) uint8, got \(1, 3, 32, 32\) torch.float32"):
        scorer.score(pixels[:1].float(), [["a dog"]])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_pairs": 0}, "num_pairs is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"timestep_range": (0.9, 0.4)}, r"timestep_range is \(0.9, 0.4\)"),
        ({"timestep_range": (450, 950)}, r"timestep_range is \(450, 950\)"),
    ],
)
def test_settings_that_make_no_sense_are_errors(settings, message, scorer):
    with pytest.raises(ValueError, match=message):
        DiffusionScorer(scorer.model, scorer.diffusion_decoder, scorer.tokenizers, **settings)


def test_parts_that_are_missing_are_named(scorer, reconstruction, image_processor):
    with pytest.raises(ValueError, match="tokenizers of all text encoders; tokenizer is missing"):
        DiffusionScorer(scorer.model, scorer.diffusion_decoder, {})
    without = VLVReconstructionPipeline(encoder=reconstruction.encoder, image_processor=image_processor)
    with pytest.raises(ValueError, match=r"the reconstruction pipeline is a model of .*; expected a latent diffusion"):
        DiffusionScorer.from_pipeline(without)
    reconstruction.register_modules(vae=AutoencoderTiny())
    with pytest.raises(ValueError, match=r"the autoencoder .* is a AutoencoderTiny; expected AutoencoderKL"):
        DiffusionScorer.from_pipeline(reconstruction)


def test_a_score_that_is_not_finite_is_named(scorer, pixels):
    latents = scorer.encode_images(pixels, SEEDS)
    latents[1] = float("inf")
    with pytest.raises(ValueError, match="the score of caption 0 of image 1, 'a large cat at the top left', is nan"):
        scorer.score_latents(latents, CAPTIONS, SEEDS)
    found = scorer.score_latents(latents, CAPTIONS, SEEDS, allow_nan=True).scores
    assert found.isfinite().all(dim=1).tolist() == [True, False, True]
