"""What the miniature's parts do before and while they train."""

import pytest
import torch

from vlv import VLVModel
from vlv.miniature.encoder import build_encoder_config, build_image_processor, initialise
from vlv.miniature.teacher import blur_words, build_text_encoder, encode_embeds
from vlv.miniature.tokenizer import build_tokenizer
from vlv.miniature.training import SceneDataset


@pytest.fixture(scope="module")
def text_encoder():
    torch.manual_seed(0)
    return build_text_encoder(build_tokenizer(for_text_encoder=True)).eval()


def test_initial_weights_let_every_query_see_its_own_part_of_the_picture(text_encoder):
    def effect_of_a_corner() -> torch.Tensor:
        """How far each query's embedding moves when the top left of a picture turns black: `(queries,)`."""
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
    initialise(model)
    after = effect_of_a_corner()
    assert before.max() / before.min() < 2  # all see the mean of the picture
    assert after.max() / after.min() > 2
    assert after.argmax() < 6  # of the 24 places in rows of six, one in the upper row


def test_blurred_words_lie_between_the_right_word_and_another_or_none(text_encoder):
    torch.manual_seed(0)
    table = text_encoder.embeddings.token_embedding.weight.detach()
    ids = torch.randint(4, len(table), (400, 12))
    assert torch.equal(blur_words(ids, table, 0.0), table[ids])
    blurred = blur_words(ids, table, 0.5)
    changed = (blurred - table[ids]).norm(dim=2) > 1e-6  # (400, 12)
    rows = changed.any(dim=1).float().mean()
    assert 0.35 < rows < 0.5  # a few rows of the half are spared by chance
    assert 0.15 < changed.float().mean() < 0.35


def test_embeddings_of_words_give_what_the_words_give(text_encoder):
    ids = build_tokenizer(for_text_encoder=True)(
        ["a large cat at the centre"], padding="max_length", return_tensors="pt"
    ).input_ids
    table = text_encoder.embeddings.token_embedding.weight
    with torch.no_grad():
        expected = text_encoder(input_ids=ids).last_hidden_state
        torch.testing.assert_close(encode_embeds(text_encoder, table[ids]), expected)
