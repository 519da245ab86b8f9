"""Stage 3 of the miniature against the truth: captions by round, from few pairs and images without captions.

`python -m vlv.miniature.stage3 ROOT` trains what is missing in ROOT (the language model, the captioner of stage 2,
stage 3 itself) and prints a table of scores by round. A run that was interrupted goes on. Options that are not listed
here are passed on to `vlv train stage3`.
"""

import argparse
from collections.abc import Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from time import process_time
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForCausalLM

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.evaluation import markdown_table
from vlv.files import write_atomically, write_json
from vlv.pipelines import DiffusionScorer
from vlv.train import freeze_for_stage2, stage3
from vlv.train.rounds import ROUNDS_FOLDER, RoundFile, update_buffer

from .captioner import ImageCaptionPairs
from .data import SceneDataset, evaluation_items
from .evaluation import caption_images
from .grammar import parse_caption
from .language_model import train_language_model
from .paper.data_efficiency import UPDATES, CachedConditioning, compute_conditioning, train_from_pairs
from .sampled_image_score import SampledImageScorer
from .scoring import count_mentions, score_scenes
from .world import SPLITS, Scene

IMAGE_SEED = 41  # of the scenes that stage 3 sees
TITLES = {"combo": "combo", "test": "test", "kept": "kept by the round, of its own images"}  # of tables
BATCH_SIZE = 64
MANY = 2**40  # length of a data set without an end
WITHOUT_CHECKPOINTS = {"--save_total_limit", "--lora_rank", "--save_only_trainable", "--save_strategy"}
SCORERS = {"score": DiffusionScorer, "image": SampledImageScorer}
COLUMNS = {
    "object_place_f1": "object + place F1",
    "exact": "exact scene",
    "background": "background",
    "invented": "invented",
    "missing": "missing",
    "words": "words",
}


def new_scenes(count: int, split: str, seed: int, held_out: Sequence[Scene]) -> tuple[tuple[int, Scene], ...]:
    """Numbers in `SceneDataset(..., split, seed)` of `count` scenes that are not in `held_out`, and the scenes."""
    return _new_scenes(count, split, seed, frozenset(scene.text for scene in held_out))


@lru_cache(maxsize=1)
def _new_scenes(count: int, split: str, seed: int, held_out: frozenset[str]) -> tuple[tuple[int, Scene], ...]:
    data = SceneDataset(MANY, split, seed, fields=("scene",))
    numbered = ((index, data[index]["scene"]) for index in range(len(data)))
    return tuple(islice((pair for pair in numbered if pair[1].text not in held_out), count))


def render_scene(index: int, split: str, seed: int) -> torch.Tensor:
    """The image `(3, 64, 64)` uint8 of a scene of `new_scenes`."""
    return SceneDataset(MANY, split, seed)[index]["pixels"]


def write_images(folder: Path, count: int, split: str, seed: int, held_out: Sequence[Scene]) -> list[Scene]:
    """Writes images as `00000.png` and so on, without captions, unless they are there. Returns their scenes."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = []
    for number, (index, scene) in enumerate(new_scenes(count, split, seed, held_out)):
        path = folder / f"{number:05}.png"
        if not path.exists():
            pixels = render_scene(index, split, seed)
            write_atomically(path, Image.fromarray(pixels.permute(1, 2, 0).numpy()).save)
        scenes.append(scene)
    return scenes


def train_captioner(
    folder: Path,
    encoder: str | Path,
    language_model: Path,
    conditioning: torch.Tensor,
    captions: Sequence[str],
    seed: int,
    updates: int = UPDATES,
) -> None:
    """Trains the projection and the language model as the table of few pairs does, and writes the captioner.

    Args:
        folder: The captioner is written there, with a reference to the text-to-image model of `encoder`.
        encoder: A miniature, which stays frozen.
        conditioning: `(N, Q, d_text)`, of images or of texts.
        captions: `N` texts.
        seed: Of the projection and of the order of the captions.
    """
    torch.manual_seed(seed)
    vlv, image_processor = hub.load_encoder(encoder)
    processor = VLVProcessor(image_processor, hub.load_tokenizer(language_model))
    model = VLVForConditionalGeneration.from_vlv_text_pretrained(
        vlv, AutoModelForCausalLM.from_pretrained(language_model)
    )
    freeze_for_stage2(model, "projector+lm")
    model.model = CachedConditioning()
    train_from_pairs(model, conditioning, processor(suffix=list(captions)).labels, updates, seed)
    model.model = vlv
    model.config.image_token_id = processor.image_token_id
    hub.export(folder, captioner=model, processor=processor, diffusion_model=hub.find_diffusion_model(str(encoder)))


def train_start(folder: Path, encoder: str | Path, language_model: Path, pairs: int, seed: int) -> None:
    """`train_captioner` on `pairs` pairs of `train`, those of the table of few pairs with this seed."""
    data = ImageCaptionPairs(pairs, seed=seed + 4)
    items = [data[index] for index in range(pairs)]
    images, captions = torch.stack([item["image"] for item in items]), [item["caption"] for item in items]
    conditioning = compute_conditioning(hub.load_encoder(encoder)[0], images)
    train_captioner(folder, encoder, language_model, conditioning, captions, seed)


def start_folder(root: Path, encoder: str | Path, pairs: int, seed: int) -> Path:
    """The folder of `train_start` in a root; another encoder of the same name has another folder."""
    return root / f"start-{Path(encoder).name}-{hub.fingerprint(encoder)[:8]}-{pairs}-pairs-seed-{seed}"


def find_language_model(root: Path) -> Path:
    """The folder of the language model in a root, which is trained on text alone if it is missing."""
    folder = root / "language-model"
    if not (folder / "tokenizer_config.json").exists():
        train_language_model(folder, root / "language-model-work")
    return folder


def measure(captions: Sequence[str], scenes: Sequence[Scene]) -> dict[str, float]:
    """Scores of captions against the scenes of their images; `words` is their mean length."""
    read = [parse_caption(caption) for caption in captions]
    words = sum(len(caption.split()) for caption in captions) / len(captions)
    return {**score_scenes(read, scenes), **count_mentions(read, scenes), "words": round(words, 2)}


def measure_kept(run: Path, number: int, scenes: Sequence[Scene]) -> dict[str, float]:
    """Scores of the captions that a round kept, of its own images.

    Args:
        run: Folder of stage 3.
        scenes: Of all images.
    """
    buffer: dict = {}
    update_buffer(buffer, RoundFile(run / ROUNDS_FOLDER, number, None, None).images(), number)
    return measure([own.caption for own in buffer.values()], [scenes[own.image] for own in buffer.values()])


def stage3_arguments(options: argparse.Namespace, run: Path, start: Path, images: Path) -> list[str]:
    """The command line of `vlv train stage3`, without the options that are passed on."""
    settings = {
        "images": images,
        "model": start,
        "output_dir": run,
        "method": options.method,
        "rounds": options.rounds,
        "round_images": options.round_images,
        "round_steps": options.round_steps,
        "num_captions": options.num_captions,
        "temperature": options.temperature,
        "reward_num_pairs": options.num_pairs,
        "buffer_rounds": options.buffer_rounds,
        "kl_weight": options.kl_weight,
        "learning_rate": options.learning_rate,
        "seed": options.seed,
        "max_caption_tokens": 64,
        "per_device_train_batch_size": BATCH_SIZE,
        "sample_batch_size": 50,
        "cache_conditioning": images.with_name(f"{images.name}-conditioning"),
        "conditioning_dtype": "float32",
        "lr_scheduler_type": "linear",
        "warmup_steps": 10,
        "logging_steps": 10,
        "validation_steps": 0,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def run_stage3(options: argparse.Namespace, passed_on: Sequence[str] = ()) -> dict[str, Any]:
    """Trains what is missing, and measures each round. The results are those of `NAME.json`.

    Its `cpu_seconds` are those of this process in stage 3: of a run that was interrupted, of its last part.

    Args:
        passed_on: Options of `vlv train stage3`.
    """
    root = Path(options.root)
    start = start_folder(root, options.encoder, options.pairs, options.seed)
    if options.start:
        start = Path(options.start)
    elif not (start / "config.json").exists():
        train_start(start, options.encoder, find_language_model(root), options.pairs, options.seed)
    held_out = {split: evaluation_items(split, options.scenes) for split in ("combo", "test")}
    images = root / f"images-{options.split}-{options.images}-without-{options.scenes}"
    excluded = [scene for _, own in held_out.values() for scene in own]
    scenes = write_images(images, options.images, options.split, IMAGE_SEED, excluded)

    run, results_file = root / options.name, root / f"{options.name}.json"
    command_line = [*stage3_arguments(options, run, start, images), *passed_on]
    began = process_time()
    stage3.main(command_line, scorer_class=SCORERS[options.reward])
    results: dict[str, Any] = {"settings": vars(options), "passed_on": list(passed_on)}
    results |= {"cpu_seconds": round(process_time() - began), "rounds": []}
    folders = [start, *(run / f"checkpoint-{options.round_steps * number}" for number in range(1, options.rounds + 1))]
    for number, folder in enumerate(folders):
        captioner, processor = hub.load_captioner(folder)
        row: dict[str, Any] = {"round": number}
        for split, (pixels, truth) in held_out.items():
            row[split] = measure(caption_images(captioner, processor, pixels), truth)
        if number:
            row["kept"] = measure_kept(run, number - 1, scenes)
        results["rounds"].append(row)
        write_json(results_file, results)
    return results


def table(results: dict[str, Any], split: str) -> str:
    """The scores by round on a split, as Markdown; for `"kept"` those of the captions that each round trained on."""
    rows = [
        [str(row["round"]), *(f"{row[split][name]:.{1 if name == 'words' else 3}f}" for name in COLUMNS)]
        for row in results["rounds"]
        if split in row
    ]
    return markdown_table(("round", *COLUMNS.values()), rows)


def check_passed_on(parser: argparse.ArgumentParser, options: argparse.Namespace, passed_on: Sequence[str]) -> None:
    """Ends with a message if an option cannot be passed on, or `--start` is not a model."""
    own = {
        argument.split("=")[0] for argument in stage3_arguments(options, Path("run"), Path("start"), Path("images"))
    }
    for argument in passed_on:
        name, equals, _ = argument.partition("=")
        if not (name.startswith("--") and equals):
            parser.error(
                f"{argument} is not an option of this command; pass those of `vlv train stage3` as --name=value"
            )
        if name.replace("-", "_").replace("__", "--", 1) in WITHOUT_CHECKPOINTS:
            parser.error(f"{name} keeps no whole captioner of each round, which this command measures; leave it out")
        if name.replace("-", "_").replace("__", "--", 1) in own:
            parser.error(f"{name} is set by this command; --help lists its own options, with dashes")
    if options.start and not (Path(options.start) / "config.json").exists():
        parser.error(f"--start {options.start}: there is no config.json; give the folder of a captioner")


def parse_options(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this command, and those that are passed on to `vlv train stage3`."""
    parser = argparse.ArgumentParser(prog="python -m vlv.miniature.stage3", description=__doc__, allow_abbrev=False)
    parser.add_argument("root", help="folder of everything that is trained")
    parser.add_argument("--name", default="stage3", help="of the run in ROOT (default: %(default)s)")
    parser.add_argument(
        "--encoder", default="checkpoints/vlv-miniature", help="folder of a miniature (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=200, help="pairs of stage 2 (default: %(default)s)")
    parser.add_argument("--start", metavar="MODEL", help="a captioner to start from, in place of --pairs")
    parser.add_argument("--images", type=int, default=4000, help="without captions (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="combo", help="of the images (default: %(default)s)")
    parser.add_argument("--method", choices=["best_of_n", "grpo"], default="best_of_n", help="default: %(default)s")
    parser.add_argument(
        "--reward",
        choices=list(SCORERS),
        default="score",
        help="'score': the denoising loss; 'image': an image is generated from each caption (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s")
    parser.add_argument("--round-images", type=int, default=800, help="images of a round (default: %(default)s)")
    parser.add_argument("--round-steps", type=int, default=100, help="updates of a round (default: %(default)s)")
    parser.add_argument("--num-captions", type=int, default=8, metavar="G", help="samples (default: %(default)s)")
    parser.add_argument("--num-pairs", type=int, default=4, metavar="K", help="of a score (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=1.0, help="of the samples (default: %(default)s)")
    parser.add_argument("--buffer-rounds", type=int, default=0, help="as of `vlv train stage3` (default: all)")
    parser.add_argument("--kl-weight", type=float, default=0.04, help="of grpo (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="default: %(default)s")
    parser.add_argument("--scenes", type=int, default=300, help="captioned of each split (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    options, passed_on = parser.parse_known_args(arguments)
    check_passed_on(parser, options, passed_on)
    return options, passed_on


def main(arguments: Sequence[str] | None = None) -> None:
    options, passed_on = parse_options(arguments)
    results = run_stage3(options, passed_on)
    for split, title in TITLES.items():
        print(f"{title}\n\n{table(results, split)}\n")


if __name__ == "__main__":
    main()
