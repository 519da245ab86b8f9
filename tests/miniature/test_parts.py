"""The initial weights of the miniature's parts, and the inputs that they are trained on."""

import pytest
import torch

from vlv import VLVModel
from vlv.miniature.data import SceneDataset
from vlv.miniature.encoder import build_encoder_config, build_image_processor, initialize_encoder
from vlv.miniature.teacher import build_text_encoder, mix_embeddings
from vlv.miniature.tokenizer import build_tokenizer
from vlv.modeling_vlv import encode_text_embeds

from ..builders import assert_close_to_scale


@pytest.fixture(scope="module")
def text_encoder():
    torch.manual_seed(0)
    return build_text_encoder(build_tokenizer(for_text_encoder=True)).eval()


def test_initial_weights_let_every_query_token_attend_to_its_own_part_of_the_image(text_encoder):
    def effect_of_a_corner() -> torch.Tensor:
        """The distance `(query tokens,)` between the caption embeddings with and without a black top left corner."""
        pixels = build_image_processor()(
            [SceneDataset(8)[i]["pixels"] for i in range(8)], return_tensors="pt"
        ).pixel_values
        blackened = pixels.clone()
        blackened[:, :, :16, :16] = -2
        with torch.no_grad():
            return (model.get_caption_embeds(pixels) - model.get_caption_embeds(blackened)).norm(dim=2).mean(dim=0)

    torch.manual_seed(0)
    model = VLVModel(build_encoder_config(text_encoder.config)).eval()
    before = effect_of_a_corner()
    initialize_encoder(model)
    after = effect_of_a_corner()
    assert before.max() / before.min() < 2  # all attend to the mean of the image
    assert after.max() / after.min() > 2
    assert after.argmax() < 6  # the 24 positions are in rows of six: one in the top row


def test_embeddings_are_mixed_in_the_given_share_of_rows_and_otherwise_kept(text_encoder):
    torch.manual_seed(0)
    embedding_table = text_encoder.embeddings.token_embedding.weight.detach()
    ids = torch.randint(4, len(embedding_table), (400, 12))
    assert torch.equal(mix_embeddings(ids, embedding_table, 0.0), embedding_table[ids])
    mixed = mix_embeddings(ids, embedding_table, 0.5)
    changed = (mixed - embedding_table[ids]).norm(dim=2) > 1e-6  # (400, 12)
    rows = changed.any(dim=1).float().mean()
    assert 0.35 < rows < 0.5  # by chance no token is mixed in some rows of the half
    assert 0.15 < changed.float().mean() < 0.35


def test_encoding_token_embeddings_gives_the_same_as_encoding_the_tokens(text_encoder):
    ids = build_tokenizer(for_text_encoder=True)(
        ["a large cat at the centre"], padding="max_length", return_tensors="pt"
    ).input_ids
    embedding_table = text_encoder.embeddings.token_embedding.weight
    with torch.no_grad():
        expected = text_encoder(input_ids=ids).last_hidden_state
        assert_close_to_scale(encode_text_embeds(text_encoder, embedding_table[ids]), expected)
