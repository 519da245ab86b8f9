"""Speed, utilisation and means by timestep, by their formulas."""

import time

import pytest
import torch
from accelerate import Accelerator

from vlv.train import Stage1Config, Stage2Config, utilisation
from vlv.train.estimate import count_training_step
from vlv.train.hardware import GPUS, gpu_of_device
from vlv.train.meters import QUARTILES, Means, Speedometer, TimedIterator
from vlv.train.utilisation import count_flops, flops_by_input

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def test_losses_are_added_to_the_quartile_of_their_timestep(accelerator):
    means = Means(("other", *QUARTILES), CPU)
    means.add_by_timestep(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 249, 250]), 1000)
    means.add_by_timestep(torch.tensor([8.0]), torch.tensor([999]), 1000)
    means.add("other", torch.tensor(6.0), 4)
    assert means.read(accelerator) == {"other": 1.5, "loss_t0_25": 1.5, "loss_t25_50": 4, "loss_t75_100": 8}
    assert means.read(accelerator) == {}


def test_speed_counts_images_tokens_waiting_and_flops(accelerator):
    speed = Speedometer(CPU, flops=(1e9, 1e6), peak=1e11)
    labels = torch.tensor([[5, 6, -100], [5, -100, -100]])
    speed.add_batch({"pixel_values": torch.zeros(2, 3, 4, 4), "labels": labels})
    waited = TimedIterator(time.sleep(0.05) for _ in range(2))
    list(waited)
    assert 0.1 <= waited.seconds < 0.2
    speed.add_wait(waited.seconds)
    start = speed._since
    logs = speed.read(accelerator)
    seconds = time.perf_counter() - start
    assert logs["images_per_second"] == pytest.approx(2 / seconds, rel=0.05)
    assert logs["tokens_per_second"] == pytest.approx(3 / seconds, rel=0.05)
    assert logs["data_wait_share"] == pytest.approx(waited.seconds / seconds, rel=0.05)
    assert logs["model_flops_utilisation"] == pytest.approx((2e9 + 6e6) / seconds / 1e11, rel=0.05)
    assert "peak_memory_gb" not in logs
    assert speed.read(accelerator)["images_per_second"] == 0


def test_the_device_of_a_run_is_found_among_the_known_cards():
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H100 PCIe": "H100 PCIe",
        "NVIDIA H100 NVL": "H100 NVL",
        "NVIDIA H200": "H200",
        "NVIDIA H200 NVL": "H200 NVL",
        "NVIDIA A100 80GB PCIe": "A100",
        "NVIDIA A100-SXM4-80GB": "A100",
        "NVIDIA GeForce RTX 4090": "RTX 4090",
        "NVIDIA RTX 6000 Ada Generation": "RTX 6000 Ada",
    }
    assert {name: gpu_of_device(name).name for name in names} == names
    assert [GPUS[name].bf16 for name in ("H100", "H100 PCIe", "H100 NVL", "A100")] == [989.4, 756.5, 835.5, 312]
    other = ("NVIDIA GeForce RTX 3060", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")
    assert [gpu_of_device(name) for name in other] == [None] * 3
    assert count_flops(Stage1Config(output_dir="unused", use_cpu=True)) == (None, None)


def test_models_that_cannot_be_counted_leave_the_training_without_a_share(stage1_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(utilisation, "peak_of", lambda args: 1e15)
    (tmp_path / "damaged.gguf").write_bytes(b"GGUF")
    for file in ("absent.gguf", "damaged.gguf"):
        config = Stage2Config(use_cpu=True, model=str(stage1_checkpoint), language_model=str(tmp_path / file))
        assert count_flops(config) == (None, None)
        with pytest.raises(ValueError, match=rf"\Athe GGUF file of language_model .*{file} cannot be read: .*\Z"):
            flops_by_input(config)


@pytest.mark.slow
def test_flops_are_those_of_the_step_at_any_length_and_without_recomputation(stage1_checkpoint, language_model):
    settings = {"model": str(stage1_checkpoint), "language_model": str(language_model), "trainable": "projector+lm"}
    config = Stage2Config(output_dir="unused", use_cpu=True, gradient_checkpointing=True, **settings)
    by_image, by_token = flops_by_input(config)
    plain = Stage2Config(output_dir="unused", use_cpu=True, per_device_train_batch_size=2, **settings)
    counted = count_training_step(plain, caption_tokens=80).count.total()
    assert 2 * by_image + 2 * 80 * by_token == pytest.approx(counted, rel=0.1)  # attention is not linear
    assert config.per_device_train_batch_size == 8 and config.activation_checkpointing  # unchanged
