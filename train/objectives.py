"""What stage 1 can do to conditioning and query tokens in training, beyond the paper; off by default."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from vlv import VLVModel


@torch.no_grad()
def unconditional_context(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The context that guidance steers away from, as the reconstruction pipeline forms it.

    It is the empty prompt, padded to all positions of the text encoder, through the text encoder.

    Args:
        model: A `VLVModel`, or what wraps it.

    Returns:
        `(1, positions, d_text)`.
    """
    config: Any = getattr(model, "module", model).config
    positions = config.text_encoder_config.max_position_embeddings
    ids = tokenizer("", padding="max_length", max_length=positions, truncation=True, return_tensors="pt").input_ids
    return model(input_ids=ids.to(device)).conditioning


def drop_embeddings(
    conditioning: torch.Tensor, unconditional: torch.Tensor, dropped: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Replaces the conditioning of some images by the unconditional context.

    Args:
        conditioning: `(B, N, d_text)`.
        unconditional: `(1, M, d_text)`.
        dropped: `(B,)`, bool: the images whose conditioning is replaced.

    Returns:
        `(B, max(N, M), d_text)`, and which of these embeddings each image has, `(B, max(N, M))`, bool; None where
        `N` equals `M`, so that every image has all.
    """
    batch, own, width = conditioning.shape
    other = unconditional.shape[1]
    unconditional = unconditional.to(conditioning).expand(batch, -1, -1)
    dropped = dropped.to(conditioning.device)[:, None]  # (B, 1)
    if own == other:
        return torch.where(dropped[..., None], unconditional, conditioning), None
    length = max(own, other)
    empty, given = (
        torch.cat([rows, rows.new_zeros(batch, length - rows.shape[1], width)], dim=1)
        for rows in (unconditional, conditioning)
    )
    places = torch.arange(length, device=conditioning.device)[None]  # (1, length)
    return torch.where(dropped[..., None], empty, given), torch.where(dropped, places < other, places < own)


class QueryNoise:
    """Adds Gaussian noise to the query tokens of each image while the model is in training mode.

    Args:
        model: Its query tokens are the input of Florence-2's decoder, where the noise is added.
        share: Standard deviation of the noise, as a share of the query tokens' root mean square.
    """

    def __init__(self, model: VLVModel, share: float):
        self.model, self.share = model, share
        decoder = model.image_encoder.language_model.decoder
        self.handle = decoder.register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self.model.training:
            return None
        queries = kwargs["inputs_embeds"]  # (B, Q, d_model)
        size = queries.detach().square().mean().sqrt()
        return args, kwargs | {"inputs_embeds": queries + self.share * size * torch.randn_like(queries)}
