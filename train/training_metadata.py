"""The record of a training that the model card uses: `training.json`."""

from pathlib import Path
from typing import Any

from transformers import Trainer

from vlv.files import read_json, write_json
from vlv.hub import TRAINING_FILE, resolve

from .saving import Provenance

SETTINGS = (  # recorded where they are set
    *("gguf_file", "load_in_4bit", "lora_rank"),
    *("method", "rounds", "num_captions", "temperature", "top_p", "buffer_rounds", "pairs_share", "kl_weight"),
    *("clip_range", "reward_num_pairs", "reward_min_timestep", "reward_max_timestep", "length_penalty"),
    "fluency_floor",
)


def write_training_metadata(
    folder: str | Path, trainer: Trainer, provenance: Provenance, changes: list[dict[str, Any]]
) -> None:
    """Writes `training.json` beside the weights: the entries of earlier stages, and this one.

    Args:
        changes: Settings that changed where the run was resumed.
    """
    args: Any = trainer.args
    state, start = trainer.state, provenance.start
    metadata: dict[str, Any] = {}
    earlier = resolve(start, allow_patterns=[TRAINING_FILE]) / TRAINING_FILE if start is not None else None
    if earlier is not None and earlier.is_file():
        metadata = read_json(earlier)
    metadata[provenance.stage] = {
        **provenance.sources,
        "steps": state.global_step,
        "batch_size": args.train_batch_size * args.gradient_accumulation_steps * args.world_size,
        "learning_rate": args.learning_rate,
        "trainable": getattr(args, "trainable", None),
        **{name: getattr(args, name) for name in SETTINGS if getattr(args, name, None)},
        "seed": args.seed,
        "final_loss": next((row["loss"] for row in reversed(state.log_history) if "loss" in row), None),
        "fingerprints": provenance.fingerprints,
        **({"changes": changes} if changes else {}),
    }
    write_json(Path(folder) / TRAINING_FILE, metadata)
