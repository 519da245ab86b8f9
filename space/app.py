"""The demo page: captions, reconstructions, and images composed from the caption embeddings of two images.

It runs as a Hugging Face Space, where the variable `MODEL_ID` names the model (`MODEL_REVISION` pins it, and
`MIN_SCORE` marks captions with a lower diffusion score), and as `vlv demo` on any machine.
"""

import os
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import gradio as gr
import torch
from gradio.utils import get_upload_folder, is_in_or_equal
from PIL import Image
from transformers import TextIteratorStreamer

from vlv import hub
from vlv.hub.card_text import describe_limits, read_card
from vlv.pipelines import ConfidenceMarker, build_reconstruction, generate_captions

EXAMPLES = sorted(str(path) for path in (Path(__file__).parent / "examples").glob("*.png"))
MAX_UPLOAD = "10mb"
QUEUE_LENGTH = 20
PROGRESS = gr.Progress()  # gradio passes a progress bar to functions that have this as a default value
DECODINGS = ["greedy", "beams", "sampling"]
# The last two rules replace the word "Error", which gradio writes into outputs; a message gives the reason.
CSS = """
.gradio-container { width: 100%; max-width: 1000px !important; margin: auto }
.image-frame img { width: 100%; height: 100%; object-fit: contain; image-rendering: pixelated }
.block.limits { border-left: 4px solid var(--color-accent); padding-left: 12px }
.result .wrap > .error { font-size: 0 }
.result .wrap > .error::after { font-size: var(--text-md); content: "No result" }
"""


@dataclass(frozen=True)
class Setting:
    """A number that visitors choose. The API can be called with anything, so its functions check each number.

    Attributes:
        label: Its name on the page and in errors.
        minimum, maximum: Bounds, which are allowed.
        step: Step of the slider. With step 1 only whole numbers are allowed.
    """

    label: str
    minimum: float
    maximum: float
    step: float = 1

    def slider(self, value: float) -> gr.Slider:
        """A slider that starts at `value`."""
        return unchecked(gr.Slider(self.minimum, self.maximum, value, step=self.step, label=self.label))

    def check(self, value: Any) -> Any:
        """The number, an int if only whole numbers are allowed.

        Raises:
            gradio.Error: If it is not a number within the bounds.
        """
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not self.minimum <= value <= self.maximum or (self.step == 1 and value != int(value)):
            kind = "whole number" if self.step == 1 else "number"
            got = "the field is empty" if value in (None, "") else f"got {str(value)[:40]}"
            raise refusal(f"{self.label} must be a {kind} from {self.minimum} to {self.maximum}; {got}.")
        return int(value) if self.step == 1 else float(value)


MAX_NEW_TOKENS = Setting("Maximum number of tokens", 4, 300)
TEMPERATURE = Setting("Temperature (for sampling)", 0.1, 2.0, step=0.1)
NUM_BEAMS = Setting("Number of beams (for beams)", 2, 8)
SEED = Setting("Seed", 0, 2**63 - 1)
STEPS = Setting("Denoising steps", 1, 100)
GUIDANCE = Setting("Guidance scale", 1.0, 6.0, step=0.1)


def refusal(message: str) -> gr.Error:
    """An error whose message the page shows. The server's log does not have it."""
    return gr.Error(message, print_exception=False)


def unchecked(field: Any, convert: Callable[[Any], Any] = lambda payload: payload) -> Any:
    """The input field with `convert` in place of gradio's checks, whose errors do not name the field."""
    # A subclass is not possible: gradio would write a stub file beside this one.
    field.preprocess = convert
    return field


def uploaded_path(payload: Any) -> str | None:
    """The path in the value of an image field, or None if no image is chosen.

    Raises:
        gradio.Error: If it is not an upload. gradio lets requests without `meta` name any file of the server.
    """
    if payload is None or not payload.path:
        return None
    if not is_in_or_equal(payload.path, get_upload_folder()):
        raise refusal("This file was not uploaded to the page. Choose the image again.")
    return payload.path


@contextmanager
def explained() -> Iterator[None]:
    """Turns an unexpected error into one sentence on the page, and writes its traceback to standard error."""
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:
        traceback.print_exc()
        raise refusal(
            "Something failed on the server. Try again with another image or other settings; if that fails too, "
            "restart the server, whose log names the cause."
        ) from error


class Demo:
    """A loaded model and the functions of the page's tabs.

    Args:
        source: Folder in the Hub's layout, or a repo id.
        revision: Branch, tag or commit of the repo.
        device: Where the model runs.
        dtype: Precision of all components.
        min_score: If given, captions have their diffusion score, and those with a lower one are marked.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If the model can neither caption nor reconstruct, or `min_score` is given and it cannot do both.
    """

    def __init__(
        self,
        source: str,
        revision: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        min_score: float | None = None,
    ):
        patterns = [*hub.CAPTIONER_FILES, *hub.PIPELINE_FILES, "README.md"]
        folder = hub.resolve(source, revision=revision, allow_patterns=patterns)
        self.name = source if "/" in source and not Path(source).exists() else folder.name
        self.card = read_card(folder)
        self.captioner: Any = None
        if (folder / "processor_config.json").is_file():
            self.captioner, self.processor = hub.load_captioner(folder, device=device, dtype=dtype)
            encoder, image_processor = self.captioner.model, self.processor.image_processor
        else:
            encoder, image_processor = hub.load_encoder(folder, device=device, dtype=dtype)
            if not (folder / "model_index.json").is_file():
                raise ValueError(
                    f"{self.name} holds only an encoder; the page needs a language model to caption, or a diffusion "
                    "model to reconstruct (`vlv push --diffusion-model` adds one)"
                )
        self.instructions: list[str] = (self.captioner.config.instructions or []) if self.captioner is not None else []
        self.num_query_tokens = count = encoder.config.num_query_tokens
        self.kept_setting = Setting("Embeddings kept", 0, count)
        self.count_settings = [Setting(f"Embeddings of the {which} image", 0, count) for which in ("first", "second")]
        self.image_processor = image_processor
        self.pipeline: Any = None
        if (folder / "model_index.json").is_file():
            if hub.has_two_encoders(folder):  # captions come from one, reconstructions from the other
                encoder, _ = hub.load_encoder(folder, device=device, dtype=dtype)
            components = hub.load_diffusion_components(folder, dtype=dtype)
            self.pipeline = build_reconstruction(encoder, image_processor, components, self.name).to(device)
            self.pipeline.set_progress_bar_config(disable=True)
        self.marker: ConfidenceMarker | None = None
        if min_score is not None:
            if self.captioner is None or self.pipeline is None:
                raise ValueError(
                    f"{self.name} cannot mark captions: scores need its captioner and its diffusion model"
                )
            self.marker = ConfidenceMarker(self.pipeline, min_score)

    def load(self, path: str | None, which: str = "an image") -> Image.Image:
        """The image in a file.

        Args:
            path: The uploaded file, or None.
            which: Name of the image in the error for None.

        Raises:
            gradio.Error: If there is no file, or it is not an image; the page shows the message.
        """
        if not path:
            raise refusal(f"Choose {which} first.")
        try:
            data = Path(path).read_bytes()
        except OSError as error:
            raise refusal(f"{Path(path).name} could not be read: {error.strerror}. Choose the image again.") from error
        try:
            return self.image_processor.load(data)
        except ValueError as error:  # it calls the data "N bytes"; the page names the file, without its folder
            reason = str(error).replace(f"{len(data)} bytes", Path(path).name, 1)
            raise refusal(f"This file cannot be read as an image: {reason}. Choose another file.") from error

    def caption(
        self,
        path: str | None,
        max_new_tokens: float,
        decoding: str,
        temperature: float,
        num_beams: float,
        instruction: str | None = None,
    ) -> Iterator[str]:
        """Yields the growing caption, and at last the complete one.

        Args:
            path: The uploaded file, or None.
            max_new_tokens: Maximum number of tokens.
            decoding: "greedy", "beams" or "sampling". Beam search yields only the complete caption.
            temperature: For sampling.
            num_beams: For beam search.
            instruction: One of `instructions`; None or "" for a caption as the model writes it without one.

        Raises:
            gradio.Error: If the image or a setting cannot be used, or the generation fails.
        """
        with explained():
            settings: dict[str, Any] = {"max_new_tokens": MAX_NEW_TOKENS.check(max_new_tokens), "do_sample": False}
            if decoding not in DECODINGS:
                raise refusal(f"Decoding must be {', '.join(DECODINGS[:-1])} or {DECODINGS[-1]}; choose one.")
            if decoding == "beams":
                settings["num_beams"] = NUM_BEAMS.check(num_beams)
            if decoding == "sampling":
                settings |= {"do_sample": True, "temperature": TEMPERATURE.check(temperature), "top_k": 0}
            if instruction not in (None, "", *self.instructions):
                raise refusal(f"Instruction must be empty{''.join(f' or {known!r}' for known in self.instructions)}.")
            inputs = self.processor(images=self.load(path), text=instruction or None)
            if decoding == "beams":  # cannot be streamed: the best beam is known only at the end
                pixel_values = inputs.pixel_values
                yield generate_captions(
                    self.captioner, self.processor, pixel_values=pixel_values, text=instruction, **settings
                )[0]
            else:
                yield from self._stream(**inputs.to(self.captioner.device), **settings)

    def caption_and_mark(self, path: str | None, *settings: Any) -> Iterator[tuple[str, str]]:
        """As `caption`, with a sentence on how well the complete caption explains the image.

        Raises:
            gradio.Error: As `caption`.
        """
        caption = ""
        for caption in self.caption(path, *settings):
            yield caption, ""
        with explained():
            marked = self.marker.mark(self.load(path), caption)  # type: ignore[union-attr]
            yield caption, self.marker.describe(marked)  # type: ignore[union-attr]

    def _stream(self, **settings: Any) -> Iterator[str]:
        """Yields the growing caption. An error of the generation, which runs in a thread, is raised here."""
        streamer = TextIteratorStreamer(self.processor.tokenizer, skip_special_tokens=True)
        errors: list[Exception] = []

        def generate() -> None:
            try:
                self.captioner.generate(**settings, streamer=streamer)
            except Exception as error:
                errors.append(error)
            finally:  # ends the loop below, also if the generation did not
                streamer.on_finalized_text("", stream_end=True)

        Thread(target=generate, daemon=True).start()
        caption = ""
        for piece in streamer:
            caption += piece
            yield caption.strip()
        if errors:
            raise errors[0]

    @explained()
    def reconstruct(
        self,
        path: str | None,
        seed: float,
        steps: float,
        guidance: float,
        prompt: str | None = None,
        image_tokens: float | None = None,
        progress: Any = PROGRESS,
    ) -> tuple[Image.Image, Image.Image]:
        """The image at the size of its reconstruction, and the reconstruction.

        With a `prompt`, words are beside the image. `image_tokens` of its embeddings are kept, by default all.

        Raises:
            gradio.Error: If the image or a setting cannot be used, or the generation fails.
        """
        settings = generation_settings(seed, steps, guidance)
        kept = self.num_query_tokens if image_tokens is None else self.kept_setting.check(image_tokens)
        original = self.load(path)
        try:
            embeds = self.pipeline.add_prompt(self.pipeline.get_caption_embeds(original), prompt or None, kept)
        except (TypeError, ValueError) as error:
            raise refusal(f"These words and embeddings cannot be used: {error}.") from error
        generated = self.generate({"caption_embeds": embeds}, settings, progress)
        return original.resize(generated.size), generated

    @explained()
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
        """An image from the leading caption embeddings of one image and those of another.

        Raises:
            gradio.Error: If an image or a setting cannot be used, or the generation fails.
        """
        settings = generation_settings(seed, steps, guidance)
        counts = [
            setting.check(count)
            for setting, count in zip(self.count_settings, (first_count, second_count), strict=True)
        ]
        images = [self.load(first, "the first image"), self.load(second, "the second image")]
        caption_embeds = self.pipeline.get_caption_embeds(images)
        try:
            mixed = self.pipeline.mix_caption_embeds(list(caption_embeds), counts)
        except ValueError as error:
            raise refusal(f"These numbers of embeddings cannot be used: {error}.") from error
        return self.generate({"caption_embeds": mixed}, settings, progress)

    def generate(self, inputs: dict[str, Any], settings: dict[str, Any], progress: Any) -> Image.Image:
        """One image from the pipeline's `inputs` and `settings`, with the steps reported to `progress`."""

        def report(pipeline: Any, step: int, timestep: Any, callback_kwargs: dict) -> dict:
            progress((step + 1, settings["num_inference_steps"]), desc="Denoising", unit="steps")
            return {}

        return self.pipeline(**inputs, **settings, callback_on_step_end=report).images[0]

    def about(self) -> str:
        """The model card without its front matter."""
        return self.card or "This model has no model card. Captions can be wrong."


def generation_settings(seed: Any, steps: Any, guidance: Any) -> dict[str, Any]:
    """The pipeline's arguments for the page's settings.

    Raises:
        gradio.Error: If one is not a number within its bounds.
    """
    return {
        "num_inference_steps": STEPS.check(steps),
        "guidance_scale": GUIDANCE.check(guidance),
        "generator": torch.Generator().manual_seed(SEED.check(seed)),
    }


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
            choices = [("none", ""), *((text, text) for text in demo.instructions)]
            # Hidden where there are none, so that the API has the same arguments for every model.
            instruction = gr.Dropdown(choices, value="", label="Instruction", visible=bool(demo.instructions))
            with gr.Accordion("Length and decoding", open=False):
                max_new_tokens = MAX_NEW_TOKENS.slider(64)
                decoding = unchecked(gr.Radio(DECODINGS, value="greedy", label="Decoding"))
                temperature = TEMPERATURE.slider(1.0)
                num_beams = NUM_BEAMS.slider(4)
            run = gr.Button("Caption", variant="primary")
            gr.Examples(EXAMPLES, image)
        with gr.Column():
            caption = gr.Textbox(label="Caption", lines=6, elem_classes="result")
            mark = gr.Markdown("", elem_classes="confidence", visible=demo.marker is not None)
            gr.Markdown(describe_limits(demo.card, "Captions"), elem_classes="limits")
        inputs = [image, max_new_tokens, decoding, temperature, num_beams, unchecked(instruction)]
        write, outputs = (demo.caption, [caption]) if demo.marker is None else (demo.caption_and_mark, [caption, mark])
        run.click(write, inputs, outputs, api_name="caption", **one_at_a_time)


def _reconstruct_tab(demo: Demo, steps: int, one_at_a_time: dict[str, Any]) -> None:
    with gr.Row():
        image = _image_field("Image")
        original = gr.Image(label="Original, resized", interactive=False, height=260, elem_classes="result")
        generated = gr.Image(label="Reconstruction", interactive=False, height=260, elem_classes="result")
    gr.Markdown(describe_limits(demo.card, "Reconstructions"), elem_classes="limits")
    with gr.Row():
        words = unchecked(gr.Textbox(label="Words"))
        kept = demo.kept_setting.slider(demo.num_query_tokens)
    inputs = [image, *_generation_controls(steps), words, kept]
    run = gr.Button("Reconstruct", variant="primary")
    gr.Examples(EXAMPLES, image)
    run.click(demo.reconstruct, inputs, [original, generated], api_name="reconstruct", **one_at_a_time)


def _compose_tab(demo: Demo, steps: int, one_at_a_time: dict[str, Any]) -> None:
    gr.Markdown("Joins the leading caption embeddings of two images and generates an image from them.")
    with gr.Row():
        first, second = _image_field("First image"), _image_field("Second image")
        composed = gr.Image(label="Composed", interactive=False, height=260, elem_classes="result")
    gr.Markdown(describe_limits(demo.card, "Reconstructions"), elem_classes="limits")
    with gr.Row():
        counts = [setting.slider(demo.num_query_tokens // 2) for setting in demo.count_settings]
    inputs = [first, second, *counts, *_generation_controls(steps)]
    run = gr.Button("Compose", variant="primary")
    gr.Examples([list(pair) for pair in pairwise(EXAMPLES)], [first, second])
    run.click(demo.compose, inputs, composed, api_name="compose", **one_at_a_time)


def _image_field(label: str) -> gr.Image:
    # `Demo.load` says why a file is not an image, where gradio says "Error".
    field = gr.Image(label=label, type="filepath", sources=["upload", "clipboard"], height=260)
    return unchecked(field, uploaded_path)


def _generation_controls(steps: int) -> list[Any]:
    with gr.Row():
        seed = unchecked(gr.Number(42, label=SEED.label, precision=0))
        return [seed, STEPS.slider(steps), GUIDANCE.slider(2.0)]


def start(demo: Demo, **settings: Any) -> tuple[gr.Blocks, str]:
    """Starts the page with a limited queue and limited uploads.

    Args:
        settings: Arguments of `gradio.Blocks.launch`.

    Returns:
        The page and its address.

    Raises:
        OSError: If the port is in use.
    """
    page = build(demo)
    page.queue(max_size=QUEUE_LENGTH, default_concurrency_limit=1)
    settings |= {"max_file_size": MAX_UPLOAD, "css": CSS, "prevent_thread_lock": True}
    # show_error: without it gradio reports its own errors, such as those of malformed requests, as "Error".
    # quiet: gradio would advise an argument of its own that users of `vlv demo` cannot give.
    _, url, _ = page.launch(show_error=True, quiet=True, **settings)
    return page, url


def launch(demo: Demo, **settings: Any) -> None:
    """Serves the page until Ctrl-C; arguments and errors are those of `start`."""
    page, url = start(demo, **settings)
    with suppress(KeyboardInterrupt):  # `page.block_thread()` would print a line about it
        print(f"the page is at {url} (Ctrl-C ends it)", flush=True)
        while page.is_running:
            time.sleep(0.1)
    page.close(verbose=False)


if __name__ == "__main__":
    if not os.environ.get("MODEL_ID"):
        raise SystemExit("MODEL_ID is not set; set this variable to the model's repository, such as org/name")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    min_score = float(os.environ["MIN_SCORE"]) if os.environ.get("MIN_SCORE") else None
    launch(Demo(os.environ["MODEL_ID"], os.environ.get("MODEL_REVISION"), device, min_score=min_score))
