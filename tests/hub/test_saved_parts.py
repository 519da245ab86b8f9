"""What `save_pretrained` of a part writes opens again where this package is not installed, with the code it names."""

import json
from pathlib import Path

import pytest

from .machine import Machine
from .server import Hub, nowhere, serve

pytestmark = pytest.mark.slow

SAVE = """
import json, sys
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
source, target = sys.argv[1:3]
trusted = {"trust_remote_code": True}
AutoModelForImageTextToText.from_pretrained(source, **trusted).save_pretrained(f"{target}/captioner")
AutoProcessor.from_pretrained(source, **trusted).save_pretrained(f"{target}/captioner")
for name, options in (("encoder", {"subfolder": "encoder"}), ("captioners-encoder", {})):
    AutoModel.from_pretrained(source, **options, **trusted).save_pretrained(f"{target}/{name}")
    AutoImageProcessor.from_pretrained(source, **trusted).save_pretrained(f"{target}/{name}")
pipeline("image-text-to-text", model=source, **trusted).save_pretrained(f"{target}/image-text-to-text")
"""
SAVE_CUSTOM_PIPELINE = """
pipeline("image-to-text", model=source, **trusted).save_pretrained(f"{target}/image-to-text")
print("null")
"""
SAVE_LOADED = """
import sys
from vlv import hub
from vlv.pipelines import VLVCaptioningPipeline
source, target = sys.argv[1:3]
model, processor = hub.load_captioner(source)
VLVCaptioningPipeline(model=model, processor=processor).save_pretrained(f"{target}/image-to-text")
encoder, image_processor = hub.load_encoder(source)
encoder.save_pretrained(f"{target}/encoder")
image_processor.save_pretrained(f"{target}/encoder")
"""
OPEN = """
import json, sys
from pathlib import Path
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
trusted, image = {"trust_remote_code": True}, sys.argv[2]
found = {}
for folder in map(str, sorted(Path(sys.argv[1]).iterdir())):
    name = Path(folder).name
    if "encoder" in name:
        pixels = AutoImageProcessor.from_pretrained(folder, **trusted)(image, return_tensors="pt").pixel_values
        found[name] = AutoModel.from_pretrained(folder, **trusted)(pixel_values=pixels).caption_embeds.sum().item()
        continue
    processor = AutoProcessor.from_pretrained(folder, **trusted)
    model = AutoModelForImageTextToText.from_pretrained(folder, **trusted)
    ids = model.generate(**processor(images=image), max_new_tokens=5, do_sample=False)
    found[name] = processor.batch_decode(ids, skip_special_tokens=True)[0]
    custom = pipeline("image-to-text", model=folder, **trusted)
    found[name + " by pipeline"] = custom(image, max_new_tokens=5)[0]["generated_text"]
print(json.dumps(found))
"""
CAPTIONERS = ("captioner", "image-text-to-text", "image-to-text")


def code_references(folder: Path) -> list[tuple[Path, str]]:
    """The references to code in a folder's JSON files, such as `modeling_vlv.VLVModel`, with the file's folder."""
    found = []

    def walk(value, path: Path) -> None:
        if isinstance(value, dict):
            for reference in value.get("auto_map", {}).values():
                references = reference if isinstance(reference, list) else [reference]
                found.extend((path.parent, text) for text in references if text)
            found.extend((path.parent, pipeline["impl"]) for pipeline in value.get("custom_pipelines", {}).values())
            for part in value.values():
                walk(part, path)

    for path in folder.rglob("*.json"):
        walk(json.loads(path.read_text(encoding="utf-8")), path)
    return found


def check_code_is_there(folder: Path) -> None:
    references = code_references(folder)
    assert references
    for place, reference in references:
        module, _, name = reference.partition(".")
        assert f"class {name}(" in (place / f"{module}.py").read_text(), (place.name, reference)


@pytest.fixture
def offline(tmp_path) -> Machine:
    return Machine(tmp_path / "reader", nowhere())


def check_captions(found: dict, names: tuple[str, ...]) -> None:
    captions = {key: text.strip() for key, text in found.items() if "encoder" not in key}
    assert captions.keys() == {key for name in names for key in (name, f"{name} by pipeline")}
    assert len(set(captions.values())) == 1 and next(iter(captions.values()))


@pytest.mark.parametrize("installed", [True, False])
def test_parts_of_a_folder_open_after_saving(installed, model, image_file, offline, tmp_path):
    saved = tmp_path / "saved"
    if installed:
        done = offline.python("import vlv\n" + SAVE, model, saved)
        assert done.returncode == 0, done.stderr[-3000:]
        done = offline.python(SAVE_LOADED, model, tmp_path / "loaded")
        assert done.returncode == 0, done.stderr[-3000:]
        check_code_is_there(tmp_path / "loaded")
        loaded = offline.without_package(OPEN, tmp_path / "loaded", image_file)
        check_captions(loaded, ("image-to-text",))
    else:
        offline.without_package(SAVE + SAVE_CUSTOM_PIPELINE, model, saved)
    check_code_is_there(saved)
    found = offline.without_package(OPEN, saved, image_file)
    check_captions(found, CAPTIONERS[:2] if installed else CAPTIONERS)
    assert found["encoder"] == found["captioners-encoder"]


def test_parts_of_a_repository_open_after_saving_where_the_hub_does_not_answer(model, image_file, offline, tmp_path):
    saved = tmp_path / "saved"
    with serve(Hub()) as endpoint:
        machine = Machine(tmp_path / "owner", endpoint)
        done = machine.vlv("push", model, "org/vlv", "--token", "hf_org")
        assert done.returncode == 0, done.stderr
        reader, again = Machine(tmp_path / "online", endpoint), tmp_path / "again"
        reader.without_package(SAVE + SAVE_CUSTOM_PIPELINE, "org/vlv", saved)
        reader.without_package(SAVE + "print('null')", "org/vlv", again)  # all files are in the cache
    check_code_is_there(again)
    check_code_is_there(saved / "image-to-text")
    impl = json.loads((saved / "image-to-text" / "config.json").read_text())["custom_pipelines"]["image-to-text"][
        "impl"
    ]
    assert impl == "pipeline_vlv_captioning.VLVCaptioningPipeline"
    check_captions(offline.without_package(OPEN, again, image_file), CAPTIONERS[:2])


def test_a_pipeline_whose_code_is_lost_is_not_named(model, offline, tmp_path):
    source = tmp_path / "source"
    save = """
import json, shutil, sys
from transformers import AutoModelForImageTextToText
source, target = sys.argv[1:]
shutil.copytree(source, "copy")
model = AutoModelForImageTextToText.from_pretrained("copy", trust_remote_code=True)
shutil.rmtree("copy")
model.save_pretrained(target)
print("null")
"""
    offline.without_package(save, model, source)
    config = json.loads((source / "config.json").read_text())
    assert "custom_pipelines" not in config and config["auto_map"]
    check_code_is_there(source)
