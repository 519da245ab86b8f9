"""The captioning pipeline gives the same captions for single images, lists, streams and batches."""

import datasets
import pytest
import torch
from datasets import Dataset, Features
from transformers import GenerationConfig, pipeline
from transformers.pipelines.pt_utils import KeyDataset

from vlv.pipelines import VLVCaptioningPipeline, generate_captions

from ..hub.machine import Machine
from ..hub.server import Hub, nowhere, serve


@pytest.fixture
def pipe(captioner, processor):
    captioner.generation_config.max_new_tokens = 5
    return VLVCaptioningPipeline(model=captioner, processor=processor)


def captions(rows: list[list[dict[str, str]]]) -> list[list[str]]:
    return [[entry["generated_text"] for entry in row] for row in rows]


def test_one_image_a_list_a_generator_and_a_dataset_agree(pipe, images):
    one_by_one = [pipe(image) for image in images]
    assert len({row[0]["generated_text"] for row in one_by_one}) > 4  # or nothing below could fail
    assert all(list(row[0]) == ["generated_text"] for row in one_by_one)
    assert pipe(images, batch_size=3) == one_by_one
    assert list(pipe(image for image in images)) == one_by_one
    data = KeyDataset([{"image": image} for image in images], "image")
    assert list(pipe(data, batch_size=2)) == one_by_one


def test_captions_are_those_of_generate(pipe, captioner, processor, images):
    ids = captioner.generate(processor(images=images[:2]).pixel_values)
    expected = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    assert captions(pipe(images[:2])) == [[text] for text in expected]


def test_paths_bytes_and_caption_embeds_are_images_too(pipe, captioner, processor, images, tmp_path):
    images[0].save(tmp_path / "a.png")
    expected = pipe(images[0])
    assert pipe(str(tmp_path / "a.png")) == expected
    assert pipe((tmp_path / "a.png").read_bytes()) == expected
    with torch.no_grad():
        z = captioner.model.get_caption_embeds(processor(images=images[0]).pixel_values)
    assert pipe({"caption_embeds": z[0]}) == expected


def test_each_image_has_num_return_sequences_captions_of_beam_search(pipe, captioner, processor, images):
    settings = {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 5}
    rows = pipe(images[:2], batch_size=2, max_new_tokens=5, generate_kwargs=settings)
    pixel_values = processor(images=images[:2]).pixel_values
    expected = generate_captions(captioner, processor, pixel_values=pixel_values, max_new_tokens=5, **settings)
    assert captions(rows) == [expected[:2], expected[2:]]
    assert len(set(expected)) == 4  # or their order could be wrong


def test_a_caption_continues_the_text(pipe, captioner, processor, images):
    inputs = processor(images=images[0], text="a large")
    ids = captioner.generate(**inputs, max_new_tokens=3)
    expected = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    assert pipe(images[0], text="a large", max_new_tokens=3) == [{"generated_text": expected}]
    assert pipe(images[0], max_new_tokens=3) != [{"generated_text": expected}]


def test_errors_name_the_cause(pipe, images):
    with pytest.raises(ValueError, match="image in a format"):
        pipe(b"not an image")
    with pytest.raises(ValueError, match="one input holds 2 images"):
        pipe([images[:2], images[0]])
    assisted = VLVCaptioningPipeline(model=pipe.model, processor=pipe.processor, assistant_model=pipe.model)
    with pytest.raises(ValueError, match="assistant"):
        assisted(images[0])
    with pytest.raises(ValueError, match=r"caption_embeds of one image must be \(8, 32\), got \(1, 3, 32\)"):
        pipe({"caption_embeds": torch.zeros(3, 32)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_token": 3}, "unknown argument 'max_new_token'; did you mean 'max_new_tokens'"),
        ({"generate_kwarg": {}}, "did you mean 'generate_kwargs'"),
        ({"batchsize": 2}, "did you mean 'batch_size'"),
        ({"xyz": 1}, "unknown argument 'xyz'; arguments of generate"),
    ],
)
def test_unknown_arguments_are_refused_at_the_call_and_by_the_constructor(
    pipe, captioner, processor, images, arguments, message
):
    with pytest.raises(TypeError, match=message):
        pipe(images[0], **arguments)
    with pytest.raises(TypeError, match=message):
        VLVCaptioningPipeline(model=captioner, processor=processor, **arguments)
    with pytest.raises(TypeError, match="positional"):
        pipe(images[0], "a large")


def test_the_constructor_names_its_own_arguments_too(captioner, processor):
    with pytest.raises(TypeError, match="did you mean 'device'"):
        VLVCaptioningPipeline(model=captioner, processor=processor, devise="cpu")


def test_arguments_given_twice_are_refused(pipe, captioner, processor, images):
    twice = {"max_new_tokens": 2, "generate_kwargs": {"max_new_tokens": 3}}
    with pytest.raises(ValueError, match="max_new_tokens is given twice"):
        pipe(images[0], **twice)
    with pytest.raises(ValueError, match="max_new_tokens is given twice"):
        VLVCaptioningPipeline(model=captioner, processor=processor, **twice)


def test_a_captioner_and_its_processor_are_needed(captioner, encoder, processor):
    with pytest.raises(ValueError, match=r"VLVForConditionalGeneration as model .* got VLVModel"):
        VLVCaptioningPipeline(model=encoder, processor=processor)
    with pytest.raises(ValueError, match="VLVProcessor as processor, got VLVForConditionalGeneration and NoneType"):
        VLVCaptioningPipeline(model=captioner)


GENERATION = {  # the same settings in each form in which they are given
    "arguments": {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2},
    "generate_kwargs": {"generate_kwargs": {"max_new_tokens": 4, "num_beams": 3, "num_return_sequences": 2}},
    "both": {"max_new_tokens": 4, "generate_kwargs": {"num_beams": 3, "num_return_sequences": 2}},
    "generation_config": {
        "generation_config": GenerationConfig(max_new_tokens=4, num_beams=3, num_return_sequences=2)
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("form", GENERATION)
def test_generation_settings_are_honoured_at_the_call_and_by_the_constructor(pipe, captioner, processor, images, form):
    pixel_values = processor(images=images[:2]).pixel_values
    settings = GENERATION["arguments"]
    flat = generate_captions(captioner, processor, pixel_values=pixel_values, **settings)
    expected = [flat[:2], flat[2:]]
    assert expected[0] != expected[1] and expected != captions(pipe(images[:2]))
    assert captions(pipe(images[:2], **GENERATION[form])) == expected
    constructed = VLVCaptioningPipeline(model=captioner, processor=processor, **GENERATION[form])
    assert captions(constructed(images[:2], batch_size=2)) == expected
    assert captioner.generation_config.num_beams in (None, 1)  # the model's own settings stay as they are


def test_settings_of_the_call_come_before_the_constructor_s(captioner, processor, images):
    def lengths(constructor: dict, call: dict) -> int:
        pipe = VLVCaptioningPipeline(model=captioner, processor=processor, **constructor)
        return len(pipe(images[0], **call))

    captioner.generation_config.max_new_tokens = 3
    beams = {"num_beams": 3, "num_return_sequences": 3}
    two = {"num_return_sequences": 2}
    assert lengths(beams, {}) == lengths({"generate_kwargs": beams}, {}) == 3
    for constructor in (beams, {"generate_kwargs": beams}, {"generation_config": GenerationConfig(**beams)}):
        assert lengths(constructor, two) == lengths(constructor, {"generate_kwargs": two}) == 2
        config = GenerationConfig(num_beams=2)  # replaces all of the constructor's
        assert lengths(constructor, {"generation_config": config}) == 1


def test_text_and_trim_are_honoured_by_the_constructor(pipe, captioner, processor, images):
    constructed = VLVCaptioningPipeline(model=captioner, processor=processor, text="a large", trim=True)
    assert constructed(images[0]) == pipe(images[0], text="a large", trim=True)
    assert constructed(images[0], text="a small", trim=False) == pipe(images[0], text="a small")
    model_outputs = {"generated_ids": torch.tensor([processor.tokenizer("a. a. a").input_ids])}
    assert constructed.postprocess(model_outputs, **constructed._postprocess_params) == [{"generated_text": "a."}]


def test_tuples_and_columns_of_data_sets_are_lists(pipe, images):
    expected = pipe(images[:3])
    assert pipe(tuple(images[:3])) == expected
    column = Dataset.from_dict({"image": images[:3]}, Features({"image": datasets.Image()}))["image"]
    assert pipe(column, batch_size=2) == expected
    assert pipe([]) == pipe(()) == []


@pytest.mark.slow
def test_images_are_read_by_workers(pipe, images, tmp_path):
    paths = [str(tmp_path / f"{number}.png") for number in range(4)]
    for image, path in zip(images, paths, strict=False):
        image.save(path)
    expected = pipe(images[:4])
    assert pipe(paths, num_workers=2, batch_size=2) == expected
    assert list(pipe(KeyDataset([{"image": path} for path in paths], "image"), num_workers=2)) == expected
    assert list(pipe((path for path in paths), num_workers=1, batch_size=3)) == expected


# --- saving ---------------------------------------------------------------------------------------------------------

WITHOUT_PACKAGE = """
import json, sys
from transformers import pipeline
source, target, image = sys.argv[1:]
pipe = pipeline("image-to-text", model=source, trust_remote_code=True, local_files_only=True)
pipe.save_pretrained(target)
print(json.dumps(pipe(image)))
"""
CODE = {"modeling_vlv.py", "modeling_vlv_captioner.py", "processing_vlv.py", "pipeline_vlv_captioning.py"}


@pytest.mark.slow
def test_what_is_saved_opens_with_its_own_code(pipe, images, tmp_path):
    pipe.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= CODE | {"processor_config.json", "chat_template.jinja"}
    loaded = pipeline("image-to-text", model=str(tmp_path), trust_remote_code=True)
    assert type(loaded).__module__.startswith("transformers_modules")
    assert loaded(images[:3]) == pipe(images[:3])
    own = pipeline("image-to-text", model=str(tmp_path), pipeline_class=VLVCaptioningPipeline)
    assert type(own) is VLVCaptioningPipeline and own(images[:3]) == pipe(images[:3])
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline("image-to-text", model=str(tmp_path))


@pytest.mark.slow
def test_what_is_saved_opens_without_the_package_and_so_does_what_that_saves(pipe, images, tmp_path):
    images[0].save(tmp_path / "image.png")
    pipe.save_pretrained(tmp_path / "1", max_shard_size="20KB")
    assert len(list((tmp_path / "1").glob("*.safetensors"))) > 1
    machine = Machine(tmp_path / "machine", nowhere())
    for source, target in (("1", "2"), ("2", "3")):
        arguments = (tmp_path / source, tmp_path / target, tmp_path / "image.png")
        assert machine.without_package(WITHOUT_PACKAGE, *arguments) == pipe(images[0])
        assert {path.name for path in (tmp_path / target).iterdir()} >= CODE
    own = pipeline("image-to-text", model=str(tmp_path / "3"), pipeline_class=VLVCaptioningPipeline)
    assert own(images[0]) == pipe(images[0])


@pytest.mark.slow
def test_save_pretrained_and_push_to_hub_upload_all_that_loading_needs(pipe, images, tmp_path):
    script = """
import sys
from transformers import pipeline
from vlv.pipelines import VLVCaptioningPipeline
pipe = pipeline("image-to-text", model=sys.argv[1], pipeline_class=VLVCaptioningPipeline)
pipe.save_pretrained("saved", push_to_hub=True, repo_id="org/saved", private=True, token="hf_org")
pipe.push_to_hub("org/pushed", token="hf_org")
"""
    pipe.save_pretrained(tmp_path / "saved")
    images[0].save(tmp_path / "image.png")
    server = Hub()
    with serve(server) as endpoint:
        machine = Machine(tmp_path / "machine", endpoint)
        done = machine.python(script, tmp_path / "saved")
        assert done.returncode == 0, done.stderr[-3000:]
        for name in ("saved", "pushed"):
            arguments = (f"org/{name}", tmp_path / name, tmp_path / "image.png")
            online = WITHOUT_PACKAGE.replace(", local_files_only=True", "")
            assert machine.without_package(online, *arguments, HF_TOKEN="hf_org") == pipe(images[0])
            assert server.repos[f"org/{name}"].private == (name == "saved")
    assert (machine.folder / "saved").is_dir()


def test_the_built_in_task_works_with_text_and_with_chat(captioner, processor, images):
    built_in = pipeline("image-text-to-text", model=captioner, processor=processor)
    plain = built_in(images=images[0], text="", max_new_tokens=4)[0]["generated_text"]
    chat = [{"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": ""}]}]
    answered = built_in(chat, max_new_tokens=4)[0]["generated_text"][-1]["content"]
    own = VLVCaptioningPipeline(model=captioner, processor=processor)(images[0], max_new_tokens=4)
    assert plain.strip() == answered.strip() == own[0]["generated_text"]
