"""The code that goes along with the weights, so that they load for people who have not installed this package.

With `trust_remote_code=True` transformers and diffusers run these files out of the repository. They find them by
`auto_map` and `custom_pipelines` in the configurations, and by the module names in `model_index.json`.
"""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

from vlv.files import write_json

MODEL_CODE, PROCESSOR_CODE = "modeling_vlv.py", "processing_vlv.py"
CAPTIONING_CODE, RECONSTRUCTION_CODE = "pipeline_vlv_captioning.py", "pipeline_vlv_reconstruction.py"

CONFIG_MAP = {"AutoConfig": "modeling_vlv.VLVConfig"}
ENCODER_MAP = CONFIG_MAP | {"AutoModel": "modeling_vlv.VLVModel"}
# AutoModel is the bare encoder here, too: transformers keeps one class for it and each configuration class.
CAPTIONER_MAP = ENCODER_MAP | {"AutoModelForImageTextToText": "modeling_vlv.VLVForConditionalGeneration"}
IMAGE_PROCESSOR_MAP = {"AutoImageProcessor": "processing_vlv.VLVImageProcessor"}
PROCESSOR_MAP = IMAGE_PROCESSOR_MAP | {"AutoProcessor": "processing_vlv.VLVProcessor"}
# Asked for before transformers redirects this task to "image-text-to-text", so the name of the paper's task works.
CUSTOM_PIPELINES = {
    "image-to-text": {
        "impl": "pipeline_vlv_captioning.VLVCaptioningPipeline",
        "pt": ["AutoModelForImageTextToText"],
    }
}


def code_file(name: str) -> Path:
    """Where this package keeps a file that goes to the Hub.

    Raises:
        FileNotFoundError: If the installation is not whole.
    """
    package = "vlv.pipelines" if name.startswith("pipeline_") else "vlv"
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise FileNotFoundError(f"{name} is not where {package} is installed; install vlv anew")


def add_code(root: Path) -> None:
    """Puts code beside the weights in `root`, which is in the Hub's layout, and names it where it is looked for."""
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
        shutil.copyfile(code_file(CAPTIONING_CODE), root / CAPTIONING_CODE)
        _add(root / "config.json", auto_map=CAPTIONER_MAP, custom_pipelines=CUSTOM_PIPELINES)
        _add(root / "processor_config.json", auto_map=PROCESSOR_MAP)
        _add(root / "processor_config.json", "image_processor", auto_map=IMAGE_PROCESSOR_MAP)
    else:
        _add(root / "config.json", auto_map=ENCODER_MAP)
    if reconstructs:
        shutil.copyfile(code_file(RECONSTRUCTION_CODE), root / RECONSTRUCTION_CODE)


def _add(path: Path, *within: str, **values: Any) -> None:
    """Sets values in a JSON file, or in a section `within` it, such as the image processor's of a processor's."""
    content = json.loads(path.read_text(encoding="utf-8"))
    section = content
    for name in within:
        section = section.setdefault(name, {})
    section.update(values)
    write_json(path, content)
