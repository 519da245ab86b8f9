"""An OpenAI-compatible endpoint that knows scenes: `python -m vlv.miniature.scene_endpoint FOLDER --port 8001`.

It takes the place of the paper's Gemini and DeepSeek in the protocols that ask a model. The scene classifier reads
images and the grammar captions, and rules make the answers. It knows the prompts of `vlv evaluate judge`, `vqa`,
`spatial` (`--boxes 2d`) and `composition`, and no others.
"""

import argparse
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vlv.evaluation.composition import CONTENT_PROMPT
from vlv.evaluation.detections import OBJECT
from vlv.evaluation.detections import PROMPTS as BOX_PROMPTS
from vlv.evaluation.judge import COMPARISON_PROMPT, SCORE_PROMPT
from vlv.evaluation.vqa import BLIND_INSTRUCTION, INSTRUCTION
from vlv.processing_vlv import to_rgb

from .evaluation import SCENE_CLASSIFIER_FILE
from .grammar import parse_caption
from .scene_classifier import SceneClassifier, resize_to_scene
from .scene_detector import detect_objects
from .scene_questions import answer_question
from .world import Scene

MODEL = "scenes"
MAX_BYTES = 50_000_000  # of a request


class SceneModel:
    """Answers the prompts of the protocols about scenes.

    Args:
        scene_classifier: Reads images.
    """

    def __init__(self, scene_classifier: SceneClassifier):
        self.scene_classifier = scene_classifier

    def answer(self, text: str, images: Sequence[str]) -> str:
        """What it writes to a prompt.

        Args:
            images: Data URIs.

        Raises:
            ValueError: If it does not know the prompt, or cannot read an image.
        """
        pixels = [resize_to_scene(_to_tensor(image)) for image in images]
        scenes = self.scene_classifier.predict_scenes(torch.stack(pixels)) if pixels else []
        if len(scenes) == 1 and (found := _fields(SCORE_PROMPT, text)):
            return f"Score: {score_caption(parse_caption(found['caption']), scenes[0])}"
        if len(scenes) == 1 and (found := _fields(COMPARISON_PROMPT, text)):
            first, second = (_balance(parse_caption(found[name]), scenes[0]) for name in ("first", "second"))
            return f"Better: {'equal' if first == second else 1 if first > second else 2}"
        if len(scenes) == 2 and text == CONTENT_PROMPT:
            return f"Score: {score_content(*scenes)}"
        if len(scenes) == 1 and text == BOX_PROMPTS["2d"]:
            return json.dumps(_boxes(pixels[0], scenes[0]))
        if not scenes and text.startswith((INSTRUCTION, BLIND_INSTRUCTION)):
            context, question = re.findall(r"(?:Image context: (.*)\n)?Image question: (.*)", text)[-1]
            return f"{answer_question(question, parse_caption(context))}$"
        raise ValueError(
            f"this model answers the prompts of vlv evaluate, not {text[:80]!r} with {len(images)} images"
        )


def _fields(prompt: str, text: str) -> dict[str, str] | None:
    """The values of the fields of a prompt; None if the text is not that prompt."""
    pattern = re.sub(r"\\\{(\w+)\\\}", r"(?P<\1>.*)", re.escape(prompt))
    found = re.fullmatch(pattern, text, re.DOTALL)
    return found.groupdict() if found else None


def score_caption(caption: Scene, scene: Scene) -> int:
    """The score of a caption by the judge's scale of 0 to 6.

    A fact is an object with size and place, or the background. Little is less than half of them.
    """
    stated, true = _facts(caption), _facts(scene)
    found, invented = (stated & true).total(), (stated - true).total()
    enough = 2 * found >= true.total()
    if invented:
        return 0 if invented > 1 or not found else 2 if enough else 1
    missing = true.total() - found
    return 6 - missing if missing < 2 else 4 if enough else 3


def score_content(original: Scene, generated: Scene) -> int:
    """How much of one scene another one shows, 0 to 6: the share of its facts, objects at any place."""
    true = Counter([o.name for o in original.objects] + [str(original.background)])
    found = Counter([o.name for o in generated.objects] + [str(generated.background)])
    return round(6 * (true & found).total() / true.total())


def _facts(scene: Scene) -> Counter[tuple[str, ...]]:
    background = [] if scene.background is None else [(scene.background,)]
    return Counter([*((o.size, o.name, o.place) for o in scene.objects), *background])


def _balance(caption: Scene, scene: Scene) -> int:
    """Right facts less wrong ones."""
    stated, true = _facts(caption), _facts(scene)
    return (stated & true).total() - (stated - true).total()


def _boxes(pixels: torch.Tensor, scene: Scene) -> list[dict[str, Any]]:
    found = [own for own in detect_objects(pixels, scene) if own.kind == OBJECT]
    return [
        {
            "label": own.label,
            "box_2d": [
                round(1000 * value)
                for value in (
                    own.centre[1] - own.size[1] / 2,
                    own.centre[0] - own.size[0] / 2,
                    own.centre[1] + own.size[1] / 2,
                    own.centre[0] + own.size[0] / 2,
                )
            ],
        }
        for own in found
    ]


def _to_tensor(image: str) -> torch.Tensor:
    if not image.startswith("data:"):
        raise ValueError("images are data URIs; this model downloads none")
    return torch.from_numpy(np.array(to_rgb(image))).permute(2, 0, 1)


def _handler(model: SceneModel) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content: dict[str, Any]
            try:
                length = int(self.headers.get("Content-Length", 0))
                if not 0 <= length <= MAX_BYTES:
                    raise ValueError(f"Content-Length must be from 0 to {MAX_BYTES}, not {length}")
                status, content = 200, _complete(model, json.loads(self.rfile.read(length)))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                status, content = 400, {"error": {"message": str(error), "type": "invalid_request_error"}}
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: Any) -> None:
            pass

    return Handler


def _complete(model: SceneModel, request: dict[str, Any]) -> dict[str, Any]:
    """A chat completion of a request. Raises `ValueError` and others for a malformed one."""
    content = request["messages"][-1]["content"]
    parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    text = "\n".join(part["text"] for part in parts if part["type"] == "text")
    images = [part["image_url"]["url"] for part in parts if part["type"] == "image_url"]
    answer = model.answer(text, images)
    counts = {"prompt_tokens": len(text.split()), "completion_tokens": len(answer.split())}
    return {
        "id": "scene",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [{"index": 0, "message": {"role": "assistant", "content": answer}, "finish_reason": "stop"}],
        "usage": counts | {"total_tokens": sum(counts.values())},
    }


@contextmanager
def serve_scenes(folder: str | Path, port: int = 0) -> Iterator[str]:
    """Serves the model in this process; gives its address, `http://127.0.0.1:port/v1`.

    Args:
        folder: A miniature with its scene classifier.
        port: 0 for a free one.
    """
    model = SceneModel(SceneClassifier.load(Path(folder) / SCENE_CLASSIFIER_FILE))
    server = ThreadingHTTPServer(("127.0.0.1", port), _handler(model))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.scene_endpoint", description=__doc__)
    parser.add_argument("folder", help="a miniature with its scene classifier, such as checkpoints/vlv-miniature")
    parser.add_argument("--port", type=int, default=8001, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with serve_scenes(options.folder, options.port) as address:
        print(f"{address}#{MODEL}", flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
