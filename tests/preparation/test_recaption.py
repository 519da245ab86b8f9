"""`vlv data recaption`: a teacher behind an endpoint that fails in every way, within a price, once for each image."""

import base64
import io
import json
import time

import pytest
from PIL import Image

from vlv.cli.main import main
from vlv.evaluation.answer_log import Answer
from vlv.evaluation.endpoint import EndpointSettings
from vlv.preparation import recaption as module
from vlv.preparation.answers import check_answer
from vlv.preparation.pack import pack
from vlv.preparation.records import Records
from vlv.train import load_pairs

from ..evaluation.openai_server import Reply, scripted_endpoint
from .inputs import write_pictures

TEXT = "a picture with many colours"
LOOP = "a red car and a blue house " * 12


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("data") / "pictures", 8)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    """The client's own pauses between repeats take up to 8 s."""
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(openai._base_client, "MAX_RETRY_DELAY", 0.01)


def command(pictures, output, url, *arguments) -> list[str]:
    options = ["--model", "teacher", "--base-url", url, "--concurrency", "1", *arguments]
    return ["data", "recaption", str(pictures), "--output", str(output), *options]


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_faults_are_repeated_and_refusals_and_nonsense_recorded(pictures, tmp_path, capsys):
    """One request at a time: the answers go to the pictures in order, each fault in the place of an answer."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("What is there?\n")
    replies = [
        *[Reply(status=429, headers={"retry-after-ms": "10"}), Reply(TEXT)],  # 00
        *[Reply(status=500), Reply(status=503), Reply(f"{TEXT}\nin two lines")],  # 01
        *[Reply(TEXT, delay=1.5), Reply(TEXT)],  # 02: a time-out
        Reply("I'm sorry, but I can't help with that."),  # 03
        Reply(LOOP),  # 04
        Reply("no"),  # 05
        Reply(body=b'{"choices": []}'),  # 06, which is asked again at the end
        Reply(" "),  # 07
        Reply(TEXT),  # 06
    ]
    out = tmp_path / "o.jsonl"
    with scripted_endpoint(lambda words, times: replies[times]) as script:
        assert main(command(pictures, out, script.url, "--timeout", "1", "--prompt", str(prompt))) == 0
    assert len(script.requests) == len(replies)
    said = capsys.readouterr().err
    assert "captioned 4 of 8 images (refused 1, malformed 3, unreadable 0, failed 0)" in said
    captions = {line["file_name"].rpartition("/")[2]: line["caption"] for line in lines(out)}
    assert captions == {"00.png": TEXT, "01.png": f"{TEXT} in two lines", "02.png": TEXT, "06.png": TEXT}
    rejected = {line["file_name"].rpartition("/")[2]: line for line in lines(tmp_path / "o.rejected.jsonl")}
    assert {name: line["status"] for name, line in rejected.items()} == {
        "03.png": "refused",
        **dict.fromkeys(["04.png", "05.png", "07.png"], "malformed"),
    }
    assert rejected["04.png"]["reason"] == "repeats itself" and rejected["04.png"]["text"] == LOOP.strip()
    assert len(load_pairs(str(out))) == 4
    content = script.requests[0]["messages"][0]["content"]
    assert content[1]["text"] == "What is there?"
    sent = base64.b64decode(content[0]["image_url"]["url"].partition(",")[2])
    assert sent == (pictures / "00.png").read_bytes()


def test_images_that_failed_are_asked_again_by_the_same_command_and_others_are_not(pictures, tmp_path, capsys):
    is_down = True

    def answer(words, times):
        if times == 0:
            return Reply(" ")  # an empty answer is final
        return Reply(status=500) if is_down and times >= 3 else Reply(TEXT)

    with scripted_endpoint(answer) as script:
        again = command(pictures, out := tmp_path / "o.jsonl", script.url, "--max-retries", "0")
        assert main(again) == 1
        assert "captioned 2 of 8 images (refused 0, malformed 1, unreadable 0, failed 5)" in capsys.readouterr().err
        statuses = [line["status"] for line in lines(tmp_path / "o.rejected.jsonl")]
        assert len(lines(out)) == 2 and statuses == ["malformed"] + ["failed"] * 5
        is_down, before = False, len(script.requests)
        assert main(again) == 0
        assert len(script.requests) == before + 5 and len(lines(out)) == 7
        assert [line["status"] for line in lines(tmp_path / "o.rejected.jsonl")] == ["malformed"]
        assert main(again) == 0 and len(script.requests) == before + 5
    counts = json.loads((tmp_path / "o.jsonl.manifest.json").read_text())["counts"]
    assert (counts["captioned"], counts["prompt_tokens"], counts["completion_tokens"]) == (7, 800, 80)


def test_no_run_spends_more_than_the_price_and_what_is_paid_for_is_kept(pictures, tmp_path, monkeypatch, capsys):
    """An answer costs 1.2; blocks of three, so that the price is kept across logs."""
    monkeypatch.setattr(module, "BLOCK", 3)
    price = ["--price-in", "10000", "--price-out", "20000", "--max-price"]
    with scripted_endpoint(lambda words, times: Reply(TEXT)) as script:
        run = command(pictures, out := tmp_path / "o.jsonl", script.url, *price)
        assert main([*run, "5"]) == 2
        assert "5 captions are in" not in (said := capsys.readouterr().err) and "4 captions are in" in said
        assert len(script.requests) == len(lines(out)) == 4
        assert main([*run, "5.5"]) == 2 and len(script.requests) == 4
        assert main([*run, "20"]) == 0 and len(script.requests) == len(lines(out)) == 8
    assert json.loads((tmp_path / "o.jsonl.manifest.json").read_text())["counts"]["price"] == pytest.approx(9.6)


def test_a_second_run_counts_what_later_blocks_have_cost(pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "BLOCK", 3)
    price = ["--price-in", "10000", "--price-out", "20000", "--max-retries", "0", "--passes", "1"]
    with scripted_endpoint(lambda words, times: Reply(TEXT) if times else Reply(status=500)) as script:
        run = command(pictures, tmp_path / "o.jsonl", script.url, *price)
        assert main(run) == 1 and len(script.requests) == 8
        assert main([*run, "--max-price", "9"]) == 2 and len(script.requests) == 8
    assert "cost 8.4000, and the next could exceed max_price 9;" in capsys.readouterr().err


def test_an_estimate_pays_for_a_few_images_that_are_not_asked_again(pictures, tmp_path, capsys):
    with scripted_endpoint(lambda words, times: Reply(TEXT)) as script:
        run = command(pictures, out := tmp_path / "o.jsonl", script.url, "--price-in", "10", "--price-out", "100")
        assert main([*run, "--estimate", "3"]) == 0
        assert len(script.requests) == 3 and not out.exists()
        assert "asked for 3 images: 100 + 10 tokens each; 8 images take about 800 + 80 tokens, price 0.0160" in (
            capsys.readouterr().out
        )
        assert main(run) == 0 and len(script.requests) == 8 and len(lines(out)) == 8


@pytest.mark.parametrize("format", ["webdataset", "parquet", "folder"])
def test_captions_of_packed_images_are_packed_with_them_for_stage_2(pictures, tmp_path, capsys, format):
    source, out = pictures, tmp_path / "o.jsonl"
    if format != "folder":
        source = tmp_path / "shards"
        pack(Records(str(pictures)), source, format=format, shard_images=3)
    with scripted_endpoint(lambda words, times: Reply("I cannot help with that." if times == 1 else TEXT)) as script:
        assert main(command(source, out, script.url)) == 0
    assert ("--captions" in capsys.readouterr().err) == (format != "folder")
    again = ["data", "pack", str(source), "--captions", str(out), "--output", str(tmp_path / "pairs")]
    assert main(again) == 0
    packed = load_pairs(str(tmp_path / "pairs"))
    assert [item["caption"] for item in packed] == [TEXT] * 7
    expected = [(pictures / f"{number:02d}.png").read_bytes() for number in range(8) if number != 1]
    assert [bytes(item["image"]) for item in packed] == expected
    assert main(again) == 0 and "nothing to do" in capsys.readouterr().err
    out.write_text(out.read_text() + json.dumps({"file_name": "other.png", "caption": "of another source"}) + "\n")
    assert main([*again, "--overwrite"]) == 2 and "names 'other.png', which is not in" in capsys.readouterr().err


def test_requests_start_at_the_rate_that_is_asked_for(pictures, tmp_path):
    """Eight at once without it. Answers that are there are not waited for."""
    with scripted_endpoint(lambda words, times: Reply(TEXT, delay=0.4)) as script:
        run = command(pictures, out := tmp_path / "o.jsonl", script.url, "--concurrency", "8", "--requests-per-minute")
        began = time.perf_counter()
        assert main([*run, "600"]) == 0
    assert len(script.times) == 8
    assert all(at - began >= 0.1 * number for number, at in enumerate(sorted(script.times)))
    began = time.perf_counter()
    assert main([*run, "1", "--min-words", "1", "--overwrite"]) == 0 and len(lines(out)) == 8
    assert time.perf_counter() - began < 60


def test_large_images_are_sent_smaller_and_unreadable_ones_are_named(tmp_path):
    folder = write_pictures(tmp_path / "in", 1, side=300)
    (folder / "bad.png").write_text("no picture")
    with scripted_endpoint(lambda words, times: Reply(TEXT)) as script:
        assert main(command(folder, tmp_path / "o.jsonl", script.url, "--max-side", "128")) == 1
        assert main(command(folder, tmp_path / "o.jsonl", script.url, "--max-side", "128")) == 1
    (request,) = script.requests
    uri = request["messages"][0]["content"][0]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).size == (128, 128)
    (rejected,) = lines(tmp_path / "o.rejected.jsonl")
    assert rejected["status"] == "unreadable" and rejected["file_name"].endswith("bad.png")


def test_a_wrong_key_stops_the_run_with_the_endpoints_words(pictures, tmp_path, capsys):
    body = json.dumps({"error": {"message": "no such key"}}).encode()
    with scripted_endpoint(lambda words, times: Reply(status=401, body=body)) as script:
        assert main(command(pictures, tmp_path / "o.jsonl", script.url)) == 2
        assert len(script.requests) == 1
    assert "no such key" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--max-price", "1"], "max_price needs price_in and price_out"),
        (["--prompt", "missing.txt"], "--prompt missing.txt cannot be read"),
    ],
)
def test_bad_options_say_what_is_expected(pictures, tmp_path, capsys, arguments, expected):
    assert main(command(pictures, tmp_path / "o.jsonl", "http://127.0.0.1:9/v1", *arguments)) == 2
    assert expected in capsys.readouterr().err


def test_no_answer_is_paid_for_again_by_another_run_of_the_same_output(tmp_path):
    """Images that were added or moved, another limit of words or address, and a list that was lost."""
    pictures, out = write_pictures(tmp_path / "in", 3), tmp_path / "o.jsonl"
    with scripted_endpoint(lambda words, times: Reply(" " if times == 1 else TEXT)) as script:
        assert main(command(pictures, out, script.url)) == 0 and len(script.requests) == 3
        write_pictures(tmp_path / "new", 1, seed=1)
        (tmp_path / "new" / "00.png").rename(pictures / "!.png")
        pictures = pictures.rename(tmp_path / "moved")
        assert main(command(pictures, out, script.url)) == 2
        assert main(command(pictures, out, script.url, "--overwrite")) == 0 and len(script.requests) == 4
        assert main(command(pictures, out, script.url, "--min-words", "1", "--overwrite")) == 0
        (tmp_path / "o.rejected.jsonl").unlink()
        assert main(command(pictures, out, script.url, "--min-words", "1")) == 0 and len(script.requests) == 4
        with scripted_endpoint(lambda words, times: Reply("other")) as other:
            assert main(command(pictures, out, other.url, "--overwrite")) == 0 and not other.requests
        assert main(command(pictures, out, script.url, "--max-tokens", "9", "--overwrite")) == 0
    assert len(script.requests) == 8 and len(lines(out)) == 4
    counts = json.loads((tmp_path / "o.jsonl.manifest.json").read_text())["counts"]
    assert counts["prompt_tokens"] == 800


def test_an_output_that_was_edited_is_not_replaced_without_overwrite(pictures, tmp_path, capsys):
    with scripted_endpoint(lambda words, times: Reply(TEXT)) as script:
        again = command(pictures, out := tmp_path / "o.jsonl", script.url)
        assert main(again) == 0
        out.write_text(edited := out.read_text().replace("many", "several"))
        assert main(again) == 2 and f"{out} has been changed since" in capsys.readouterr().err
        assert out.read_text() == edited
        assert main([*again, "--overwrite"]) == 0 and "many" in out.read_text() and len(script.requests) == 8


def test_a_file_of_the_user_beside_the_output_is_not_replaced(pictures, tmp_path, capsys):
    (tmp_path / "o.rejected.jsonl").write_text("mine")
    assert main(command(pictures, tmp_path / "o.jsonl", "http://127.0.0.1:9/v1")) == 2
    assert "o.rejected.jsonl exists and no manifest" in capsys.readouterr().err
    assert (tmp_path / "o.rejected.jsonl").read_text() == "mine"


def test_a_folder_of_images_with_the_output_in_it_is_read_without_the_rejected_ones(tmp_path):
    folder = write_pictures(tmp_path / "in", 3)
    with scripted_endpoint(lambda words, times: Reply(TEXT if times else "I'm sorry, I cannot.")) as script:
        assert main(command(folder, folder / "o.jsonl", script.url)) == 0
    assert len(load_pairs(str(folder))) == 2


def test_answers_of_an_interrupted_run_are_in_the_lists(pictures, tmp_path):
    def interrupt(done):
        raise KeyboardInterrupt

    with scripted_endpoint(lambda words, times: Reply(TEXT)) as script:
        how = module.RecaptionConfig(EndpointSettings("teacher", script.url, concurrency=1))
        with pytest.raises(KeyboardInterrupt):
            module.recaption(Records(str(pictures)), tmp_path / "o.jsonl", how, advance=lambda n: n and interrupt(n))
        assert len(lines(tmp_path / "o.jsonl")) == len(script.requests) == 1


def test_an_image_that_the_endpoint_does_not_take_is_not_asked_for_again(pictures, tmp_path):
    bodies = {0: "your image violates our content_policy", 1: "the image is too large"}

    def answer(words, times):
        body = json.dumps({"error": {"message": bodies.get(times)}}).encode()
        return Reply(status=400, body=body) if times in bodies else Reply(TEXT)

    with scripted_endpoint(answer) as script:
        assert main(command(pictures, tmp_path / "o.jsonl", script.url)) == 0
        assert len(script.requests) == 8
    assert [line["status"] for line in lines(tmp_path / "o.rejected.jsonl")] == ["refused", "malformed"]


def test_an_endpoint_that_answers_nothing_right_ends_the_run(pictures, tmp_path, capsys):
    body = json.dumps({"error": {"message": "no vision"}}).encode()
    is_down = True
    with scripted_endpoint(lambda words, times: Reply(status=400, body=body) if is_down else Reply(TEXT)) as script:
        again = command(pictures, tmp_path / "o.jsonl", script.url, "--max-failures", "5")
        assert main(again) == 2 and len(script.requests) == 5
        assert "the last 5 requests failed" in (said := capsys.readouterr().err) and "no vision" in said
        is_down = False
        assert main(again) == 0 and len(lines(tmp_path / "o.jsonl")) == 8


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("A woman says sorry to a man who can't see.", "captioned"),
        ("I’m unable to identify people in images.", "refused"),
        ("Sorry, I cannot describe it.", "refused"),
        ("I apologize, but I can't help with that.", "refused"),
        ("My apologies, but this cannot be described.", "refused"),
        ("Icons of an app on a white ground.", "captioned"),
        ("As an AI, I have no eyes.", "refused"),
        ("I can't fulfill that request.", "refused"),
        ("I can’t fulfill that request.", "refused"),
        ("I cannot create content of that kind.", "refused"),
        ("I must decline to describe this image.", "refused"),
        ("As a language model, I can't view images.", "refused"),
        ("I'm just a language model and have no image.", "refused"),
        ("I don't see an image attached to your message.", "refused"),
        ("I don’t see an image attached to your message.", "refused"),
        ("Please upload an image so that I can describe it.", "refused"),
        ("It looks like you haven't attached an image.", "refused"),
        ("As a model walks by, an AI robot waves.", "captioned"),
        ("I can't believe it's butter, says the label of a yellow tub.", "captioned"),
        ("It looks like a cat, with a text in {brackets} and <angles> beside it.", "captioned"),
        ('{"error": "model overloaded, try again"}', "malformed"),
        ("[A cat on a mat.]", "malformed"),
        ("<html><body>502 Bad Gateway nginx</body></html>", "malformed"),
        ("```\nA cat on a mat.\n```", "malformed"),
        ("Here is the caption: ```A cat on a mat.```", "malformed"),
        (" ".join(f"word{number}" for number in range(300)), "captioned"),
    ],
)
def test_refusals_are_told_from_captions(text, status):
    assert check_answer(Answer("x", text)).status == status


@pytest.mark.parametrize(("reason", "status"), [("length", "malformed"), ("content_filter", "refused")])
def test_an_answer_that_was_cut_is_no_caption(reason, status):
    assert check_answer(Answer("x", "a picture with many", finish_reason=reason)).status == status
