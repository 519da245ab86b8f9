"""Captions of images by each kind of captioner, and a run that goes on."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import ExifTags, Image
from transformers import CLIPImageProcessorPil, Florence2Processor, LlavaProcessor
from transformers.image_utils import load_image

from vlv.checkpoints import MINIATURE
from vlv.cli.main import main
from vlv.evaluation.captioners import (
    CAPTION_TASK,
    PROMPT,
    caption_images,
    caption_notes,
    default_prompt,
    find_kind,
    open_captioner,
)
from vlv.evaluation.endpoint import PriceReached
from vlv.miniature.tokenizer import build_tokenizer

from .openai_server import Reply, scripted_endpoint

IMAGES = Path(__file__).parent.parent.parent / "examples" / "images"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> list[Path]:
    """Two images, and a file between them that is not one."""
    broken = tmp_path_factory.mktemp("broken") / "broken.png"
    broken.write_bytes(b"not an image")
    return [IMAGES / "test-1.png", broken, IMAGES / "test-2.png"]


def test_the_kind_is_found_from_the_source(tmp_path, llava, files):
    (tmp_path / "captions.json").write_text("{}")
    found = [find_kind(source) for source in (str(MINIATURE), str(llava), "http://127.0.0.1/v1#m")]
    assert found == ["vlv", "pipeline", "endpoint"]
    assert find_kind(str(tmp_path / "captions.json")) == find_kind("absent.json") == "file"


def test_a_source_that_is_nothing_is_named_with_what_to_do(tmp_path):
    with pytest.raises(FileNotFoundError, match="runs/none is neither a folder nor a model on the Hub") as error:
        find_kind("runs/none")
    assert "pass the folder of a model, a repo id like org/name" in str(error.value)
    (tmp_path / "model").mkdir()
    with pytest.raises(FileNotFoundError, match="model is not the folder of a model: it has no config"):
        find_kind(str(tmp_path / "model"))


@pytest.mark.parametrize("kind", ["endpoint", "file"])
def test_empty_captions_are_captions_and_counted_and_those_cut_off_are(kind, files, tmp_path):
    replies = {"a": Reply("a small dog"), "b": Reply(" "), "c": Reply("", finish_reason="length"), "d": Reply("a")}
    replies["d"].finish_reason = "length"
    images = dict(zip(replies, [files[0], files[2]] * 2, strict=True))
    (tmp_path / "c.json").write_text(json.dumps({name: reply.text for name, reply in replies.items()}))

    def answer(words: str, before: int) -> Reply:
        return list(replies.values())[before]

    with scripted_endpoint(answer) as script:
        for _ in range(2):  # the second time from the log
            source = f"{script.url}#m" if kind == "endpoint" else str(tmp_path / "c.json")
            settings = {"log": tmp_path / "answers.jsonl", "endpoint": {"concurrency": 1, "max_retries": 0}}
            found = caption_images(open_captioner(source, **settings), images, tmp_path / "log.jsonl")
            assert [own.caption.strip() for own in found] == ["a small dog", "", "", "a"]
            assert [own.is_empty for own in found] == [False, True, True, False]
            assert [own.is_cut for own in found] == [False, False, kind == "endpoint", kind == "endpoint"]
            empty, *cut = caption_notes(found)
            assert empty == "2 of 4 captions are empty, such as that of 'b'; they count"
            expected = "2 of 4 captions are cut off at the most tokens, such as that of 'c'; raise max_new_tokens"
            assert cut == ([expected] if kind == "endpoint" else [])
        assert len(script.requests) == (4 if kind == "endpoint" else 0)


def test_an_endpoint_is_sent_images_that_are_upright(tmp_path):
    corner = Image.new("RGB", (32, 16), "white")
    corner.paste((200, 0, 0), (0, 0, 8, 8))  # at the top left, as it is stored
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6  # to be shown turned clockwise by 90 degrees
    for kind in ("jpg", "png"):
        corner.save(tmp_path / f"turned.{kind}", exif=turned, **({"quality": 95} if kind == "jpg" else {}))
    corner.save(tmp_path / "upright.jpg")
    with scripted_endpoint(lambda words, before: Reply("a corner")) as script:
        names = ("turned.jpg", "turned.png", "upright.jpg")
        captioner = open_captioner(f"{script.url}#m", log=tmp_path / "a.jsonl", endpoint={"concurrency": 1})
        assert len(list(captioner.caption([tmp_path / name for name in names]))) == 3
    sent = []
    for request in script.requests:
        head, _, data = request["messages"][0]["content"][0]["image_url"]["url"].partition(";base64,")
        sent.append((head, base64.b64decode(data)))
    assert [head for head, _ in sent] == ["data:image/jpeg", "data:image/png", "data:image/jpeg"]
    for _, data in sent[:2]:
        image = Image.open(io.BytesIO(data))
        assert image.size == (16, 32) and not image.getexif()
        red, white = image.convert("RGB").getpixel((12, 3)), image.convert("RGB").getpixel((3, 3))
        assert red[0] > 180 and red[1] < 40 and min(white) > 220  # at the top right
    assert sent[2][1] == (tmp_path / "upright.jpg").read_bytes()


@pytest.mark.slow
def test_a_vlv_writes_what_the_command_writes_and_names_what_it_cannot_read(files, tmp_path):
    found = list(open_captioner(str(MINIATURE), batch_size=2).caption(files))
    assert main(["caption", *map(str, files), "--output", str(tmp_path / "c.json")]) == 1
    expected = json.loads((tmp_path / "c.json").read_text())
    assert {own.name: own.caption for own in found if own.error is None} == expected
    assert found[1].name == "broken.png" and "not an image" in found[1].error and found[1].caption is None
    assert all(own.seconds > 0 for own in found)


@pytest.mark.slow
def test_a_model_of_transformers_writes_captions_of_a_chat_or_of_words(llava, files, tmp_path):
    captioner = open_captioner(str(llava), max_new_tokens=6)
    found = list(captioner.caption(files))
    settings = {"generate_kwargs": {"max_new_tokens": 6, "do_sample": False}, "return_full_text": False}
    picture = {"type": "image", "image": load_image(str(files[0]))}
    chat = [{"role": "user", "content": [picture, {"type": "text", "text": PROMPT}]}]
    assert found[0].caption == captioner.pipeline(text=chat, **settings)[0]["generated_text"].strip() != ""
    assert found[0].caption != found[2].caption and "not an image" in found[1].error
    assert captioner.fingerprint != open_captioner(str(llava), max_new_tokens=5).fingerprint
    captioner.is_chat, captioner.prompt = False, "no place for the image"
    (refused,) = captioner.caption(files[:1])
    assert refused.caption is None and refused.error.startswith("the model does not take it: ")
    captioner.is_chat, captioner.prompt = False, "<image>a small dog"  # as of a processor without a chat template
    (plain,) = captioner.caption(files[:1])
    expected = captioner.pipeline(picture["image"], text="<image>a small dog", **settings)[0]["generated_text"]
    assert plain.caption == expected.strip() != found[0].caption


@pytest.mark.slow
def test_an_endpoint_is_asked_about_each_image_once(files, tmp_path):
    def answer(words: str, before: int) -> Reply:
        return Reply(status=500, body=b"{}") if before == 0 else Reply(f" {words} ", delay=0.05)

    with scripted_endpoint(answer) as script:
        source, log = f"{script.url}#m", tmp_path / "new" / "answers.jsonl"
        settings = {"max_retries": 0, "concurrency": 1}
        names = ["a", "b", "c"]
        first = list(open_captioner(source, log=log, endpoint=settings, prompt="What?").caption(files, names))
        assert [own.caption for own in first] == [None, "What?", "What?"] and "status 500" in first[0].error
        assert first[1].seconds >= 0.05
        again = open_captioner(source, log=log, endpoint=settings, prompt="What?")
        assert [own.caption for own in again.caption(files, names)] == ["What?"] * 3
        assert (again.endpoint.totals.kept, again.endpoint.totals.answered, len(script.requests)) == (2, 1, 4)
        content = script.requests[-1]["messages"][0]["content"]
        assert content[0]["image_url"]["url"].startswith("data:image/png;base64,") and content[1]["text"] == "What?"
        limited = {"price_in": 1000.0, "max_price": 0.15, **settings}
        with pytest.raises(PriceReached, match="raise it to go on"):
            list(open_captioner(source, log=tmp_path / "b.jsonl", endpoint=limited, prompt="What?").caption(files))


@pytest.mark.parametrize(
    ("source", "settings", "error"),
    [
        ("http://127.0.0.1/v1", {"log": Path("a.jsonl")}, "names no model; expected the endpoint's address"),
        ("http://127.0.0.1/v1#m", {}, "is an endpoint; pass log"),
        ("absent.json", {}, "absent.json cannot be read"),
        (str(MINIATURE), {"kind": "vllm"}, "kind is one of vlv, pipeline, endpoint, file, not 'vllm'"),
    ],
)
def test_sources_that_are_incomplete_are_refused(source, settings, error):
    with pytest.raises(ValueError, match=error):
        open_captioner(source, **settings)


def test_captions_of_a_file_are_found_by_the_names_of_images(files, tmp_path):
    (tmp_path / "c.json").write_text(json.dumps({"x/test-1.jpg": "one", "test-2.png": "two"}))
    found = list(open_captioner(str(tmp_path / "c.json")).caption(files))
    assert [own.caption for own in found] == ["one", None, "two"]
    assert found[1].error == f"{tmp_path / 'c.json'} has no caption of it"
    with pytest.raises(ValueError, match="need as many different names"):
        list(open_captioner(str(tmp_path / "c.json")).caption([files[0], files[0]]))


def test_captions_are_kept_for_the_same_captioner_name_and_image(files, tmp_path):
    log, images = tmp_path / "captions.jsonl", {"a": tmp_path / "a.png", "b": files[1], "c": files[2]}
    images["a"].write_bytes(files[0].read_bytes())
    counted: list[str] = []

    class Counted:
        """The embedded miniature, which notes what it is asked."""

        def __init__(self) -> None:
            self.own = open_captioner(str(MINIATURE), max_new_tokens=3)
            self.source, self.kind, self.keeps_captions = self.own.source, self.own.kind, False
            self.fingerprint = self.own.fingerprint

        def caption(self, paths, names=None):
            counted.extend(names)
            return self.own.caption(paths, names)

    captioner = Counted()
    done: list[int] = []
    first = caption_images(captioner, images, log, done.append)
    assert counted == ["a", "b", "c"] and sum(done) == 3 and first[1].error is not None
    with log.open("a") as file:
        file.write('{"captioner": ')  # a killed run's last line
    again = caption_images(captioner, images, log)
    assert [again[0], again[2]] == [first[0], first[2]] and counted == ["a", "b", "c", "b"]
    images["a"].write_bytes(files[2].read_bytes())
    changed = caption_images(captioner, images, log)
    assert counted == ["a", "b", "c", "b", "a", "b"] and changed[0].caption == first[2].caption
    captioner.fingerprint = "another"
    caption_images(captioner, images, log)
    assert counted[-3:] == ["a", "b", "c"]


def test_models_of_transformers_are_asked_what_their_processors_understand():
    tokenizer, images = build_tokenizer(for_text_encoder=False), CLIPImageProcessorPil()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<image>"]})
    tokenizer.image_token, tokenizer.image_token_id = "<image>", tokenizer.convert_tokens_to_ids("<image>")
    images.image_seq_length = 4
    florence = Florence2Processor(images, tokenizer)
    assert default_prompt(florence) == CAPTION_TASK == "<MORE_DETAILED_CAPTION>"
    assert florence(text=CAPTION_TASK, images=load_image(str(IMAGES / "test-1.png"))).input_ids  # a task of its own
    settings = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    assert default_prompt(LlavaProcessor(images, tokenizer, chat_template="{{ messages }}", **settings)) == PROMPT
    assert default_prompt(LlavaProcessor(images, tokenizer, **settings)) == ""
