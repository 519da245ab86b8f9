"""Evaluates a file of captions: against references, images and objects where they are given, and by itself."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import caption_metrics as cm
from .features import AutoModelFeatures
from .matching import match_names
from .results import corpus_figure, figure, mean_figure


@dataclass
class CaptionSet:
    """Captions with what they are measured against.

    Attributes:
        names: Of the images.
        captions: One for each name.
        references: One list of texts for each name.
        objects: The objects of each image, for CHAIR.
        vocabulary: CHAIR's objects with their synonyms.
        images: CLIP's features of the images, `(N, width)`.
    """

    names: list[str]
    captions: list[str]
    references: list[list[str]] | None = None
    objects: list[list[str]] | None = None
    vocabulary: dict[str, list[str]] | None = None
    images: torch.Tensor | None = None


@dataclass
class Measured:
    """What is measured of a set of captions.

    Attributes:
        means: By key, the label of a figure and its value for each caption, of which the figure is the mean.
        statistics: By key, the label of a figure, and a function of the indices of captions that computes it.
        constants: Figures without an interval.
        notes: On how far the figures can be trusted.
    """

    means: dict[str, tuple[str, Sequence[float]]] = field(default_factory=dict)
    statistics: dict[str, tuple[str, Callable[[torch.Tensor], float]]] = field(default_factory=dict)
    constants: dict[str, dict[str, Any]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def figures(self, count: int, samples: int) -> dict[str, Any]:
        """The figures of `count` captions, with intervals of `samples` resamplings."""
        found = {
            key: corpus_figure(label, statistic, count, samples) for key, (label, statistic) in self.statistics.items()
        }
        found |= {key: mean_figure(label, values, samples) for key, (label, values) in self.means.items()}
        return found | self.constants

    @property
    def values(self) -> dict[str, Sequence[float]]:
        """The value of each figure for each caption."""
        return {key: values for key, (_, values) in self.means.items()}


def measure_captions(
    given: CaptionSet,
    clip: AutoModelFeatures | None = None,
    bert_model: str | None = None,
    bert_layers: int | None = None,
    tokenizer: Any = None,
    max_new_tokens: int = 300,
    batch_size: int = 64,
    device: str = "cpu",
) -> Measured:
    """Measures all that can be computed from what is given.

    Args:
        clip: The model of `given.images`, for CLIPScore.
        bert_model: For BERTScore, with `bert_layers`, see `caption_metrics.bert_score`.
        tokenizer: Of the model that wrote the captions, with at most `max_new_tokens`, for the share that ended.
        batch_size, device: Of BERTScore's model.

    Raises:
        ImportError: If the extra vlv[eval] is not installed.
        ValueError: If there are no captions.
    """
    if not given.captions:
        raise ValueError("there are no captions to evaluate")
    captions, count, measured = given.captions, len(given.captions), Measured()
    means, statistics, notes = measured.means, measured.statistics, measured.notes
    if given.references is not None:
        means["cider_d"] = "CIDEr-D", cm.cider_d(captions, given.references)
        bleu = cm.Bleu(captions, given.references)
        for order in range(1, 5):
            statistics[f"bleu_{order}"] = f"BLEU-{order}", partial(bleu.score, order)
        means["rouge_l"] = "ROUGE-L", cm.rouge_l(captions, given.references)
        means["meteor"] = cm.meteor_name(), cm.meteor(captions, given.references)
        if bert_model:
            label = f"BERTScore F1 ({bert_model}, layer {bert_layers or 'last'})"
            scores = cm.bert_score(captions, given.references, bert_model, bert_layers, batch_size, device)
            means["bert_score"] = label, scores
        if count == 1:
            notes.append("CIDEr-D of one image is 0: its words are weighted by how few images have them")
    if clip is not None and given.images is not None:
        found = cm.clip_scores(clip, captions, given.images, given.references)
        means["clip_score"] = f"CLIPScore ({clip.source})", found["clip_score"]
        if "ref_clip_score" in found:
            means["ref_clip_score"] = f"RefCLIPScore ({clip.source})", found["ref_clip_score"]
        if found["cut"]:
            notes.append(
                f"CLIPScore reads only the beginning of {found['cut']} of {count} captions: they are too long"
            )
    if given.vocabulary is not None:
        truth = given.objects
        chair = cm.Chair(given.vocabulary)
        if truth is None and given.references is not None:
            truth = [sorted({name for text in texts for name in chair.mentions(text)}) for texts in given.references]
            notes.append("CHAIR takes the objects that the references mention for the objects of the images")
        if truth is None:
            raise ValueError("CHAIR needs the objects of the images, or references that mention them")
        mentions = chair.count(captions, truth)
        for key, label in (("chair_i", "CHAIR-i"), ("chair_s", "CHAIR-s"), ("chair_recall", "recall of objects")):
            statistics[key] = label, partial(_chair_score, mentions, key)
    means["words"] = "words", cm.lengths(captions)
    means["repetition_4"] = "repetition of 4 words", cm.repetition(captions)
    if tokenizer is not None:
        means["ended"] = f"end within {max_new_tokens} tokens", cm.ended(captions, tokenizer, max_new_tokens)
    for order in (1, 2):
        measured.constants[f"distinct_{order}"] = figure(f"distinct-{order}", cm.distinct(captions, order))
    return measured


def _chair_score(mentions: torch.Tensor, key: str, rows: torch.Tensor) -> float:
    return cm.chair_scores(mentions[rows])[key]


def read_captions(path: str | os.PathLike) -> dict[str, str]:
    """The captions of a file as `vlv caption` writes it: `{name: caption}`, or `{name: {"caption": ...}}`.

    Raises:
        ValueError: If it is another file; the message names it.
    """
    content = _read(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object {{image: caption}}, as `vlv caption` writes it")
    captions = {}
    for name, entry in content.items():
        text = entry.get("caption") if isinstance(entry, dict) else entry
        if not isinstance(text, str):
            raise ValueError(f"{path}: the caption of {name!r} is not text: {text!r}")
        captions[name] = text
    return captions


def read_lists(path: str | os.PathLike) -> dict[str, list[str]]:
    """One or more texts for each name: references of images, objects of images, or synonyms of objects.

    The file is `{name: text or [text, ...]}`, or a file of COCO's caption annotations.

    Raises:
        ValueError: If it is another file; the message names it.
    """
    content = _read(path)
    if isinstance(content, dict) and {"images", "annotations"} <= set(content):
        try:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            found: dict[str, list[str]] = {}
            for annotation in content["annotations"]:
                found.setdefault(names[annotation["image_id"]], []).append(annotation["caption"])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of COCO's caption annotations: it lacks {error}") from error
        return found
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold an object {{name: [text, ...]}}, or COCO's caption annotations")
    lists = {name: [entry] if isinstance(entry, str) else entry for name, entry in content.items()}
    for name, entry in lists.items():
        if not isinstance(entry, list) or not all(isinstance(text, str) for text in entry):
            raise ValueError(f"{path}: the entry {name!r} is not a text or a list of texts: {entry!r}")
    return lists


def _read(path: str | os.PathLike) -> Any:
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # of JSON or of UTF-8
        raise ValueError(f"{path} is not JSON: {error}") from error


def read_texts(path: str | os.PathLike) -> dict[str, list[str]]:
    """The texts of each image in a file of captions or of references.

    An entry is a text, a list of texts, or `{"caption": text}`; a file of COCO's caption annotations is read, too.

    Raises:
        ValueError: If it is another file; the message names it.
    """
    content = _read(path)
    if not isinstance(content, dict) or not any(isinstance(entry, dict) for entry in content.values()):
        return read_lists(path)
    return {name: [text] for name, text in read_captions(path).items()}


def entries_of(names: Sequence[str], entries: Mapping[str, Any], source: str) -> list[Any]:
    """The entry of each image, as `match_names` finds it.

    Raises:
        ValueError: If an image has none or could have two, or an entry belongs to two images.
    """
    matches = match_names(names, entries, source)
    if missing := [name for name in names if name not in matches]:
        shown = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
        raise ValueError(f"{source} has no entry for {len(missing)} of {len(names)} images: {shown}")
    return [entries[matches[name]] for name in names]
