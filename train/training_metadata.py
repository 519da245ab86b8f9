"""What a finished training leaves beside its weights, for the model card: `training.json`."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from vlv.files import read_json, write_json
from vlv.hub import TRAINING_FILE, resolve


def write_training_metadata(trainer: Trainer, stage: str, start: str | None, **facts: Any) -> None:
    """Writes how a model came about, after what its start says of itself.

    Args:
        stage: `"stage1"` or `"stage2"`.
        start: Folder or repo id of the model that training went on from, if there was one.
        facts: Such as the names of data and base models.
    """
    if not trainer.is_world_process_zero():
        return
    args, state = trainer.args, trainer.state
    known: dict[str, Any] = {}
    before = resolve(start, allow_patterns=[TRAINING_FILE]) / TRAINING_FILE if start is not None else None
    if before is not None and before.is_file():
        known = read_json(before)
    known[stage] = {
        **facts,
        "steps": state.global_step,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "trainable": getattr(args, "trainable", None),
        "seed": args.seed,
        "final_loss": next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None),
    }
    assert args.output_dir is not None
    write_json(Path(args.output_dir) / TRAINING_FILE, known)
