"""Metrics of captions: against references, against the objects of an image, and of the text alone.

Each function takes lists with one entry for each image and returns one value for each image, unless it says otherwise.
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch
from transformers import AutoTokenizer

from .features import AutoModelFeatures, load_encoder, require

References = Sequence[Sequence[str]]
"""Of each image, one or more captions by people."""
PUNCTUATION = frozenset(
    ["''", "'", "``", "`", "(", ")", "[", "]", "{", "}", ".", "?", "!", ",", ":", "-", "--", "...", ";"]
)
"""The tokens that coco-caption leaves out, with square brackets for its `-LRB-`."""
CIDER_ORDER, CIDER_SIGMA = 4, 6.0
CLIP_SCORE_WEIGHT = 2.5


def tokenize(caption: str) -> list[str]:
    """Lower-case words as coco-caption counts them: Penn Treebank tokens (by nltk) without punctuation.

    Raises:
        ImportError: If nltk is not installed.
    """
    separated = re.sub(r"([.?!])(?=\s)", r" \1 ", caption.lower())  # nltk separates only the last full stop
    return [token for token in _treebank().tokenize(separated) if token not in PUNCTUATION]


@cache
def _treebank() -> Any:
    return require("nltk.tokenize.treebank").TreebankWordTokenizer()


def cider_d(captions: Sequence[str], references: References) -> list[float]:
    """CIDEr-D of each caption (Vedantam et al., 2015), as coco-caption computes it: 0 to 10.

    Counts of 1 to 4 words are weighted by how few images' references have them, so a value depends on all references,
    and is 0 if there is one image.
    """
    _check(captions, references)
    found = [[_ngrams(tokenize(text)) for text in texts] for texts in references]
    frequency = Counter(ngram for texts in found for ngram in set().union(*texts))
    num_images = math.log(len(references)) if references else 0.0

    def weigh(counts: Counter) -> tuple[list[dict], list[float], int]:
        weighted: list[dict] = [{} for _ in range(CIDER_ORDER)]
        for ngram, count in counts.items():
            weighted[len(ngram) - 1][ngram] = count * (num_images - math.log(max(1, frequency[ngram])))
        norms = [math.sqrt(sum(value**2 for value in one.values())) for one in weighted]
        return weighted, norms, sum(count for ngram, count in counts.items() if len(ngram) == 2)

    scores = []
    for caption, texts in zip(captions, found, strict=True):
        vector, norms, length = weigh(_ngrams(tokenize(caption)))
        total = 0.0
        for reference, reference_norms, reference_length in map(weigh, texts):
            penalty = math.exp(-((length - reference_length) ** 2) / (2 * CIDER_SIGMA**2))
            for order in range(CIDER_ORDER):
                if norms[order] and reference_norms[order]:
                    shared = sum(
                        min(value, reference[order].get(ngram, 0.0)) * reference[order].get(ngram, 0.0)
                        for ngram, value in vector[order].items()
                    )
                    total += penalty * shared / (norms[order] * reference_norms[order])
        scores.append(10 * total / CIDER_ORDER / len(texts))
    return scores


def _ngrams(words: Sequence[str], orders: Sequence[int] = range(1, CIDER_ORDER + 1)) -> Counter:
    return Counter(tuple(words[i : i + n]) for n in orders for i in range(len(words) - n + 1))


class Bleu:
    """BLEU-1 to BLEU-4 of a corpus, by torchmetrics. Keeps the counts of each caption, which can be resampled.

    Of two references whose lengths are equally near, the shorter one counts, as in coco-caption.
    """

    def __init__(self, captions: Sequence[str], references: References):
        _check(captions, references)
        update = require("torchmetrics.functional.text.bleu")._bleu_score_update
        rows = []
        for caption, texts in zip(captions, references, strict=True):
            matches, total = torch.zeros(4), torch.zeros(4)
            shortest_first = sorted(texts, key=lambda text: len(tokenize(text)))  # of two equally near, it counts
            lengths = update(
                [caption], [shortest_first], matches, total, torch.tensor(0.0), torch.tensor(0.0), 4, tokenize
            )
            rows.append(torch.cat([matches, total, torch.stack(lengths)]))
        self.counts = torch.stack(rows).double()  # (N, 10): matches and totals of 1 to 4 words, and two lengths

    def score(self, order: int = 4, rows: torch.Tensor | None = None) -> float:
        """BLEU up to `order` words, 0 to 1, of all captions or of those at the indices `rows`."""
        compute = require("torchmetrics.functional.text.bleu")._bleu_score_compute
        counts = (self.counts if rows is None else self.counts[rows]).sum(0)
        matches, total, lengths = counts[:order], counts[4 : 4 + order], counts[8:]
        return compute(*lengths, matches, total, order, [1 / order] * order, False).item()


def rouge_l(captions: Sequence[str], references: References) -> list[float]:
    """ROUGE-L of each caption, 0 to 1: F1 of the longest common subsequence with the best reference (torchmetrics)."""
    _check(captions, references)
    update = require("torchmetrics.functional.text.rouge")._rouge_score_update
    found = update(captions, references, ["L"], "best", None, lambda text: text, tokenize)
    return [score["fmeasure"].item() for score in found["L"]]


def meteor(captions: Sequence[str], references: References) -> list[float]:
    """METEOR of each caption, 0 to 1, by nltk: words match if they or their stems are equal, or WordNet's synonyms.

    Without nltk's WordNet on this machine, no synonyms match: see `meteor_name`.
    """
    _check(captions, references)
    score = require("nltk.translate.meteor_score").meteor_score
    wordnet = _wordnet()
    return [
        score([tokenize(text) for text in texts], tokenize(caption), wordnet=wordnet)
        for caption, texts in zip(captions, references, strict=True)
    ]


class _NoSynonyms:
    """A WordNet without entries."""

    def synsets(self, word: str) -> list:
        return []


def _wordnet() -> Any:
    wordnet = require("nltk.corpus").wordnet
    try:
        wordnet.ensure_loaded()
    except LookupError:
        return _NoSynonyms()
    return wordnet


def meteor_name() -> str:
    """What `meteor` computes on this machine."""
    return "METEOR (words and stems)" if isinstance(_wordnet(), _NoSynonyms) else "METEOR (words, stems, synonyms)"


@torch.no_grad()
def bert_score(
    captions: Sequence[str],
    references: References,
    model: str,
    num_layers: int | None = None,
    batch_size: int = 64,
    device: str = "cpu",
) -> list[float]:
    """BERTScore F1 of each caption with its best reference, as the package bert-score computes it without rescaling.

    torchmetrics 1.9 has a BERTScore, too. It compares captions with references of other captions if their lengths
    differ.

    Args:
        model: Folder or Hub repo id of a text encoder, such as roberta-large.
        num_layers: The layer whose states are compared (17 of roberta-large); by default the last.
        batch_size: Images whose captions are compared at once, and texts in a batch of the encoder.

    Raises:
        OSError, ValueError: As `load_text_encoder`.
    """
    _check(captions, references)
    encoder, tokenizer = load_text_encoder(model, num_layers)
    encoder, layers = encoder.to(device), encoder.config.num_hidden_layers
    scores: list[float] = []
    for start in range(0, len(captions), batch_size):
        pairs = list(zip(captions[start : start + batch_size], references[start : start + batch_size], strict=True))
        texts = list(dict.fromkeys(text for caption, one in pairs for text in (caption, *one)))
        states = _token_states(texts, encoder, tokenizer, layers if num_layers is None else num_layers, batch_size)
        scores += [max(greedy_match(*states[caption], *states[text]) for text in one) for caption, one in pairs]
    return scores


def load_text_encoder(model: str, num_layers: int | None = None) -> tuple[Any, Any]:
    """The text encoder of `bert_score` and its tokenizer.

    Raises:
        OSError: If it cannot be loaded, or has no weights in safetensors.
        ValueError: If it has no text layers, or fewer than `num_layers`.
    """
    encoder = load_encoder(model)
    layers = getattr(encoder.config, "num_hidden_layers", None)
    if layers is None:
        raise ValueError(
            f"{model} ({encoder.config.model_type}) is not a text encoder; pass one such as roberta-large"
        )
    if num_layers is not None and not 0 < num_layers <= layers:
        raise ValueError(f"{model} has {layers} layers, so there is no layer {num_layers}")
    return encoder, AutoTokenizer.from_pretrained(model)


def _token_states(
    texts: Sequence[str], encoder: Any, tokenizer: Any, layer: int, batch_size: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of each text the states `(T, width)` of its tokens in a layer, and their weights `(T,)`, 0 for special ones."""
    states = {}
    for start in range(0, len(texts), batch_size):
        batch = list(texts[start : start + batch_size])
        inputs = tokenizer(batch, padding=True, truncation=True, return_special_tokens_mask=True, return_tensors="pt")
        inputs = inputs.to(encoder.device)
        special = inputs.pop("special_tokens_mask")  # (B, T): also of padding
        hidden = encoder(**inputs, output_hidden_states=True).hidden_states[layer]
        for text, state, mask, weights in zip(batch, hidden, inputs.attention_mask.bool(), 1 - special, strict=True):
            states[text] = state[mask], weights[mask].float()
    return states


def greedy_match(
    caption: torch.Tensor, caption_weights: torch.Tensor, reference: torch.Tensor, reference_weights: torch.Tensor
) -> float:
    """F1 of the cosines of each token with the most similar token of the other text.

    Args:
        caption: States `(T, width)`.
        caption_weights: `(T,)`: how much each token counts.
        reference: States `(S, width)`.
        reference_weights: `(S,)`.
    """
    cosines = torch.nn.functional.normalize(caption, dim=-1) @ torch.nn.functional.normalize(reference, dim=-1).T
    precision = (cosines.max(1).values * caption_weights).sum() / caption_weights.sum().clamp_min(1)
    recall = (cosines.max(0).values * reference_weights).sum() / reference_weights.sum().clamp_min(1)
    return (2 * precision * recall / (precision + recall)).nan_to_num().item()


def clip_scores(
    model: AutoModelFeatures,
    captions: Sequence[str],
    images: torch.Tensor,
    references: References | None = None,
) -> dict[str, Any]:
    """CLIPScore (Hessel et al., 2021) of each caption: 2.5 times the cosine of image and caption, at least 0.

    Args:
        model: A CLIP or SigLIP model.
        images: Its features of the images, `(N, width)`.
        references: With them also RefCLIPScore, the harmonic mean of the CLIPScore and the caption's best cosine with
            a reference.

    Returns:
        `clip_score`, `ref_clip_score` and, as one number, `cut`: the captions longer than the model reads.
    """
    embeds, cut = model.embed_texts(captions)
    scores = CLIP_SCORE_WEIGHT * torch.cosine_similarity(images, embeds).clamp_min(0)  # (N,)
    found: dict[str, Any] = {"clip_score": scores.tolist(), "cut": sum(cut)}
    if references is not None:
        _check(captions, references)
        flat, _ = model.embed_texts([text for texts in references for text in texts])
        parts = flat.split([len(texts) for texts in references])
        best = torch.stack(
            [torch.cosine_similarity(one[None], part).max() for one, part in zip(embeds, parts, strict=True)]
        ).clamp_min(0)
        found["ref_clip_score"] = (2 * scores * best / (scores + best).clamp_min(1e-12)).tolist()
    return found


class Chair:
    """CHAIR (Rohrbach et al., 2018): the objects that a caption mentions and the image does not have.

    Args:
        vocabulary: Of each object its synonyms, such as `{"dog": ["puppy", "hot dog stand"]}`. Words of several parts
            win over their parts. Regular plurals are recognised.

    Raises:
        ValueError: If a word names two objects.
    """

    def __init__(self, vocabulary: Mapping[str, Sequence[str]]):
        self.objects: dict[str, str] = {}
        for name, synonyms in vocabulary.items():
            for word in (name, *synonyms):
                for form in _forms(" ".join(word.lower().split())):
                    if self.objects.setdefault(form, name) != name:
                        raise ValueError(f"{form!r} names two objects: {self.objects[form]!r} and {name!r}")
        words = sorted(map(re.escape, self.objects), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(words)})(?!\w)" if words else r"(?!)")

    def mentions(self, caption: str) -> list[str]:
        """The objects that a caption mentions, one entry for each mention."""
        return [self.objects[word] for word in self._pattern.findall(" ".join(caption.lower().split()))]

    def count(self, captions: Sequence[str], truth: Sequence[Sequence[str]]) -> torch.Tensor:
        """Of each caption, the mentions, the mentions of absent objects, the present objects, and those mentioned.

        Args:
            truth: The objects of each image, in any of their words.

        Returns:
            `(N, 4)` float64.
        """
        _one_for_each(captions, truth)
        rows = []
        for caption, objects in zip(captions, truth, strict=True):
            present = {self._named(word) for word in objects}
            mentioned = self.mentions(caption)
            absent = sum(name not in present for name in mentioned)
            rows.append((len(mentioned), absent, len(present), len(present & set(mentioned))))
        return torch.tensor(rows, dtype=torch.float64).reshape(-1, 4)

    def _named(self, word: str) -> str:
        try:
            return self.objects[word.lower()]
        except KeyError:
            raise ValueError(f"{word!r} is not an object of the vocabulary, nor a synonym of one") from None


def chair_scores(counts: torch.Tensor) -> dict[str, float]:
    """CHAIR of `Chair.count`: the share of mentions (`chair_i`) and of captions (`chair_s`) that are hallucinated.

    `chair_recall` is the share of the images' objects that are mentioned. A share of nothing is 0.
    """
    mentions, absent, present, found = counts.sum(0).tolist()
    return {
        "chair_i": absent / mentions if mentions else 0.0,
        "chair_s": (counts[:, 1] > 0).double().mean().item() if len(counts) else 0.0,
        "chair_recall": found / present if present else 0.0,
    }


def _forms(word: str) -> list[str]:
    """A word and its regular plurals: also those in -ies, -oes and -ves."""
    if re.search(r"(s|x|z|ch|sh)$", word):
        return [word, word + "es"]
    if re.search(r"[^aeiou]y$", word):
        return [word, word[:-1] + "ies"]
    if re.search(r"[^aeiou]o$", word):  # potatoes, pianos
        return [word, word + "es", word + "s"]
    if ending := re.search(r"(?:(?<=i)fe|(?<=[lr])f|(?<=ea|oa|ie|oo)f)$", word):  # knives, shelves, leaves; roofs
        return [word, word[: ending.start()] + "ves", word + "s"]
    return [word, word + "s"]


def lengths(captions: Sequence[str]) -> list[float]:
    """The number of words of each caption."""
    return [float(len(tokenize(caption))) for caption in captions]


def distinct(captions: Sequence[str], order: int) -> float:
    """The share of different sequences of `order` words among all such sequences of all captions (distinct-n)."""
    counts: Counter = Counter()
    for caption in captions:
        counts.update(_ngrams(tokenize(caption), [order]))
    return len(counts) / counts.total() if counts else 0.0


def repetition(captions: Sequence[str], order: int = 4) -> list[float]:
    """Of each caption, the share of sequences of `order` words that have occurred in it before: 0 to 1."""
    found = [_ngrams(tokenize(caption), [order]) for caption in captions]
    return [1 - len(counts) / counts.total() if counts else 0.0 for counts in found]


def ended(captions: Sequence[str], tokenizer: Any, max_new_tokens: int) -> list[float]:
    """Of each caption 1 if it ended by itself, 0 if it was cut at `max_new_tokens`.

    Args:
        tokenizer: Of the language model that wrote the captions. A caption that has as many tokens was cut.
    """
    return [
        float(len(tokenizer(caption, add_special_tokens=False).input_ids) < max_new_tokens) for caption in captions
    ]


def _one_for_each(captions: Sequence[Any], others: Sequence[Any]) -> None:
    if len(captions) != len(others):
        raise ValueError(f"expected one entry for each of {len(captions)} captions, got {len(others)}")


def _check(captions: Sequence[str], references: References) -> None:
    _one_for_each(captions, references)
    for index, texts in enumerate(references):
        if isinstance(texts, str) or not texts:
            raise ValueError(f"entry {index} of the references must be a list of at least one text, got {texts!r}")
