"""The model that a server answers with: chats, images and caption embeddings as batches for it."""

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import LogitsProcessorList, StoppingCriteriaList

from vlv import hub
from vlv.pipelines import build_reconstruction, generate_images

from .batching import Delta, Finished, Job, Result
from .protocol import MAX_IMAGES, ChatRequest, Message, RequestError
from .rows import Row, RowSampling, RowStopping, Settings

MAX_WARNINGS = 20  # different texts that the log has, whatever clients send
MAX_CHARACTERS_PER_POSITION, MAX_POSITIONS_OF_TEXT = 20, 100_000  # longer texts are not tokenized
log = logging.getLogger("vlv.serving")


@dataclass(frozen=True)
class Chat:
    """A chat, ready for the model.

    Attributes:
        input_ids: `(L,)`, image tokens among them.
        pixel_values: `(N, 3, height, width)` of its images.
        settings: One for each choice.
    """

    input_ids: torch.Tensor
    pixel_values: torch.Tensor
    settings: list[Settings]


@dataclass(frozen=True)
class Variation:
    """An image to reconstruct, once for each seed; `pixel_values` is `(1, 3, height, width)`."""

    pixel_values: torch.Tensor
    seeds: list[int]
    guidance_scale: float
    steps: int


class ServedModel:
    """A loaded captioner and, where the repository has one, its text-to-image model.

    Args:
        source: Folder in the Hub's layout, or a repo id.
        name: Its name in requests; by default the repo id or the folder's name.
        revision: Branch, tag or commit of the repo.
        device, dtype: Where and in which precision it runs.
        reconstruct: Whether to load the text-to-image model.
        max_new_tokens: Most new tokens of a caption where a request does not say.
        max_tokens_limit: Most new tokens of a caption whatever a request says.
        unknown_text: What becomes of words that the model was not trained to follow: `"read"` takes them as the
            beginning of the caption, `"ignore"` leaves them out, `"refuse"` answers with an error.

    Raises:
        FileNotFoundError: If there is no such model.
        ValueError: If it has no language model, or a file is damaged.
    """

    def __init__(
        self,
        source: str,
        name: str | None = None,
        revision: str | None = None,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        reconstruct: bool = True,
        max_new_tokens: int = 300,
        max_tokens_limit: int = 1024,
        unknown_text: str = "read",
    ):
        patterns = [*hub.CAPTIONER_FILES, *(hub.PIPELINE_FILES if reconstruct else [])]
        folder = hub.resolve(source, revision=revision, allow_patterns=patterns)
        self.name = name or (source if "/" in source and not Path(source).exists() else folder.resolve().name)
        self.created = int(time.time())
        self.max_new_tokens, self.max_tokens_limit = max_new_tokens, max_tokens_limit
        self.unknown_text = unknown_text
        self._warned: set[str] = set()
        self.model, self.processor = hub.load_captioner(folder, device=device, dtype=dtype)
        text_config = self.model.config.text_config.get_text_config()
        self.positions = getattr(text_config, "max_position_embeddings", None) or 2**31
        self.pipeline: Any = None
        if reconstruct and (folder / "model_index.json").is_file():
            encoder: Any = self.model.model
            if hub.has_two_encoders(folder):  # captions come from one, reconstructions from the other
                encoder, _ = hub.load_encoder(folder, device=device, dtype=dtype)
            components = hub.load_diffusion_components(folder, dtype=dtype)
            self.pipeline = build_reconstruction(encoder, self.processor.image_processor, components, self.name)
            self.pipeline.to(device).set_progress_bar_config(disable=True)
            self.pipeline.keep_prompt()
        end = self.model.generation_config.eos_token_id
        self.end_ids = {self.processor.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Pixel values `(1, 3, height, width)`."""
        return self.processor.image_processor(image, return_tensors="pt").pixel_values

    def prepare_chat(self, request: ChatRequest, pixel_values: Sequence[torch.Tensor]) -> Chat:
        """A request, with the pixel values `(1, 3, height, width)` of its images in the order of its messages.

        Raises:
            RequestError: 400 if there is no image, the language model allows no such chat, its words are refused, or
                it is longer than the language model's positions.
        """
        if not pixel_values:
            raise RequestError("an image is missing: give a message a part of type 'image_url'", "messages")
        characters = sum(len(part.text) for own in request.messages for part in own.parts() if part.type == "text")
        if characters > MAX_CHARACTERS_PER_POSITION * min(self.positions, MAX_POSITIONS_OF_TEXT):
            raise self._too_long(f"{characters} characters")
        messages = [self._plain_message(message) for message in request.messages]
        unfinished = request.messages[-1].role == "assistant"  # a beginning of the answer, which goes on
        ending = {"continue_final_message": True} if unfinished else {"add_generation_prompt": True}
        try:
            text = self.processor.apply_chat_template(messages, tokenize=False, **ending)
            text.encode()
        except UnicodeEncodeError as error:  # JSON can hold half of a surrogate pair
            raise RequestError(f"the messages are not valid Unicode: {error.reason}", "messages") from error
        except ValueError as error:
            raise RequestError(str(error), "messages") from error
        token = self.processor.image_token
        if text.count(token) != len(pixel_values):
            raise RequestError(
                f"the messages have {text.count(token)} image tokens ({token}) for {len(pixel_values)} images; leave "
                "the token out of the texts",
                "messages",
            )
        text = text.replace(token, self.processor.replace_image_token({}, 0))
        input_ids = self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        if (room := self.positions - len(input_ids)) < 1:
            raise self._too_long(f"{len(input_ids)} tokens, those of images included")
        return Chat(input_ids, torch.cat(list(pixel_values)), self._settings(request, room))

    def _too_long(self, length: str) -> RequestError:
        return RequestError(
            f"the messages have {length}, which leaves none of the language model's {self.positions} positions for "
            "the answer; shorten them",
            "messages",
            code="context_length_exceeded",
        )

    def _plain_message(self, message: Message) -> dict[str, Any]:
        """A message as chat templates read it. Words of users that the model was not trained to follow are checked."""
        content: list[dict[str, str]] = [
            {"type": "image"} if part.type == "image_url" else {"type": "text", "text": part.text}
            for part in message.parts()
        ]
        words = "".join(part.get("text", "") for part in content)
        if message.role == "user" and words.strip():
            images = [part for part in content if part["type"] == "image"]
            known = self.model.config.instructions or []
            if words.strip() in known:
                content = [*images, {"type": "text", "text": words.strip()}]
            elif self.unknown_text == "ignore":
                content = images
            else:
                follows = ", ".join(map(repr, known)) if known else "no instructions"
                reason = f"the model follows {follows}; it was not trained to follow {words!r}"
                if self.unknown_text == "refuse":
                    raise RequestError(reason, "messages")
                self._warn_once(f"{reason[:300]}, which it reads as the beginning of the caption (--unknown-text)")
        return {"role": "system" if message.role == "developer" else message.role, "content": content}

    def _warn_once(self, message: str) -> None:
        if message not in self._warned and len(self._warned) < MAX_WARNINGS:
            self._warned.add(message)
            log.warning(message)

    def _settings(self, request: ChatRequest, room: int) -> list[Settings]:
        """One for each choice. `room` is the number of positions left."""
        longest = request.max_completion_tokens or request.max_tokens or self.max_new_tokens
        seed = secrets.randbits(62) if request.seed is None else request.seed % 2**63
        return [
            Settings(
                max_tokens=min(longest, self.max_tokens_limit, room),
                temperature=request.temperature or 0.0,
                top_p=1.0 if request.top_p is None else request.top_p,
                seed=seed + index,
                frequency_penalty=request.frequency_penalty or 0.0,
                presence_penalty=request.presence_penalty or 0.0,
                stop=tuple(request.stop or ()),
            )
            for index in range(request.n or 1)
        ]

    @torch.inference_mode()
    def compute(self, jobs: Sequence[Job]) -> None:
        """Computes jobs of one kind, whose `payload` is a `Chat`, a tensor of pixel values, or a `Variation`."""
        kind = type(jobs[0].payload)
        if kind is Chat:
            for group in self._fitting_groups(jobs):
                self._write_captions(group)
        elif kind is Variation:
            self._reconstruct(jobs)
        else:
            embeds = self._encode([job.payload for job in jobs])
            for job, own in zip(jobs, embeds, strict=True):
                job.send(Result(own.float().cpu()))

    def _encode(self, pixel_values: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Caption embeddings `(N, Q, d_text)` of each of several batches of images."""
        sizes = [len(own) for own in pixel_values]
        joined = torch.cat(list(pixel_values)).to(self.model.device, self.model.dtype)
        embeds = [self.model.model.get_caption_embeds(part) for part in joined.split(MAX_IMAGES)]
        return list(torch.cat(embeds).split(sizes))

    def _fitting_groups(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Chats that can be written together: captions that have ended grow on with their batch, within positions."""
        groups: list[list[Job]] = []
        for job in jobs:
            together = [own.payload for own in (*groups[-1], job)] if groups else []
            prompt = max((len(chat.input_ids) for chat in together), default=0)
            new = max((own.max_tokens for chat in together for own in chat.settings), default=0)
            if groups and prompt + new <= self.positions:
                groups[-1].append(job)
            else:
                groups.append([job])
        return groups

    def _write_captions(self, jobs: Sequence[Job]) -> None:
        chats: list[Chat] = [job.payload for job in jobs]
        rows = [_row_of(job, index, own) for job in jobs for index, own in enumerate(job.payload.settings)]
        counts = [len(chat.settings) for chat in chats]
        embeds = self._encode([chat.pixel_values for chat in chats])
        longest = max(len(chat.input_ids) for chat in chats)
        pad = self.processor.tokenizer.pad_token_id
        input_ids = torch.full((len(chats), longest), pad)
        mask = torch.zeros_like(input_ids)
        for index, chat in enumerate(chats):
            input_ids[index, longest - len(chat.input_ids) :] = chat.input_ids
            mask[index, longest - len(chat.input_ids) :] = 1
        repeats = torch.tensor(counts)
        repeated = [own.repeat(count, 1, 1) for own, count in zip(embeds, counts, strict=True)]
        self.model.generate(
            input_ids=input_ids.repeat_interleave(repeats, dim=0).to(self.model.device),
            attention_mask=mask.repeat_interleave(repeats, dim=0).to(self.model.device),
            caption_embeds=torch.cat(repeated),
            do_sample=False,
            num_beams=1,
            max_new_tokens=max(row.settings.max_tokens for row in rows),
            logits_processor=LogitsProcessorList([RowSampling(rows)]),
            stopping_criteria=StoppingCriteriaList([RowStopping(rows, self._decode, self.end_ids)]),
        )

    def _decode(self, tokens: list[int]) -> str:
        return self.processor.tokenizer.decode(tokens, skip_special_tokens=True)

    def _reconstruct(self, jobs: Sequence[Job]) -> None:
        variations: list[Variation] = [job.payload for job in jobs]
        pixel_values = torch.cat([own.pixel_values for own in variations])
        encoder = self.pipeline.encoder
        embeds = encoder.get_caption_embeds(pixel_values.to(encoder.device, encoder.dtype))
        counts = [len(own.seeds) for own in variations]

        def stop_if_cancelled(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipeline._interrupt = all(job.is_cancelled() for job in jobs)
            return tensors

        images = generate_images(
            self.pipeline,
            caption_embeds=embeds.repeat_interleave(torch.tensor(counts, device=embeds.device), dim=0),
            seeds=[seed for own in variations for seed in own.seeds],
            guidance_scale=variations[0].guidance_scale,
            num_inference_steps=variations[0].steps,
            callback_on_step_end=stop_if_cancelled,
        )
        for job, own in zip(jobs, images.split(counts), strict=True):
            job.send(Result(own))


def _row_of(job: Job, index: int, settings: Settings) -> Row:
    row: Row

    def finish(reason: str) -> None:
        job.send(Finished(index, reason, row.text, len(row.tokens)))

    row = Row(settings, lambda text: job.send(Delta(index, text)), finish, job.is_cancelled)
    return row
