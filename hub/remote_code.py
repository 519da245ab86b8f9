"""The code that a repository holds beside the weights, so that they load where this package is not installed.

With `trust_remote_code=True` transformers and diffusers run these files of the repository. They find them by
`auto_map` and `custom_pipelines` in the configurations, and by the module names in `model_index.json`.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from vlv.files import read_json, write_json

MODEL_CODE, PROCESSOR_CODE = "modeling_vlv.py", "processing_vlv.py"
CAPTIONER_CODE = (
    *("modeling_vlv_captioner.py", "generation_vlv.py", "processing_vlv_captioner.py"),
    "pipeline_vlv_captioning.py",
)

CONFIG_MAP = {"AutoConfig": "modeling_vlv.VLVConfig"}
# AutoModel is the encoder in a captioner's folder, too: transformers keeps one class for it and each config class.
ENCODER_MAP = CONFIG_MAP | {"AutoModel": "modeling_vlv.VLVModel"}
CAPTIONER_CLASS = "modeling_vlv_captioner.VLVForConditionalGeneration"
CAPTIONER_MAP = ENCODER_MAP | {
    "AutoModelForImageTextToText": CAPTIONER_CLASS,
    "AutoModelForMultimodalLM": CAPTIONER_CLASS,
}
IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": "processing_vlv.VLVImageProcessor"}
PROCESSOR_MAP = IMAGE_PROCESSOR_MAP | {"AutoProcessor": "processing_vlv_captioner.VLVProcessor"}
# transformers looks here before it redirects the removed task "image-to-text" to "image-text-to-text".
CUSTOM_PIPELINES = {
    "image-to-text": {
        "impl": "pipeline_vlv_captioning.VLVCaptioningPipeline",
        "pt": ["AutoModelForImageTextToText"],
    }
}


def code_file(name: str) -> Path:
    """Path of a code file of this package that repositories hold.

    Raises:
        FileNotFoundError: If the installation is incomplete.
    """
    package = "vlv.pipelines" if name.startswith(("pipeline_", "modular_")) else "vlv"
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise FileNotFoundError(f"{name} is missing from the installed package {package}; install vlv again")


def add_code(root: Path) -> None:
    """Copies the code into `root`, a folder in the Hub layout, and adds its names to the configurations."""
    captions = (root / "processor_config.json").is_file()
    reconstructs = (root / "model_index.json").is_file()
    for name in (MODEL_CODE, PROCESSOR_CODE):
        shutil.copyfile(code_file(name), root / name)
    shutil.copyfile(code_file(MODEL_CODE), root / "encoder" / MODEL_CODE)
    shutil.copyfile(code_file(PROCESSOR_CODE), root / "image_processor" / PROCESSOR_CODE)
    _add(root / "encoder" / "config.json", auto_map=ENCODER_MAP)
    _add(root / "image_processor" / "preprocessor_config.json", auto_map=IMAGE_PROCESSOR_MAP)
    _add(root / "preprocessor_config.json", auto_map=PROCESSOR_MAP if captions else IMAGE_PROCESSOR_MAP)
    if captions:
        for name in CAPTIONER_CODE:
            shutil.copyfile(code_file(name), root / name)
        _add(root / "config.json", auto_map=CAPTIONER_MAP, custom_pipelines=CUSTOM_PIPELINES)
        _add(root / "processor_config.json", auto_map=PROCESSOR_MAP)
        _add(root / "processor_config.json", "image_processor", auto_map=IMAGE_PROCESSOR_MAP)
    else:
        _add(root / "config.json", auto_map=ENCODER_MAP)
    if reconstructs:
        code = read_json(root / "model_index.json", "_class_name")["_class_name"][0] + ".py"
        for old in root.glob("pipeline_vlv_*reconstruction.py"):  # of a model of another family
            old.unlink()
        shutil.copyfile(code_file(code), root / code)


def _add(path: Path, *section_names: str, **values: Any) -> None:
    """Sets values in a JSON file, or in a section of it, such as `image_processor` in a processor's configuration."""
    content = json.loads(path.read_text(encoding="utf-8"))
    section = content
    for name in section_names:
        section = section.setdefault(name, {})
    section.update(values)
    write_json(path, content)
