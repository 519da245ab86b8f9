"""A model of lmms-eval: `--model vlv --model_args pretrained=FOLDER_OR_REPO`.

lmms-eval finds it by the entry point `lmms_eval.models`. Nothing here imports this module: it needs lmms-eval.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from torch.nn import functional as F

from vlv import hub
from vlv.pipelines import generate_captions

logger = logging.getLogger(__name__)
MANIFEST = ModelManifest("vlv", simple_class_path=f"{__name__}.VLV")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MAX_NEW_TOKENS = 300  # where a task does not say
GENERATION = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")
"""What `generate` takes of a task's `generation_kwargs`. `until` is applied to the text; anything else is left out."""


class VLV(lmms):
    """A captioner for the tasks of lmms-eval that have one image a sample.

    Args:
        pretrained: Folder or repo id of the captioner. No code of the repository runs.
        prompt: Words between image and caption: an instruction that the captioner was trained to follow, or the
            beginning of the caption.
        task_prompt: Whether the words of the task stand in the place of `prompt`. A captioner that was not trained on
            them does not understand them, so by default they are left out.
        batch_size: Images at once.
        max_batch_size: Not used; lmms-eval passes it.
        device: By default a GPU if there is one. Under `accelerate launch` each process has its own.
        dtype: Precision of the weights.

    Raises:
        FileNotFoundError, ValueError: As `vlv.hub.load_captioner`, or if an argument does not fit.
    """

    def __init__(
        self,
        pretrained: str,
        prompt: str = "",
        task_prompt: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
    ):
        super().__init__()
        if prompt and task_prompt:
            raise ValueError("prompt and task_prompt exclude each other; give one of them")
        if dtype not in DTYPES:
            raise ValueError(f"dtype is {dtype!r}; expected one of {', '.join(DTYPES)}")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size is {batch_size!r}; expected a whole number of at least 1")
        accelerator = Accelerator()
        if accelerator.num_processes > 1:
            self.accelerator, device = accelerator, str(accelerator.device)
            self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.model, self.processor = hub.load_captioner(str(pretrained), dtype=DTYPES[dtype], device=device)
        self.batch_size, self.prompt, self.task_prompt = int(batch_size), str(prompt), task_prompt
        if not task_prompt:
            logger.warning("the words of the tasks are left out; task_prompt=True gives them to the captioner")

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """A caption for each request. Its `args`: words, settings, `doc_to_visual`, sample number, task and split."""
        captions: list[str] = []
        for batch in self._batches(requests, lambda request: request.args[1]):
            settings = batch[0].args[1]
            pixels = self._pixel_values([self._image(*request.args[2:]) for request in batch])
            words = [self._words(request.args[0]) for request in batch]
            given = generation_settings(settings)
            texts = generate_captions(self.model, self.processor, pixel_values=pixels, text=words, **given)
            captions += [cut(text, settings.get("until")) for text in texts]
        return captions

    @torch.no_grad()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """How unlikely each text is after an image and words, and whether it is what greedy decoding writes.

        As in the models of lmms-eval, and as its multiple-choice tasks read it, the first is not a log-probability but
        the loss: minus the mean log-probability of the text's tokens.

        The `args` of a request: words, text or `doc_to_target`, `doc_to_visual`, sample number, task and split.
        """
        found: list[tuple[float, bool]] = []
        for batch in self._batches(requests, lambda request: len(request.args)):
            if len(batch[0].args) < 6:
                raise ValueError("a request has no image; mutual information with a text alone is not supported")
            docs = [self.task_dict[task][split][number] for *_, number, task, split in (r.args for r in batch)]
            texts = [r.args[1](doc) if callable(r.args[1]) else r.args[1] for r, doc in zip(batch, docs, strict=True)]
            inputs = self.processor(text=[self._words(r.args[0]) for r in batch], suffix=texts, append_eos=False)
            inputs["pixel_values"] = self._pixel_values([self._image(*request.args[2:]) for request in batch])
            inputs = {name: value.to(self.model.device) for name, value in inputs.items()}
            logits, labels = self.model(**inputs).logits.float(), inputs["labels"]  # (B, L, vocab), (B, L)
            losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where there is no label
            is_token = labels != -100
            greedy = ((logits.argmax(-1) == labels) | ~is_token).all(dim=1)
            found += zip((losses.sum(dim=1) / is_token.sum(dim=1)).tolist(), greedy.tolist(), strict=True)
        return found

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("VLV captions one image at a time; tasks of several rounds are not supported")

    def _batches(self, requests: Sequence[Instance], key: Callable[[Instance], Any]) -> Iterator[list[Instance]]:
        """Requests in their order, at most `batch_size` at once, with equal keys."""
        batch: list[Instance] = []
        for request in requests:
            if batch and (len(batch) == self.batch_size or key(request) != key(batch[0])):
                yield batch
                batch = []
            batch.append(request)
        if batch:
            yield batch

    def _words(self, task_words: str) -> str:
        return task_words.replace(self.processor.image_token, "").strip() if self.task_prompt else self.prompt

    def _image(self, doc_to_visual: Callable[[Any], Any], number: int, task: str, split: str) -> Image.Image:
        images = doc_to_visual(self.task_dict[task][split][number])
        images = images if isinstance(images, list) else [images]
        if len(images) != 1 or not isinstance(images[0], Image.Image):
            kinds = ", ".join(type(image).__name__ for image in images) or "nothing"
            raise ValueError(f"sample {number} of {task} has {kinds}; VLV captions samples of one PIL image")
        return images[0]

    def _pixel_values(self, images: list[Image.Image]) -> torch.Tensor:
        """`(B, 3, height, width)` on the model's device."""
        pixels: torch.Tensor = self.processor(images=images).pixel_values
        return pixels.to(self.model.device, self.model.dtype)


def generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate`, of a task's `generation_kwargs`. A temperature of 0 is greedy decoding."""
    given = {name: settings[name] for name in GENERATION if settings.get(name) is not None}
    if not given.get("do_sample") or not given.get("temperature", 1.0):
        given = {name: value for name, value in given.items() if name not in ("temperature", "top_p", "top_k")}
        given["do_sample"] = False
    return {"max_new_tokens": MAX_NEW_TOKENS, **given}


def cut(text: str, until: str | Sequence[str] | None) -> str:
    """The text before the first of the strings in `until`."""
    for end in [until] if isinstance(until, str) else until or ():
        text = text.split(end)[0] if end else text
    return text
