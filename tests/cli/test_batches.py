"""Inputs are read one by one and gathered into batches."""

from pathlib import Path

import pytest
import torch

from vlv.captioning.batches import Batch, join_rows, read_batches
from vlv.captioning.captioner import Captioner, CaptionSettings
from vlv.captioning.encoding import in_few_sizes
from vlv.captioning.inputs import Input, collect_images
from vlv.captioning.output import Summary
from vlv.captioning.sharded import ShardCaptioner, ShardJob


def test_pixel_values_are_those_of_the_files(mixed_folder, image_processor):
    inputs = collect_images([str(mixed_folder)])
    summary = Summary(len(inputs))
    batches = list(read_batches(inputs, image_processor, 2, summary))
    paths = {item.name: item.path for item in inputs if item.name not in summary.failed}
    assert [batch.names for batch in batches] == [list(paths)[:2], list(paths)[2:4], list(paths)[4:]]
    pixel_values = torch.cat([batch.tensors["pixel_values"] for batch in batches])
    assert torch.equal(pixel_values, image_processor(list(paths.values()), return_tensors="pt").pixel_values)


def test_originals_are_square_images_of_the_size_asked_for(mixed_folder, image_processor):
    inputs = [Input("sub/good.png", mixed_folder / "sub" / "good.png")]  # 1 x 3000 pixels
    (batch,) = read_batches(inputs, image_processor, 8, Summary(1), original_size=32)
    assert [original.size for original in batch.originals] == [(32, 32)]
    (batch,) = read_batches(inputs, image_processor, 8, Summary(1))
    assert batch.originals == [None]


def test_embeddings_of_different_lengths_are_not_mixed(image_processor):
    inputs = [
        Input(f"{n}", Path("z.safetensors"), torch.full((length, 4), float(n)))
        for n, length in enumerate((3, 3, 2, 3))
    ]
    batches = list(read_batches(inputs, image_processor, 8, Summary(4)))
    assert [batch.names for batch in batches] == [["0", "1"], ["2"], ["3"]]
    assert [tuple(batch.tensors["caption_embeds"].shape) for batch in batches] == [(2, 3, 4), (1, 2, 4), (1, 3, 4)]


@pytest.mark.parametrize(("number", "sizes"), [(8, [8]), (7, [4, 2, 1]), (6, [4, 2]), (1, [1])])
def test_the_last_batch_of_a_shard_is_of_few_sizes(number, sizes):
    """In the order of the inputs."""
    rows = [Batch([Input(str(n), Path())], {"pixel_values": torch.full((1, 2), n)}, [None]) for n in range(number)]
    (whole,) = join_rows(rows, 8)
    parts = list(in_few_sizes([whole], 8))
    assert [len(part.inputs) for part in parts] == sizes
    assert [name for part in parts for name in part.names] == whole.names
    assert torch.cat([part.tensors["pixel_values"] for part in parts]).equal(whole.tensors["pixel_values"])


def test_a_shard_on_a_cpu_passes_batches_of_few_sizes(captioner, processor, image_folder, monkeypatch):
    """Both to the encoder and to the language model."""
    job = ShardJob("unused", "float32", "cpu", CaptionSettings(max_new_tokens=2), batch_size=4, encoder_batch_size=8)
    (path, *_), sizes = sorted(image_folder.rglob("*.png")), []
    encode, generate, encoder = captioner.model.get_caption_embeds, captioner.generate, captioner.model
    monkeypatch.setattr(encoder, "get_caption_embeds", lambda pixels: sizes.append(len(pixels)) or encode(pixels))
    monkeypatch.setattr(
        captioner, "generate", lambda **inputs: sizes.append(-len(inputs["caption_embeds"])) or generate(**inputs)
    )
    shard = ShardCaptioner(job, Captioner(captioner, processor, job.settings))
    inputs = [Input(str(number), path) for number in range(7)]
    assert sum(map(len, shard.caption_inputs(inputs, Summary(7)))) == 7
    assert sizes == [4, 2, 1, -4, -2, -1]
