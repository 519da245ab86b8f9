"""The calls that caption or reconstruct one batch."""

import pytest
import torch

from vlv.pipelines import generate_captions, generate_images

from ..builders import assert_close_to_scale


def test_captions_of_images_and_of_their_embeddings_are_equal(captioner, processor, images):
    pixel_values = processor(images=images[:3]).pixel_values
    captions = generate_captions(captioner, processor, pixel_values=pixel_values, max_new_tokens=5)
    assert len(set(captions)) == 3 and not any("<" in caption for caption in captions)
    z = captioner.model.get_caption_embeds(pixel_values)
    assert generate_captions(captioner, processor, caption_embeds=z, max_new_tokens=5) == captions


def test_captions_are_greedy_whatever_the_model_s_own_settings(captioner, processor, images):
    pixel_values = processor(images=images[:3]).pixel_values
    greedy = generate_captions(captioner, processor, pixel_values=pixel_values, max_new_tokens=8)
    captioner.generation_config.do_sample = True
    captioner.generation_config.temperature = 50.0
    assert generate_captions(captioner, processor, pixel_values=pixel_values, max_new_tokens=8) == greedy
    sampled = generate_captions(captioner, processor, pixel_values=pixel_values, max_new_tokens=8, do_sample=True)
    assert sampled != greedy


def test_an_image_depends_on_its_own_seed_and_not_on_its_batch(reconstruction, images):
    together = generate_images(reconstruction, image=images[:2], seeds=(1, 2), num_inference_steps=2)
    assert together.shape == (2, 3, 32, 32) and together.dtype == torch.float32
    for position, seed in enumerate((1, 2)):
        z = reconstruction.get_caption_embeds(images[position])
        alone = generate_images(reconstruction, caption_embeds=z, seeds=(seed,), num_inference_steps=2)
        assert_close_to_scale(alone[0], together[position], 1e-4)
    other = generate_images(reconstruction, image=images[:2], seeds=(1, 3), num_inference_steps=2)
    assert_close_to_scale(other[0], together[0])
    assert (other[1] - together[1]).abs().max() > 1e-2


def test_an_image_and_embeddings_together_are_refused(reconstruction, images):
    with pytest.raises(ValueError, match="not both"):
        generate_images(
            reconstruction, image=images[:1], caption_embeds=reconstruction.get_caption_embeds(images[:1]), seeds=(1,)
        )
