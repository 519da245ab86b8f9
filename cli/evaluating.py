"""What the commands of `vlv evaluate` share: images of a folder, features, models, errors and progress."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vlv.captioning.inputs import collect_images
from vlv.checkpoints import MINIATURE
from vlv.errors import UserError
from vlv.pipelines.schedulers import OWN

from .models import loading, use_scheduler
from .parsers.evaluate import INCEPTION, SCENE_CLASSIFIER


def resolve_model(source: str) -> str:
    """The folder or repo id that a setting names; `miniature` is the embedded one."""
    return str(MINIATURE) if source == "miniature" else source


def load_text_to_image(source: str, dtype: Any, device: str, scheduler: str = OWN) -> Any:
    """A text-to-image pipeline: of diffusers, without its safety checker, or the frozen text-to-image model of a VLV.

    Raises:
        UserError: If it cannot be loaded, or has weights in other files than safetensors.
    """
    import inspect

    from diffusers import DiffusionPipeline

    from vlv.miniature.evaluation import teacher_pipeline
    from vlv.pipelines import load_reconstruction

    with loading(source):
        config = DiffusionPipeline.load_config(source)
        if "VLV" in str(config["_class_name"]):
            pipeline = teacher_pipeline(load_reconstruction(source, dtype=dtype, device=device))
        else:
            # A safety checker would put black images among the measured ones.
            parts = {"safety_checker": None} if "safety_checker" in config else {}
            pipeline = DiffusionPipeline.from_pretrained(source, dtype=dtype, use_safetensors=True, **parts)
    if "prompt" not in inspect.signature(pipeline.__call__).parameters:
        raise UserError(f"text_to_image {source} is a {type(pipeline).__name__}, which takes no prompt")
    pipeline.set_progress_bar_config(disable=True)
    use_scheduler(pipeline, scheduler, "scheduler")
    return pipeline.to(device)


def choose_features(name: str, resize: str, device: str) -> Any:
    """The feature extractor of `--features`.

    Raises:
        UserError: If it cannot be loaded.
    """
    from vlv.evaluation.features import AutoModelFeatures, InceptionFeatures
    from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE
    from vlv.miniature.scene_classifier import SceneClassifierFeatures

    with loading(f"the features {name}"):
        if name == SCENE_CLASSIFIER:
            return SceneClassifierFeatures(MINIATURE / SCENE_CLASSIFIER_FILE)
        if name == INCEPTION:
            try:
                return InceptionFeatures(resize, device)  # type: ignore[arg-type]
            except (ImportError, FileNotFoundError) as error:
                raise UserError(
                    f"--features {INCEPTION}: {error}\nfeatures that need no other package or download: --features "
                    f"{SCENE_CLASSIFIER} (the miniature's), or --features DIR, the folder of a vision model of "
                    "transformers"
                ) from error
        return AutoModelFeatures(name, device)


def choose_detector(name: str, threshold: float | None = None, device: str = "cpu") -> Any:
    """The object detector of a setting: the miniature's, or a model of transformers.

    Raises:
        UserError: If it cannot be loaded.
    """
    from vlv.evaluation.detections import THRESHOLD, PipelineDetector
    from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE
    from vlv.miniature.scene_detector import SceneDetector

    with loading(f"the detector {name}"):
        if name == SCENE_CLASSIFIER:
            return SceneDetector(MINIATURE / SCENE_CLASSIFIER_FILE)
        return PipelineDetector(name, THRESHOLD if threshold is None else threshold, device)


def read_images(folder: str, option: str) -> dict[str, Path]:
    """The images of a folder by name.

    Raises:
        UserError: If it is not a folder, has no images, or one that cannot be read: figures of the others would be
            those of another set.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{option} {folder} is not a folder")
    found = collect_images([folder])
    for item in found:
        if item.problem is not None:
            raise UserError(f"{item.path}: {item.problem}; remove it, or repair it")
    return {item.name: item.path for item in found}


@contextmanager
def as_user_errors() -> Iterator[None]:
    """Turns errors of values and files into a `UserError`."""
    try:
        yield
    except (ValueError, FileNotFoundError) as error:
        raise UserError(str(error)) from error


@contextmanager
def progress(total: int, title: str, is_main: bool) -> Iterator[Any]:
    """A progress bar on the main process's terminal; gives the function that moves it by a number of images."""
    with tqdm(total=total, desc=title, unit=" images", disable=None if is_main else True) as bar:
        yield bar.update
