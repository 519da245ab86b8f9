import pytest

from vlv.miniature.tokenizer import build_tokenizer
from vlv.pipelines import VLVReconstructionPipeline

from ..builders import stable_diffusion_parts


@pytest.fixture
def reconstruction(encoder, image_processor) -> VLVReconstructionPipeline:
    """An untrained reconstruction pipeline: 32 x 32 pixels, 8 caption embeddings for 12 text positions."""
    tokenizer = build_tokenizer(for_text_encoder=True)
    pipeline = VLVReconstructionPipeline(
        encoder=encoder, **stable_diffusion_parts(), image_processor=image_processor, tokenizer=tokenizer
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
