"""Instructions in a column of the training data: every source has them, the model reads them before the caption."""

import csv
import io
import json
import re
import tarfile

import datasets
import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

from vlv import VLVConfig, hub
from vlv.train import Stage2Collator, Stage2Config, Stage2Trainer, freeze_for_stage2, load_pairs, stage2
from vlv.train.census import format_census, sample_prompts, take_census
from vlv.train.instructions import MOST_RECORDED, count_instructions, record_instructions

from .data_files import encoded

CAPTIONS = ["a dog", "a cat", "an apple"]
PROMPTS = ["on the right", "", None]


def table(column="prompt", images=True) -> list[dict]:
    """Three rows: one with an instruction, one with an empty one and one without."""
    image = "file_name" if images else "image"
    values = [f"{n}.png" if images else {"bytes": encoded(n), "path": None} for n in range(3)]
    rows = zip(values, CAPTIONS, PROMPTS, strict=True)
    return [{image: value, "caption": caption, column: prompt} for value, caption, prompt in rows]


def write_jsonl(folder, column):
    rows = [{name: value for name, value in row.items() if value is not None} for row in table(column)]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return "list.jsonl"


def write_csv(folder, column):
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["file_name", "caption", column])
        writer.writeheader()
        writer.writerows([row | {column: row[column] or ""} for row in table(column)])
    return "list.csv"


def write_parquet(folder, column):
    (folder / "tables").mkdir(exist_ok=True)
    parquet.write_table(pa.Table.from_pylist(table(column, images=False)), folder / "tables" / "0.parquet")
    return "tables"


def write_keys(folder, column):
    (folder / "000").mkdir(exist_ok=True)
    for number in range(3):
        (folder / "000" / f"{number}.png").write_bytes(encoded(number))
    rows = [{"key": str(number)} | row for number, row in enumerate(table(column))]
    parquet.write_table(pa.Table.from_pylist(rows).drop_columns(["file_name"]), folder / "000.parquet")
    return "000.parquet"


def write_tar(folder, column, with_text=False):
    """A `.json` for each sample, which holds the caption, or only the instruction beside a `.txt`."""
    (folder / "tars").mkdir(exist_ok=True)
    with tarfile.open(folder / "tars" / "0.tar", "w") as archive:
        for number, row in enumerate(table(column)):
            files = {".png": encoded(number)} | ({".txt": row["caption"].encode()} if with_text else {})
            values = {name: row[name] for name in (column, *(() if with_text else ("caption",)))}
            for suffix, data in (files | {".json": json.dumps(values).encode()}).items():
                member = tarfile.TarInfo(f"{number}{suffix}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return "tars"


def write_tar_with_text(folder, column):
    return write_tar(folder, column, with_text=True)


def write_saved(folder, column):
    datasets.Dataset.from_list(table(column, images=False)).save_to_disk(folder / "saved")
    return "saved"


WRITERS = [write_jsonl, write_csv, write_parquet, write_keys, write_tar, write_tar_with_text, write_saved]


@pytest.fixture
def folder(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    return tmp_path


def prompts(items) -> list[str]:
    return [item.get("prompt") or "" for item in items]


@pytest.mark.parametrize("write", WRITERS)
def test_every_source_has_the_instructions_of_its_rows(write, folder, caplog):
    source = str(folder / write(folder, "prompt"))
    pairs = load_pairs(source)
    assert prompts(pairs) == [pairs.prompt(i) for i in range(3)] == sample_prompts(pairs) == ["on the right", "", ""]
    assert [item["caption"] for item in pairs] == CAPTIONS
    assert "the column 'prompt' is read as instructions" in caplog.text
    without = load_pairs(source, prompt_column="")
    assert not any("prompt" in item for item in without) and sample_prompts(without) == []


@pytest.mark.parametrize("write", WRITERS)
def test_a_column_of_another_name_has_to_be_there(write, folder):
    source = str(folder / write(folder, "question"))
    assert not any("prompt" in item for item in load_pairs(source))
    assert prompts(load_pairs(source, prompt_column="question")) == ["on the right", "", ""]
    with pytest.raises(ValueError, match=r"has no 'style' for instructions; name a column by --prompt_column"):
        load_pairs(source, prompt_column="style")
    held_back = load_pairs(source, prompt_column="question", eval_share=0.4)
    assert sorted(sample_prompts(held_back) + sample_prompts(held_back.held_back)) == ["", "", "on the right"]


@pytest.mark.parametrize("write", [write_parquet, write_tar_with_text])
def test_a_stream_has_the_instructions_of_its_rows(write, folder):
    stream = load_pairs(str(folder / write(folder, "question")), streaming=True, prompt_column="question")
    items = [item for item, _ in zip(stream, range(3), strict=False)]
    assert dict(zip((item["caption"] for item in items), prompts(items), strict=True)) == dict(
        zip(CAPTIONS, ["on the right", "", ""], strict=True)
    )
    assert sample_prompts(stream)[0] == "on the right"
    with pytest.raises(ValueError, match="has no 'style' for instructions"):
        load_pairs(str(folder / write(folder, "question")), streaming=True, prompt_column="style")


def test_instructions_that_are_not_text_are_named(folder, processor):
    rows = table() + [table()[0] | {"prompt": ["as tags"]}]
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"list\.jsonl, line 4: the instruction is \['as tags'\], expected text"):
        load_pairs(str(folder / "list.jsonl"))
    parquet.write_table(pa.Table.from_pylist([row | {"prompt": 3} for row in table()]), folder / "list.parquet")
    with pytest.raises(ValueError, match=r"list\.parquet: the column 'prompt' holds int64, but instructions are text"):
        load_pairs(str(folder / "list.parquet"))
    item = {"image": str(folder / "0.png"), "caption": "a dog", "prompt": 3}
    with pytest.raises(ValueError, match=r"0\.png.*: the instruction is 3, expected text"):
        Stage2Collator(processor, 8, on_bad_image="error")([item])


def test_one_column_cannot_be_captions_and_instructions(folder):
    source = str(folder / write_jsonl(folder, "question"))
    with pytest.raises(ValueError, match="prompt_column and caption_column are both 'caption'"):
        load_pairs(source, prompt_column="caption")
    captions = load_pairs(str(folder / write_csv(folder, "prompt")), caption_column="prompt")
    assert captions[0]["caption"] == "on the right" and "prompt" not in captions[0]
    lines = [json.dumps({"image": row["file_name"], "prompt": ["one", "two"]}) for row in table()]
    (folder / "several.jsonl").write_text("\n".join(lines))
    several = load_pairs(str(folder / "several.jsonl"), caption_column="prompt")
    assert several[0]["caption"] == "one" and "prompt" not in several[0]


def test_without_instructions_data_and_batches_are_what_they_were(folder, processor):
    (folder / "list.jsonl").write_text("\n".join(map(json.dumps, table())))
    (folder / "plain.jsonl").write_text("\n".join(json.dumps(row | {"prompt": None}) for row in table()))
    pairs, plain = (load_pairs(str(folder / name)) for name in ("list.jsonl", "plain.jsonl"))
    assert plain.fingerprint() == load_pairs(str(folder / "list.jsonl"), prompt_column="").fingerprint()
    assert plain.fingerprint() != pairs.fingerprint()
    collate = Stage2Collator(processor, 8)
    assert set(collate(list(plain))) == {"pixel_values", "labels", "names", "num_skipped"}
    mixed = collate(list(pairs))
    expected = processor(text=["on the right", "", ""])
    assert torch.equal(mixed["input_ids"], expected.input_ids)
    assert torch.equal(mixed["attention_mask"], expected.attention_mask)
    assert torch.equal(mixed["labels"], collate(list(plain))["labels"])


def test_a_model_records_what_it_was_trained_with():
    config = VLVConfig()
    record_instructions(config, count_instructions(["", ""]))
    assert config.instructions is None
    record_instructions(config, count_instructions(["b", "a", "", "a"]))
    record_instructions(config, count_instructions(["c", "b"]))
    assert config.instructions == ["a", "b", "c"]
    record_instructions(config, count_instructions(map(str, range(MOST_RECORDED))))
    assert config.instructions == ["a", "b", "c"]


def test_the_census_counts_instructions(folder, captioner, processor):
    pairs = load_pairs(str(folder / write_jsonl(folder, "prompt")))
    config = Stage2Config(output_dir=str(folder / "run"), max_steps=1, use_cpu=True, validation_steps=0)
    freeze_for_stage2(captioner, "projector")
    census = take_census(Stage2Trainer(captioner, config, pairs, processor))
    counts = {"of_captions": 3, "with": 1, "different": 1, "each": {"on the right": 1}}
    assert census["captions"]["instructions"] == counts
    assert "instructions: before 1 of 3 captions, 1 different: 'on the right' 1" in format_census(census)


@pytest.mark.slow
def test_stage_2_learns_from_instructions_and_records_them(folder, stage1_checkpoint, language_model):
    settings = {
        **{"model": stage1_checkpoint, "language_model": language_model, "output_dir": folder / "run", "max_steps": 2},
        **{"pairs": folder / write_jsonl(folder, "question"), "prompt_column": "question", "validation_steps": 2},
        **{"per_device_train_batch_size": 3, "num_validation_images": 3, "use_cpu": True, "disable_tqdm": True},
        **{"eval_pairs": folder / "list.jsonl", "dataloader_num_workers": 0},
    }
    stage2.main([f"--{name}={value}" for name, value in settings.items()])
    model, _ = hub.load_captioner(folder / "run")
    assert model.config.instructions == ["on the right"]
    assert json.loads((folder / "run" / "encoder" / "config.json").read_text()).get("instructions") is None
    samples = json.loads((folder / "run" / "samples" / "step-0000002.json").read_text())
    assert [row.get("prompt") for row in samples] == ["on the right", None, None]
    assert re.search("eval_loss", (folder / "run" / "trainer_state.json").read_text())
