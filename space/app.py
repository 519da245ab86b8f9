"""The demo page: captions, reconstructions, and images composed from the caption embeddings of two images.

It runs as a Hugging Face Space, where the variable `MODEL_ID` names the model (and `MODEL_REVISION` pins it), and as
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
from vlv.pipelines import VLVReconstructionPipeline, generate_captions

EXAMPLES = sorted(str(path) for path in (Path(__file__).parent / "examples").glob("*.png"))
MAX_UPLOAD = "10mb"
QUEUE_LENGTH = 20
PROGRESS = gr.Progress()  # gradio passes a progress bar to functions that have this as a default value
CSS = """
.gradio-container { width: 100%; max-width: 1000px !important; margin: auto }
.image-frame img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }
"""


class Demo:
    """A loaded model and the functions of the page's tabs.

    Args:
        source: Folder in the Hub's layout, or a repo id.
        revision: Branch, tag or commit of the repo.
        device: Where the model runs.
        dtype: Precision of all components.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the model can neither caption nor reconstruct.
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
                    f"{self.name} holds only an encoder; the page needs a language model to caption, or a diffusion "
                    "model to reconstruct (`vlv push --diffusion-model` adds one)"
                )
            encoder, image_processor = hub.load_encoder(folder, device=device, dtype=dtype)
        self.num_query_tokens = encoder.config.num_query_tokens
        self.image_processor = image_processor
        self.pipeline: Any = None
        if (folder / "model_index.json").is_file():
            if hub.has_two_encoders(folder):  # captions come from one, reconstructions from the other
                encoder, _ = hub.load_encoder(folder, device=device, dtype=dtype)
            components = hub.load_diffusion_components(folder, dtype=dtype)
            pipeline = VLVReconstructionPipeline(encoder=encoder, image_processor=image_processor, **components)
            self.pipeline = pipeline.to(device)
            self.pipeline.set_progress_bar_config(disable=True)

    def load(self, path: str | None, which: str = "an image") -> Image.Image:
        """The image in a file.

        Args:
            path: The uploaded file, or None.
            which: Name of the image in the error for None.

        Raises:
            gradio.Error: If there is no file, or it is not an image; the page shows the message.
        """
        if not path:
            raise gr.Error(f"Choose {which} first.")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise gr.Error(f"{Path(path).name} could not be read: {error.strerror}") from error
        try:
            return self.image_processor.load(data)
        except ValueError as error:  # it calls the data "N bytes"; the page names the file, without its folder
            reason = str(error).replace(f"{len(data)} bytes", Path(path).name, 1)
            raise gr.Error(f"This file cannot be read as an image: {reason}") from error

    def caption(
        self, path: str | None, max_new_tokens: float, decoding: str, temperature: float, num_beams: float
    ) -> Iterator[str]:
        """Yields the growing caption, and at last the complete one.

        Args:
            path: The uploaded file, or None.
            max_new_tokens: Maximum number of tokens.
            decoding: "greedy", "beams" or "sampling". Beam search yields only the complete caption.
            temperature: For sampling.
            num_beams: For beam search.
        """
        pixel_values = self.processor(images=self.load(path)).pixel_values
        settings: dict[str, Any] = {"max_new_tokens": int(max_new_tokens), "do_sample": False}
        if decoding == "beams":  # cannot be streamed: the best beam is known only at the end
            settings["num_beams"] = int(num_beams)
            yield generate_captions(self.captioner, self.processor, pixel_values=pixel_values, **settings)[0]
            return
        if decoding == "sampling":
            settings |= {"do_sample": True, "temperature": temperature, "top_k": 0}
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_special_tokens=True, timeout=120)
        settings |= {"pixel_values": pixel_values.to(self.captioner.device), "streamer": streamer}
        thread = Thread(target=self.captioner.generate, kwargs=settings, daemon=True)
        thread.start()
        caption = ""
        for piece in streamer:
            caption += piece
            yield caption.strip()
        thread.join()

    def reconstruct(
        self, path: str | None, seed: float, steps: float, guidance: float, progress: Any = PROGRESS
    ) -> tuple[Image.Image, Image.Image]:
        """The image at the size of its reconstruction, and the reconstruction."""
        original = self.load(path)
        generated = self.generate({"image": original}, seed, steps, guidance, progress)
        return original.resize(generated.size), generated

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
        """An image from the leading caption embeddings of one image and those of another."""
        images = [self.load(first, "the first image"), self.load(second, "the second image")]
        caption_embeds = self.pipeline.encode_image(images)
        try:
            mixed = self.pipeline.mix_caption_embeds(list(caption_embeds), [int(first_count), int(second_count)])
        except ValueError as error:
            raise gr.Error(str(error)) from error
        return self.generate({"caption_embeds": mixed}, seed, steps, guidance, progress)

    def generate(
        self, inputs: dict[str, Any], seed: float, steps: float, guidance: float, progress: Any
    ) -> Image.Image:
        """One image from the pipeline's `inputs`, with the steps reported to `progress`."""

        def report(pipeline: Any, step: int, timestep: Any, callback_kwargs: dict) -> dict:
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
            return "This model has no model card. Captions can be wrong."
        text = self.card.read_text(encoding="utf-8")
        return text.split("---", 2)[2] if text.startswith("---") else text


def build(demo: Demo, steps: int = 25) -> gr.Blocks:
    """The page, with a tab for each thing that the model can do.

    Args:
        steps: Initial value of the number of denoising steps.
    """
    # The tabs share one pipeline, and its scheduler has state, so the page runs one request at a time.
    one_at_a_time: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
    with gr.Blocks(title="VLV") as page:
        gr.Markdown(
            f"# What does the captioner see?\n`{demo.name}` encodes an image as {demo.num_query_tokens} caption "
            f"embeddings. {_abilities(demo)}"
        )
        if demo.captioner is not None:
            with gr.Tab("Caption"):
                _caption_tab(demo, one_at_a_time)
        if demo.pipeline is not None:
            with gr.Tab("Reconstruct"):
                _reconstruct_tab(demo, steps, one_at_a_time)
            with gr.Tab("Compose"):
                _compose_tab(demo, steps, one_at_a_time)
        else:
            gr.Markdown("This repository has no diffusion model, so it cannot reconstruct images.")
        with gr.Accordion("About this model", open=False):
            gr.Markdown(demo.about())
    return page


def _abilities(demo: Demo) -> str:
    if demo.captioner is None:
        return "The page reconstructs images from them."
    if demo.pipeline is None:
        return "The page writes captions from them."
    return "The page writes captions and reconstructs images from them."


def _caption_tab(demo: Demo, one_at_a_time: dict[str, Any]) -> None:
    with gr.Row():
        with gr.Column():
            image = _image_field("Image")
            with gr.Accordion("Length and decoding", open=False):
                max_new_tokens = gr.Slider(4, 300, 64, step=1, label="Maximum number of tokens")
                decoding = gr.Radio(["greedy", "beams", "sampling"], value="greedy", label="Decoding")
                temperature = gr.Slider(0.1, 2.0, 1.0, step=0.1, label="Temperature (for sampling)")
                num_beams = gr.Slider(2, 8, 4, step=1, label="Number of beams (for beams)")
            run = gr.Button("Caption", variant="primary")
            gr.Examples(EXAMPLES, image)
        caption = gr.Textbox(label="Caption", lines=6)
        inputs = [image, max_new_tokens, decoding, temperature, num_beams]
        run.click(demo.caption, inputs, caption, api_name="caption", **one_at_a_time)


def _reconstruct_tab(demo: Demo, steps: int, one_at_a_time: dict[str, Any]) -> None:
    with gr.Row():
        image = _image_field("Image")
        original = gr.Image(label="Original, resized", interactive=False, height=260)
        generated = gr.Image(label="Reconstruction", interactive=False, height=260)
    inputs = [image, *_generation_controls(steps)]
    run = gr.Button("Reconstruct", variant="primary")
    gr.Examples(EXAMPLES, image)
    run.click(demo.reconstruct, inputs, [original, generated], api_name="reconstruct", **one_at_a_time)


def _compose_tab(demo: Demo, steps: int, one_at_a_time: dict[str, Any]) -> None:
    gr.Markdown("Joins the leading caption embeddings of two images and generates an image from them.")
    count = demo.num_query_tokens
    with gr.Row():
        first, second = _image_field("First image"), _image_field("Second image")
        composed = gr.Image(label="Composed", interactive=False, height=260)
    with gr.Row():
        first_count = gr.Slider(0, count, count // 2, step=1, label="Embeddings of the first image")
        second_count = gr.Slider(0, count, count // 2, step=1, label="Embeddings of the second image")
    inputs = [first, second, first_count, second_count, *_generation_controls(steps)]
    run = gr.Button("Compose", variant="primary")
    gr.Examples([list(pair) for pair in pairwise(EXAMPLES)], [first, second])
    run.click(demo.compose, inputs, composed, api_name="compose", **one_at_a_time)


def _image_field(label: str) -> gr.Image:
    field = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=260)
    # Passes on the uploaded file, because `Demo.load` says why a file is not an image, where gradio says "Error".
    # A subclass is not possible: gradio would write a stub file beside this one.
    field.preprocess = lambda payload: payload.path if payload is not None else None  # type: ignore[method-assign]
    return field


def _generation_controls(steps: int) -> list[Any]:
    with gr.Row():
        seed = gr.Number(42, label="Seed", precision=0)
        num_inference_steps = gr.Slider(1, 100, steps, step=1, label="Denoising steps")
        guidance_scale = gr.Slider(1.0, 6.0, 2.0, step=0.1, label="Guidance scale")
    return [seed, num_inference_steps, guidance_scale]


def launch(demo: Demo, **settings: Any) -> None:
    """Serves the page with a limited queue and limited uploads.

    Args:
        settings: Arguments of `gradio.Blocks.launch`.
    """
    page = build(demo)
    page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)
    # quiet: gradio would advise an argument of its own that users of `vlv demo` cannot give
    _, url, _ = page.launch(max_file_size=MAX_UPLOAD, css=CSS, quiet=True, prevent_thread_lock=True, **settings)
    print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
    page.block_thread()


if __name__ == "__main__":
    if not os.environ.get("MODEL_ID"):
        raise SystemExit("MODEL_ID is not set; set this variable to the model's repository, such as org/name")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    launch(Demo(os.environ["MODEL_ID"], os.environ.get("MODEL_REVISION"), device))
