"""FLOPs and memory of a step: layers that can be counted by hand."""

import pytest
import torch
from torch import nn

from vlv.train.counting import MemoryMode, MetaAutocast, MetaResults, count_step

ROWS, WIDE, NARROW = 10, 64, 16


class Chain(nn.Module):
    """Two linear layers, as two parts."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDE, WIDE, bias=False), nn.Linear(WIDE, NARROW, bias=False)

    def forward(self, x):
        return self.second(self.first(x))


def count_chain(first: bool, second: bool):
    """The step with either layer trained or frozen."""
    with torch.device("meta"):
        chain = Chain()
    chain.first.requires_grad_(first)
    chain.second.requires_grad_(second)
    parts = {"first": chain.first, "second": chain.second}
    return count_step(lambda: chain(torch.empty(ROWS, WIDE, device="meta")).sum(), parts, [chain])


def test_a_frozen_layer_costs_its_input_gradient_and_a_layer_before_it_none():
    first, second = 2 * ROWS * WIDE * WIDE, 2 * ROWS * WIDE * NARROW
    for trained, backward in (((True, True), (first, 2 * second)), ((True, False), (first, second))):
        parts = count_chain(*trained).parts
        assert [sum(part.forward.values()) for part in parts.values()] == [first, second]
        assert tuple(sum(part.backward.values()) for part in parts.values()) == backward
    parts = count_chain(False, True).parts
    assert sum(parts["first"].backward.values()) == 0 and sum(parts["second"].backward.values()) == second


def test_kinds_of_operations_are_counted_apart():
    with torch.device("meta"):
        convolution = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        query = nn.Parameter(torch.empty(2, 4, 10, 16))

    def loss():
        attended = nn.functional.scaled_dot_product_attention(query, query, query)
        return convolution(torch.empty(1, 3, 12, 12, device="meta")).sum() + attended.sum()

    (part,) = count_step(loss, {}, [convolution]).parts.values()
    assert part.forward == {
        "convolution": 2 * 144 * 8 * 3 * 9,
        "matmul": 0,
        "attention": 2 * 2 * (2 * 4 * 10 * 10 * 16),
    }


@pytest.mark.slow
def test_recomputed_activations_cost_another_forward_pass_and_need_less_memory():
    from diffusers import UNet2DConditionModel

    def count(checkpointed: bool):
        with torch.device("meta"):
            unet = UNet2DConditionModel(
                block_out_channels=(8, 8),
                down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
                up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
                cross_attention_dim=8,
                attention_head_dim=2,
                norm_num_groups=4,
                layers_per_block=4,
            ).requires_grad_(False)
            embeds = torch.empty(4, 6, 8, requires_grad=True)
        if checkpointed:
            unet.enable_gradient_checkpointing()
            unet.train()

        def loss():
            return unet(torch.empty(4, 4, 16, 16, device="meta"), torch.zeros(4, device="meta"), embeds).sample.sum()

        found = count_step(loss, {"unet": unet}, [unet])
        return sum(found.parts["unet"].forward.values()), found.total(), found.peak_bytes

    forward, total, peak = count(False)
    again_forward, again_total, again_peak = count(True)
    assert forward == again_forward and again_peak < 0.7 * peak
    assert 0.75 * forward < again_total - total < forward  # layers outside the checkpointed blocks run once


def test_memory_is_that_of_the_tensors_alive():
    layer = nn.Linear(4, 4, bias=False)
    memory = MemoryMode([layer])
    with memory:
        x = torch.ones(8, 4)  # 128 bytes
        y = layer(x)
        view = y.view(32)  # no memory of its own
        assert memory.alive == 256
        del y
        assert memory.alive == 256
        del view
        assert memory.alive == 128 and memory.peak == 256


def test_the_memory_of_a_meta_step_is_that_of_the_computed_step():
    torch.manual_seed(0)
    peaks = []
    for device in ("meta", "cpu"):
        with torch.device(device):
            model = nn.Sequential(
                *(m for _ in range(4) for m in (nn.Linear(WIDE, WIDE), nn.GELU(), nn.LayerNorm(WIDE)))
            )
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        memory = MemoryMode([model])
        with memory:
            model(torch.ones(ROWS, WIDE, device=device)).sum().backward()
        peaks.append(memory.peak)
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)


def test_autocast_on_meta_tensors_gives_the_dtypes_of_autocast_on_a_gpu():
    with torch.device("meta"):
        linear, norm, x = nn.Linear(4, 4), nn.LayerNorm(4), torch.ones(2, 4)
    with MetaAutocast():
        y = linear(x)
        results = [y, nn.functional.gelu(y), x @ x.T, norm(y), y + x, nn.functional.mse_loss(y, y)]
    assert [t.dtype for t in results] == [torch.bfloat16] * 3 + [torch.float32] * 3


def test_a_repeated_operation_on_meta_tensors_gives_what_the_first_gave_in_a_new_tensor():
    with torch.device("meta"):
        x, whole = torch.ones(4, 6), torch.ones(4, dtype=torch.long)
    operations = [
        *(lambda number=number: whole + number for number in (1, 1.0, True)),
        *(lambda tensor=tensor: tensor * tensor for tensor in (x, x.t(), x[:, ::2])),
        lambda: torch.aminmax(x, dim=1),
        lambda: x.view(24),
    ]

    def run() -> list[list[tuple]]:
        found = []
        for operation in operations:
            result = operation()
            tensors = [result] if isinstance(result, torch.Tensor) else [*result]
            found.append([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors])
        return found

    expected = run()
    with MetaResults():
        assert run() == run() == expected
        tensors = [x, x.view(24), x.view(24), x + x, x + x]
    memory = [tensor.untyped_storage()._cdata for tensor in tensors]
    assert memory[0] == memory[1] == memory[2] and len(set(memory)) == 3
