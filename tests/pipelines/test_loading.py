"""`load_reconstruction` assembles the pipeline from the components of one folder."""

import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel

from vlv import hub
from vlv.miniature.tokenizer import build_tokenizer
from vlv.pipelines import VLVReconstructionPipeline, generate_images, load_reconstruction


@pytest.fixture
def exported(tmp_path, captioner, processor, stable_diffusion):
    return hub.export(tmp_path / "vlv", captioner=captioner, processor=processor, diffusion_model=stable_diffusion)


def test_the_pipeline_reconstructs_like_one_put_together_by_hand(
    exported, captioner, image_processor, stable_diffusion, images
):
    loaded = load_reconstruction(exported)
    by_hand = VLVReconstructionPipeline(
        encoder=captioner.model,
        vae=AutoencoderKL.from_pretrained(stable_diffusion, subfolder="vae"),
        unet=UNet2DConditionModel.from_pretrained(stable_diffusion, subfolder="unet"),
        scheduler=DDPMScheduler.from_pretrained(stable_diffusion, subfolder="scheduler"),
        image_processor=image_processor,
        tokenizer=build_tokenizer(for_text_encoder=True),
    )
    assert torch.equal(loaded.get_caption_embeds(images[:2]), by_hand.get_caption_embeds(images[:2]))
    assert torch.equal(loaded.encode_prompt("a large dog"), by_hand.encode_prompt("a large dog"))
    results = []
    for pipeline in (loaded, by_hand):
        pipeline.set_progress_bar_config(disable=True)
        results.append(generate_images(pipeline, image=images[:2], seeds=(1, 2), num_inference_steps=2))
    assert results[0].shape == (2, 3, 32, 32)
    assert torch.equal(*results)


def test_all_components_have_the_given_precision(exported):
    pipeline = load_reconstruction(exported, dtype=torch.bfloat16)
    assert pipeline.encoder.dtype == pipeline.unet.dtype == pipeline.vae.dtype == torch.bfloat16


def test_a_folder_without_a_diffusion_model_is_named(tmp_path, encoder, image_processor):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_reconstruction(tmp_path)
    folder = hub.export(tmp_path / "encoder", encoder=encoder, image_processor=image_processor)
    with pytest.raises(FileNotFoundError, match=str(folder)):
        load_reconstruction(folder)
