"""Files by which Modular Diffusers loads a VLV: its blocks, and where each component comes from.

The text-to-image model's components may come from another repository. The encoder and the image processor have to lie
in the repository of the blocks: diffusers runs the code of no other one.
"""

import shutil
from pathlib import Path
from typing import Any

from diffusers import __version__ as diffusers_version

from vlv.diffusion_decoder import DiffusionDecoder, find_family
from vlv.files import read_json, write_json

from .decoder import referred_diffusion_model
from .layout import MODEL_INDEX_FILE
from .load import diffusion_model_folder
from .remote_code import code_file

BLOCKS_CLASS = "VLVBlocks"
SHARED_CODE = "modular_vlv.py"
BLOCKS_FILE = "modular_config.json"
INDEX_FILE = "modular_model_index.json"
PROCESSOR_FILE = "preprocessor_config.json"


def add_modular_files(folder: Path, repo: str, token: str | None = None) -> None:
    """Adds the files of Modular Diffusers to a model in the Hub layout. Without a pipeline for its family, adds none.

    Args:
        repo: The repository that the folder will be.
        token: Of the Hub, for the `model_index.json` of a text-to-image model that the folder refers to.
    """
    if not (folder / MODEL_INDEX_FILE).is_file():
        return
    index_file = diffusion_model_folder(folder, [MODEL_INDEX_FILE], token=token) / MODEL_INDEX_FILE
    index = read_json(index_file)
    family = find_family(index, index_file)
    if family.modular_blocks is None:
        return
    for name in (SHARED_CODE, f"{family.modular_blocks}.py"):
        shutil.copyfile(code_file(name), folder / name)
    # By this file diffusers recognises the encoder of a folder, as it does other components by their weights.
    shutil.copyfile(folder / "image_processor" / PROCESSOR_FILE, folder / "encoder" / PROCESSOR_FILE)
    version = {"_diffusers_version": diffusers_version}
    auto_map = {"ModularPipelineBlocks": f"{family.modular_blocks}.{BLOCKS_CLASS}"}
    write_json(folder / BLOCKS_FILE, {"_class_name": BLOCKS_CLASS, **version, "auto_map": auto_map})
    write_json(folder / INDEX_FILE, {**version, **_index(folder, repo, family, index)})


def _index(folder: Path, repo: str, family: type[DiffusionDecoder], index: dict[str, Any]) -> dict[str, Any]:
    """The entries of `modular_model_index.json`.

    Args:
        index: `model_index.json` of the text-to-image model.
    """
    referred = referred_diffusion_model(folder)
    source, revision = (repo, None) if referred is None else (referred.source, referred.revision)
    return {
        "_blocks_class_name": BLOCKS_CLASS,
        "_class_name": "StableDiffusionXLModularPipeline",  # whose blocks generate the images of either family
        "encoder": _entry("transformers", "AutoModel", repo, "encoder"),
        "vlv_image_processor": _entry("transformers", "AutoImageProcessor", repo, "image_processor"),
        **{name: _entry("transformers", "AutoTokenizer", source, name, revision) for name in family.tokenizers},
        **{
            name: _entry("diffusers", index[name][1], source, name, revision) for name in (*family.models, "scheduler")
        },
        **{name: index.get(name, default) for name, default in family.pipeline_settings.items()},
    }


def _entry(library: str, class_name: str, source: str, subfolder: str, revision: str | None = None) -> list[Any]:
    place = {"pretrained_model_name_or_path": source, "subfolder": subfolder, "variant": None, "revision": revision}
    return [library, class_name, {"type_hint": [library, class_name], **place}]
