"""What stage 1 can do to conditioning and query tokens in training, beyond the paper; off by default."""

from typing import Any

import torch
from torch import nn

from vlv import VLVModel
from vlv.diffusion_decoder import Conditioning


def drop_embeddings(conditioning: Conditioning, unconditional: Conditioning, dropped: torch.Tensor) -> Conditioning:
    """Replaces the conditioning of some images by the unconditional one.

    Args:
        conditioning: Of `B` images, `N` embeddings each.
        unconditional: Of one row, `M` embeddings.
        dropped: `(B,)`, bool: the images whose conditioning is replaced.

    Returns:
        `max(N, M)` embeddings for each image, and the mask of which it has; without a mask where `N` equals `M`, so
        that every image has all.
    """
    states = conditioning.hidden_states
    batch, own, width = states.shape
    other = unconditional.hidden_states.shape[1]
    empty_states = unconditional.hidden_states.to(states).expand(batch, -1, -1)
    dropped = dropped.to(states.device)[:, None]  # (B, 1)
    pooled = conditioning.pooled
    if pooled is not None:
        assert unconditional.pooled is not None
        pooled = torch.where(dropped, unconditional.pooled.to(pooled), pooled)
    if own == other:
        return Conditioning(torch.where(dropped[..., None], empty_states, states), pooled)
    length = max(own, other)
    empty, given = (
        torch.cat([rows, rows.new_zeros(batch, length - rows.shape[1], width)], dim=1)
        for rows in (empty_states, states)
    )
    places = torch.arange(length, device=states.device)[None]  # (1, length)
    mask = torch.where(dropped, places < other, places < own)
    return Conditioning(torch.where(dropped[..., None], empty, given), pooled, mask)


class QueryNoise:
    """Adds Gaussian noise to the query tokens of each image while the model is in training mode.

    Args:
        model: Its query tokens are the input of the query decoder, where the noise is added.
        share: Standard deviation of the noise, as a share of the query tokens' root mean square.
    """

    def __init__(self, model: VLVModel, share: float):
        self.model, self.share = model, share
        self.handle = model.get_query_decoder().register_forward_pre_hook(self._add, with_kwargs=True)

    def _add(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self.model.training:
            return None
        queries = kwargs["inputs_embeds"]  # (B, Q, d_model)
        size = queries.detach().square().mean().sqrt()
        noise = torch.randn(queries.shape, device=queries.device, dtype=queries.dtype)  # whatever their layout
        return args, kwargs | {"inputs_embeds": queries + self.share * size * noise}
