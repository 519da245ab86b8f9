"""What sampling and scoring of stage 3 cost, counted on the meta device as a training step is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from vlv.diffusion_decoder import Conditioning, DiffusionDecoder

from .counting import PartCount, count_step
from .stage3_config import Stage3Config

READING, SAMPLING, VAE_ENCODER, SCORING = "reading", "sampling", "vae_encoder", "scoring"
FLOAT32_BYTES = 4
SENTENCE_TOKENS = 25
"""Of a sentence, by assumption: captions that the text encoder does not read as a whole are scored by sentences."""


@dataclass
class RoundCount:
    """What sampling and scoring the captions of an image cost, and their memory.

    Attributes:
        parts: FLOPs of an image by part, all in the forward pass. `reading` is of the encoder and of the language
            model over whole sequences: the prefix, log-probabilities for `grpo`, and fluency. `sampling` is of the
            language model that writes token by token, `scoring` of text encoders and denoiser.
        passes: Passes of the denoiser, if the texts of an image differ; equal ones are scored once.
        layer_steps: Layers of the language model that run one after the other to write the greedy captions and then
            the samples of a part.
        cache_bytes: Keys and values of the captions that are sampled together.
        peak_bytes: The most bytes besides weights and the training's own state, at `peak_at`.
    """

    parts: dict[str, PartCount]
    passes: int
    layer_steps: int
    cache_bytes: int
    peak_bytes: int
    peak_at: str


def count_round(
    config: Stage3Config,
    model: Any,
    decoder: DiffusionDecoder,
    images: Callable[[], dict[str, Any]] | None,
    image_size: int,
    caption_tokens: int,
    half: bool,
) -> RoundCount:
    """Counts what a round computes for an image before it trains.

    Args:
        model: The captioner on the meta device; its weights are those of the training.
        decoder: The frozen text-to-image model on the meta device.
        images: Gives the encoder's input of a batch of `per_device_train_batch_size`; None if its output is cached.
        image_size: Side in pixels of the images for the diffusion model.
        caption_tokens: Tokens of a caption.
        half: Whether captioner and denoiser compute in half precision.
    """
    vlv_config = model.config
    width = model.get_input_embeddings().weight.shape[1]
    prefix = vlv_config.num_query_tokens
    positions = vlv_config.num_text_positions
    kept: dict[str, Any] = {}

    def forward(call: Callable[[], Any], module: nn.Module) -> tuple[int, PartCount]:
        """The most bytes alive, and FLOPs by kind, of a call of a module."""
        bf16 = [module] if half and module is not decoder else []  # the denoiser's weights are in half precision
        found = count_step(call, {}, [module], bf16, backward=False)
        total = PartCount()
        for part in found.parts.values():
            _add(total, part, 1)
        return found.peak_bytes, total

    def read(length: int, scored: int) -> PartCount:
        """The language model on one row of so many positions, the last of them with the output layer."""

        def call() -> None:
            states = torch.empty(1, length, width, device="meta")
            output = model.language_model(inputs_embeds=states, use_cache=True, logits_to_keep=scored)
            kept["cache"] = sum(
                tensor.nbytes
                for layer in output.past_key_values.layers
                for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
                if isinstance(tensor, torch.Tensor)
            )

        return forward(call, model.language_model)[1]

    groups = config.num_captions + 1  # the greedy one
    reading, sampling = PartCount(), PartCount()
    peaks: dict[str, int] = {}
    if images is not None:
        peak, own = forward(lambda: model.model(**images()), model.model)
        _add(reading, own, 1 / config.per_device_train_batch_size)
        peaks["the encoder, sampling"] = peak * config.sample_batch_size // config.per_device_train_batch_size
    shared = read(prefix, 1)
    whole = read(prefix + caption_tokens, caption_tokens)
    _add(reading, shared, 2)  # once for the greedy caption and once for the samples
    _add(sampling, whole, groups)
    _add(sampling, shared, -groups)
    rows = config.sample_batch_size * config.num_captions
    cache = kept["cache"] * rows
    vocabulary = model.get_output_embeddings().weight.shape[0]
    peaks["the language model, sampling"] = cache + 2 * rows * vocabulary * FLOAT32_BYTES  # logits and probabilities
    if config.method == "grpo":
        _add(reading, whole, config.num_captions * (2 if config.kl_weight else 1))
    if config.fluency_floor is not None:
        _add(reading, read(caption_tokens, caption_tokens), groups)

    vae_dtype = decoder.vae.dtype
    together = min(config.sample_batch_size, config.reward_batch_size)

    def encode() -> None:
        decoder.vae.encode(torch.empty(together, 3, image_size, image_size, dtype=vae_dtype, device="meta"))

    peaks["the autoencoder, scoring"], own = forward(encode, decoder)
    vae = PartCount()
    _add(vae, own, 1 / together)

    side, channels = image_size // decoder.scale_factor, decoder.vae.config.latent_channels
    texts = -(-caption_tokens // SENTENCE_TOKENS) if caption_tokens > positions else 1
    batch, count = config.reward_batch_size, config.reward_num_pairs
    passes = ((groups + (config.method == "best_of_n")) * texts + 1) * count  # the best so far, and no words

    def read_text() -> Conditioning:
        ids = [torch.zeros(1, positions, dtype=torch.long, device="meta") for _ in vlv_config.text_encoder_configs]
        return Conditioning.of(model.model(input_ids=ids))

    def denoise() -> None:
        one = kept["text"]
        pooled = None if one.pooled is None else one.pooled.expand(batch, -1)
        latents = torch.empty(batch, channels, side, side, device="meta")
        timesteps = torch.zeros(batch, dtype=torch.long, device="meta")
        conditioning = Conditioning(one.hidden_states.expand(batch, -1, -1), pooled)
        decoder.denoise(latents, conditioning, torch.empty_like(latents), timesteps)

    def keep_text() -> None:
        kept["text"] = read_text()

    _, own = forward(keep_text, model.model)
    scoring = PartCount()
    _add(scoring, own, passes / count)
    peaks["the denoiser, scoring"], own = forward(denoise, decoder)
    _add(scoring, own, passes / batch)
    peak_at = max(peaks, key=lambda name: peaks[name])
    layers = vlv_config.text_config.get_text_config().num_hidden_layers
    parts = {READING: reading, SAMPLING: sampling, VAE_ENCODER: vae, SCORING: scoring}
    return RoundCount(parts, passes, 2 * caption_tokens * layers, cache, peaks[peak_at], peak_at)


def _add(total: PartCount, part: PartCount, times: float) -> None:
    for kind, flops in part.forward.items():
        total.forward[kind] += round(flops * times)
