"""The record of a finished training that the model card uses: `training.json`."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from vlv.files import read_json, write_json
from vlv.hub import TRAINING_FILE, resolve


def write_training_metadata(trainer: Trainer, stage: str, start: str | None, **sources: Any) -> None:
    """Writes `training.json` beside the weights, on the first process: earlier stages, and this one.

    Args:
        stage: `"stage1"` or `"stage2"`.
        start: Folder or repo id of the VLV model that training started from, if any. Its `training.json` has the
            entries of earlier stages.
        sources: Names of the data and of the base models, such as `images` and `image_encoder`.
    """
    if not trainer.is_world_process_zero():
        return
    args, state = trainer.args, trainer.state
    metadata: dict[str, Any] = {}
    earlier = resolve(start, allow_patterns=[TRAINING_FILE]) / TRAINING_FILE if start is not None else None
    if earlier is not None and earlier.is_file():
        metadata = read_json(earlier)
    metadata[stage] = {
        **sources,
        "steps": state.global_step,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "trainable": getattr(args, "trainable", None),
        "seed": args.seed,
        "final_loss": next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None),
    }
    assert args.output_dir is not None
    write_json(Path(args.output_dir) / TRAINING_FILE, metadata)
