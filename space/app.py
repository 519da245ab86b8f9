"""What a VLV sees: captions, reconstructions, and pictures out of two images' caption embeddings.

Runs as a Hugging Face Space, where the variable `MODEL_ID` names the model (and `MODEL_REVISION` pins it), and as
`vlv demo` on any machine.
"""

import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import gradio as gr
import torch
from PIL import Image
from transformers import TextIteratorStreamer

from vlv import hub
from vlv.pipelines import VLVReconstructionPipeline

EXAMPLES = sorted(str(path) for path in (Path(__file__).parent / "examples").glob("*.png"))
MAX_UPLOAD = "10mb"
QUEUE_LENGTH = 20
PROGRESS = gr.Progress()  # as a default value it tells gradio to hand over a progress bar
CSS = """
.gradio-container { width: 100%; max-width: 1000px !important; margin: auto }
.image-frame img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }
"""


class Demo:
    """A loaded model and what the tabs do with it.

    Args:
        source: Folder in the Hub's layout, or a repo id.
        revision: Branch, tag or commit of the repo.
        device: Where the model runs.
        dtype: Of all of it.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it can neither caption nor reconstruct.
    """

    def __init__(
        self, source: str, revision: str | None = None, device: str = "cpu", dtype: torch.dtype = torch.float32
    ):
        patterns = [*hub.CAPTIONER_FILES, *hub.PIPELINE_FILES, "README.md"]
        folder = hub.resolve(source, revision=revision, allow_patterns=patterns)
        self.name = source if "/" in source and not Path(source).exists() else folder.name
        self.card = folder / "README.md"
        self.captioner: Any = None
        if (folder / "processor_config.json").is_file():
            self.captioner, self.processor = hub.load_captioner(folder, device=device, dtype=dtype)
            encoder, image_processor = self.captioner.model, self.processor.image_processor
        else:
            if not (folder / "model_index.json").is_file():
                raise ValueError(
                    f"{self.name} holds an encoder alone, without a language model to caption or a text-to-image "
                    "model to reconstruct (`vlv push --decoder` adds one)"
                )
            encoder, image_processor = hub.load_encoder(folder, device=device, dtype=dtype)
        self.queries = encoder.config.num_query_tokens
        self.image_processor = image_processor
        self.pipeline: Any = None
        if (folder / "model_index.json").is_file():
            if hub.has_two_encoders(folder):  # captions come from one, reconstructions from the other
                encoder, _ = hub.load_encoder(folder, device=device, dtype=dtype)
            parts = hub.load_diffusion_components(folder, dtype=dtype)
            pipeline = VLVReconstructionPipeline(encoder=encoder, image_processor=image_processor, **parts)
            self.pipeline = pipeline.to(device)
            self.pipeline.set_progress_bar_config(disable=True)

    def load(self, path: str | None, which: str = "an image") -> Image.Image:
        """The picture in a file, or an error that the page shows."""
        if not path:
            raise gr.Error(f"Choose {which} first.")
        try:
            return self.image_processor.load(path)
        except ValueError as error:
            reason = str(error).replace(str(path), Path(path).name)
            raise gr.Error(f"This cannot be read as an image: {reason}") from error

    def caption(self, path: str | None, longest: float, how: str, temperature: float, beams: float) -> Iterator[str]:
        """The caption so far, again and again until it is whole."""
        picture = self.load(path)
        pixels = self.processor(images=picture).pixel_values.to(self.captioner.device)
        settings: dict[str, Any] = {"pixel_values": pixels, "max_new_tokens": int(longest), "do_sample": False}
        if how == "beams":  # cannot be streamed: the words are settled at the end
            ids = self.captioner.generate(**settings, num_beams=int(beams))
            yield self.processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
            return
        if how == "sampling":
            settings |= {"do_sample": True, "temperature": temperature, "top_k": 0}
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_special_tokens=True, timeout=120)
        thread = Thread(target=self.captioner.generate, kwargs={**settings, "streamer": streamer}, daemon=True)
        thread.start()
        words = ""
        for piece in streamer:
            words += piece
            yield words.strip()
        thread.join()

    def reconstruct(
        self, path: str | None, seed: float, steps: float, guidance: float, progress: Any = PROGRESS
    ) -> tuple[Image.Image, Image.Image]:
        """The picture as the model is shown it, and its reconstruction."""
        picture = self.load(path)
        drawn = self.draw({"image": picture}, seed, steps, guidance, progress)
        return picture.resize(drawn.size), drawn

    def compose(
        self,
        first: str | None,
        second: str | None,
        first_count: float,
        second_count: float,
        seed: float,
        steps: float,
        guidance: float,
        progress: Any = PROGRESS,
    ) -> Image.Image:
        """A picture from the first embeddings of one image and the first of another."""
        pictures = [self.load(first, "the first image"), self.load(second, "the second image")]
        rows = self.pipeline.encode_image(pictures)
        try:
            mixed = self.pipeline.mix_caption_embeds(list(rows), [int(first_count), int(second_count)])
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return self.draw({"caption_embeds": mixed}, seed, steps, guidance, progress)

    def draw(self, inputs: dict[str, Any], seed: float, steps: float, guidance: float, progress: Any) -> Image.Image:
        def report(pipeline: Any, step: int, timestep: Any, tensors: dict) -> dict:
            progress((step + 1, int(steps)), desc="Denoising", unit="steps")
            return {}

        return self.pipeline(
            **inputs,
            num_inference_steps=int(steps),
            guidance_scale=guidance,
            generator=torch.Generator().manual_seed(int(seed)),
            callback_on_step_end=report,
        ).images[0]

    def about(self) -> str:
        """The model card without its front matter."""
        if not self.card.is_file():
            return "This model has no card. Captions can be wrong."
        text = self.card.read_text(encoding="utf-8")
        return text.split("---", 2)[2] if text.startswith("---") else text


def build(demo: Demo, steps: int = 25) -> gr.Blocks:
    """The page: a tab for each thing that the model can do.

    Args:
        steps: Denoising steps to begin with.
    """
    # The tabs share one pipeline, whose scheduler remembers where it is: one request at a time in all.
    alone: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    with gr.Blocks(title="VLV") as page:
        gr.Markdown(
            f"# What does it see?\n`{demo.name}` turns an image into {demo.queries} caption embeddings. Read them as "
            "words, or let them be drawn again."
        )
        if demo.captioner is not None:
            with gr.Tab("Caption"):
                _caption_tab(demo, alone)
        if demo.pipeline is not None:
            with gr.Tab("Reconstruct"):
                _reconstruct_tab(demo, steps, alone)
            with gr.Tab("Compose"):
                _compose_tab(demo, steps, alone)
        else:
            gr.Markdown("This model holds no text-to-image model, so it reconstructs nothing.")
        with gr.Accordion("About this model", open=False):
            gr.Markdown(demo.about())
    return page


def _caption_tab(demo: Demo, alone: dict[str, Any]) -> None:
    with gr.Row():
        with gr.Column():
            image = _picture("Image")
            with gr.Accordion("Detail and sampling", open=False):
                longest = gr.Slider(4, 300, 64, step=1, label="At most so many tokens")
                how = gr.Radio(["greedy", "beams", "sampling"], value="greedy", label="Decoding")
                temperature = gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature (sampling)")
                beams = gr.Slider(2, 8, 4, step=1, label="Beams (beams)")
            run = gr.Button("Caption", variant="primary")
            gr.Examples(EXAMPLES, image)
        words = gr.Textbox(label="Caption", lines=6)
        run.click(demo.caption, [image, longest, how, temperature, beams], words, api_name="caption", **alone)


def _reconstruct_tab(demo: Demo, steps: int, alone: dict[str, Any]) -> None:
    with gr.Row():
        source = _picture("Image")
        original = gr.Image(label="Original, as the model is shown it", interactive=False, height=260)
        drawn = gr.Image(label="Reconstruction", interactive=False, height=260)
    controls = _drawing_controls(steps)
    run = gr.Button("Reconstruct", variant="primary")
    gr.Examples(EXAMPLES, source)
    run.click(demo.reconstruct, [source, *controls], [original, drawn], api_name="reconstruct", **alone)


def _compose_tab(demo: Demo, steps: int, alone: dict[str, Any]) -> None:
    gr.Markdown("The first embeddings of one image, then the first of another.")
    with gr.Row():
        first, second = _picture("First image"), _picture("Second image")
        mixed = gr.Image(label="Mixed", interactive=False, height=260)
    with gr.Row():
        first_count = gr.Slider(0, demo.queries, demo.queries // 2, step=1, label="Tokens of the first")
        second_count = gr.Slider(0, demo.queries, demo.queries // 2, step=1, label="Tokens of the second")
    inputs = [first, second, first_count, second_count, *_drawing_controls(steps)]
    run = gr.Button("Compose", variant="primary")
    gr.Examples([list(pair) for pair in pairwise(EXAMPLES)], [first, second])
    run.click(demo.compose, inputs, mixed, api_name="compose", **alone)


def _picture(label: str) -> gr.Image:
    field = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=260)
    # The file as it was uploaded, for `Demo.load` to read or to refuse with a reason; gradio itself says "Error".
    # (A subclass would make gradio write a stub file beside this one.)
    field.preprocess = lambda payload: payload.path if payload is not None else None  # type: ignore[method-assign]
    return field


def _drawing_controls(steps: int) -> list[Any]:
    with gr.Row():
        seed = gr.Number(42, label="Seed", precision=0)
        count = gr.Slider(1, 100, steps, step=1, label="Steps")
        guidance = gr.Slider(1.0, 6.0, 2.0, step=0.1, label="Guidance")
    return [seed, count, guidance]


def launch(demo: Demo, **settings: Any) -> None:
    """Serves the page, with a bounded queue and bounded uploads.

    Args:
        settings: Of `gradio.Blocks.launch`.
    """
    page = build(demo)
    page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)
    page.launch(max_file_size=MAX_UPLOAD, css=CSS, **settings)


if __name__ == "__main__":
    if not os.environ.get("MODEL_ID"):
        raise SystemExit("set the variable MODEL_ID to the model's repository, such as org/name")
    best = "cuda" if torch.cuda.is_available() else "cpu"
    launch(Demo(os.environ["MODEL_ID"], os.environ.get("MODEL_REVISION"), best))
