"""The reconstruction pipeline is put together from the parts of one folder."""

import pytest
import torch

from vlv import hub
from vlv.pipelines import load_reconstruction


def test_the_reconstruction_is_assembled_from_its_parts(tmp_path, captioner, processor, stable_diffusion, pictures):
    exported = hub.export(tmp_path / "vlv", captioner=captioner, processor=processor, diffusion_model=stable_diffusion)
    pipeline = load_reconstruction(exported)
    assert torch.equal(pipeline.encode_image(pictures[:2]), load_reconstruction(exported).encode_image(pictures[:2]))
    pixels = pipeline.image_processor(pictures[:2], return_tensors="pt").pixel_values
    assert torch.equal(pipeline.encode_image(pictures[:2]), captioner.model.get_caption_embeds(pixels))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(pictures[0], num_inference_steps=2).images[0].size == (32, 32)


def test_a_folder_without_a_decoder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_reconstruction(tmp_path)
