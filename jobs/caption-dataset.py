# /// script
# requires-python = ">=3.11,<3.14"
# dependencies = ["datasets>=4.0", "huggingface_hub>=1.3"]
#
# [tool.hf-jobs]
# secrets = ["HF_TOKEN"]
# ///
"""Captions the images of a data set of the Hub, and pushes a data set with the captions (docs/bulk.md).

vlv is in no package index: `--with` names a wheel of it, or the folder of its source.

    uv build --wheel
    hf jobs uv run --flavor l4x1 --timeout 8h -v ./dist:/vlv --with /vlv/vlv-0.2.0-py3-none-any.whl \
        jobs/caption-dataset.py org/photos org/photos-captioned --model org/vlv --dtype bfloat16 --batch-size 64
    uv run --with . jobs/caption-dataset.py org/photos org/photos-captioned --model org/vlv --max-samples 100

Each shard of rows is one commit with a parquet file, the record of the run and the card. The same command, given again
after a job has ended, goes on behind the last shard.
"""

import argparse
import json
import os
import re
import shlex
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value
from datasets import disable_progress_bars as disable_dataset_bars
from datasets.features.features import require_storage_embed
from huggingface_hub import CommitOperationAdd, DatasetCardData, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars as disable_hub_bars

try:
    from vlv import hub
except ModuleNotFoundError as error:
    if error.name != "vlv":
        raise
    sys.exit("caption-dataset: vlv is not installed; name its wheel or source folder: uv run --with FOLDER ...")
from vlv.captioning.caption_column import to_dataset, with_captions
from vlv.captioning.choices import TIME_LIMIT
from vlv.captioning.dataset_rows import DatasetArguments, rows_of_dataset
from vlv.captioning.inputs import Input
from vlv.captioning.output import Summary
from vlv.captioning.sharded import ShardCaptioner
from vlv.captioning.texts import prompt_fields
from vlv.cli.caption_job import check_prompt, prepare_job
from vlv.cli.choosing import complete_choice_arguments
from vlv.cli.main import IGNORED_WARNINGS, quieten_libraries
from vlv.cli.models import choose_device, loading
from vlv.cli.parsers.caption import add_generation_arguments, add_text_arguments
from vlv.cli.parsers.choice import add_sampling_arguments
from vlv.cli.parsers.common import add_model_arguments, positive
from vlv.cli.parsers.shards import add_speed_arguments
from vlv.errors import UserError, first_line
from vlv.files import read_json, to_json
from vlv.hub.card import is_as_pushed, stamp
from vlv.train.data.captions import IMAGE_COLUMNS, find_column
from vlv.train.data.loading import find_dataset
from vlv.train.data.tables import ColumnDataset

RECORDS = ".captioning"
"""The folder of the records in the pushed data set, one for each split. `datasets` leaves out folders with a dot."""
CARD, HUB_URL = "README.md", "https://huggingface.co"
SHARD_SIZE = 1000
MAY_DIFFER = ("shards", "complete", "command", "model")
"""In the records of a run and of one that goes on with it. The fingerprint tells models apart."""
FIRST_ROWS = 100
"""Rows that tell the columns of a stream that does not name them."""
WAITS = (0, 1, 2, 4, 8, 16)
"""Seconds before a commit is tried again behind that of another job."""
CONFLICT = 412
"""The Hub's status of a commit whose parent is no longer the last."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="caption-dataset.py",
        description="Captions the images of a data set of the Hub, and pushes a data set with its columns and the "
        "captions. The same command, given again, goes on with a run that has ended. An image that cannot be read "
        "gets no caption; it is named in the record, and the exit code is 1, or 0 where nothing was left to do. The "
        "token of the Hub is the variable HF_TOKEN, or the one of `hf auth login`.",
        allow_abbrev=False,
    )
    parser.add_argument("input_dataset", metavar="INPUT", help="data set of the Hub, such as org/name")
    parser.add_argument("output_dataset", metavar="OUTPUT", help="data set to push; created if it does not exist")
    parser.add_argument("--config", metavar="NAME", help="configuration (subset) of INPUT")
    parser.add_argument("--split", default="train", help="split to caption (default: train); OUTPUT may have several")
    parser.add_argument("--dataset-revision", metavar="REV", help="branch, tag or commit of INPUT (default: main)")
    parser.add_argument("--image-column", default="image", metavar="NAME", help="column of images (default: image)")
    parser.add_argument("--caption-column", default="caption", metavar="NAME", help="new column (default: caption)")
    parser.add_argument("--max-samples", type=positive, metavar="N", help="caption the first N rows alone")
    parser.add_argument("--shuffle", action="store_true", help="shuffle the rows by --seed (default: 0) first")
    parser.add_argument(
        "--streaming", action="store_true", help="read INPUT while captions are written; without it, it is downloaded"
    )
    parser.add_argument("--private", action="store_true", help="create OUTPUT as a private data set")
    parser.add_argument(
        "--shard-size",
        type=positive,
        default=SHARD_SIZE,
        metavar="N",
        help=f"rows of a file and a commit, which are in memory with their images (default: {SHARD_SIZE})",
    )
    add_text_arguments(parser)
    add_generation_arguments(parser)
    add_sampling_arguments(parser)
    add_speed_arguments(parser)
    add_model_arguments(parser)
    # Options of `vlv caption` that are not offered here.
    parser.set_defaults(best_by=None, confidence=False, min_score=None, num_pairs=None, embeddings=None)
    parser.set_defaults(embeddings_cache=None, url_timeout=TIME_LIMIT)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Captions a data set.

    Returns:
        The exit code: 0 if all images have captions, or nothing was left to do, 1 if some could not be read, 2 if the
        run could not go on.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = build_parser().parse_args(given)
    options.command = shlex.join(["caption-dataset.py", *given])
    quieten_libraries()
    if not sys.stderr.isatty():  # bars would fill the log of a job
        disable_dataset_bars()
        disable_hub_bars()
    try:
        with warnings.catch_warnings():
            for message in IGNORED_WARNINGS:
                warnings.filterwarnings("ignore", message=message)
            return run(options)
    except (UserError, hub.UploadError, OSError, ValueError) as error:  # of a full disk, and of data that do not fit
        print(f"caption-dataset: {error}", file=sys.stderr)
        return 2


def run(options: argparse.Namespace) -> int:
    check_options(options)
    if get_token() is None:
        raise UserError(f"no token to push {options.output_dataset}; set HF_TOKEN, or run `hf auth login`")
    info = find_input(options)
    revision = str(info.sha)
    features = read_features(options, revision)
    device = choose_device(options)
    _, recorded = prepare_job(options, options.model, device, ["config.json"])
    if not os.path.isdir(options.model):
        options.revision = recorded["fingerprint"]  # the branch may move
    output = Output(options.output_dataset, options.split, options.private, bool(info.private or info.gated))
    done = output.begin(
        {
            "dataset": options.input_dataset,
            "dataset_revision": revision,
            **{name: getattr(options, name) for name in ("config", "split", "image_column", "caption_column")},
            **{name: getattr(options, name) for name in ("max_samples", "shard_size", "shuffle_seed")},
            **recorded,
            "command": options.command,
        }
    )
    if output.is_complete:
        print(f"{options.output_dataset} has the captions of {done:,} rows; nothing is left to do", file=sys.stderr)
        return 0  # so that a launcher does not start the run again for images that cannot be read
    if done:
        print(f"{done:,} rows of {options.output_dataset} are done", file=sys.stderr)
    shards = read_shards(options, revision, features, done)
    job, _ = prepare_job(options, options.model, device)
    with loading(options.model):
        writer = ShardCaptioner(job)
    if options.prompt:
        check_prompt(options.prompt, options.model, writer.captioner.model, writer.captioner.processor)
    for shard in shards:
        caption_shard(options, writer, shard, output)
    output.finish()
    return output.exit_code


def check_options(options: argparse.Namespace) -> None:
    """Completes the options. Raises `UserError` for those that contradict each other."""
    if options.model is None:
        raise UserError("--model is missing: folder or Hub repo id of a VLV")
    if not re.fullmatch(r"\w+(\.\w+)*", options.split):
        raise UserError(f"--split {options.split} is not the name of a split; for a part of one, pass --max-samples")
    if options.output_dataset == options.input_dataset:
        raise UserError(f"OUTPUT is INPUT, {options.input_dataset}; give another name")
    if options.shuffle and options.streaming:
        raise UserError("--shuffle is of a whole data set, and --streaming reads it in order; leave one of them out")
    if prompt_fields(options.prompt):
        raise UserError("--prompt with fields such as {name} is of image files; leave the fields out")
    if options.seed is not None and options.seed < 0:
        raise UserError(f"--seed is {options.seed}; expected 0 or more")
    options.shuffle_seed = (options.seed or 0) if options.shuffle else None
    if options.shuffle and options.num_captions == 1 and options.temperature is None:
        options.seed = None  # it is not of samples
    complete_choice_arguments(options)


def find_input(options: argparse.Namespace) -> Any:
    """What the Hub says of the input, such as its commit. Raises `UserError` if there is none."""
    name, revision = options.input_dataset, options.dataset_revision
    try:
        return HfApi().dataset_info(name, revision=revision)
    except RevisionNotFoundError as error:
        raise UserError(f"{name} has no revision {revision}; give a branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"there is no data set {name} on the Hub, or this token may not read it") from error
    except (HTTPError, OSError, HFValidationError) as error:
        raise UserError(f"{name} cannot be read: {error}") from error


def open_dataset(options: argparse.Namespace, revision: str, streaming: bool) -> Any:
    """The split of the input. Raises `UserError` if it cannot be opened."""
    name = options.input_dataset
    try:
        return find_dataset(name, options.split, streaming, name=options.config, revision=revision)
    except (ValueError, OSError, HTTPError) as error:
        raise UserError(f"{name}, split {options.split}: {error}") from error


def read_features(options: argparse.Namespace, revision: str) -> Features:
    """The columns of the input. Raises `UserError` for columns that cannot be captioned, replaced or pushed."""
    name, stream = options.input_dataset, open_dataset(options, revision, streaming=True)
    try:
        features = stream.features or Dataset.from_list(list(stream.take(FIRST_ROWS))).features
        find_column(list(features), options.image_column, IMAGE_COLUMNS, name)
    except (ValueError, OSError, HTTPError) as error:
        raise UserError(str(error)) from error
    # Images alone are read, and are pushed with their content; others would be pushed as paths of this machine.
    if files := [key for key, kind in features.items() if require_storage_embed(kind) and not isinstance(kind, Image)]:
        raise UserError(
            f"{name} has files that are not pushed in {', '.join(files)}: lists of images, sounds, videos and "
            "such; caption a copy without these columns"
        )
    if options.caption_column in features:
        raise UserError(f"{name} has a column {options.caption_column!r}; name another by --caption-column")
    return features


def read_shards(options: argparse.Namespace, revision: str, features: Features, done: int) -> Iterator[Dataset]:
    """The rows of the input behind those that are done, in shards."""
    size, dataset = options.shard_size, open_dataset(options, revision, options.streaming)
    if options.streaming:
        if options.max_samples:
            dataset = dataset.take(options.max_samples)
        rows = iter((dataset.decode(False) if dataset.features else dataset).skip(done))
        while chunk := read_rows(options.input_dataset, rows, size):
            yield to_dataset(options.input_dataset, chunk, features)
        return
    if options.shuffle:
        dataset = dataset.shuffle(seed=options.shuffle_seed)
    end = min(len(dataset), options.max_samples or len(dataset))
    for first in range(done, end, size):
        yield dataset.select(range(first, min(first + size, end)))


def read_rows(name: str, rows: Iterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The next rows of a stream, fewer at its end. Raises `UserError` if they cannot be read."""
    try:
        return list(islice(rows, count))
    except Exception as error:  # of the libraries for data sets, tables and downloads
        raise UserError(f"{name} cannot be read: {first_line(error):.300}; give the command again to go on") from error


def caption_shard(options: argparse.Namespace, writer: ShardCaptioner, shard: Dataset, output: "Output") -> None:
    """Captions the rows of a shard and pushes them."""
    since, first = time.perf_counter(), output.num_rows
    source = ColumnDataset(shard, options.image_column, None, repository=options.input_dataset)
    place = DatasetArguments(options.input_dataset, options.split)
    inputs: list[Input] = list(rows_of_dataset(place, source, options.url_timeout, first=first, versions=False))
    summary = Summary(len(inputs))
    lines = {line["name"]: line for lines in writer.caption_inputs(inputs, summary) for line in lines}
    summary.say(*writer.job.editor.notes())
    writer.job.editor.counts.clear()
    several = options.num_captions > 1
    captions = [lines.get(item.name, {}).get("captions" if several else "caption") for item in inputs]
    feature = List(Value("string")) if several else Value("string")
    table = with_captions(shard, options.input_dataset, options.caption_column, captions, feature)
    result = {"rows": len(inputs), "captioned": summary.done, "failed": summary.failed}
    result |= {"seconds": round(time.perf_counter() - since, 3), **writer.environment()}
    summary.close("captioned", output.push_shard(table, result))


class Output:
    """The data set on the Hub, of which a commit is one shard more.

    Args:
        name: `org/name`. It is created if it does not exist.
        split: The split that is written.
        private: Whether a new data set is private; if not, as the organisation has it.
        restricted: Whether the input is private or gated, so that the output must be private.

    Raises:
        UploadError: If the token may not write, or the data set is public and should be private.
    """

    def __init__(self, name: str, split: str, private: bool, restricted: bool):
        self.name, self.split, self._api = name, split, HfApi()
        self._record: dict[str, Any] = {}
        with hub.upload_errors(name):
            if restricted and not private and not self._is_private():
                raise ValueError(f"INPUT is private or gated, and {name} would be public; pass --private")
            self._api.create_repo(name, repo_type="dataset", private=private or None, exist_ok=True)
            if private and not self._is_private():
                raise ValueError(f"{name} exists and is public; make it private, or push to another data set")
            self._read()

    def _is_private(self) -> bool:
        """Whether the data set exists and is private."""
        try:
            return bool(self._api.dataset_info(self.name).private)
        except RepositoryNotFoundError:
            return False

    def _read(self) -> None:
        """Reads the last commit: its files, and the record of each split."""
        self._head = str(self._api.dataset_info(self.name).sha)
        self._files = self._api.list_repo_files(self.name, repo_type="dataset", revision=self._head)
        records = [file for file in self._files if file.startswith(f"{RECORDS}/")]
        self._records = {Path(file).stem: read_json(self._download(file), "dataset", "shards") for file in records}
        self._pushed = to_json(self._records.get(self.split))

    @property
    def is_complete(self) -> bool:
        return self._record["complete"]

    @property
    def num_rows(self) -> int:
        """Rows that are done."""
        return sum(shard["rows"] for shard in self._record["shards"])

    @property
    def exit_code(self) -> int:
        return int(any(shard["failed"] for shard in self._record["shards"]))

    def begin(self, run: dict[str, Any]) -> int:
        """Begins a run, or goes on with the one that the data set has.

        Returns:
            The rows that are done.

        Raises:
            UserError: If the data set has another run, or other data of this split.
        """
        if self.split not in self._records:
            own = ("data/", ".", CARD) if self._records else (".", CARD)
            others = [
                file for file in self._files if file.startswith(f"data/{self.split}-") or not file.startswith(own)
            ]
            if others:
                raise UserError(f"{self.name} has {others[0]}, which is not of this command; give another OUTPUT")
        self._record = self._records.get(self.split) or {**run, "shards": [], "complete": False}
        run, then = json.loads(to_json(run)), self._record
        names = [name for name in {**then, **run} if name not in MAY_DIFFER and then.get(name) != run.get(name)]
        if names:
            differ = "; ".join(f"{name} {then.get(name)}, here {run.get(name)}" for name in names)
            raise UserError(
                f"{self.name} has captions of another run ({differ}); give the options of then (--revision and "
                "--dataset-revision for the model and the data set of then), or another OUTPUT"
            )
        return self.num_rows

    def push_shard(self, shard: Dataset, result: dict[str, Any]) -> str:
        """Pushes the next shard with its result. Returns what it is called."""
        file = f"data/{self.split}-{len(self._record['shards']):05}.parquet"
        self._record["shards"].append({"file": file, **result})
        with tempfile.TemporaryDirectory(prefix="caption-dataset-") as folder:
            path = Path(folder, "shard.parquet")
            shard.to_parquet(path)
            self._commit(f"Add the captions of {self.num_rows} rows", CommitOperationAdd(file, path))
        return f"{self.name}: {file}"

    def finish(self) -> None:
        """Records that the run is complete. Raises `UserError` if there were no rows."""
        if not self._record["shards"]:
            raise UserError(f"{self._record['dataset']} has no rows in the split {self.split}")
        self._record["complete"] = True
        self._commit(f"Complete the captions of {self.num_rows} rows")
        print(f"{self._api.endpoint}/datasets/{self.name}", file=sys.stderr)

    def _commit(self, message: str, *operations: CommitOperationAdd) -> None:
        record = CommitOperationAdd(f"{RECORDS}/{self.split}.json", to_json(self._record))
        with hub.upload_errors(self.name):
            for wait in WAITS:
                time.sleep(wait)
                self._records[self.split] = self._record
                card = [] if self._has_edited_card() else [CommitOperationAdd(CARD, self._card().encode())]
                try:
                    done = self._api.create_commit(
                        self.name,
                        [*operations, record, *card],
                        commit_message=message,
                        repo_type="dataset",
                        parent_commit=self._head,
                    )
                except HfHubHTTPError as error:
                    if error.response.status_code != CONFLICT or wait == WAITS[-1]:
                        raise
                    self._read_others()
                else:
                    self._head, self._pushed = done.oid, to_json(self._record)
                    return

    def _read_others(self) -> None:
        """Reads what other jobs have pushed. Raises `ValueError` if one writes this split."""
        before = self._pushed
        self._read()
        if self._pushed != before:
            raise ValueError(
                f"another job writes the split {self.split} of {self.name}; end it, and give the command again to go "
                "on with what it has pushed"
            )

    def _download(self, file: str) -> Path:
        return Path(self._api.hf_hub_download(self.name, file, repo_type="dataset", revision=self._head))

    def _has_edited_card(self) -> bool:
        """Whether there is a card that this script has not written."""
        try:
            return not is_as_pushed(self._download(CARD).read_text(encoding="utf-8"))
        except RemoteEntryNotFoundError:
            return False

    def _card(self) -> str:
        files = [{"split": split, "path": f"data/{split}-*"} for split in self._records]
        data = DatasetCardData(
            task_categories=["image-to-text"],
            source_datasets=sorted({record["dataset"] for record in self._records.values()}),
            tags=["image-captioning", "vlv", "uv-script"],
            configs=[{"config_name": "default", "data_files": files}],
        )
        parts = [f"---\n{data.to_yaml()}\n---\n\n# {self.name.split('/')[-1]}\n\nCaptions that a model has written. "]
        parts.append("They can be wrong.\n")
        parts += [_describe(split, record) for split, record in self._records.items()]
        return stamp("".join(parts))


def _describe(split: str, record: dict[str, Any]) -> str:
    """The section of a split in the card."""
    counts = {name: sum(shard[name] for shard in record["shards"]) for name in ("rows", "captioned")}
    failed = sum(len(shard["failed"]) for shard in record["shards"])
    model = record["model"] if os.path.isdir(record["model"]) else f"[{record['model']}]({HUB_URL}/{record['model']})"
    rows = [
        ("images", f"[{record['dataset']}]({HUB_URL}/datasets/{record['dataset']}), `{record['dataset_revision']}`"),
        ("model", f"{model}, `{record['fingerprint']}`"),
        ("captions", f"{counts['captioned']:,} in the column `{record['caption_column']}`"),
        ("rows", f"{counts['rows']:,}" + ("" if record["complete"] else ", more are being added")),
        ("images that could not be read", f"{failed:,}, named in `{RECORDS}/{split}.json`"),
        *((name, f"`{value}`") for name, value in record["settings"].items()),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"\n## {split}\n\n| | |\n|---|---|\n{table}\n\n```bash\n{record['command']}\n```\n"


if __name__ == "__main__":
    sys.exit(main())
