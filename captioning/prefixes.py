"""The prefixes of captions: what a language model in another program reads in place of images."""

import torch

from .batches import Batch
from .captioner import Captioner


@torch.no_grad()
def read_prefixes(captioner: Captioner, batch: Batch) -> torch.Tensor:
    """What the language model of a captioner reads before the captions of a batch.

    Returns:
        `(B, Q + P, d_lm)`: Q caption embeddings and the P tokens of the prompt, the same for all, so that no prefix
        has padding.

    Raises:
        ValueError: If the prefix is longer than the language model can read.
    """
    model, settings = captioner.model, captioner.settings
    inputs = {name: tensor.to(model.device, model.dtype) for name, tensor in batch.tensors.items()}
    if settings.prompt:
        text = captioner.processor(text=[settings.prompt] * len(batch.inputs))
        inputs |= {name: tensor.to(model.device) for name, tensor in text.items()}
    prefixes, _, _ = model.get_prefix(**inputs)
    return prefixes
