"""Trains everything in the miniature from nothing: `python -m vlv.miniature`, or `make miniature`.

Each run is a process of its own. It resumes where it was stopped, and is skipped once it is done. Last come the
variants that the paper's tables compare, and the tables (`docs/paper_in_miniature.md`).

`--recipe mmdit` trains the second miniature, whose text-to-image model is of the family of Stable Diffusion 3.5. It
takes autoencoder, first text encoder and language model of the first one. `--start-from checkpoints/vlv-miniature`
takes them from a finished model.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlv import VLVForConditionalGeneration, VLVProcessor, hub

from .autoencoder import train_autoencoder
from .captioner import train_captioner
from .encoder import train_encoder
from .evaluation import SCENE_CLASSIFIER_FILE
from .instructed_captioner import train_instructed_captioner
from .language_model import train_language_model
from .latents import CHUNK, SCENES, encode_scenes, latents_file
from .mmdit_teacher import train_mmdit_teacher
from .paper.measurements import ENCODER_VARIANTS, LARGE_LANGUAGE_MODEL, SMALL_LANGUAGE_MODEL
from .paper.runner import minutes_left
from .scene_classifier import train_scene_classifier
from .teacher import assemble_pipeline, train_teacher
from .training import DEVICES, use_device


@dataclass(frozen=True)
class Run:
    """One training run of the recipe.

    Attributes:
        name: Also of its log and of its folder below ROOT/work.
        train: Called with its output, its work folder, `inputs` and `settings`.
        minutes: Wall-clock of the run that made the embedded weights, on two virtual cores of one physical core.
        done: The file below ROOT that is written last.
        output: Below ROOT; by default a folder with the run's name.
        inputs: Arguments that are outputs of earlier runs, below ROOT.
        settings: Other arguments.
        parallel: Whether several processes share the work.
    """

    name: str
    train: Callable[..., None]
    minutes: int
    done: str
    output: str = ""
    inputs: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    parallel: bool = False

    def __call__(self, root: Path) -> None:
        inputs = {argument: root / path for argument, path in self.inputs.items()}
        self.train(root / (self.output or self.name), root / "work" / self.name, **inputs, **self.settings)


AUTOENCODER = {"autoencoder_dir": "autoencoder", "scene_classifier_path": SCENE_CLASSIFIER_FILE}
TEACHER = {"teacher_dir": "teacher-3", "scene_classifier_path": SCENE_CLASSIFIER_FILE}

PARTS = [
    Run(
        "scene-classifier",
        train_scene_classifier,
        minutes=4,
        done=SCENE_CLASSIFIER_FILE,
        output=SCENE_CLASSIFIER_FILE,
    ),
    Run(
        "autoencoder",
        train_autoencoder,
        minutes=43,
        done="autoencoder/diffusion_pytorch_model.safetensors",
        parallel=True,
    ),
    Run(
        "teacher",
        train_teacher,
        minutes=45,
        done="teacher/model_index.json",
        inputs=AUTOENCODER,
        parallel=True,
    ),
    Run(  # half of its captions are partial
        "teacher-2",
        train_teacher,
        minutes=10,
        done="teacher-2/model_index.json",
        inputs={**AUTOENCODER, "initial_teacher": "teacher"},
        settings={"images": 51_200, "learning_rate": 6e-4, "seed": 10, "partial_captions": 0.5},
        parallel=True,
    ),
    Run(  # embedding mixing in half of its captions, too
        "teacher-3",
        train_teacher,
        minutes=12,
        done="teacher-3/model_index.json",
        inputs={**AUTOENCODER, "initial_teacher": "teacher-2"},
        settings={
            "images": 51_200,
            "learning_rate": 8e-4,
            "seed": 20,
            "partial_captions": 0.5,
            "embedding_mixing": 0.5,
        },
        parallel=True,
    ),
    Run(
        "encoder",
        train_encoder,
        minutes=62,
        done="encoder/preprocessor_config.json",
        inputs=TEACHER,
        parallel=True,
    ),
    Run(
        "language-model",
        train_language_model,
        minutes=8,
        done="language-model/tokenizer_config.json",
    ),
    Run(
        "captioner",
        train_captioner,
        minutes=6,
        done="captioner/processor_config.json",
        inputs={"encoder_dir": "encoder", "language_model_dir": "language-model"},
        parallel=True,
    ),
    Run(  # half of its pairs have an instruction
        "instructed-captioner",
        train_instructed_captioner,
        minutes=45,
        done="instructed-captioner/processor_config.json",
        inputs={"captioner_dir": "captioner"},
        parallel=True,
    ),
]

# What only the paper's tables compare.
VARIANTS = [
    *(
        Run(
            encoder.folder,
            train_encoder,
            minutes=round(encoder.images / 3_900),
            done=f"{encoder.folder}/preprocessor_config.json",
            inputs=TEACHER,
            settings={
                "images": encoder.images,
                "num_query_tokens": encoder.num_query_tokens,
                "tail_drop": encoder.tail_drop,
                "seed": encoder.seed,
            },
            parallel=True,
        )
        for encoder in ENCODER_VARIANTS
    ),
    *(
        Run(
            model.folder,
            train_language_model,
            minutes=minutes,
            done=f"{model.folder}/tokenizer_config.json",
            settings={"width": model.width, "layers": model.layers},
        )
        for model, minutes in ((SMALL_LANGUAGE_MODEL, 2), (LARGE_LANGUAGE_MODEL, 17))
    ),
]

# The second recipe: other runs of the same parts, with an MMDiT for a teacher.
MMDIT_TEACHER = {**AUTOENCODER, "first_teacher": "teacher-3", "latents_dir": "latents"}

# Below, a wrong caption adds at most a third as much loss as at the highest timesteps (README, "A second recipe").
MMDIT_MIN_TIMESTEP = 200

MMDIT_PARTS = [
    Run(
        "latents",
        encode_scenes,
        minutes=3,
        done=str(latents_file("latents", SCENES // CHUNK - 1)),
        inputs={"autoencoder_dir": "autoencoder"},
    ),
    Run(
        "mmdit-teacher",
        train_mmdit_teacher,
        minutes=75,
        done="mmdit-teacher/model_index.json",
        inputs=MMDIT_TEACHER,
        parallel=True,
    ),
    Run(  # half of its captions are partial, with embedding mixing in half of them
        "mmdit-teacher-2",
        train_mmdit_teacher,
        minutes=120,
        done="mmdit-teacher-2/model_index.json",
        inputs={**MMDIT_TEACHER, "initial_teacher": "mmdit-teacher"},
        settings={
            "images": 204_800,
            "learning_rate": 8e-4,
            "seed": 10,
            "partial_captions": 0.5,
            "embedding_mixing": 0.5,
        },
        parallel=True,
    ),
    Run(
        "mmdit-encoder",
        train_encoder,
        minutes=90,
        done="mmdit-encoder/preprocessor_config.json",
        inputs={"teacher_dir": "mmdit-teacher-2", "scene_classifier_path": SCENE_CLASSIFIER_FILE},
        settings={"images": 256_000, "min_timestep": MMDIT_MIN_TIMESTEP},
        parallel=True,
    ),
    Run(
        "mmdit-captioner",
        train_captioner,
        minutes=6,
        done="mmdit-captioner/processor_config.json",
        inputs={"encoder_dir": "mmdit-encoder", "language_model_dir": "language-model"},
        parallel=True,
    ),
]
RUNS = {run.name: run for run in [*PARTS, *VARIANTS, *MMDIT_PARTS]}


@dataclass(frozen=True)
class Recipe:
    """What makes one miniature.

    Attributes:
        parts: Its own runs, in order.
        teacher, captioner: The folders below ROOT that the finished model consists of.
    """

    parts: list[Run]
    teacher: str
    captioner: str


RECIPES = {
    "unet": Recipe(PARTS, "teacher-3", "instructed-captioner"),
    "mmdit": Recipe(MMDIT_PARTS, "mmdit-teacher-2", "mmdit-captioner"),
}


def needed_runs(wanted: list[Run], root: Path) -> list[Run]:
    """The wanted runs, and before them the runs of `PARTS` that those of them need that are not done."""
    needed = {run.name for run in wanted}
    for run in reversed([*PARTS, *wanted]):
        if run.name in needed and not (root / run.done).exists():
            inputs = set(run.inputs.values())
            needed |= {other.name for other in PARTS if (other.output or other.name) in inputs}
    return [run for run in PARTS if run.name in needed] + [run for run in wanted if run not in PARTS]


def take_parts(model: Path, root: Path) -> None:
    """Writes the parts of a finished miniature of the first recipe where its runs would write them.

    Args:
        model: In the Hub's layout, with its scene classifier.
        root: The folder of parts. What is done there stays.

    Raises:
        ValueError: If the model's text-to-image model is of another family.
    """
    captioner, processor = hub.load_captioner(model)
    encoder, _ = hub.load_encoder(model)
    components = hub.load_diffusion_components(model, dtype=torch.float32)
    if "unet" not in components or len(encoder.text_encoders) != 1:
        raise ValueError(
            f"{model} has no UNet with one text encoder; give a miniature of the first recipe, such as "
            "checkpoints/vlv-miniature"
        )
    teacher = assemble_pipeline(
        components["vae"],
        encoder.text_encoder,
        components["unet"],
        components["tokenizer"],
        components["scheduler"],
    )
    root.mkdir(parents=True, exist_ok=True)
    if not (root / SCENE_CLASSIFIER_FILE).exists():
        shutil.copyfile(model / SCENE_CLASSIFIER_FILE, root / SCENE_CLASSIFIER_FILE)
    saves: dict[str, list[Any]] = {
        "autoencoder": [teacher.vae],
        "teacher-3": [teacher],
        "language-model": [captioner.language_model, processor.tokenizer],
    }
    done = {run.name: root / run.done for run in PARTS}
    for name, parts in saves.items():
        for part in parts if not done[name].exists() else []:
            part.save_pretrained(root / name)


def assemble(root: Path, output: Path, recipe: str = "unet") -> None:
    """Puts the trained parts into one folder in the Hub's layout, in half precision, with the scene classifier."""
    parts = RECIPES[recipe]
    hub.export(
        output,
        captioner=VLVForConditionalGeneration.from_pretrained(root / parts.captioner),
        processor=VLVProcessor.from_pretrained(root / parts.captioner),
        diffusion_model=root / parts.teacher,
        dtype=torch.float16,
    )
    shutil.copyfile(root / SCENE_CLASSIFIER_FILE, output / SCENE_CLASSIFIER_FILE)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature", description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("runs/miniature"), help="folder of parts and checkpoints")
    parser.add_argument("--output", type=Path, help="assemble the trained miniature in this folder")
    parser.add_argument("--processes", type=int, default=2, help="number of processes, one thread each (default: 2)")
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="where to train (default: cpu)")
    parser.add_argument("--recipe", choices=RECIPES, default="unet", help="the text-to-image model (default: unet)")
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="take the parts of a finished miniature")
    parser.add_argument("--only", choices=RUNS, metavar="NAME", help="train this part only (--plan lists the names)")
    parser.add_argument("--plan", action="store_true", help="print what is to do and how long it takes, and stop")
    parser.add_argument(
        "--without-tables", action="store_true", help="leave out the paper's tables and their variants"
    )
    parser.add_argument("--worker", choices=RUNS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.device == "cuda" and options.recipe != "mmdit" and not options.worker:
        parser.error("the recipe 'unet' trains on the CPU; --device cuda is for --recipe mmdit")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but PyTorch finds no GPU here; leave it out to train on the CPU")
    if options.worker:
        use_device(options.device)
        RUNS[options.worker](options.root)
        return
    if options.start_from and not options.plan:
        take_parts(options.start_from, options.root)
    if options.only:
        _train([RUNS[options.only]], options.root, options.processes, options.device)
        return
    with_tables = options.recipe == "unet" and not options.without_tables
    print(plan(options.root, with_tables, options.recipe), flush=True)
    if options.plan:
        return
    _train(needed_runs(RECIPES[options.recipe].parts, options.root), options.root, options.processes, options.device)
    if options.output:
        assemble(options.root, options.output, options.recipe)
        print(f"assembled in {options.output}")
    if with_tables:
        _train(VARIANTS, options.root, options.processes, options.device)
        page = str(options.root / "paper_in_miniature.md")
        command = [sys.executable, "-m", "vlv.miniature.paper", "--root", str(options.root), "--report", page]
        _run_command(command, options.root, "tables")
        print(f"tables: {page}")


def plan(root: Path, with_tables: bool = True, recipe: str = "unet") -> str:
    """What is done, what is to do, and about how long it takes."""
    runs = needed_runs(RECIPES[recipe].parts, root) + (VARIANTS if with_tables else [])
    left = {run.name: 0 if (root / run.done).exists() else run.minutes for run in runs}
    if with_tables:
        left["tables"] = minutes_left(root)
    lines = [f"  {name:<26} {f'about {minutes} min' if minutes else 'done'}" for name, minutes in left.items()]
    total = sum(left.values())
    return "\n".join([f"plan, in {root}:", *lines, f"  {'in all':<26} about {total // 60} h {total % 60} min"])


def _train(runs: list[Run], root: Path, processes: int, device: str) -> None:
    for run in runs:
        if (root / run.done).exists():
            print(f"{run.name}: done")
            continue
        print(f"{run.name}: training, log in {root / f'{run.name}.log'}", flush=True)
        _start_worker(run.name, root, processes if run.parallel else 1, device)


def _start_worker(name: str, root: Path, processes: int, device: str) -> None:
    worker = ["-m", "vlv.miniature", "--root", str(root), "--worker", name, "--device", device]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *launcher, *worker]
    else:
        command = [sys.executable, *worker]
    _run_command(command, root, name)


def _run_command(command: list[str], root: Path, name: str) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with (root / f"{name}.log").open("a") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{name} failed; see {root / f'{name}.log'}")
