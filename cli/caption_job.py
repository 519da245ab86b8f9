"""How the options of a command line write captions, and what is recorded of that."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from vlv import VLVConfig, VLVForConditionalGeneration, VLVProcessor, hub
from vlv.captioning.captioner import CaptionSettings
from vlv.captioning.encoding import ENCODER_BATCH_SIZE
from vlv.captioning.sharded import ShardJob
from vlv.captioning.texts import CaptionEditor, instruction_of_length
from vlv.errors import UserError

from .caption_io import open_editor
from .choosing import recorded_choice
from .models import loading


def settings_of(arguments: argparse.Namespace) -> CaptionSettings:
    return CaptionSettings(**{field.name: getattr(arguments, field.name) for field in fields(CaptionSettings)})


def recorded_settings(
    arguments: argparse.Namespace, settings: CaptionSettings, editor: CaptionEditor
) -> dict[str, Any]:
    """All that changes a caption besides the model."""
    return settings.recorded() | {"dtype": arguments.dtype} | recorded_choice(arguments) | editor.recorded()


def prepare_job(
    arguments: argparse.Namespace, source: str, device: str, files: Sequence[str] = hub.CAPTIONER_FILES
) -> tuple[ShardJob, dict[str, Any]]:
    """Downloads the model of a command line.

    Args:
        files: What is downloaded of it; `config.json` suffices to tell what is recorded.

    Returns:
        How its shards are captioned, and what is recorded of that: `model`, `fingerprint` and `settings`.

    Raises:
        UserError: If the model cannot be loaded, or has no instruction for `--length`.
    """
    with loading(source):
        model = hub.resolve(source, revision=arguments.revision, allow_patterns=list(files))
        fingerprint = hub.fingerprint(model, hub.CAPTIONER_FINGERPRINT)
        config = VLVConfig.from_dict(hub.read_config(model))
    if arguments.length:
        arguments.prompt = instruction_of_length(arguments.length, config.instructions, source)
    editor = open_editor(arguments)
    settings = settings_of(arguments)
    job = ShardJob(
        model=str(model),
        dtype=arguments.dtype,
        device=device,
        settings=settings,
        editor=editor,
        batch_size=arguments.batch_size,
        encoder_batch_size=arguments.encoder_batch_size or ENCODER_BATCH_SIZE,
        num_workers=arguments.num_workers,
        embeddings_cache=arguments.embeddings_cache,
        static_cache=arguments.static_cache,
        compiled=arguments.compile,
        url_timeout=arguments.url_timeout,
    )
    recorded = recorded_settings(arguments, settings, editor)
    return job, {"model": source, "fingerprint": fingerprint, "settings": recorded}


def check_prompt(prompt: str, source: str, model: VLVForConditionalGeneration, processor: VLVProcessor) -> None:
    """Says if the model was not trained to follow an instruction.

    Raises:
        UserError: If the instruction is longer than the language model can read.
    """
    embeds = torch.zeros(1, model.config.num_query_tokens, model.config.caption_embed_dim)
    try:
        model.get_prefix(
            caption_embeds=embeds.to(model.device, model.dtype), **processor(text=prompt).to(model.device)
        )
    except ValueError as error:
        raise UserError(f"--prompt: {error}") from error
    known = model.config.instructions or []
    if prompt not in known:
        reason = f"was trained to follow {', '.join(map(repr, known))}" if known else "records no instructions"
        print(f"note: {source} {reason}; it reads {prompt!r} as the beginning of captions", file=sys.stderr)
