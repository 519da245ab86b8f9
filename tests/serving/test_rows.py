"""Captions of one batch, each with settings of its own."""

import pytest
import torch

from vlv.serving.rows import Row, RowSampling, RowStopping, Settings

LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])
WORDS = ["", " a", " cat", " and", " dog", ".", " "]
END = 0


def row_of(settings: Settings, cancelled=lambda: False) -> tuple[Row, list]:
    events: list = []
    return Row(settings, events.append, lambda reason: events.append((reason,)), cancelled), events


def write(settings: Settings, tokens: list[int]) -> tuple[Row, list]:
    """What a caption of these tokens passes on."""
    row, events = row_of(settings)
    stopping = RowStopping([row], lambda ids: "".join(WORDS[i] for i in ids), {END})
    for end in range(1, len(tokens) + 1):
        if stopping(torch.tensor([tokens[:end]]), None).all():
            break
    return row, events


def draw(settings: Settings, times: int) -> torch.Tensor:
    """How often each token is drawn from `LOGITS`."""
    row, _ = row_of(settings)
    sampling = RowSampling([row])
    drawn = torch.tensor([int(sampling(torch.zeros(1, 0), LOGITS[None]).argmax()) for _ in range(times)])
    return torch.bincount(drawn, minlength=4) / times


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_with_their_probabilities(temperature):
    expected = torch.softmax(LOGITS / temperature, dim=0)
    assert (draw(Settings(10, temperature=temperature, seed=1), 4000) - expected).abs().max() < 0.03  # 3.8 sigma


def test_top_p_draws_from_the_most_probable_tokens_alone():
    drawn = draw(Settings(10, temperature=1.0, top_p=0.8), 1000)
    assert drawn[2:].sum() == 0 and drawn[:2].min() > 0.2


def test_a_caption_without_temperature_takes_the_most_probable_token_beside_one_that_is_drawn():
    rows = [row_of(Settings(10))[0], row_of(Settings(10, temperature=1.0))[0]]
    scores = LOGITS.expand(2, 4)
    changed = RowSampling(rows)(torch.zeros(2, 0), scores)
    assert torch.equal(changed[0], LOGITS) and not torch.equal(changed[1], LOGITS)
    assert torch.equal(scores[1], LOGITS)


def test_random_numbers_of_a_caption_do_not_depend_on_its_batch():
    def first(count: int) -> torch.Tensor:
        rows = [row_of(Settings(10, temperature=1.0, seed=5 + index))[0] for index in range(count)]
        return RowSampling(rows)(torch.zeros(count, 0), LOGITS.expand(count, 4))[0]

    assert torch.equal(first(1), first(3))


def test_penalties_are_subtracted_from_tokens_that_the_caption_has():
    row, _ = row_of(Settings(10, frequency_penalty=0.5, presence_penalty=0.25))
    row.tokens = [0, 0, 2]
    changed = RowSampling([row])(torch.zeros(1, 3), LOGITS[None])
    assert torch.allclose(changed[0], LOGITS - torch.tensor([1.25, 0.0, 0.75, 0.0]))


def test_a_caption_ends_at_its_end_token_and_at_its_length():
    row, events = write(Settings(10), [1, 2, END, 4])
    assert (row.text, row.tokens, events[-1]) == ("a cat", [1, 2, END], ("stop",))
    row, events = write(Settings(2), [1, 2, 3, 4])
    assert (row.text, row.tokens, events[-1]) == ("a cat", [1, 2], ("length",))


def test_a_stop_string_over_two_tokens_is_never_passed_on():
    row, events = write(Settings(10, stop=("cat and",)), [1, 2, 3, 4])
    assert row.text == "a" and events == ["a", ("stop",)]


def test_what_only_begins_as_a_stop_string_is_passed_on_later():
    row, events = write(Settings(10, stop=("cat. cat",)), [1, 2, 5, 4, END])
    assert events == ["a", " cat. dog", ("stop",)] and row.text == "a cat. dog"


def test_white_space_around_a_caption_is_left_out():
    _, events = write(Settings(10), [6, 1, 2, 6, 6, END])
    assert events == ["a", " cat", ("stop",)]


def test_a_cancelled_caption_ends_at_the_next_token():
    row, events = row_of(Settings(10), cancelled=lambda: True)
    stopping = RowStopping([row], lambda ids: "text", {END})
    assert stopping(torch.tensor([[1]]), None).all() and not events
