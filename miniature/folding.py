"""Stable Diffusion 3 without T5 reads 256 equal positions. One of them is enough to compute with."""

import math

import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from torch import nn
from torch.nn import functional as F

from vlv.diffusion_decoder.sd3 import EMPTY_POSITIONS


class FoldedAttention:
    """Joint attention in which the last position of the context counts `copies` times.

    `copies` equal positions have equal states in every layer. Attention to all of them is attention to one, with the
    logarithm of their number added to its logit.
    """

    def __init__(self) -> None:
        self.copies = 1

    def fold(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """A forward hook of the transformer: keeps one of the empty positions at the end of the context."""
        context = kwargs["encoder_hidden_states"]
        self.copies = 1
        if context.shape[1] > EMPTY_POSITIONS and not context[:, -EMPTY_POSITIONS:].any():
            self.copies = EMPTY_POSITIONS
            kwargs["encoder_hidden_states"] = context[:, : 1 - EMPTY_POSITIONS]
        return args, kwargs

    def __call__(
        self, attn: Attention, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `JointAttnProcessor2_0`: `(B, N, d)` and `(B, M, d)`, image and context, to the same shapes."""

        def heads(states: torch.Tensor) -> torch.Tensor:  # (B, N, d) to (B, heads, N, d / heads)
            return states.unflatten(2, (attn.heads, -1)).transpose(1, 2)

        def norm(layer: nn.Module | None, states: torch.Tensor) -> torch.Tensor:
            return states if layer is None else layer(states)

        image, context = hidden_states, encoder_hidden_states
        query = torch.cat(
            [
                norm(attn.norm_q, heads(attn.to_q(image))),
                norm(attn.norm_added_q, heads(attn.add_q_proj(context))),
            ],
            dim=2,
        )
        key = torch.cat(
            [
                norm(attn.norm_k, heads(attn.to_k(image))),
                norm(attn.norm_added_k, heads(attn.add_k_proj(context))),
            ],
            dim=2,
        )
        value = torch.cat([heads(attn.to_v(image)), heads(attn.add_v_proj(context))], dim=2)
        bias = None
        if self.copies > 1:
            bias = query.new_zeros(key.shape[2])
            bias[-1] = math.log(self.copies)
            bias = bias.expand(len(query), 1, query.shape[2], -1)
        states = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2).flatten(2)
        image, context = states[:, : image.shape[1]], states[:, image.shape[1] :]
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[0](image), context


def fold_empty_positions(transformer: SD3Transformer2DModel) -> None:
    """Makes the transformer compute the same in less time where its context ends with 256 empty positions."""
    folded = FoldedAttention()
    transformer.set_attn_processor(folded)
    transformer.register_forward_pre_hook(folded.fold, with_kwargs=True)
