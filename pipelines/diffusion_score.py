"""How well captions explain images to the frozen text-to-image model: a denoising loss, without sampling."""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image

from vlv import VLVModel
from vlv.diffusion_decoder import Conditioning, DiffusionDecoder, build_diffusion_decoder, family_of_components

from .loading import ReconstructionPipeline

NUM_PAIRS = 4
TIMESTEP_RANGE = (0.45, 0.95)
NO_WORDS = None  # the text whose loss captions are compared with
LATENTS, NOISE = 0, 1  # what random numbers are for
SHORTEST_SENTENCE = 4  # letters; what is shorter is a number of a list, or an abbreviation
_SENTENCE_END = re.compile(r"(?<=[.!?])(?<!\b[A-Za-z]\.[A-Za-z]\.)\s+|(?<=[。！？])|\n+")


def split_into_sentences(text: str) -> list[str]:
    """The sentences of a text; itself if it has no end of one.

    Numbers of lists, abbreviations and what else has less than `SHORTEST_SENTENCE` letters is of the next sentence, or
    at the end of the text of the last one. A full stop after two letters with full stops, such as p.m., ends none.
    """
    found: list[str] = []
    begun = ""
    for part in filter(None, map(str.strip, _SENTENCE_END.split(text))):
        begun = f"{begun} {part}".strip()
        if sum(map(str.isalpha, part)) >= SHORTEST_SENTENCE:
            found.append(begun)
            begun = ""
    if begun:
        found[-1:] = [" ".join([*found[-1:], begun])]
    return found or [text]


@dataclass
class CaptionScores:
    """Scores of `G` captions of each of `N` images, and what they consist of. All tensors are on the CPU.

    Attributes:
        scores: `(N, G)`, float32: `unconditional_losses - losses`. Above 0: the caption explains the image better than
            no words.
        losses: `(N, G)`, float32: the mean denoising loss under each caption.
        unconditional_losses: `(N, 1)`, float32: that under no words.
        num_texts: `(N, G)`, int64: the sentences that a caption was split into; 1 where all captions of the image fit.
        num_cut: `(N, G)`, int64: those of them that are too long for the text encoder, so that their end is not read.
    """

    scores: torch.Tensor
    losses: torch.Tensor
    unconditional_losses: torch.Tensor
    num_texts: torch.Tensor
    num_cut: torch.Tensor


class DiffusionScorer:
    """Scores captions by the denoising loss of a frozen text-to-image model.

    The score of a caption is the loss of the image's latents under no words, less that under the caption's words.
    Both are means over the same `num_pairs` pairs of timestep and noise, so a caption costs `num_pairs` passes of the
    denoiser. The timesteps are the middles of `num_pairs` equal parts of `timestep_range`, the same for all images.
    The noise depends on `seed` and on the image's own seed, and not on the captions or the batch.

    If a caption is longer than a text encoder's positions, it and the other captions of its image are split into
    sentences, since scores of whole captions and of sentences cannot be compared. Each sentence is scored on its own
    against the same latents, and the caption's loss is the mean of theirs. A sentence that is too long by itself is
    cut at the last position.

    Args:
        model: Holds the text encoders.
        diffusion_decoder: The text-to-image model that `model` was trained with.
        tokenizers: Those of the text encoders, by the names of the diffusion model's components.
        num_pairs: Pairs of timestep and noise.
        timestep_range: Lowest and highest timestep, as shares of the schedule. At lower noise the noised image says
            nearly all that words could (docs/evaluation.md has the ranking by timestep); at higher noise a model that
            predicts the noise can read it off its input, whatever the words.
        seed: Of the noise.
        batch_size: Most passes of the denoiser at once.

    Raises:
        ValueError: If an argument is not one of the allowed values, or a tokenizer is missing.
    """

    def __init__(
        self,
        model: VLVModel,
        diffusion_decoder: DiffusionDecoder,
        tokenizers: dict[str, Any],
        num_pairs: int = NUM_PAIRS,
        timestep_range: tuple[float, float] = TIMESTEP_RANGE,
        seed: int = 0,
        batch_size: int = 64,
    ):
        for name, value in (("num_pairs", num_pairs), ("batch_size", batch_size)):
            if value < 1:
                raise ValueError(f"{name} is {value}; expected 1 or more")
        first, last = timestep_range
        if not 0 <= first <= last <= 1:
            raise ValueError(
                f"timestep_range is {timestep_range}; expected two shares of the schedule, such as 0.45, 0.95"
            )
        if seed < 0:
            raise ValueError(f"seed is {seed}; expected 0 or more")
        names = diffusion_decoder.tokenizers[: len(model.config.text_encoder_configs)]
        if missing := [name for name in names if tokenizers.get(name) is None]:
            raise ValueError(f"captions need the tokenizers of all text encoders; {' and '.join(missing)} is missing")
        self.model, self.diffusion_decoder = model, diffusion_decoder
        self.tokenizers = {name: tokenizers[name] for name in names}
        self.seed, self.batch_size = seed, batch_size
        self.timesteps = spread_timesteps(num_pairs, first, last, diffusion_decoder.num_timesteps)  # (K,)
        self._unconditional: Conditioning | None = None

    @classmethod
    def from_pipeline(cls, pipeline: ReconstructionPipeline, **settings: Any) -> "DiffusionScorer":
        """The scorer with the parts of a reconstruction pipeline, whose autoencoder becomes float32 if it is float16.

        Args:
            settings: Arguments of the class.

        Raises:
            ValueError: If the pipeline has no complete text-to-image model.
        """
        components = pipeline.components
        source = "the reconstruction pipeline"
        family = family_of_components(components, source)
        components |= {name: pipeline.config[name] for name in family.pipeline_settings}
        vae_dtype = torch.bfloat16 if components["vae"].dtype == torch.bfloat16 else torch.float32
        decoder = build_diffusion_decoder(components, source, vae_dtype=vae_dtype)
        return cls(pipeline.encoder, decoder.to(pipeline.device), components, **settings)

    @property
    def device(self) -> torch.device:
        return self.diffusion_decoder.denoiser.device

    def settings(self) -> dict[str, Any]:
        """What losses depend on besides the models and the image, as JSON values."""
        return {
            "scorer": type(self).__name__,
            "timesteps": self.timesteps.tolist(),
            "seed": self.seed,
            "dtype": str(self.diffusion_decoder.denoiser.dtype),
            "vae_dtype": str(self.diffusion_decoder.vae.dtype),
        }

    def score(
        self,
        pixels: torch.Tensor,
        captions: Sequence[Sequence[str]],
        seeds: Sequence[int] | None = None,
        allow_nan: bool = False,
    ) -> CaptionScores:
        """Scores of captions of images.

        Args:
            pixels: `(N, 3, S, S)`, uint8, as `to_pixels` makes them.
            captions: Of each image `G` texts, at least one.
            seeds: One for each image; by default a hash of its pixels, so that its scores depend on nothing else.
            allow_nan: Whether scores may be NaN or infinite.

        Raises:
            ValueError: If the numbers do not fit, or a score is not finite.
        """
        seeds = [seed_of_pixels(image) for image in pixels] if seeds is None else seeds
        return self.score_latents(self.encode_images(pixels, seeds), captions, seeds, allow_nan)

    def encode_images(self, pixels: torch.Tensor, seeds: Sequence[int]) -> torch.Tensor:
        """Latents `(N, C, h, w)`, float32, of images `(N, 3, S, S)` uint8; the random numbers are those of `seeds`."""
        if pixels.ndim != 4 or pixels.shape[1] != 3 or pixels.dtype != torch.uint8:
            raise ValueError(f"pixels must be (N, 3, height, width) uint8, got {tuple(pixels.shape)} {pixels.dtype}")
        generators = self._generators(seeds, LATENTS)
        parts = zip(pixels.split(self.batch_size), _chunks(generators, self.batch_size), strict=True)
        return torch.cat(
            [self.diffusion_decoder.encode_images(part.to(self.device) / 127.5 - 1, own) for part, own in parts]
        )

    @torch.no_grad()
    def score_latents(
        self,
        latents: torch.Tensor,
        captions: Sequence[Sequence[str]],
        seeds: Sequence[int],
        allow_nan: bool = False,
        known: Sequence[MutableMapping[str | None, float]] | None = None,
    ) -> CaptionScores:
        """Scores of captions of images whose latents are known.

        Args:
            latents: `(N, C, h, w)`, as `encode_images` of the `DiffusionDecoder` returns them.
            captions, seeds, allow_nan: As in `score`.
            known: Of each image the losses of texts (None: no words) that this scorer has computed before. They are
                not computed again, and the others are added.
        """
        if len(captions) != len(latents) or len(seeds) != len(latents):
            raise ValueError(
                f"{len(captions)} lists of captions and {len(seeds)} seeds for {len(latents)} images; give one each"
            )
        counts = sorted({len(texts) for texts in captions})
        if counts and counts[0] == 0:
            empty = next(place for place, texts in enumerate(captions) if not texts)
            raise ValueError(f"image {empty} has no captions; give at least one, or leave the image out")
        if len(counts) != 1:
            raise ValueError(f"images have {counts} captions; score those with the same number together")
        fitting = self.fitting(text for row in captions for text in row)
        parts = [self.split_captions(row, fitting) for row in captions]  # sentences of each caption
        fitting |= self.fitting({s for row in parts for own in row for s in own} - fitting.keys())
        texts = [dict.fromkeys([NO_WORDS, *(s for own in row for s in own)]) for row in parts]  # of each image, once
        own = [{} for _ in texts] if known is None else known
        missing = [[text for text in row if text not in found] for row, found in zip(texts, own, strict=True)]
        for found, row, values in zip(own, missing, self.text_losses(latents, missing, seeds), strict=True):
            found.update(zip(row, values, strict=True))
        unconditional = torch.tensor([[found[NO_WORDS]] for found in own])  # (N, 1)
        means = torch.tensor(
            [[sum(found[s] for s in own) / len(own) for own in row] for found, row in zip(own, parts, strict=True)]
        )  # (N, G)
        num_texts = torch.tensor([[len(own) for own in row] for row in parts])
        num_cut = torch.tensor([[sum(not fitting[s] for s in own) for own in row] for row in parts])
        result = CaptionScores(unconditional - means, means, unconditional, num_texts, num_cut)
        if not allow_nan and not result.scores.isfinite().all():
            image, number = (~result.scores.isfinite()).nonzero()[0].tolist()
            raise ValueError(
                f"the score of caption {number} of image {image}, {captions[image][number]!r:.80}, is "
                f"{result.scores[image, number].item()}; a denoiser overflows in float16: use bfloat16 or float32"
            )
        return result

    def sample_noise(self, shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
        """The noise `(N, K, C, h, w)` of images with these seeds, whose latents have the shape `(C, h, w)`."""
        shape = (len(self.timesteps), *shape)
        return torch.stack([randn_tensor(shape, own, self.device) for own in self._generators(seeds, NOISE)])

    def fitting(self, texts: Iterable[str]) -> dict[str, bool]:
        """Of each text whether every text encoder has positions for all of its tokens."""
        words = list(dict.fromkeys(texts))
        positions, found = self.model.config.num_text_positions, dict.fromkeys(words, True)
        for tokenizer in self.tokenizers.values() if words else ():
            for text, ids in zip(words, tokenizer(words, verbose=False).input_ids, strict=True):
                found[text] &= len(ids) <= positions
        return found

    @staticmethod
    def split_captions(captions: Sequence[str], fitting: Mapping[str, bool]) -> list[list[str]]:
        """The texts that each caption of an image is scored as: itself where all fit, otherwise its sentences."""
        if all(fitting[caption] for caption in captions):
            return [[caption] for caption in captions]
        return [split_into_sentences(caption) for caption in captions]

    def text_losses(
        self, latents: torch.Tensor, texts: Sequence[Sequence[str | None]], seeds: Sequence[int]
    ) -> list[list[float]]:
        """The mean loss of each image under each of its texts, of which it may have none; None is no words."""
        count = len(self.timesteps)
        latents = latents.to(self.device, torch.float32)
        noise = self.sample_noise(latents.shape[1:], seeds)  # (N, K, C, h, w)
        rows = [(image, text, pair) for image, own in enumerate(texts) for text in own for pair in range(count)]
        found: list[torch.Tensor] = []
        for chunk in _chunks(rows, self.batch_size):
            images, words, pairs = map(list, zip(*chunk, strict=True))
            denoised = self.diffusion_decoder.denoise(
                latents[images], self._conditioning(words), noise[images, pairs], self.timesteps[pairs]
            )
            found.append(denoised.losses)
        if not found:
            return [[] for _ in texts]
        means = iter(torch.cat(found).cpu().double().unflatten(0, (-1, count)).mean(dim=1).tolist())
        return [[next(means) for _ in own] for own in texts]

    def _conditioning(self, texts: Sequence[str | None]) -> Conditioning:
        """The conditioning of each of `B` texts, of which each is encoded once."""
        words = list(dict.fromkeys(text for text in texts if text is not NO_WORDS))
        parts = [self.unconditional]
        if words:
            parts.append(self.diffusion_decoder.encode_texts(self.model, self.tokenizers, words, self.device))
        places = {NO_WORDS: 0} | {word: place for place, word in enumerate(words, start=1)}
        rows = [places[text] for text in texts]
        pooled = [part.pooled for part in parts if part.pooled is not None]
        return Conditioning(
            torch.cat([part.hidden_states.to(parts[-1].hidden_states) for part in parts])[rows],
            torch.cat([states.to(pooled[-1]) for states in pooled])[rows] if pooled else None,
        )

    @property
    def unconditional(self) -> Conditioning:
        """The conditioning of no words, of one row: what guidance steers away from, at all positions."""
        if self._unconditional is None:
            positions = self.model.config.num_text_positions
            self._unconditional = self.diffusion_decoder.unconditional(
                self.model, self.tokenizers, self.device, positions
            )
        return self._unconditional

    def _generators(self, seeds: Sequence[int], use: int) -> list[torch.Generator]:
        """A random generator for each image, for latents or for noise."""
        keys = [np.random.SeedSequence([self.seed, seed, use]) for seed in seeds]
        return [torch.Generator().manual_seed(int(key.generate_state(1, np.uint64)[0])) for key in keys]


def spread_timesteps(count: int, first: float, last: float, num_timesteps: int) -> torch.Tensor:
    """The middles of `count` equal parts of the range from `first` to `last`, shares of the schedule.

    Returns:
        `(count,)`, int64, ascending.
    """
    shares = first + (torch.arange(count, dtype=torch.float64) + 0.5) / count * (last - first)
    return (shares * num_timesteps).long().clamp(max=num_timesteps - 1)


def seed_of_pixels(pixels: torch.Tensor) -> int:
    """A seed that depends on the values of an image `(3, H, W)` uint8 alone."""
    return int.from_bytes(hashlib.blake2b(pixels.cpu().contiguous().numpy().tobytes(), digest_size=8).digest())


def to_pixels(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB images of one size to `(N, 3, H, W)`, uint8."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
