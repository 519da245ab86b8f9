"""Trainers on real data: streams that resume, too many unreadable images, flips, and the census that opens a run."""

import io
import json
import logging
import shutil
from itertools import islice

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from vlv import VLVForConditionalGeneration, VLVImageProcessor
from vlv.train import Stage1Collator, Stage2Config, Stage2Trainer, census, freeze_for_stage2, load_pairs
from vlv.train.census import caption_statistics
from vlv.train.data import StreamingDataset
from vlv.train.data.collators import _crop_square


def trainer_of(output_dir, captioner, processor, dataset, **settings) -> Stage2Trainer:
    model = VLVForConditionalGeneration(captioner.config)
    model.load_state_dict(captioner.state_dict())
    config = Stage2Config(
        output_dir=str(output_dir),
        learning_rate=1e-2,
        logging_steps=1,
        per_device_train_batch_size=2,
        use_cpu=True,
        disable_tqdm=True,
        validation_steps=0,
        trainable="projector",
        **{"max_steps": 1, "dataloader_num_workers": 0, **settings},
    )
    freeze_for_stage2(model, config.trainable)
    return Stage2Trainer(model, config, dataset, processor)


def losses(trainer: Stage2Trainer) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("streaming", [True, False])
def test_a_resumed_run_on_shards_or_a_stream_has_the_losses_of_an_unbroken_one(
    tmp_path, captioner, processor, images, streaming
):
    captions = ["a small dog", "a large apple at the top left", "a cat", "a"]
    folder = tmp_path / "data"
    images[5].save(tmp_path / "5.png")
    (tmp_path / "list.jsonl").write_text('{"image": "5.png", "caption": ["a dog", "a large cat"]}')
    sources = [str(folder), f"{tmp_path}/list.jsonl@0.5"]
    for name in ("a", "b"):
        rows = {
            "image": [{"path": None, "bytes": _png(images[n])} for n in range(4)],
            "caption": [[f"{text} {name}", "a", name][: 1 + n % 3] for n, text in enumerate(captions)],
        }
        features = datasets.Features({"image": datasets.Image(), "caption": datasets.List(datasets.Value("string"))})
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(rows, features=features).to_parquet(folder / f"{name}.parquet", batch_size=2)

    def run(name: str, max_steps: int) -> Stage2Trainer:
        dataset = load_pairs(sources, streaming=streaming, seed=42, caption_lines="all")
        assert isinstance(dataset, StreamingDataset) == streaming
        settings = {"max_steps": max_steps, "save_steps": 4, "lr_scheduler_type": "constant"}
        trainer = trainer_of(tmp_path / name, captioner, processor, dataset, **settings)
        assert trainer.train_to_end()
        return trainer

    unbroken = losses(run("unbroken", 11))  # the last steps are of the second pass, over 14 samples of the folder
    run("broken", 4)
    assert losses(run("broken", 11)) == unbroken and len(set(unbroken)) == 11


def _png(image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.slow
def test_a_run_stops_when_too_many_images_cannot_be_read(tmp_path, captioner, processor, images):
    pairs = [{"image": images[0] if n % 2 else b"broken", "caption": "a dog"} for n in range(30)]
    settings = {"train_sampling_strategy": "sequential", "max_steps": 14}
    with pytest.raises(ValueError, match=r"11 of 22 images or captions of this epoch cannot be read"):
        trainer_of(tmp_path / "a", captioner, processor, pairs, **settings).train()
    trainer_of(tmp_path / "b", captioner, processor, pairs, max_bad_share=0.02, **settings).train()
    with pytest.raises(ValueError, match=r"1 of 2 images"):
        trainer_of(tmp_path / "c", captioner, processor, pairs, max_bad_share=0.0, **settings).train()


def test_encoder_and_diffusion_model_see_the_same_flip_and_crop(images):
    processor = VLVImageProcessor(
        size={"height": 16, "width": 16}, pre_crop_size=16, image_mean=[0.0] * 3, image_std=[1.0] * 3
    )
    collator = Stage1Collator(processor, diffusion_image_size=16)

    def pixels(augmentation: dict | None) -> torch.Tensor:
        batch = collator([{"image": images[1], "augmentation": augmentation}])  # 92 x 44
        assert torch.allclose(batch["pixel_values"] * 255, batch["diffusion_pixels"].float(), atol=1e-3)
        return batch["diffusion_pixels"][0].int()

    middle, left, right = pixels(None), pixels({"crop": (0.0, 0.5)}), pixels({"crop": (1.0, 0.5)})
    assert torch.equal(pixels({"flip": True}), middle.flip(-1)) and torch.equal(pixels({"flip": False}), middle)
    square = images[1].crop((0, 0, 44, 44)).resize((16, 16), 2)
    inside = left.permute(1, 2, 0).numpy()[:, :-1]  # the last column has a neighbour in the complete image
    assert np.array_equal(inside, np.asarray(square)[:, :-1]) and not torch.equal(left, right)
    ramp = Image.fromarray(np.tile(np.arange(92, dtype=np.uint8)[None, :, None], (44, 1, 3)))
    centre = _crop_square(ramp, 16, 0.5, 0.5)
    difference = np.abs(np.asarray(centre, int) - np.asarray(processor.load(ramp), int))
    assert difference.max() < 92 / 33  # the crop in the middle, to within one of its pixels


def test_captions_are_measured_as_the_trainer_cuts_them(tmp_path, processor, images, monkeypatch):
    texts = ["a small dog", "a cat\na dog", "", "a large apple at the top left", "a zyzzyva"]
    for number, text in enumerate(texts):
        images[number].save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(text)
    found = caption_statistics(load_pairs(str(tmp_path)), processor.tokenizer, max_tokens=5, append_eos=True)
    assert (found["images_with_captions"], found["images_left_out"], found["images_with_several_captions"]) == (
        4,
        1,
        1,
    )
    ids = processor.tokenizer(["a small dog", "a cat", texts[3], texts[4]], add_special_tokens=False).input_ids
    lengths = [len(row) + 1 for row in ids]
    assert found["tokens_median"] == np.median(lengths) and found["tokens_greatest"] == max(lengths) == 8
    assert found["cut_at_max_caption_tokens"] == 1 and found["captions_measured"] == 4
    unknown = sum(row.count(processor.tokenizer.unk_token_id) for row in ids)
    assert found["share_of_unknown_tokens"] == unknown / sum(map(len, ids)) > 0
    assert found["examples"] == ["a small dog", "a cat", "a zyzzyva"]

    monkeypatch.setattr(census, "SAMPLE", 2)
    monkeypatch.setattr(census, "READ_TOGETHER", 2)
    sampled = caption_statistics(load_pairs(str(tmp_path)), processor.tokenizer, max_tokens=5, append_eos=True)
    assert sampled["captions_measured"] == 2 and sampled["images_with_captions"] == 4


def test_the_census_of_a_stream_is_of_its_first_images(tmp_path, captioner, processor, images, monkeypatch):
    monkeypatch.setattr(census, "STREAM_SAMPLE", 3)
    texts = ["a small dog", ["a cat", "a zyzzyva"], "", "not counted"]
    table = datasets.Dataset.from_dict(
        {"image": ["0.png"] * 4, "text": [[t] if isinstance(t, str) else t for t in texts]}
    )
    images[0].save(tmp_path / "0.png")
    (tmp_path / "list.jsonl").write_text('{"image": "0.png", "caption": "a large dog"}')
    (tmp_path / "data").mkdir()
    table.to_parquet(tmp_path / "data" / "a.parquet")
    sources = [f"{tmp_path}/data@3", f"{tmp_path}/list.jsonl"]
    dataset = load_pairs(sources, streaming=True, caption_lines="all", shuffle=False)
    before = [item["caption"] for item in islice(dataset, 6)]
    found = census.take_census(trainer_of(tmp_path / "run", captioner, processor, dataset))
    assert [item["caption"] for item in islice(dataset, 6)] == before
    stream, listed = found["sources"]
    assert stream["share_of_the_samples"] == 0.75 and listed["samples_in_a_pass"] == 1
    captions = stream["captions"]
    assert captions["of_the_first"] == 3 and captions["examples"] == ["a small dog", "a cat", "a zyzzyva"]
    assert (captions["images_with_captions"], captions["images_left_out"], captions["most_captions_of_an_image"]) == (
        2,
        1,
        2,
    )
    assert captions["share_of_unknown_tokens"] > 0 and "epochs" not in found
    lines = census.format_census(found).splitlines()
    assert lines[:2] == ["images: unknown: a stream", f"{tmp_path}/data: 75.0% of all samples"]
    assert lines[2].startswith("captions of the first 3 images of the stream: of 2 images; 1 empty or not text")
    assert f"{tmp_path}/list.jsonl: 25.0% of all samples; 1 in a pass" in lines
    monkeypatch.setattr(census, "STREAM_SAMPLE", 0)
    with pytest.raises(ValueError, match=r"none of the first 0 captions of .*data has words; is this the right data"):
        census.take_census(trainer_of(tmp_path / "run", captioner, processor, dataset))


def test_a_run_of_very_many_passes_over_its_images_is_told_how_to_make_fewer(
    tmp_path, captioner, processor, image_folder
):
    for steps, noted in ((8000, False), (8800, True)):
        trainer = trainer_of(tmp_path, captioner, processor, load_pairs(str(image_folder)), max_steps=steps)
        text = census.format_census(census.take_census(trainer))
        assert ("note: the run passes over its images 1,100 times; --max_steps or --num_train_epochs" in text) == noted


@pytest.mark.parametrize("workers", [0, 2])
def test_an_unreadable_image_is_named_once_and_counted_in_each_epoch(
    workers, tmp_path, captioner, processor, image_folder
):
    folder = shutil.copytree(image_folder, tmp_path / "images")
    (folder / "a" / "1.png").write_bytes(b"no image")
    handler = logging.FileHandler(tmp_path / "log")  # which the workers write to, too
    logger = logging.getLogger("vlv.train.data.collators")
    logger.addHandler(handler)
    try:
        settings = {"max_steps": 24, "dataloader_num_workers": workers}  # three epochs
        trainer = trainer_of(tmp_path / "run", captioner, processor, load_pairs(str(folder)), **settings)
        trainer.train()
    finally:
        logger.removeHandler(handler)
        handler.close()
    (line,) = (tmp_path / "log").read_text().splitlines()
    assert "skipped an image" in line and "1.png" in line
    assert [row["images_skipped"] for row in trainer.state.log_history if "images_skipped" in row][-1] == 3


@pytest.mark.slow
def test_a_census_opens_a_run_and_the_time_is_said_after_some_steps(
    tmp_path, captioner, processor, image_folder, capsys, monkeypatch
):
    monkeypatch.setattr(census, "WARM_UP_STEPS", 1)
    monkeypatch.setattr(census, "TIMED_STEPS", 1)
    trainer = trainer_of(tmp_path, captioner, processor, load_pairs(str(image_folder)), max_steps=3, save_steps=100)
    trainer.train_to_end()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "images: 16 in an epoch"
    assert any(line.startswith("tokens of 16 captions: median") for line in lines)
    counted = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert any(
        line.startswith(f"trainable parameters: {counted:,} (language_projection {counted:,})") for line in lines
    )
    assert "steps: 3 of 2 images, 0.375 epochs" in lines
    assert "expected time: unknown before the first 2 steps" in lines
    content = json.loads((tmp_path / "census.json").read_text())
    assert content["trainable_parameters"]["all"] == counted and content["seconds_per_step"] > 0
    assert sum(line.startswith("expected time: 0 s (") for line in lines) == 1


@pytest.mark.parametrize(
    ("seconds", "text"), [(5.2, "5 s"), (125, "2 min 5 s"), (7260, "2 h 1 min"), (2e5, "2 d 7 h")]
)
def test_times_are_said_in_two_units(seconds, text):
    assert census.format_time(seconds) == text
