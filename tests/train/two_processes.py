"""Trains small models in one process or in two, on CPUs over gloo. `main` runs all of `test_scale.py`'s trainings."""

import gc
import json
import os
import shutil
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import accelerate.commands.launch
import numpy as np
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_multi_gpu_env
from PIL import Image
from torch.distributed.tensor import DTensor

import vlv.train.configs
from vlv import VLVForConditionalGeneration, VLVImageProcessor, VLVModel, VLVProcessor
from vlv.diffusion_decoder import StableDiffusionDecoder
from vlv.miniature.tokenizer import build_tokenizer
from vlv.pipelines import DiffusionScorer
from vlv.train import (
    Stage1Config,
    Stage1Trainer,
    Stage2Config,
    Stage2Trainer,
    Stage3Config,
    Stage3Trainer,
    UnfreezingCallback,
    freeze_for_stage1,
    freeze_for_stage2,
    stage1_trainer,
)
from vlv.train.lora import add_lora
from vlv.train.parsing import errors_in_one_line
from vlv.train.rounds import RoundFile

from ..builders import language_model_config, stable_diffusion_parts, vlv_config

CONFIGS = Path(vlv.train.configs.__path__[0]) / "accelerate"
CAPTIONS = ("a small dog", "a large apple at the top left", "a cat")
GLOBAL_BATCH, STEPS = 4, 3
LORA = {"lora_rank": 2, "trainable": "projector", "merge_lora_checkpoints": False}
LATER = "model.image_encoder.language_model.encoder."
"""What the unfreezing trains after step 2."""


def images() -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (64, 64, 3)).astype("uint8")) for _ in range(8)]


def launch_environment(config: str) -> dict[str, str]:
    """The variables that `accelerate launch --config_file CONFIG` sets for the processes that it starts."""
    parser = accelerate.commands.launch.launch_command_parser()
    arguments = parser.parse_args(["--config_file", str(CONFIGS / config), "script.py"])
    arguments, _, _ = accelerate.commands.launch._validate_launch_command(arguments)
    environment = prepare_multi_gpu_env(arguments)
    return {name: value for name, value in environment.items() if name.startswith(("ACCELERATE_", "FSDP_"))}


def trainer_of(stage: int, folder: Path, **settings: Any) -> Stage1Trainer | Stage2Trainer:
    """A trainer of a small model without dropout, which each process would draw in its own way."""
    fsdp = os.environ.get("ACCELERATE_USE_FSDP") == "true"
    AcceleratorState._reset_state(reset_partial_state=True)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 1,
        "per_device_train_batch_size": GLOBAL_BATCH // world_size,
        "learning_rate": 1e-3,
        "dataloader_num_workers": 0,
        "validation_steps": 0,
        "num_validation_images": 1,
        **({"max_caption_tokens": 12} if stage == 2 else {}),
        "use_cpu": True,
        "disable_tqdm": True,
        **settings,
    }
    later = common.pop("unfreeze", None)
    torch.manual_seed(0)
    config = vlv_config(text_config=language_model_config() if stage == 2 else None)
    config.image_encoder_config.text_config.dropout = 0.0
    processor = VLVImageProcessor(size={"height": 64, "width": 64})
    trainer: Any
    if stage == 1:
        args: Any = Stage1Config(**common)
    else:
        args = Stage2Config(**common)
    assert args.device.type == "cpu"
    if fsdp:  # accelerate applies FSDP to processes with GPUs; FSDP itself works on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    if stage == 1:
        parts = stable_diffusion_parts()
        decoder = StableDiffusionDecoder(parts["vae"], parts["unet"], parts["scheduler"].config)
        encoder = VLVModel(config)
        freeze_for_stage1(encoder, args.trainable)
        tokenizer = build_tokenizer(for_text_encoder=True)
        data = [{"image": image} for image in images()]
        trainer = Stage1Trainer(encoder, decoder, args, data, processor, {"tokenizer": tokenizer})
    else:
        captioner = VLVForConditionalGeneration(config)
        freeze_for_stage2(captioner, args.trainable)
        if args.lora_rank:
            add_lora(captioner, args.lora_rank)
        data = [{"image": image, "caption": CAPTIONS[n % 3]} for n, image in enumerate(images())]
        trainer = Stage2Trainer(
            captioner, args, data, VLVProcessor(processor, build_tokenizer(for_text_encoder=False))
        )
    if later is not None:
        trainer.add_callback(UnfreezingCallback({later: [LATER]}))
    return trainer


def stage3(folder: Path, broken: Path | None = None) -> dict[str, Any]:
    """Two rounds of a small captioner; returns the losses, the captions and rewards, and how many parts are whose.

    Args:
        broken: A finished run, which is gone on with in `folder` from the end of its first round and from what was
            left of the second if the other process had been killed before its first part.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    torch.manual_seed(0)
    config = vlv_config(text_config=language_model_config())
    config.image_encoder_config.text_config.dropout = 0.0
    model = VLVForConditionalGeneration(config)
    args = Stage3Config(
        output_dir=str(folder),
        **{"rounds": 2, "round_images": 8, "round_steps": 1, "num_captions": 3, "sample_batch_size": 2},
        **{"reward_num_pairs": 1, "max_caption_tokens": 12, "append_eos": False, "validation_steps": 0},
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        learning_rate=1e-3,
        logging_steps=1,
        dataloader_num_workers=0,
        use_cpu=True,
        disable_tqdm=True,
    )
    freeze_for_stage2(model, args.trainable)
    parts = stable_diffusion_parts()
    decoder = StableDiffusionDecoder(parts["vae"], parts["unet"], parts["scheduler"].config)
    scorer = DiffusionScorer(model.model, decoder, {"tokenizer": build_tokenizer(for_text_encoder=True)}, num_pairs=1)
    processor = VLVProcessor(
        VLVImageProcessor(size={"height": 64, "width": 64}), build_tokenizer(for_text_encoder=False)
    )
    trainer = Stage3Trainer(model, args, [{"image": image} for image in images()], processor, scorer, 32)
    state = PartialState()
    if broken is not None and state.is_main_process:
        shutil.copytree(broken / "rounds", folder / "rounds")
        (folder / "rounds" / "round-0001.rank-1.jsonl").unlink()
    state.wait_for_everyone()
    trainer.train(resume_from_checkpoint=None if broken is None else str(broken / "checkpoint-1"))
    files = [RoundFile(folder / "rounds", number, None, None) for number in range(2)]
    return {
        "losses": losses(trainer),
        "rounds": [[[image.index, image.captions, image.rewards] for image in file.images()] for file in files],
        "parts": [path.read_text().count('"made_of"') for path in sorted(folder.glob("rounds/*.jsonl"))],
    }


def losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(stage: int, folder: Path, **settings: Any) -> dict[str, Any]:
    """Trains and saves the model; returns the losses and what is known of the training.

    Args:
        settings: With `resume_from_checkpoint`, a folder, it goes on from its checkpoint of step 2, and writes no
            other unless `save_strategy` is given.
    """
    if run := settings.pop("resume_from_checkpoint", None):
        settings = {"save_strategy": "no", **settings, "resume_from_checkpoint": str(run / "checkpoint-2")}
    trainer = trainer_of(stage, folder, **settings)
    trainer.train(resume_from_checkpoint=settings.get("resume_from_checkpoint"))
    trainer.save_model()
    parameters = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return {
        "losses": losses(trainer),
        "frozen_in_optimiser": sum(not p.requires_grad for p in parameters),
        "in_optimiser": len(parameters),
        "trained": [name for name, p in trainer.model.named_parameters() if p.requires_grad],
        "trainable": sum(p.requires_grad for p in trainer.model.parameters()),
        "sharded_denoiser": stage == 1
        and any(isinstance(p, DTensor) for p in trainer.diffusion_decoder.denoiser.parameters()),
    }


def unfreeze(folder: Path) -> dict[str, Any]:
    """Trains in bfloat16, and a part of the model after step 2 alone; returns how far that part has moved."""
    trainer = trainer_of(2, folder, bf16=True, unfreeze=2, max_steps=STEPS, save_strategy="no", trainable="all")
    name = f"{LATER}layers.0.fc1.weight"
    earlier = "language_projection.linear_1.weight"
    moved: list[float] = []
    norms: list[float] = []
    dtypes: set[str] = set()

    def watched(name: str) -> torch.Tensor:
        return whole(dict(trainer.model.named_parameters())[name])

    start = watched(name)
    step = trainer.callback_handler.on_pre_optimizer_step
    before_earlier = watched(earlier)

    def on_pre_optimizer_step(*arguments):
        moved.append((watched(name) - start).abs().max().item())
        gradient = dict(trainer.model.named_parameters())[name].grad
        norms.append(-1.0 if gradient is None else whole(gradient).norm().item())
        dtypes.update(str(p.dtype) for p in trainer.model.parameters())
        return step(*arguments)

    trainer.callback_handler.on_pre_optimizer_step = on_pre_optimizer_step
    trainer.train()
    moved.append((watched(name) - start).abs().max().item())
    return {
        "moved": moved,
        "gradients": norms,
        "dtypes": sorted(dtypes),
        "earlier": (watched(earlier) - before_earlier).abs().max().item(),
        "losses": losses(trainer),
    }


def trainings(folder: Path, shard_diffusion_model: bool) -> dict[str, Any]:
    """All trainings of one engine."""
    stage1 = {"noise_by_sample": True, "ema_decay": 0.9}
    if shard_diffusion_model:
        stage1["shard_diffusion_model"] = True
    found = {
        "stage1": train(1, folder / "stage1", validation_steps=1, **stage1),
        "stage1-resumed": train(
            1,
            folder / "stage1-resumed",
            resume_from_checkpoint=folder / "stage1",
            save_only_trainable=True,
            save_strategy="steps",
            **stage1,
        ),
        "stage2": train(2, folder / "stage2", validation_steps=STEPS),
        "unfreezing": unfreeze(folder / "unfreezing"),
    }
    if not shard_diffusion_model:
        found["stage3"] = stage3(folder / "stage3")
        found["stage3-resumed"] = stage3(folder / "stage3-resumed", folder / "stage3")
    second, settings = "stage2", {}
    if shard_diffusion_model:
        second, settings = "lora", LORA
        found["lora"] = train(2, folder / "lora", **LORA)
    found[f"{second}-resumed"] = train(2, folder / "resumed", **settings, resume_from_checkpoint=folder / second)
    return found


def fail(folder: Path, rank: int) -> None:
    """A training in which the second process alone cannot read an image, while the first one waits for its gradients.

    Ends both processes.
    """
    with errors_in_one_line("vlv train stage2"):
        trainer = trainer_of(2, folder, on_bad_image="error", save_strategy="no")
        if rank:
            for item in trainer.train_dataset:
                item["image"] = b"broken"
        trainer.train()


def main(folder: Path) -> None:
    """Forks a second process, and trains with DDP and then with FSDP2; writes `results.json`; fails in the second."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    child = os.fork()
    rank = int(child == 0)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "RANK": str(rank)}
    os.environ |= {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    stage1_trainer.VALIDATION_INFERENCE_STEPS = 2
    code = 1
    try:
        results = {}
        for engine, config in (("ddp", "ddp_8gpu.yaml"), ("fsdp2", "fsdp2_8gpu.yaml")):
            os.environ |= launch_environment(config)
            results[engine] = trainings(folder / engine, engine == "fsdp2")
            gc.collect()
        if rank == 0:
            (folder / "results.json").write_text(json.dumps(results))
        fail(folder / "failed", rank)
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        if rank:
            os._exit(code)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(code or status)
