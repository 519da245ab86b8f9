"""The captioner takes sequences with image tokens, as other vision-language models do, and computes the same."""

import copy

import pytest
import torch
from transformers import AutoConfig, DynamicCache, TextStreamer

from vlv import VLVForConditionalGeneration
from vlv.generation_vlv import mask_and_positions

from ..builders import QUERIES, VOCABULARY, assert_close_to_scale, vlv_config
from .test_language_models import OWN_SIZES, SIZES

KINDS = ("qwen2", "llama", "gpt2", "opt")
IMAGE = VOCABULARY + 3  # beyond the embeddings
PREFIX = torch.tensor([[11, 12], [13, 14], [15, 16]])
CAPTIONS = torch.tensor([[5, 6, 7, 3], [8, 3, -100, -100], [9, 10, 3, -100]])


@pytest.fixture(scope="module")
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(7))


def build(kind: str) -> VLVForConditionalGeneration:
    torch.manual_seed(0)
    sizes = OWN_SIZES.get(kind, SIZES)
    config = AutoConfig.for_model(kind, **{"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, **sizes})
    model = VLVForConditionalGeneration(vlv_config(text_config=config)).eval()
    model.config.image_token_id = IMAGE
    return model


@pytest.fixture(scope="module")
def model() -> VLVForConditionalGeneration:
    return build("qwen2")


def image(count: int = 1) -> list[int]:
    return [IMAGE] * QUERIES * count


def pad(rows: list[list[int]], side: str = "left", value: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of different lengths and their mask."""
    longest = max(map(len, rows))
    left = side == "left"
    ids = [[value] * (longest - len(r)) * left + r + [value] * (longest - len(r)) * (not left) for r in rows]
    mask = [[0] * (longest - len(r)) * left + [1] * len(r) + [0] * (longest - len(r)) * (not left) for r in rows]
    return torch.tensor(ids), torch.tensor(mask)


def sequence(prefix: torch.Tensor, captions: torch.Tensor) -> dict[str, torch.Tensor]:
    """Both, and an image before them, as one sequence."""
    before = torch.cat([torch.tensor([image()] * len(prefix)), prefix], dim=1)
    return {
        "input_ids": torch.cat([before, captions.clamp(min=0)], dim=1),
        "attention_mask": torch.cat([torch.ones_like(before), (captions != -100).long()], dim=1),
        "labels": torch.cat([torch.full_like(before, -100), captions], dim=1),
    }


@pytest.mark.parametrize("prefix", [PREFIX, PREFIX[:, :0]], ids=["words", "no words"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_loss_and_gradients_are_those_of_the_prefix(kind, prefix, pixels):
    model = build(kind)
    words = {"input_ids": prefix} if prefix.shape[1] else {}
    whole = sequence(prefix, CAPTIONS)
    length = QUERIES + prefix.shape[1]
    prompt = whole["input_ids"][:, :length]

    expected = model.generate(pixels, **words, max_new_tokens=5, min_new_tokens=5)
    written = model.generate(input_ids=prompt, pixel_values=pixels, max_new_tokens=5, min_new_tokens=5)
    assert torch.equal(written, torch.cat([prompt, expected], dim=1))
    assert len(set(map(tuple, expected.tolist()))) > 1  # the images matter

    gradients, losses, logits = [], [], []
    for inputs in ({**words, "labels": CAPTIONS}, whole):
        output = model(pixel_values=pixels, **inputs)
        output.loss.backward()
        losses.append(output.loss)
        logits.append(output.logits)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert_close_to_scale(losses[1], losses[0])
    counted = CAPTIONS != -100
    assert_close_to_scale(logits[1][:, length - 1 : -1][counted], logits[0][counted])
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(gradient.abs().max() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        allowed = 1e-5 * gradient.abs().max() + 1e-7 * largest  # of its own scale, and rounding of sums that cancel
        assert (gradients[1][name] - gradient).abs().max() <= allowed, name
    assert gradients[0]["language_projection.linear_1.weight"].abs().max() > 1e-3 * largest


def test_in_training_logits_are_returned_unless_they_are_refused(model, pixels):
    inputs = {"pixel_values": pixels, **sequence(PREFIX, CAPTIONS)}
    shape = (*inputs["input_ids"].shape, VOCABULARY)
    full, cheap = model(**inputs), model(**inputs, return_logits=False)
    assert full.logits.shape == shape and cheap.logits is None
    assert_close_to_scale(cheap.loss, full.loss)
    labels = inputs.pop("labels")
    assert_close_to_scale(model(**inputs).logits, full.logits)
    assert_close_to_scale(model(**inputs, logits_to_keep=1).logits, full.logits[:, -1:])
    image_labels = labels.masked_fill(inputs["input_ids"] == IMAGE, IMAGE)
    assert torch.equal(model(**inputs, labels=image_labels).loss, full.loss)
    learnt = int((labels != -100).sum())
    assert_close_to_scale(model(**inputs, labels=image_labels, num_items_in_batch=learnt).loss, full.loss)
    doubled = model(**inputs, labels=labels, num_items_in_batch=2 * int((labels != -100).sum())).loss
    assert_close_to_scale(2 * doubled, full.loss)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("search", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("kind", ["qwen2", "opt"])
def test_a_row_of_a_batch_is_written_as_it_is_alone(kind, search, side, pixels):
    """Also where the image does not come first, and where there are two."""
    model = build(kind)
    rows = [[*image(), 11, 12, 13], [14, *image(2)], [15, 16, *image(), 17, 18, 19, 20]]
    pictures = [pixels[:1], pixels[1:], pixels[:1]]
    ids, mask = pad(rows, side)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, **search}
    together = model.generate(input_ids=ids, attention_mask=mask, pixel_values=torch.cat(pictures), **settings)
    count = search.get("num_return_sequences", 1)
    assert torch.equal(together[:, : ids.shape[1]], ids.repeat_interleave(count, dim=0))
    for number, (row, own) in enumerate(zip(rows, pictures, strict=True)):
        alone = model.generate(input_ids=torch.tensor([row]), pixel_values=own, **settings)
        new = together[number * count : (number + 1) * count, ids.shape[1] :]
        assert torch.equal(new, alone[:, len(row) :])


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_sequence_goes_on_from_its_cache(kind, pixels):
    """Only the first call has images, and its rows are of different lengths."""
    model = build(kind)
    ids, mask = pad([[*image(), 11, 12, 13], image(), [*image(), 14]])
    expected = model.generate(
        input_ids=ids, attention_mask=mask, pixel_values=pixels, max_new_tokens=4, min_new_tokens=4
    )
    eos = model.config.text_config.eos_token_id
    inputs = {"input_ids": ids, "pixel_values": pixels}
    cache, written = None, ids
    with torch.no_grad():
        for _ in range(4):
            output = model(**inputs, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            output.logits[..., eos] = -torch.inf  # of min_new_tokens
            cache, new = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            inputs = {"input_ids": new}
            written, mask = torch.cat([written, new], dim=1), torch.cat([mask, mask[:, -1:]], dim=1)
    assert torch.equal(written, expected)


def test_samples_are_those_of_the_prefix(model, pixels):
    settings = {"do_sample": True, "max_new_tokens": 6, "num_return_sequences": 2, "repetition_penalty": 1.2}
    torch.manual_seed(1)
    expected = model.generate(pixels, input_ids=PREFIX, **settings)
    torch.manual_seed(1)
    prompt = sequence(PREFIX, CAPTIONS[:, :0])["input_ids"]
    written = model.generate(input_ids=prompt, pixel_values=pixels, **settings)
    assert torch.equal(written[:, prompt.shape[1] :], expected)


def test_lengths_count_the_prompt_and_a_streamer_is_given_it(model, processor, pixels, capsys):
    prompt = torch.tensor([[*image(), 11, 12]])
    length = prompt.shape[1]
    own = {"input_ids": prompt, "pixel_values": pixels[:1]}
    written = model.generate(**own, max_length=length + 4, min_length=length + 4)
    assert written.shape == (1, length + 4)
    config = copy.deepcopy(model.generation_config)
    config.max_length = config.min_length = length + 4
    assert torch.equal(model.generate(**own, generation_config=config), written)
    with pytest.raises(ValueError, match=rf"max_length is {length}, but input_ids have {length} tokens already"):
        model.generate(**own, max_length=length)
    result = model.generate(**own, max_length=length + 4, return_dict_in_generate=True)
    assert torch.equal(result.sequences, model.generate(**own, max_length=length + 4))
    for skip_prompt, ids in ((True, written[0, length:]), (False, written[0, -6:])):
        streamer = TextStreamer(processor.tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        model.generate(**own, max_length=length + 4, min_length=length + 4, streamer=streamer)
        assert capsys.readouterr().out.split() == processor.decode(ids, skip_special_tokens=True).split()


def test_beams_are_returned_in_a_dictionary_after_their_prompt(model, pixels):
    ids, mask = pad([[*image(), 11, 12], image(), [*image(), 14]])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}
    settings = {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}
    result = model.generate(**inputs, **settings, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(result.sequences, model.generate(**inputs, **settings))
    assert torch.equal(result.sequences[:, : ids.shape[1]], ids.repeat_interleave(2, dim=0))
    assert result.sequences_scores.shape == (6,) and len(set(map(tuple, result.sequences.tolist()))) == 6


def test_caption_embeddings_stand_in_for_images(model, pixels):
    prompt = torch.tensor([image()] * 3)
    embeds = model.model(pixels).caption_embeds
    expected = model.generate(inputs=prompt, pixel_values=pixels, max_new_tokens=4)
    assert torch.equal(model.generate(input_ids=prompt, caption_embeds=embeds, max_new_tokens=4), expected)
    assert torch.equal(model(input_ids=prompt, pixel_values=pixels).caption_embeds, embeds)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_language_model_without_the_token_gets_one_embedding_and_stays_tied(kind, pixels, tmp_path):
    model = build(kind)
    expected = model.generate(pixels, max_new_tokens=5, min_new_tokens=5)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rows = len(model.get_input_embeddings().weight)
    model.set_image_token(5)
    assert len(model.get_input_embeddings().weight) == rows and model.config.image_token_id == 5
    model.set_image_token(rows)
    model.save_pretrained(tmp_path)
    for own in (model, VLVForConditionalGeneration.from_pretrained(tmp_path).eval()):
        assert own.config.image_token_id == rows == own.config.text_config.vocab_size - 1
        weights = own.get_input_embeddings().weight, own.get_output_embeddings().weight
        assert len(weights[0]) == len(weights[1]) == rows + 1 and (weights[0] is weights[1]) == tied
        assert torch.equal(own.generate(pixels, max_new_tokens=5, min_new_tokens=5), expected)
        assert own.generation_config.suppress_tokens == [rows]


def test_the_image_token_is_never_written_whether_or_not_it_has_an_embedding(pixels):
    model = build("qwen2")
    written = model.generate(pixels[:1], max_new_tokens=1, min_new_tokens=1)
    token = int(written[0, -1])
    model.generation_config.suppress_tokens = [7]
    for _ in range(2):
        model.set_image_token(token)
        assert model.generation_config.suppress_tokens == [7, token]
    assert token not in model.generate(pixels[:1], max_new_tokens=1, min_new_tokens=1)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.tensor([image()])}, "tokens: 8, features: 3 images x 8"),
        ({"input_ids": torch.tensor([[*image(3), 1]]), "labels": CAPTIONS}, r"labels are \(3, 4\), but input_ids are"),
        (
            {"input_ids": torch.tensor([[*image(3)]]), "attention_mask": torch.ones(1, 4)},
            r"attention_mask is \(1, 4\)",
        ),
        ({"input_ids": torch.tensor([[*image(3)]]), "inputs_embeds": torch.ones(1, 24, 32)}, "as input_ids, not as"),
        ({"input_ids": torch.tensor([[*image(3), 60]])}, "input_ids hold the id 60, but .* embeddings of 55 tokens"),
        ({"input_ids": torch.tensor([[60], [1], [1]])}, r"call model.set_image_token\(processor.image_token_id\)"),
    ],
)
def test_a_sequence_that_does_not_fit_its_images_is_an_error(model, pixels, inputs, message):
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(pixel_values=pixels, **inputs)


def test_a_first_call_without_images_is_an_error(model):
    with pytest.raises(ValueError, match="their images are missing; pass pixel_values"):
        model(input_ids=torch.tensor([image()]))
    with pytest.raises(ValueError, match="an image to caption is missing, and past_key_values are empty"):
        model(input_ids=torch.tensor([[5]]), past_key_values=DynamicCache())


def test_arguments_given_under_two_names_are_an_error(model, pixels):
    ids = torch.tensor([image()])
    with pytest.raises(ValueError, match="inputs of 2 dimensions are another name of input_ids"):
        model.generate(inputs=ids, input_ids=ids, pixel_values=pixels)
    with pytest.raises(ValueError, match="inputs of 4 dimensions are another name of pixel_values"):
        model.generate(pixels, inputs=pixels)


def test_a_sequence_longer_than_the_positions_is_an_error(model, pixels):
    """One that fills them has logits, and leaves no position to write at."""
    positions = model.config.text_config.max_position_embeddings
    full = torch.tensor([[*image(), *[11] * (positions - QUERIES)]])
    inputs = {"pixel_values": pixels[:1], "attention_mask": None}
    with torch.no_grad():
        assert model(input_ids=full, **inputs).logits.shape[1] == positions
        longer = torch.cat([full, full[:, -1:]], dim=1)
        message = f"input_ids have {positions + 1} tokens, but the language model has {positions} positions"
        with pytest.raises(ValueError, match=message):
            model(input_ids=longer, **inputs)
        padded = torch.ones_like(longer)
        padded[0, -1] = 0
        assert model(input_ids=longer, pixel_values=pixels[:1], attention_mask=padded).logits is not None
    with pytest.raises(ValueError, match=f"have {positions} tokens, .* leaves none for the caption"):
        model.generate(input_ids=full, pixel_values=pixels[:1], max_new_tokens=1)


def test_ids_may_lie_on_another_device_than_the_embeddings(pixels):
    """A hook of the embeddings moves ids, as with accelerate's `device_map`."""
    model = build("qwen2")
    captions = model.model(pixels).caption_embeds.to("meta")
    model.to("meta").get_input_embeddings().register_forward_pre_hook(lambda _, inputs: (inputs[0].to("meta"),))
    ids = torch.tensor([image()] * 3)
    embeds, _ = model.get_prompt_embeds(ids, caption_embeds=captions)
    inputs = mask_and_positions(embeds, torch.ones_like(ids), None, 0)
    assert embeds.is_meta and inputs["attention_mask"].is_meta and inputs["position_ids"].is_meta


@pytest.mark.slow
def test_both_forms_with_labels_compile_as_one_graph(model, pixels):
    """And the form that a compiled call cannot recognise fails an assertion."""
    whole = sequence(PREFIX, CAPTIONS)
    with torch.no_grad():
        embeds = model.model(pixels).caption_embeds
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        for inputs in ({"input_ids": PREFIX, "labels": CAPTIONS}, whole):
            got, expected = (call(caption_embeds=embeds, **inputs).loss for call in (compiled, model))
            assert torch.equal(got, expected)
        with pytest.raises(RuntimeError, match="compiled: labels as long as input_ids, but not one image token"):
            compiled(caption_embeds=embeds, **{**whole, "input_ids": whole["input_ids"].clamp(max=5)})
    with pytest.raises(RuntimeError, match="compiled: image tokens need labels as long as input_ids"):
        torch.compile(model._is_sequence, fullgraph=True, backend="eager")(whole["input_ids"], None, None)


def test_token_types_of_a_processor_change_nothing(model, pixels):
    ids = torch.tensor([image()] * 3)
    inputs = {"input_ids": ids, "pixel_values": pixels}
    types = {"mm_token_type_ids": torch.ones_like(ids)}
    with torch.no_grad():
        assert torch.equal(model(**inputs, **types).logits, model(**inputs).logits)
        assert model.base_model(**inputs, **types).last_hidden_state is not None
    written = model.generate(**inputs, max_new_tokens=2)
    assert torch.equal(model.generate(**inputs, **types, max_new_tokens=2), written)
