"""`vlv serve`, as the `openai` client and other HTTP clients see it."""

import asyncio
import base64
import io
import json
import re
import signal
import socket
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import numpy as np
import openai
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.pipelines import load_reconstruction
from vlv.serving.app import ServerLimits, build_app
from vlv.serving.rows import Settings
from vlv.serving.served import Chat, ServedModel

from .process import KEY, MODEL, start_server

EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "images").glob("*.png"))[::2]


def uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def chat_about(*urls: str, text: str | None = None) -> list[dict]:
    content: list[dict] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    if text is not None:
        content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def expected(tmp_path_factory) -> dict[str, dict[str, str]]:
    """The captions of `vlv caption`, by prompt and name of the image."""
    captions = {}
    for prompt in ("", "as tags"):
        output = tmp_path_factory.mktemp("captions") / "captions.json"
        assert main(["caption", *map(str, EXAMPLES), "--output", str(output), "--prompt", prompt]) == 0
        captions[prompt] = {Path(name).name: caption for name, caption in json.loads(output.read_text()).items()}
    return captions


@pytest.fixture
def client(server):
    return server.client()


@pytest.fixture
def post(server):
    """Sends a body to the chat route as it is."""

    def send(body: bytes | str, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | headers
        return httpx.post(server.url + path, content=body, headers=headers, timeout=60)

    return send


@pytest.mark.slow
@pytest.mark.parametrize("prompt", ["", "as tags"])
def test_captions_are_those_of_the_command(client, expected, prompt):
    for path in EXAMPLES:
        answer = client.chat.completions.create(model=MODEL, messages=chat_about(uri(path), text=prompt or None))
        assert answer.choices[0].message.content == expected[prompt][path.name]
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_two_hundred_concurrent_requests_are_answered_each_with_its_own_caption(server, expected):
    async def ask(client: openai.AsyncOpenAI, number: int) -> bool:
        path, prompt = EXAMPLES[number % len(EXAMPLES)], ["", "as tags"][number % 2]
        messages = chat_about(uri(path), text=prompt or None)
        answer = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=6)
        text = answer.choices[0].message.content
        return len(text) > 5 and expected[prompt][path.name].startswith(text)

    async def ask_all() -> list[bool]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
            return await asyncio.gather(*(ask(client, number) for number in range(200)))

    assert all(asyncio.run(ask_all()))


def test_a_streamed_answer_has_the_same_text(client, expected):
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=chat_about(uri(EXAMPLES[0])), stream=True, stream_options={"include_usage": True}
        )
    )
    parts = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(parts) == expected[""][EXAMPLES[0].name] and sum(map(bool, parts)) > 5
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.prompt_tokens == 24 and chunks[-1].usage.completion_tokens > 5


def test_choices_are_drawn_by_the_seed_whatever_else_is_asked_at_the_time(client):
    def ask(seed: int) -> list[str]:
        messages = chat_about(uri(EXAMPLES[1]))
        answer = client.chat.completions.create(model=MODEL, messages=messages, n=4, temperature=1.5, seed=seed)
        return [own.message.content for own in answer.choices]

    first, other = ask(3), ask(9)
    assert len(set(first)) > 1 and first != other
    results: dict[int, list[str]] = {}
    threads = [threading.Thread(target=lambda seed=seed: results.update({seed: ask(seed)})) for seed in (1, 3, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[3] == first


def test_an_answer_ends_before_a_stop_string_and_at_its_length(client, expected):
    messages = chat_about(uri(EXAMPLES[0]))
    full = expected[""][EXAMPLES[0].name]
    answer = client.chat.completions.create(model=MODEL, messages=messages, stop=["bottom", "top"]).choices[0]
    assert (answer.message.content, answer.finish_reason) == (full.split(" bottom")[0], "stop")
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=3)
    assert full.startswith(answer.choices[0].message.content) and answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3


def test_the_beginning_of_an_answer_goes_on(client, expected):
    full = expected[""][EXAMPLES[0].name]
    messages = [*chat_about(uri(EXAMPLES[0])), {"role": "assistant", "content": full.partition(",")[0]}]
    answer = client.chat.completions.create(model=MODEL, messages=messages)
    assert answer.choices[0].message.content == full.removeprefix(full.partition(",")[0])


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError, match="'gpt-4o' is not served here; this server has 'vlv-miniature'"):
        client.chat.completions.create(model="gpt-4o", messages=chat_about(uri(EXAMPLES[0])))


@pytest.mark.parametrize("encoding_format", ["float", "base64"])
def test_embeddings_are_the_caption_embeddings(client, encoding_format):
    arguments = {} if encoding_format == "base64" else {"encoding_format": "float"}  # base64 is the client's default
    answer = client.embeddings.create(model=MODEL, input=[uri(path) for path in EXAMPLES[:2]], **arguments)
    pipeline = load_reconstruction(MINIATURE)
    for path, own in zip(EXAMPLES, answer.data, strict=False):
        embeds = pipeline.get_caption_embeds(Image.open(path))[0]
        assert own.shape == list(embeds.shape)
        assert torch.allclose(torch.tensor(own.embedding).reshape(embeds.shape), embeds, atol=1e-4)


def test_variations_are_the_reconstructions_of_their_seeds(client):
    with pytest.warns(DeprecationWarning):  # the client's word on OpenAI's own models of this route
        answer = client.images.create_variation(
            image=EXAMPLES[0], n=2, response_format="b64_json", extra_body={"seed": 5, "num_inference_steps": 4}
        )
    images = load_reconstruction(MINIATURE)(
        [Image.open(EXAMPLES[0])] * 2,
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="pt",
    ).images
    for own, image in zip(answer.data, images, strict=True):
        with Image.open(io.BytesIO(base64.b64decode(own.b64_json))) as png:
            assert png.format == "PNG"
            pixels = torch.from_numpy(np.array(png)).permute(2, 0, 1) / 255
        assert (pixels - image.float()).abs().max() < 0.02


@pytest.mark.parametrize(
    ("key", "status"), [(KEY, 200), ("another key", 401), ("", 401)], ids=["right", "wrong", "none"]
)
def test_a_request_needs_the_key(server, key, status):
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    response = httpx.get(f"{server.url}/v1/models", headers=headers)
    assert response.status_code == status
    assert status == 200 or "Authorization: Bearer KEY" in response.json()["error"]["message"]
    assert httpx.get(f"{server.url}/health").json()["status"] == "ok"


CHAT = {"model": MODEL, "messages": chat_about("data:image/png;base64,aGVsbG8=")}
SMALL = chat_about(uri(EXAMPLES[0]))


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (b"", 400, "body"),
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "body"),
        (b"[" * 100_000, 400, "body|JSON|recursion"),
        ("[1, 2]", 400, "valid dictionary"),
        ("null", 400, "body"),
        (json.dumps(CHAT), 400, "messages.0..content.0..image_url|not an image"),
        (json.dumps(CHAT | {"messages": []}), 400, "messages: .*at least 1"),
        (json.dumps(CHAT | {"messages": [{"role": "user", "content": "hello"}]}), 400, "an image is missing"),
        (json.dumps(CHAT | {"messages": [{"role": "tool", "content": "x"}]}), 400, "messages.0.role"),
        (json.dumps(CHAT | {"messages": chat_about("http://127.0.0.1:1/a.png")}), 400, "not a public address"),
        (json.dumps(CHAT | {"messages": chat_about("file:///etc/passwd")}), 400, "give a data URI"),
        (json.dumps(CHAT | {"messages": SMALL * 2}), 400, "makes? one chat of each image|one image and one message"),
        (json.dumps(CHAT | {"messages": SMALL, "n": 99}), 400, "n is 99, and this server writes at most 16"),
        (json.dumps(CHAT | {"messages": SMALL, "max_tokens": 0}), 400, "max_tokens: .*greater than or equal to 1"),
        (json.dumps(CHAT | {"messages": SMALL, "temperature": "hot"}), 400, "temperature: .*number"),
        (json.dumps(CHAT | {"messages": SMALL}).replace('"user"', '"user", "x": NaN'), 200, ""),
        (json.dumps(CHAT | {"messages": SMALL, "temperature": float("nan")}), 400, "temperature"),
        (json.dumps(CHAT | {"messages": SMALL, "stop": ""}), 400, "stop"),
        (json.dumps(CHAT | {"messages": SMALL, "tools": [{}]}), 400, "tools is not supported"),
        (json.dumps(CHAT | {"messages": SMALL, "logprobs": True}), 400, "logprobs is not supported"),
        (json.dumps(CHAT | {"messages": SMALL, "user": "me", "store": False}), 200, ""),
        (json.dumps(CHAT | {"messages": chat_about(uri(EXAMPLES[0]), text="\ud800")}), 400, "not valid Unicode"),
        (json.dumps(CHAT | {"messages": SMALL, "stop": ["a"] * 17}), 400, "stop: .*at most 16"),
        (
            json.dumps(CHAT | {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}),
            400,
            "input_audio",
        ),
        (
            json.dumps(CHAT | {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            400,
            r"content.0.image_url: Field required",
        ),
        (json.dumps(CHAT | {"messages": chat_about(uri(EXAMPLES[0]), text="w " * 10**6)}), 400, "2000000 characters"),
        (json.dumps(CHAT | {"messages": chat_about(uri(EXAMPLES[0]), text="word " * 5000)}), 400, "positions"),
        (json.dumps(CHAT | {"messages": chat_about(uri(EXAMPLES[0]), text="<image>")}), 400, "image tokens"),
        (b"x" * (3 * 2**20), 413, "more than 2 MiB"),
    ],
    ids=range(30),
)
def test_what_cannot_be_answered_is_an_error_that_says_why(post, body, status, message):
    response = post(body)
    assert response.status_code == status, response.text
    if status != 200:
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        assert re.search(message, error["message"]), error


def test_forms_that_cannot_be_answered_are_errors_that_say_why(server):
    def send(**arguments) -> str:
        url = f"{server.url}/v1/images/variations"
        response = httpx.post(url, headers={"Authorization": f"Bearer {KEY}"}, **arguments)
        assert response.status_code == 400, response.text
        return response.json()["error"]["message"]

    image = {"image": EXAMPLES[0].read_bytes()}
    assert "an image is missing" in send(data={"n": "1"})
    assert "n is 'many'; expected a whole number from 1 to 10" in send(files=image, data={"n": "many"})
    assert "expected url or b64_json" in send(files=image, data={"response_format": "tiff"})
    assert "not an image in a format that this server reads" in send(files={"image": b"hello"})


def test_an_unknown_address_names_those_that_exist(server):
    response = httpx.get(f"{server.url}/v1/completions", headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == 404 and "/v1/chat/completions" in response.json()["error"]["message"]


@pytest.mark.slow
def test_clients_that_hang_up_leave_nothing_behind(server, client, expected):
    """Without that, twenty batches of sixteen long captions and a reconstruction of a hundred steps come first."""
    long = {"n": 16, "temperature": 2, "frequency_penalty": -2, "max_tokens": 1000, "stream": True}
    body = json.dumps({"model": MODEL, "messages": SMALL, **long}).encode()
    parts = urlsplit(server.url)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    for sent in [*[head.encode() + body] * 20, head.encode() + body[:10]]:  # the last promises more than comes
        connection = socket.create_connection((parts.hostname, parts.port))
        connection.sendall(sent)
        connection.close()
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/images/variations",
            headers={"Authorization": f"Bearer {KEY}"},
            files={"image": EXAMPLES[0].read_bytes()},
            data={"n": "10", "num_inference_steps": "100"},
            timeout=httpx.Timeout(10, read=0.5),
        )
    start = time.monotonic()
    answer = client.chat.completions.create(model=MODEL, messages=SMALL)
    assert answer.choices[0].message.content == expected[""][EXAMPLES[0].name]
    assert time.monotonic() - start < 30  # of minutes
    assert httpx.get(f"{server.url}/health").json()["waiting"] == 0


@pytest.mark.slow
def test_a_full_queue_refuses_and_sigterm_answers_what_it_has(tmp_path, expected):
    server = start_server(tmp_path / "log", "--max-waiting", "4", "--max-batch", "1", "--no-variations")
    answers: list[str] = []
    busy: list[openai.RateLimitError] = []
    refused: list[bool] = []

    def ask() -> None:
        try:
            answer = server.client().chat.completions.create(model=MODEL, messages=SMALL)
            answers.append(answer.choices[0].message.content)
        except openai.RateLimitError as error:
            busy.append(error)
        except openai.APIConnectionError:
            refused.append(True)  # it came after the signal

    threads = [threading.Thread(target=ask) for _ in range(30)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 30
    while not busy and time.monotonic() < deadline:
        time.sleep(0.01)
    server.process.send_signal(signal.SIGTERM)
    for thread in threads:
        thread.join()
    assert server.process.wait() == 0, server.log.read_text()
    assert answers and set(answers) == {expected[""][EXAMPLES[0].name]}
    assert "4 requests wait already" in str(busy[0]) and busy[0].response.headers["retry-after"] == "1"
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


def test_the_program_of_the_documentation_prints_what_it_says(server, monkeypatch, capsys):
    root = Path(__file__).parents[2]
    program, printed = re.search(
        r"```python\n(.*?)```\n\n```\n(.*?)```", (root / "docs/serving.md").read_text(), re.S
    ).groups()
    monkeypatch.chdir(root)
    exec(program.replace("http://127.0.0.1:8000", server.url).replace('"KEY"', repr(KEY)), {})
    assert capsys.readouterr().out == printed


@pytest.fixture(scope="module")
def served() -> ServedModel:
    return ServedModel(str(MINIATURE), reconstruct=False)


def test_an_answer_that_takes_too_long_is_an_error(served):
    body = {"model": MODEL, "messages": SMALL}
    with TestClient(build_app(served, ServerLimits(timeout=0.02))) as client:
        response = client.post("/v1/chat/completions", json=body)
        assert response.status_code == 504 and "longer than 0.02 s" in response.json()["error"]["message"]
        stream = client.post("/v1/chat/completions", json=body | {"stream": True}).text
        assert "longer than 0.02 s" in stream and "[DONE]" not in stream


@pytest.mark.parametrize("unknown_text", ["read", "ignore", "refuse"])
def test_words_that_the_model_was_not_trained_to_follow(served, expected, unknown_text):
    served.unknown_text = unknown_text
    with TestClient(build_app(served, ServerLimits())) as client:
        body = {"model": MODEL, "messages": chat_about(uri(EXAMPLES[0]), text="Describe this image.")}
        response = client.post("/v1/chat/completions", json=body)
        known = client.post(
            "/v1/chat/completions", json=body | {"messages": chat_about(uri(EXAMPLES[0]), text=" as tags\n")}
        )
        assert known.json()["choices"][0]["message"]["content"] == expected["as tags"][EXAMPLES[0].name]
    if unknown_text == "refuse":
        assert response.status_code == 400 and "the model follows 'briefly'" in response.json()["error"]["message"]
        return
    caption = response.json()["choices"][0]["message"]["content"]
    assert (caption == expected[""][EXAMPLES[0].name]) is (unknown_text == "ignore")


def test_chats_that_would_exceed_the_positions_together_are_written_apart(served):
    class OfTokens:
        def __init__(self, prompt: int, new: int):
            pixel_values = torch.zeros(1, 3, 64, 64)
            self.payload = Chat(torch.zeros(prompt), pixel_values, [Settings(new)])

    jobs = [OfTokens(100, 8), OfTokens(20, 60), OfTokens(20, 60), OfTokens(100, 4)]
    served.positions, before = 110, served.positions
    try:
        assert served._fitting_groups(jobs) == [jobs[:1], jobs[1:3], jobs[3:]]
    finally:
        served.positions = before


def test_no_caption_is_longer_than_the_server_allows(served):
    served.max_tokens_limit, before = 3, served.max_tokens_limit
    try:
        with TestClient(build_app(served, ServerLimits())) as client:
            body = {"model": MODEL, "messages": SMALL, "max_tokens": 5000}
            answer = client.post("/v1/chat/completions", json=body).json()
    finally:
        served.max_tokens_limit = before
    assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["finish_reason"] == "length"


def test_a_model_without_variations_says_so(served):
    with TestClient(build_app(served, ServerLimits())) as client:
        response = client.post("/v1/images/variations", files={"image": EXAMPLES[0].read_bytes()})
        assert response.status_code == 404 and "without a text-to-image model" in response.json()["error"]["message"]
