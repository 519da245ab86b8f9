"""Questions to an OpenAI-compatible endpoint that fails in every way."""

import base64
import io
import json
import threading
import time

import pytest
from PIL import Image

from vlv.evaluation import endpoint as endpoint_module
from vlv.evaluation.endpoint import (
    Endpoint,
    EndpointError,
    EndpointSettings,
    PriceReached,
    Question,
    find_key,
    image_part,
)

from .openai_server import Reply, scripted_endpoint

FAST = {"Retry-After": "0"}
PRICES = {"price_in": 1000.0, "price_out": 10_000.0}  # an answer of the server costs 0.2


def ask(text: str) -> Question:
    return Question(text, [{"role": "user", "content": text}])


def build(url: str, folder, **settings) -> Endpoint:
    defaults = {"max_retries": 2, "timeout": 0.5, "concurrency": 4}
    return Endpoint(EndpointSettings("judge", url, **(defaults | settings)), folder / "answers.jsonl")


def test_faults_that_pass_are_asked_again_and_others_fail_by_name(tmp_path):
    replies = {
        "once 429": [Reply(status=429, headers=FAST, body=b"{}"), Reply("a")],
        "once 500": [Reply(status=500, headers=FAST, body=b"oops"), Reply("b")],
        "once late": [Reply("late", delay=1.0), Reply("c")],
        "always 500": [Reply(status=500, headers=FAST, body=b"oops")],
        "no JSON": [Reply(body=b"<html>")],
        "no choices": [Reply(body=b'{"choices": []}')],
        "empty": [Reply("  ")],
        "refused": [Reply(body=b'{"choices": [{"message": {"content": null, "refusal": "I will not"}}]}')],
        "null choice": [Reply(body=b'{"choices": [null]}')],
        "text choice": [Reply(body=b'{"choices": ["x"]}')],
        "choices by name": [Reply(body=b'{"choices": {"a": 1}}')],
        "null message": [Reply(body=b'{"choices": [{"message": null}]}')],
        "a list": [Reply(body=b"[]")],
        "bad request": [Reply(status=400, body=b'{"error": {"message": "too long"}}')],
        "right": [Reply("d")],
    }

    def answer(words: str, before: int) -> Reply:
        return replies[words][min(before, len(replies[words]) - 1)]

    with scripted_endpoint(answer) as script:
        endpoint = build(script.url, tmp_path)
        answers = {own.name: own for own in endpoint.ask(map(ask, replies))}
    assert list(answers) == list(replies)
    assert {name: own.text for name, own in answers.items() if own.error is None} == {
        "once 429": "a",
        "once 500": "b",
        "once late": "c",
        "right": "d",
    }
    errors = {name: own.error for name, own in answers.items() if own.error is not None}
    assert "status 500" in errors["always 500"] and "too long" in errors["bad request"]
    assert errors["refused"] == "refused: I will not" and errors["empty"] == "the answer is empty"
    assert "no choices" in errors["no choices"] and errors["no JSON"]
    assert (endpoint.totals.answered, endpoint.totals.failed) == (4, 11)
    unread = ("null choice", "text choice", "choices by name", "null message")
    assert all("choices cannot be read" in errors[name] for name in unread) and errors["a list"]


def test_usage_that_is_not_numbers_counts_as_none(tmp_path):
    usage = {"prompt_tokens": "many", "completion_tokens": [1]}
    body = json.dumps({"choices": [{"message": {"content": "a"}, "finish_reason": 3}], "usage": usage}).encode()
    with scripted_endpoint(lambda words, before: Reply(body=body)) as script:
        endpoint = build(script.url, tmp_path, price_in=1.0)
        (answer,) = endpoint.ask([ask("a")])
    assert (answer.text, answer.finish_reason, endpoint.totals.price) == ("a", None, 0)


def test_many_failures_in_a_row_end_the_run_and_a_right_answer_between_them_counts_anew(tmp_path):
    def answer(words: str, before: int) -> Reply:
        return Reply("right") if int(words) == 3 else Reply(status=500)

    with scripted_endpoint(answer) as script:
        endpoint = build(script.url, tmp_path, concurrency=1, max_retries=0, max_failures=4)
        with pytest.raises(EndpointError, match="the last 4 requests failed, the last one with: status 500"):
            endpoint.ask(ask(str(number)) for number in range(50))
        assert len(script.requests) == 8


def test_an_endpoint_without_credit_ends_the_run(tmp_path):
    body = json.dumps({"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}).encode()
    with scripted_endpoint(lambda words, before: Reply(status=429, body=body)) as script:
        with pytest.raises(EndpointError, match="exceeded your quota"):
            build(script.url, tmp_path, concurrency=1, max_retries=0).ask(map(ask, "abc"))
        assert len(script.requests) == 1


def test_a_run_goes_on_with_the_answers_in_its_log(tmp_path):
    with scripted_endpoint(lambda words, before: Reply(words.upper())) as script:
        build(script.url, tmp_path).ask([ask("a"), ask("b")])
        log = tmp_path / "answers.jsonl"
        log.write_text(log.read_text() + '{"hash": "cut by a kill')
        endpoint = build(script.url, tmp_path)
        answers = endpoint.ask([ask("a"), ask("c"), ask("b")])
        assert [own.text for own in answers] == ["A", "C", "B"]
        assert (endpoint.totals.kept, endpoint.totals.answered, len(script.requests)) == (2, 1, 3)
        assert build(script.url, tmp_path).ask([ask("c")])[0].text == "C" and len(script.requests) == 3
        build(script.url, tmp_path, temperature=1.0).ask([ask("c")])
        assert len(script.requests) == 4  # another setting is another answer
        with scripted_endpoint(lambda words, before: Reply("other")) as other:
            assert build(other.url, tmp_path).ask([ask("c")])[0].text == "other"  # so is another endpoint


def test_failed_questions_are_asked_again(tmp_path):
    with scripted_endpoint(lambda words, before: Reply("" if before == 0 else "b")) as script:
        assert build(script.url, tmp_path).ask([ask("a")])[0].error
        assert build(script.url, tmp_path).ask([ask("a")])[0].text == "b"


@pytest.mark.parametrize("status", [401, 403, 404])
def test_an_endpoint_that_refuses_ends_the_run_at_once(tmp_path, status):
    body = json.dumps({"error": {"message": "no such key"}}).encode()
    with scripted_endpoint(lambda words, before: Reply(status=status, body=body)) as script:
        with pytest.raises(EndpointError, match=f"{status}.*no such key"):
            build(script.url, tmp_path, concurrency=1).ask(ask(str(number)) for number in range(50))
        assert len(script.requests) < 5


def test_a_run_stops_before_the_price_is_exceeded(tmp_path):
    with scripted_endpoint(lambda words, before: Reply("a")) as script:
        endpoint = build(script.url, tmp_path, **PRICES, max_price=1.1)
        with pytest.raises(PriceReached, match=r"max_price 1\.1"):
            endpoint.ask(ask(str(number)) for number in range(50))
        assert endpoint.totals.answered == len(script.requests) == 5
        more = build(script.url, tmp_path, **PRICES, max_price=99.0)
        assert len(more.ask(ask(str(number)) for number in range(10))) == 10
        assert more.totals.kept == 5


def test_the_first_request_goes_alone_and_a_rerun_counts_what_the_log_cost(tmp_path):
    with scripted_endpoint(lambda words, before: Reply("a", delay=0.05)) as script:
        for limit, requests in ((0.3, 1), (0.3, 1), (0.7, 3)):
            endpoint = build(script.url, tmp_path, **PRICES, max_price=limit)
            with pytest.raises(PriceReached, match=r"answers\.jsonl cost 0"):
                endpoint.ask(ask(str(number)) for number in range(9))
            assert len(script.requests) == requests
            assert endpoint.totals.price == pytest.approx(0.2 * requests)
            assert endpoint.totals.prompt_tokens == 100 * requests


def test_a_price_limit_needs_an_endpoint_that_reports_usage(tmp_path):
    body = json.dumps({"choices": [{"message": {"role": "assistant", "content": "a"}}]}).encode()
    with scripted_endpoint(lambda words, before: Reply(body=body)) as script:
        with pytest.raises(EndpointError, match=r"does not report usage.*leave max_price out"):
            build(script.url, tmp_path, **PRICES, max_price=9.0).ask(ask(str(number)) for number in range(9))
        assert len(script.requests) == 1
        with pytest.raises(EndpointError, match=r"answers\.jsonl has answers without their tokens"):
            build(script.url, tmp_path, **PRICES, max_price=9.0)
        assert len(build(script.url, tmp_path, **PRICES).ask([ask("0"), ask("1")])) == 2


def test_a_price_limit_needs_prices_and_openai_needs_a_key(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ValueError, match="max_price needs price_in and price_out"):
        EndpointSettings("judge", max_price=1.0)
    with pytest.raises(ValueError, match="max_price is 0; it must be above 0"):
        EndpointSettings("judge", price_in=1.0, max_price=0.0)
    with pytest.raises(EndpointError, match="OPENAI_API_KEY is not set"):
        Endpoint(EndpointSettings("judge"), tmp_path / "log")


def test_two_questions_of_one_name_are_an_error(tmp_path):
    with scripted_endpoint(lambda words, before: Reply("a")) as script, pytest.raises(ValueError, match="named 'a'"):
        build(script.url, tmp_path).ask([ask("a"), ask("a")])


class CountedName(str):
    """Counts how often it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        CountedName.compared += 1
        return str.__eq__(self, other)


def test_looking_for_names_takes_time_in_proportion_to_the_questions(tmp_path):
    with scripted_endpoint(lambda words, before: Reply("a")) as script:
        questions = [Question(CountedName(number), ask("same").messages) for number in range(40)]
        build(script.url, tmp_path).ask(questions)
    assert CountedName.compared < 5 * len(questions)


def test_an_answer_with_half_a_surrogate_pair_is_kept(tmp_path):
    body = b'{"choices": [{"message": {"role": "assistant", "content": "a dog \\ud83d"}}]}'
    with scripted_endpoint(lambda words, before: Reply(body=body)) as script:
        for _ in range(2):
            assert build(script.url, tmp_path).ask([ask("a")])[0].text == "a dog \ud83d"
        assert len(script.requests) == 1


def test_an_interrupted_run_does_not_wait_for_slow_requests(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoint_module, "GRACE", 0.2)
    before = set(threading.enumerate())

    def interrupt(done: int) -> None:
        raise KeyboardInterrupt

    with scripted_endpoint(lambda words, before: Reply("a", delay=0.1 if words == "quick" else 2.5)) as script:
        endpoint = build(script.url, tmp_path, timeout=5.0)
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            endpoint.ask(map(ask, ("slow", "slower", "quick")), interrupt)
        assert time.monotonic() - start < 2
        assert all(thread.daemon for thread in set(threading.enumerate()) - before)  # none keeps the program alive
    assert [json.loads(line)["text"] for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == ["a"]


def test_a_file_of_several_pictures_is_sent_as_jpeg():
    file = io.BytesIO()
    pictures = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    pictures[0].save(file, "MPO", save_all=True, append_images=pictures[1:])
    assert image_part(file.getvalue())["image_url"]["url"].startswith("data:image/jpeg;base64,")


def test_formats_that_endpoints_do_not_take_become_png():
    image = Image.effect_noise((9, 7), 50).convert("RGB")
    for kind, sent in {"TIFF": "png", "BMP": "png", "PNG": "png", "WEBP": "webp", "JPEG": "jpeg"}.items():
        file = io.BytesIO()
        image.save(file, kind)
        head, _, data = image_part(file.getvalue())["image_url"]["url"].partition(",")
        assert head == f"data:image/{sent};base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as found:
            assert found.format.lower() == sent and (sent != "png" or found.tobytes() == image.tobytes())
        if kind == "BMP":
            cut = image_part(file.getvalue()[:60])["image_url"]["url"]
            assert cut.startswith("data:image/bmp;base64,")  # damaged: sent as it is, for the endpoint to refuse


def test_answers_of_a_log_without_times_are_kept(tmp_path):
    with scripted_endpoint(lambda words, before: Reply("a", delay=0.02)) as script:
        (first,) = build(script.url, tmp_path).ask([ask("x")])
        assert first.seconds >= 0.02
        log = tmp_path / "answers.jsonl"
        entry = json.loads(log.read_text())
        assert entry.pop("seconds") == first.seconds
        log.write_text(json.dumps(entry) + "\n")
        again = build(script.url, tmp_path)
        assert [own.text for own in again.ask([ask("x")])] == ["a"] and again.totals.kept == 1


@pytest.mark.parametrize(
    ("base_url", "key_variable", "key"),
    [
        (None, None, "openai"),
        ("https://api.openai.com/v1", None, "openai"),
        ("https://eu.api.openai.com/v1", None, "openai"),
        ("https://api.openai.com.other.org/v1", None, None),
        ("https://other.org/v1", None, None),
        ("https://other.org/v1", "OTHER_KEY", "other"),
        ("https://other.org/v1", "OPENAI_API_KEY", "openai"),
        ("http://127.0.0.1:8000/v1", None, None),
        ("http://127.0.0.1:8000/v1", "OTHER_KEY", "other"),
        ("http://[::1]:8000/v1", "OTHER_KEY", "other"),
        ("http://localhost:8000/v1", "UNSET_KEY", None),
        ("http://192.168.0.7/v1", None, None),
        ("https://other.org/v1", "UNSET_KEY", "UNSET_KEY is not set"),
        ("http://other.org/v1", "OTHER_KEY", "to other.org unencrypted"),
        ("http://api.openai.com/v1", None, "to api.openai.com unencrypted"),
        ("http://127.0.0.1.other.org/v1", "OTHER_KEY", "to 127.0.0.1.other.org unencrypted"),
    ],
)
def test_a_key_goes_only_to_the_endpoint_that_it_is_for(base_url, key_variable, key, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "openai")
    monkeypatch.setenv("OTHER_KEY", "other")
    for name in ("UNSET_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    settings = EndpointSettings("judge", base_url, key_variable)
    if key is not None and " " in key:
        with pytest.raises(EndpointError, match=key):
            find_key(settings)
    else:
        assert find_key(settings) == key


def test_an_endpoint_is_sent_the_key_that_is_for_it(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "openai")
    with scripted_endpoint(lambda words, before: Reply("a")) as script:
        build(script.url, tmp_path).ask([ask("none")])
        build(script.url, tmp_path, key_variable="OPENAI_API_KEY").ask([ask("given")])
    assert script.keys == ["Bearer none", "Bearer openai"]


def test_an_address_with_a_password_is_refused_without_showing_it():
    with pytest.raises(ValueError, match="the endpoint at host has a user name or password") as found:
        EndpointSettings("judge", "https://user:secret@host/v1")
    assert "secret" not in str(found.value)
