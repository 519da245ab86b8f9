"""Trains everything in the miniature from nothing: `python -m vlv.miniature`, or `make miniature`.

Each part is a process of its own that resumes where it was stopped, and is skipped once it is done. At the end come
the variants that the paper's tables compare, and the tables (`docs/paper_in_miniature.md`).
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .evaluation import SCENE_CLASSIFIER_FILE


@dataclass(frozen=True)
class Part:
    """A step of the recipe: how to run it, the file that shows it is done, how long it took, and who shares the work.

    Attributes:
        minutes: Wall-clock of the run that made the embedded weights, on two virtual cores of one physical.
        parallel: Whether processes share the work.
    """

    run: Callable[[Path], None]
    done: str
    minutes: int
    parallel: bool = False


def _scene_classifier(root: Path) -> None:
    from .scene_classifier import train_scene_classifier

    train_scene_classifier(root / SCENE_CLASSIFIER_FILE, root / "work" / "scene classifier")


def _autoencoder(root: Path) -> None:
    from .autoencoder import train_autoencoder

    train_autoencoder(root / "autoencoder", root / "work" / "autoencoder")


def _teacher(root: Path) -> None:
    from .teacher import train_teacher

    train_teacher(root / "teacher", root / "work" / "teacher", root / "autoencoder", root / SCENE_CLASSIFIER_FILE)


def _teacher_of_careless_captions(root: Path) -> None:
    from .teacher import train_teacher

    train_teacher(
        root / "teacher-2",
        root / "work" / "teacher-2",
        root / "autoencoder",
        root / SCENE_CLASSIFIER_FILE,
        images=51_200,
        learning_rate=6e-4,
        seed=10,
        partial_captions=0.5,
        initial_teacher=root / "teacher",
    )


def _teacher_of_blurred_words(root: Path) -> None:
    from .teacher import train_teacher

    train_teacher(
        root / "teacher-3",
        root / "work" / "teacher-3",
        root / "autoencoder",
        root / SCENE_CLASSIFIER_FILE,
        images=51_200,
        learning_rate=8e-4,
        seed=20,
        partial_captions=0.5,
        embedding_mixing=0.5,
        initial_teacher=root / "teacher-2",
    )


def _encoder(root: Path) -> None:
    from .encoder import train_encoder

    train_encoder(root / "encoder", root / "work" / "encoder", root / "teacher-3", root / SCENE_CLASSIFIER_FILE)


def _variant(name: str, minutes: int, **settings) -> Part:
    """A stage 1 that differs from the embedded one in `settings`: what `paper_tables.py` compares."""

    def run(root: Path) -> None:
        from .encoder import train_encoder

        train_encoder(
            root / name,
            root / "work" / name,
            root / "teacher-3",
            root / SCENE_CLASSIFIER_FILE,
            **{"seed": 0, **settings},
        )

    return Part(run, f"{name}/preprocessor_config.json", minutes, parallel=True)


def _language_model(root: Path) -> None:
    from .language_model import train_language_model

    train_language_model(root / "language-model", root / "work" / "language-model")


def _another_language_model(name: str, minutes: int, **sizes: int) -> Part:
    """Another size of the same: what `paper_tables.py` compares."""

    def run(root: Path) -> None:
        from .language_model import train_language_model

        train_language_model(root / name, root / "work" / name, **sizes)

    return Part(run, f"{name}/tokenizer_config.json", minutes)


def _captioner(root: Path) -> None:
    from .captioner import train_captioner

    train_captioner(root / "captioner", root / "work" / "captioner", root / "encoder", root / "language-model")


PARTS = {
    "scene classifier": Part(_scene_classifier, SCENE_CLASSIFIER_FILE, 4),
    "autoencoder": Part(_autoencoder, "autoencoder/diffusion_pytorch_model.safetensors", 43, parallel=True),
    "teacher": Part(_teacher, "teacher/model_index.json", 45, parallel=True),
    "teacher-2": Part(_teacher_of_careless_captions, "teacher-2/model_index.json", 10, parallel=True),
    "teacher-3": Part(_teacher_of_blurred_words, "teacher-3/model_index.json", 12, parallel=True),
    "encoder": Part(_encoder, "encoder/preprocessor_config.json", 62, parallel=True),
    "language-model": Part(_language_model, "language-model/tokenizer_config.json", 8),
    "captioner": Part(_captioner, "captioner/processor_config.json", 6, parallel=True),
}

VARIANT_SETTINGS: dict[str, dict[str, Any]] = {
    "encoder-30k": {"images": 30_000},
    "encoder-60k": {"images": 60_000},
    "encoder-120k": {"images": 120_000},
    "encoder-tail-drop": {"images": 120_000, "tail_drop": 0.5},
    "encoder-6-queries": {"images": 120_000, "num_query_tokens": 6},
    "encoder-12-queries": {"images": 120_000, "num_query_tokens": 12},
    # Two seeds more of each, since their order depends on the seed.
    "encoder-120k-seed-1": {"images": 120_000, "seed": 1},
    "encoder-120k-seed-2": {"images": 120_000, "seed": 2},
    "encoder-6-queries-seed-1": {"images": 120_000, "num_query_tokens": 6, "seed": 1},
    "encoder-6-queries-seed-2": {"images": 120_000, "num_query_tokens": 6, "seed": 2},
    "encoder-12-queries-seed-1": {"images": 120_000, "num_query_tokens": 12, "seed": 1},
    "encoder-12-queries-seed-2": {"images": 120_000, "num_query_tokens": 12, "seed": 2},
}
VARIANTS = {
    name: _variant(name, minutes=round(settings["images"] / 3_900), **settings)
    for name, settings in VARIANT_SETTINGS.items()
} | {
    "language-model-small": _another_language_model("language-model-small", 2, width=64, layers=2),
    "language-model-large": _another_language_model("language-model-large", 17, width=192, layers=4),
}


def assemble(root: Path, output: Path) -> None:
    """Puts the finished parts into one folder in the Hub's layout, in half precision, the judge beside them."""
    import torch

    from vlv import VLVForConditionalGeneration, VLVProcessor, hub

    hub.export(
        output,
        captioner=VLVForConditionalGeneration.from_pretrained(root / "captioner"),
        processor=VLVProcessor.from_pretrained(root / "captioner"),
        diffusion_model=root / "teacher-3",
        dtype=torch.float16,
    )
    shutil.copyfile(root / SCENE_CLASSIFIER_FILE, output / SCENE_CLASSIFIER_FILE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/miniature"), help="where parts and checkpoints go")
    parser.add_argument("--output", type=Path, help="assemble the finished miniature into this folder")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each (default: 2)")
    parser.add_argument("--only", choices=[*PARTS, *VARIANTS], help="train this part alone")
    parser.add_argument("--plan", action="store_true", help="print what is to do and how long it takes, and stop")
    parser.add_argument("--without-tables", action="store_true", help="train the parts alone, not what tables compare")
    parser.add_argument("--worker", choices=[*PARTS, *VARIANTS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        import torch

        torch.set_num_threads(1)
        (PARTS | VARIANTS)[options.worker].run(options.root)
        return
    if options.only:
        _train({options.only: (PARTS | VARIANTS)[options.only]}, options.root, options.processes)
        return
    print(plan(options.root, with_tables=not options.without_tables), flush=True)
    if options.plan:
        return
    _train(PARTS, options.root, options.processes)
    if options.output:
        assemble(options.root, options.output)
        print(f"assembled in {options.output}")
    if not options.without_tables:
        _train(VARIANTS, options.root, options.processes)
        page = ["--report", str(options.root / "paper_in_miniature.md")]
        command = [sys.executable, "-m", "vlv.miniature.paper.measurements", "--root", str(options.root), *page]
        _run(command, options.root, "tables")
        print(f"tables: {page[1]}")


def plan(root: Path, with_tables: bool = True) -> str:
    """What is done, what is to do, and about how long it will take."""
    steps = PARTS | VARIANTS if with_tables else PARTS
    left = {name: 0 if (root / part.done).exists() else part.minutes for name, part in steps.items()}
    if with_tables:
        from .paper.measurements import minutes_left

        left["tables"] = minutes_left(root)
    lines = [f"  {name:<26} {f'about {minutes} min' if minutes else 'done'}" for name, minutes in left.items()]
    total = sum(left.values())
    return "\n".join([f"plan, in {root}:", *lines, f"  {'in all':<26} about {total // 60} h {total % 60} min"])


def _train(parts: dict[str, Part], root: Path, processes: int) -> None:
    for name, part in parts.items():
        if (root / part.done).exists():
            print(f"{name}: done")
            continue
        print(f"{name}: training, log in {root / f'{name}.log'}", flush=True)
        _run_worker(name, root, processes if part.parallel else 1)


def _run_worker(name: str, root: Path, processes: int) -> None:
    root.mkdir(parents=True, exist_ok=True)
    worker = ["-m", "vlv.miniature", "--root", str(root), "--worker", name]
    if processes > 1:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc_per_node={processes}",
            *worker,
        ]
    else:
        command = [sys.executable, *worker]
    _run(command, root, name)


def _run(command: list[str], root: Path, name: str) -> None:
    with (root / f"{name}.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{name} failed; see {root / f'{name}.log'}")
