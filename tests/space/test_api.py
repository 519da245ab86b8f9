"""The HTTP API of the page, which can be called with anything: each failure ends in a sentence."""

import json
import re
import shutil
import socket
import time
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image

from vlv.checkpoints import MINIATURE
from vlv.space.app import EXAMPLES, Demo, start

FILE = {"_type": "gradio.FileData"}
SEED, STEPS, TOKENS = "Seed must be", "Denoising steps must be", "Maximum number of tokens must be"
EMPTY = "the field is empty"


class Api:
    """The HTTP API of a running page."""

    def __init__(self, url: str):
        self.url = f"{url}gradio_api"

    def upload(self, path) -> dict:
        """An uploaded file, as the value of an image field."""
        with open(path, "rb") as file:
            answer = httpx.post(f"{self.url}/upload", files={"files": file})
        return {"path": answer.raise_for_status().json()[0], "meta": FILE}

    def call(self, name: str, *data) -> tuple[str, list | dict | None]:
        """The last event of a function, "complete" or "error", with its data."""
        if name == "reconstruct":
            data = (*data, *("", 24)[len(data) - 4 :])  # no words, all embeddings
        body = json.dumps({"data": data})  # json knows NaN, which httpx refuses to write
        event = httpx.post(f"{self.url}/call/{name}", content=body, headers={"content-type": "application/json"})
        stream, deadline = "", time.monotonic() + 60
        with httpx.stream("GET", f"{self.url}/call/{name}/{event.json()['event_id']}", timeout=60) as answer:
            for piece in answer.iter_text():
                stream += piece
                assert time.monotonic() < deadline, "no result within a minute"
        kind, data = re.findall(r"event: (\w+)\ndata: (.*)", stream)[-1]
        return kind, json.loads(data)

    def refused(self, name: str, *data) -> str:
        """The message for a call that fails."""
        kind, answer = self.call(name, *data)
        assert kind == "error", answer
        return answer["error"]


@contextmanager
def serving(demo):
    page, url = start(demo)
    try:
        yield Api(url)
    finally:
        page.close(verbose=False)


@pytest.fixture(scope="module")
def api(demo):
    with serving(demo) as api:
        yield api


@pytest.fixture(scope="module")
def image(api):
    return api.upload(EXAMPLES[0])


@pytest.mark.parametrize(
    ("seed", "steps", "guidance", "message"),
    [
        (None, 2, 2.0, f"{SEED} a whole number from 0 to {2**63 - 1}; {EMPTY}."),
        (2**63, 2, 2.0, f"got {2**63}."),
        (10**30, 2, 2.0, f"got {10**30}."),
        (-1, 2, 2.0, "got -1."),
        (1.5, 2, 2.0, "got 1.5."),
        (float("nan"), 2, 2.0, "got nan."),
        ("7", 2, 2.0, SEED),
        (True, 2, 2.0, SEED),
        ([7], 2, 2.0, SEED),
        (1, None, 2.0, f"{STEPS} a whole number from 1 to 100; {EMPTY}."),
        (1, "", 2.0, EMPTY),
        (1, 0, 2.0, "got 0."),
        (1, 10**9, 2.0, f"{STEPS} a whole number from 1 to 100; got 1000000000."),
        (1, 2, None, f"Guidance scale must be a number from 1.0 to 6.0; {EMPTY}."),
        (1, 2, -3, "got -3."),
        (1, 2, float("inf"), "got inf."),
    ],
)
def test_a_setting_that_cannot_be_used_is_named(seed, steps, guidance, message, api, image):
    assert message in api.refused("reconstruct", image, seed, steps, guidance)
    assert message in api.refused("compose", image, image, 4, 4, seed, steps, guidance)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ((None, "greedy", 1.0, 4, ""), f"{TOKENS} a whole number from 4 to 300; {EMPTY}."),
        ((0, "greedy", 1.0, 4, ""), "got 0."),
        ((10**9, "greedy", 1.0, 4, ""), "got 1000000000."),
        ((8, "best", 1.0, 4, ""), "Decoding must be greedy, beams or sampling"),
        ((8, "greedy", 1.0, 4, "sing"), "Instruction must be empty or 'briefly'"),
        ((8, "greedy", 1.0, 4, ["briefly"]), "Instruction must be empty or 'briefly'"),
        ((8, None, 1.0, 4, ""), "Decoding must be"),
        ((8, ["greedy"], 1.0, 4, ""), "Decoding must be"),
        ((8, "sampling", 0, 4, ""), "Temperature (for sampling) must be a number from 0.1 to 2.0; got 0."),
        ((8, "beams", 1.0, 1000, ""), "Number of beams (for beams) must be a whole number from 2 to 8; got 1000."),
    ],
)
def test_a_setting_of_captions_that_cannot_be_used_is_named(settings, message, api, image):
    assert message in api.refused("caption", image, *settings)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("", 0), "image_tokens is 0; expected 1 to 24"),
        (("a sun", 30), "Embeddings kept must be a whole number from 0 to 24; got 30."),
        ((["a sun", 3], 24), "cannot be used"),
        (("a sun " * 20, 24), "24 caption embeddings and 42 tokens of the prompt do not fit"),
    ],
)
def test_words_that_cannot_be_used_are_named(words, message, api, image):
    assert message in api.refused("reconstruct", image, 1, 1, 2.0, *words)


def test_settings_of_another_decoding_are_ignored(api, image):
    kind, (caption,) = api.call("caption", image, 8, "greedy", None, None, None)
    assert kind == "complete" and caption


def test_the_bounds_themselves_are_allowed(api, image):
    assert api.call("reconstruct", image, 2**63 - 1, 1, 6)[0] == "complete"
    assert api.call("reconstruct", image, 0, 1, 1)[0] == "complete"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.png", b"", "empty.png is empty (0 bytes). Choose another file."),
        ("cut.png", Path(EXAMPLES[0]).read_bytes()[:300], "cut.png is damaged: "),
        (
            "page.svg",
            b"<svg xmlns='http://www.w3.org/2000/svg'/>",
            "page.svg is not an image in a format that can be read",
        ),
        ("notes.txt", b"words", "notes.txt is not an image in a format that can be read"),
    ],
)
def test_a_file_that_is_not_an_image_is_named(name, content, message, api, image, tmp_path):
    (tmp_path / name).write_bytes(content)
    uploaded = api.upload(tmp_path / name)
    for call in (("caption", uploaded, 8, "greedy", 1.0, 4, ""), ("compose", image, uploaded, 4, 4, 1, 2, 2.0)):
        refused = api.refused(*call)
        assert message in refused and str(Path(uploaded["path"]).parent) not in refused


def test_an_upload_that_is_gone_is_named(api, tmp_path):
    """An image that no other test has: Gradio keeps an upload under its content, in one folder for all processes."""
    Image.effect_noise((32, 32), 50).save(tmp_path / "gone.png")
    uploaded = api.upload(tmp_path / "gone.png")
    Path(uploaded["path"]).unlink()
    assert api.refused("caption", uploaded, 8, "greedy", 1.0, 4, "") == (
        "gone.png could not be read: No such file or directory. Choose the image again."
    )


def test_no_image_is_a_request_to_choose_one(api, image):
    assert api.refused("reconstruct", None, 1, 2, 2.0) == "Choose an image first."
    assert api.refused("compose", image, None, 4, 4, 1, 2, 2.0) == "Choose the second image first."


def test_an_upload_that_is_too_large_is_refused(api, tmp_path):
    (tmp_path / "large.png").write_bytes(bytes(10 * 2**20 + 1))
    with pytest.raises(httpx.HTTPStatusError) as refused:
        api.upload(tmp_path / "large.png")
    assert refused.value.response.status_code == 413 and "maximum allowed size" in refused.value.response.text


@pytest.mark.parametrize("meta", [{"meta": FILE}, {"meta": {}}, {}], ids=["meta", "empty meta", "no meta"])
def test_a_file_of_the_server_that_was_not_uploaded_is_refused(meta, api, tmp_path):
    private = shutil.copy(EXAMPLES[0], tmp_path / "private.png")
    refused = api.refused("caption", {"path": str(private), **meta}, 8, "greedy", 1.0, 4, "")
    assert "not uploaded" in refused


@pytest.mark.parametrize("value", ["text", 3, [None]])
def test_a_request_that_gradio_refuses_says_why(value, api):
    assert "valid dictionary" in api.refused("caption", value, 8, "greedy", 1.0, 4, "")


@pytest.mark.slow
@pytest.mark.parametrize("decoding", ["greedy", "beams", "sampling"])
def test_a_model_that_fails_ends_in_a_sentence_at_once(decoding, capfd):
    demo = Demo(str(MINIATURE))
    with serving(demo) as api:
        image = api.upload(EXAMPLES[0])
        demo.captioner.language_model.set_output_embeddings(torch.nn.Linear(3, 3))  # fits no other part
        message = api.refused("caption", image, 8, decoding, 1.0, 4, "")
        assert message.startswith("Something failed on the server. Try again")
        log = capfd.readouterr().err
        assert log.count("Traceback (most recent call last)") == 1 and "shapes cannot be multiplied" in log


@pytest.mark.slow
@pytest.mark.parametrize("tab", ["reconstruct", "compose"])
def test_a_diffusion_model_that_fails_ends_in_a_sentence(tab, capfd):
    demo = Demo(str(MINIATURE))
    with serving(demo) as api:
        image = api.upload(EXAMPLES[0])
        demo.pipeline.unet.conv_in = torch.nn.Conv2d(1, 1, 1)
        images = [image] if tab == "reconstruct" else [image, image, 4, 4]
        assert api.refused(tab, *images, 1, 2, 2.0).startswith("Something failed on the server. Try again")
        assert "expected input" in capfd.readouterr().err


@pytest.mark.slow
def test_the_page_goes_on_when_the_model_s_folder_is_deleted(tmp_path):
    folder = shutil.copytree(MINIATURE, tmp_path / "model")
    demo = Demo(str(folder))
    shutil.rmtree(folder)
    with serving(demo) as api:
        image = api.upload(EXAMPLES[0])
        assert api.call("caption", image, 8, "greedy", 1.0, 4, "")[0] == "complete"
        assert api.call("reconstruct", image, 1, 2, 2.0)[0] == "complete"


def test_input_that_cannot_be_used_leaves_no_traceback_in_the_log(api, image, capfd):
    api.refused("reconstruct", image, None, 2, 2.0)
    assert capfd.readouterr().err == ""


def test_a_busy_port_is_an_error(demo):
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(OSError, match="empty port"):
        start(demo, server_port=busy.getsockname()[1])
