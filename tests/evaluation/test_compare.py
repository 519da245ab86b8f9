"""`vlv evaluate compare`: captioners on the same images, those that fail, runs that go on, and paired differences."""

import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from vlv.checkpoints import MINIATURE
from vlv.cli.main import build_parser, main
from vlv.evaluation.caption_sets import CaptionSet, measure_captions
from vlv.evaluation.captioner_process import CaptionJob, run_job
from vlv.evaluation.captioners import PROMPT
from vlv.evaluation.compare import (
    CaptionerRun,
    compare,
    diffusion_scores,
    label_captioners,
    paired_differences,
    run_captioner,
)
from vlv.evaluation.endpoint import EndpointOptions

from ..interpreter import run_python
from .openai_server import Reply, scripted_endpoint

IMAGES = Path(__file__).parent.parent.parent / "examples" / "images"
NAMES = ["test-1.png", "test-2.png", "test-3.png"]


@pytest.fixture
def job(tmp_path) -> CaptionJob:
    """Captions in a file, for two of three images."""
    file = tmp_path / "mine.json"
    file.write_text(json.dumps({name: f"a dog in {name}" for name in NAMES[:2]}))
    return CaptionJob(
        source=str(file),
        kind=None,
        prompt=None,
        max_new_tokens=20,
        batch_size=2,
        dtype="float32",
        device="cpu",
        endpoint={},
        images={name: str(IMAGES / name) for name in NAMES},
        folder=str(tmp_path / "job"),
    )


def test_a_file_of_captions_has_neither_speed_nor_memory_and_names_what_it_lacks(job):
    run = run_captioner(job)
    assert list(run.captions) == NAMES[:2] and run.kind == "file" and run.error is None
    assert "has no caption of it" in run.failures[NAMES[2]]
    assert run.images_per_second is None and run.peak_memory_mb is None


def test_an_endpoint_goes_on_and_keeps_its_speed(job):
    with scripted_endpoint(lambda words, before: Reply("a red dog", delay=0.05)) as server:
        asked = replace(job, source=f"{server.url}#m", endpoint={"concurrency": 1})
        counted: list[int] = []
        first = run_captioner(asked, counted.append)
        again = run_captioner(asked)
        assert len(server.requests) == 3 and sum(counted) == 3
    assert first.captions == dict.fromkeys(NAMES, "a red dog")
    assert 0 < first.images_per_second <= 20  # each answer takes a twentieth of a second
    assert again.captions == first.captions and again.images_per_second == first.images_per_second


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("none.json", "none.json"),
        ("org/none", "org/none"),
        ("./none", "./none does not exist"),
        ("runs/none", "runs/none is neither a folder nor a model on the Hub"),
        ("http://127.0.0.1:9/v1", "names no model"),
    ],
)
def test_a_captioner_that_cannot_be_used_has_an_error(job, source, reason):
    run = run_captioner(replace(job, source=source))
    assert reason in run.error and not run.captions


def test_a_captioner_without_any_caption_has_an_error(job, tmp_path):
    (tmp_path / "mine.json").write_text('{"other.png": "a dog"}')
    assert "it captioned no image" in run_captioner(job).error


@pytest.mark.slow
def test_a_vlv_captions_with_its_own_speed_and_goes_on_where_it_stopped(job):
    ours = replace(job, source=str(MINIATURE), images={NAMES[0]: str(IMAGES / NAMES[0])})
    first = run_captioner(ours, run=run_job)
    assert first.kind == "vlv" and first.captions[NAMES[0]] and first.images_per_second > 0
    counted: list[int] = []
    more = run_captioner(replace(ours, images=job.images), counted.append, run=run_job)
    assert counted == [1, 1, 1] and len(more.captions) == 3 and more.captions[NAMES[0]] == first.captions[NAMES[0]]
    entries = [json.loads(line) for line in (Path(job.folder) / "captions.jsonl").read_text().splitlines()]
    speed = 3 / sum(own["seconds"] for own in entries)
    assert more.images_per_second == pytest.approx(speed, abs=1e-3)
    (Path(job.folder) / "broken.png").write_bytes(b"not an image")
    images = job.images | {"broken.png": str(Path(job.folder) / "broken.png")}
    result = run_job(replace(ours, images=images))  # as after a run that was killed: its captions are all there is
    assert result["num_new"] == 0 and list(result["failures"]) == ["broken.png"]
    assert result["num_timed"] / result["seconds"] == pytest.approx(speed)


def test_an_endpoint_that_stops_in_the_middle_keeps_the_speed_of_its_answers(job):
    with scripted_endpoint(lambda words, before: Reply("a dog", delay=0.05)) as server:
        limits = {"concurrency": 1, "price_in": 1000.0, "price_out": 10_000.0}  # an answer costs 0.2
        asked = replace(job, source=f"{server.url}#m", endpoint=limits | {"max_price": 0.5})
        assert "max_price" in run_captioner(asked).error and len(server.requests) == 2
        again = run_captioner(replace(asked, endpoint=limits))
        assert len(server.requests) == 3 and len(again.captions) == 3
    parts = [json.loads(line) for line in (Path(job.folder) / "runs.jsonl").read_text().splitlines()]
    seconds = sum(part["seconds"] for part in parts)
    assert sum(part["num_timed"] for part in parts) == 3 and all(part["seconds"] >= 0.05 for part in parts)
    assert again.images_per_second == pytest.approx(3 / seconds, abs=1e-3)


def test_an_endpoint_whose_run_is_killed_keeps_the_speed_of_its_answers(job):
    with scripted_endpoint(lambda words, before: Reply("a dog", delay=0.05 if before < 2 else 30)) as server:
        asked = replace(job, source=f"{server.url}#m", endpoint={"concurrency": 1})
        process = multiprocessing.get_context("fork").Process(target=run_captioner, args=(asked,))
        process.start()
        while len(server.requests) < 3 and process.is_alive():  # the third is not answered
            time.sleep(0.01)
        process.kill()
        process.join()
    parts = [json.loads(line) for line in (Path(job.folder) / "runs.jsonl").read_text().splitlines()]
    assert process.exitcode == -signal.SIGKILL and [part["num_timed"] for part in parts] == [1, 1]
    again = run_captioner(replace(asked, images=dict(list(job.images.items())[:2])))  # nothing is left to ask
    assert len(again.captions) == 2
    assert again.images_per_second == pytest.approx(2 / sum(part["seconds"] for part in parts), abs=1e-3)
    assert 2 < again.images_per_second <= 20  # each answer takes a twentieth of a second


def test_captions_that_are_empty_or_cut_off_are_counted_and_measured(job, tmp_path):
    def measure(names, sets):
        return {label: measure_captions(own) for label, own in sets.items()}

    Path(job.source).write_text(json.dumps(dict.fromkeys(NAMES, "")))
    texts = [Reply("a dog"), Reply(""), Reply("a cat in", finish_reason="length")]
    with scripted_endpoint(lambda words, before: texts[before]) as server:
        asked = replace(job, source=f"{server.url}#m", endpoint={"concurrency": 1}, folder=str(tmp_path / "asked"))
        runs = {"file": run_captioner(job), "endpoint": run_captioner(asked)}
    results = compare(runs, NAMES, measure, {"images": "i"}, 0, tmp_path)
    counts = {label: (own["num_empty"], own["num_cut"]) for label, own in results["captioners"].items()}
    assert counts == {"file": (3, 0), "endpoint": (1, 1)} and results["num_images"] == 3
    assert results["captioners"]["endpoint"]["empty"] == [NAMES[1]]
    assert results["notes"] == [
        f"file: 3 of 3 captions are empty, such as that of '{NAMES[0]}'; they count",
        f"endpoint: 1 of 3 captions are empty, such as that of '{NAMES[1]}'; they count",
        f"endpoint: 1 of 3 captions are cut off at the most tokens, such as that of '{NAMES[2]}'; raise "
        "--max-new-tokens",
    ]
    assert results["captioners"]["endpoint"]["metrics"]["words"]["value"] == pytest.approx(5 / 3, abs=1e-6)


@pytest.mark.slow
def test_the_peak_memory_stays_when_memory_is_given_back(tmp_path):
    code = """
from vlv.evaluation.captioner_process import peak_memory
before = peak_memory()
held = bytearray(b"x") * 2**29  # 512 MiB, more than importing libraries needed at its peak
with_it = peak_memory()
del held
print(before, with_it, peak_memory())
"""
    done = run_python(code, [], cwd=tmp_path, env=os.environ)
    before, with_it, after = map(int, done.stdout.split())
    assert with_it > before + 2**28 and after > with_it - 1e6, done.stderr


@pytest.mark.slow
def test_differences_are_paired():
    references = [["a red dog", "a dog"], ["two cats"], ["a house by a tree"], ["an apple"]]
    good = ["a red dog", "two cats", "a house by a tree", "a pear"]
    weak = ["a red dog", "two dogs", "a tree", "a pear"]
    measured = [measure_captions(CaptionSet([*"abcd"], own, references)) for own in (good, weak)]
    found = paired_differences(*measured, 4, 200)
    singles = [own.figures(4, 0) for own in measured]
    assert set(found) == set(singles[0]) - {"distinct_1", "distinct_2"}
    for key, one in found.items():
        assert one["value"] == pytest.approx(singles[0][key]["value"] - singles[1][key]["value"], abs=2e-6), key
    low, high = found["rouge_l"]["interval"]
    assert 0 <= low < found["rouge_l"]["value"] < high  # no image is worse, so no resampling is
    same = paired_differences(measured[0], measured[0], 4, 50)
    assert all(one["value"] == 0 and one["interval"] == [0, 0] for one in same.values())


def test_figures_are_of_the_images_that_all_usable_captioners_have(tmp_path):
    def measure(names, sets):
        return {label: measure_captions(own) for label, own in sets.items()}

    runs = {
        "a": CaptionerRun("a.json", "file", {"1": "a dog", "2": "a | cat\nsits", "3": "a big red house"}),
        "b": CaptionerRun("b.json", "file", {"1": "a dog", "2": "cats"}, {"3": "it is empty"}),
        "c": CaptionerRun("c", error="it does not load"),
    }
    results = compare(runs, ["1", "2", "3"], measure, {"images": "i"}, 20, tmp_path)
    assert results["num_images"] == 2 and results["captioners"]["a"]["metrics"]["words"]["value"] == 3
    assert set(results["per_image"]["a"]["words"]) == {"1", "2"}
    assert [(own["first"], own["second"]) for own in results["differences"]] == [("a", "b")]
    assert results["differences"][0]["metrics"]["words"]["value"] == 1.5
    assert "b has no caption of 1 of 3 images, such as '3': it is empty" in results["notes"]
    assert "metrics" not in results["captioners"]["c"] and results["captioners"]["c"]["error"] == "it does not load"
    assert json.loads((tmp_path / "results.json").read_text()) == results
    table = (tmp_path / "captions.md").read_text().splitlines()
    assert table[3] == "| 2 | a \\| cat sits | cats |  |"
    assert "| c | 0 | 0 |" in (tmp_path / "results.md").read_text()


def test_labels_are_short_and_different(tmp_path):
    (tmp_path / "weak.json").write_text("{}")
    one, two = "http://127.0.0.1:1/v1#vlv", "https://host/v1#vlv"
    assert label_captioners([str(MINIATURE), "org/blip", str(tmp_path / "weak.json"), one]) == [
        "vlv-miniature",
        "blip",
        "weak",
        "vlv",
    ]
    assert label_captioners(["runs/vlv", one, two]) == ["vlv", "vlv at 127.0.0.1:1", "vlv at host"]
    assert label_captioners(["runs/vlv", "org/vlv"]) == ["runs/vlv", "org/vlv"]


@pytest.mark.slow
def test_diffusion_scores_are_those_of_vlv_score(tmp_path):
    names = NAMES[:2]
    captions = {"a": ["a large dog", "a small cat on a grey background"], "b": ["", "a large tree"]}
    scores = diffusion_scores(str(MINIATURE), [IMAGES / name for name in names], captions, {}, batch_size=1)
    (tmp_path / "c.json").write_text(
        json.dumps({name: [captions[k][i] for k in "ab"] for i, name in enumerate(names)})
    )
    command = ["score", *(str(IMAGES / name) for name in names), "--captions", str(tmp_path / "c.json")]
    assert main([*command, "--output", str(tmp_path / "s.json")]) == 0
    own = json.loads((tmp_path / "s.json").read_text())
    assert scores["b"][0] == pytest.approx(0, abs=1e-6)  # an empty caption explains as much as no words
    for place, name in enumerate(names):
        assert [scores[k][place] for k in "ab"] == pytest.approx(own[name], abs=1e-4)


@pytest.mark.slow
def test_a_process_of_its_own_measures_its_memory(job):
    ours = replace(job, source=str(MINIATURE), max_new_tokens=2, images=job.images | {"none.png": "none.png"})
    counted: list[int] = []
    run = run_captioner(ours, counted.append)
    assert run.error is None and list(run.captions) == NAMES and list(run.failures) == ["none.png"]
    assert counted == [0, 1, 1, 1, 1] and run.peak_memory_mb > 100 and run.load_seconds > 0
    result = json.loads((Path(job.folder) / "result.json").read_text())
    assert result["num_new"] == result["num_timed"] == 3


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ('echo "captioned 2"; cp "$(dirname "$3")/ready.json" "$(dirname "$3")/result.json"', None),
        ("echo out of memory >&2; exit 3", "its process ended with 'out of memory'"),
        ("kill -9 $$", "its process was ended by signal 9"),
        ('echo \'{"error": "OSError: no weights"}\' > "$(dirname "$3")/result.json"', "OSError: no weights"),
    ],
)
def test_how_a_process_ends_is_told(job, script, error, tmp_path, monkeypatch):
    program = tmp_path / "python"  # in the place of an interpreter, which takes seconds to import the libraries
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    (tmp_path / "job").mkdir()
    ready = {"kind": "vlv", "fingerprint": "f", "captions": {"a": "b"}, "failures": {}, "load_seconds": 1.5}
    ready |= {"empty": [], "cut": [], "notes": []}
    ready |= {"num_new": 4, "num_timed": 4, "seconds": 2.0, "peak_memory": 3e9, "peak_gpu_memory": 5e9}
    (tmp_path / "job" / "ready.json").write_text(json.dumps(ready))
    counted: list[int] = []
    run = run_captioner(replace(job, source=str(MINIATURE)), counted.append)
    if error is None:
        assert counted == [2] and run.error is None and run.captions == {"a": "b"}
        assert (run.images_per_second, run.load_seconds) == (2, 1.5)
        assert (run.peak_memory_mb, run.peak_gpu_memory_mb) == (3000, 5000)
    else:
        assert error in run.error and not run.captions


@pytest.mark.slow
def test_the_command_names_a_captioner_that_fails_and_its_results_make_a_report(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    for name in NAMES:
        shutil.copy(IMAGES / name, tmp_path / "images")
    (tmp_path / "good.json").write_text(json.dumps(dict.fromkeys(NAMES, "a large dog")))
    (tmp_path / "weak.json").write_text(json.dumps(dict.fromkeys(NAMES, "a sun")))
    (tmp_path / "truth.json").write_text(json.dumps({name: ["a large dog", "an animal"] for name in NAMES}))
    captioners = [str(tmp_path / f"{name}.json") for name in ("good", "weak", "none")]
    options = ["--images", str(tmp_path / "images"), "--references", str(tmp_path / "truth.json")]
    command = ["evaluate", "compare", *captioners, *options, "--output-dir", str(tmp_path / "out")]
    assert main([*command, "--bootstrap", "20"]) == 1
    shown = capsys.readouterr().out
    assert "failed: none.json: " in shown and "| paired difference | good less weak |" in shown
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["captioners"]["good"]["metrics"]["rouge_l"]["value"] == 1
    assert len(results["differences"]) == 1 and len(results["captions"]) == 3
    assert main(["evaluate", "report", str(tmp_path / "out"), "--output", str(tmp_path / "r.html")]) == 0


def test_options_that_do_not_fit_are_refused(tmp_path, capsys, dinov2_model, bert_model):
    file = tmp_path / "c.json"
    file.write_text("{}")
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps({path.name: ["a dog"] for path in IMAGES.glob("*.png")}))
    rest = ["--images", str(IMAGES), "--output-dir", str(tmp_path / "out")]
    for options, message in (
        ([str(file), str(file)], "a captioner is given twice; leave one out, or tell them apart with --names"),
        ([str(file), "--names", "a", "b"], "--names needs 1 different names, one for each captioner"),
        ([str(file), "--bert", "x"], "pass --references FILE with --bert"),
        ([str(file), "--references", "none.json"], "none.json cannot be read"),
        ([str(file), "--bert", "./none", "--references", str(truth)], "cannot load --bert ./none"),
        ([str(file), "--clip", "./none"], "cannot load --clip ./none"),
        ([str(file), "--clip", str(dinov2_model)], "embeds no texts; pass a CLIP or SigLIP model"),
        ([str(file), "--bert", str(bert_model), "--bert-layer", "9", "--references", str(truth)], "has 2 layers"),
        ([str(file), "--score-model", "./none"], "cannot load --score-model ./none"),
        ([str(file), "--prompt", "a", "--prompt", "b"], "--prompt is given twice without a name; the names are c"),
        (["https://a:b@host/v1#m"], "the endpoint at host has a user name or password"),
        ([str(file), "--key-variable", "K"], "the endpoints are none, as in NAME=VARIABLE"),
        (["https://host/v1#m", "--key-variable", "UNSET_KEY"], "the environment variable UNSET_KEY is not set"),
        (["http://host/v1#m", "--key-variable", "PATH"], "the key in PATH would go to host unencrypted"),
        (["http://host/v1#m", "--max-price", "1"], "max_price needs price_in and price_out"),
    ):
        assert main(["evaluate", "compare", *options, *rest]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_each_endpoint_has_its_own_key_and_prompt_and_is_asked_once_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "openai")
    monkeypatch.setenv("B_KEY", "b")
    (tmp_path / "images").mkdir()
    shutil.copy(IMAGES / NAMES[0], tmp_path / "images")
    prompts: list[str] = []
    with scripted_endpoint(lambda words, before: prompts.append(words) or Reply(words)) as server:
        a, b = f"{server.url}#a", f"{server.url}#b"
        rest = ["--images", str(tmp_path / "images"), "--output-dir", str(tmp_path / "out"), "--bootstrap", "0"]
        rest += ["--prompt", "for=all", "--prompt", "b=1 + 1 = ?", "--key-variable", "b=B_KEY"]
        assert main(["evaluate", "compare", a, b, *rest]) == 0
        assert prompts == ["for=all", "1 + 1 = ?"] and server.keys == ["Bearer none", "Bearer b"]
        assert main(["evaluate", "compare", b, a, *rest]) == 0
        assert len(server.requests) == 2
        assert main(["evaluate", "compare", a, *rest[:-4], "--key-variable", "OPENAI_API_KEY"]) == 0
        assert len(server.requests) == 2  # a key is no part of the question
        assert main(["evaluate", "compare", a, *rest[:-6], "--key-variable", "OPENAI_API_KEY"]) == 0
        assert prompts[2:] == [PROMPT] and server.keys[2] == "Bearer openai"
    (found,) = json.loads((tmp_path / "out" / "results.json").read_text())["captions"].values()
    assert found == {"a": PROMPT}


def test_the_command_has_all_options_of_endpoints():
    own = vars(build_parser().parse_args(["evaluate", "compare", "a", "--images", "i", "--output-dir", "o"]))
    assert {**EndpointOptions().options(), "key_variable": []}.items() <= own.items()
