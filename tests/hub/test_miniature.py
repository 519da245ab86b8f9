"""The embedded miniature, pushed, and loaded by transformers and diffusers alone."""

import json

import pytest
import torch
from PIL import Image

from vlv import hub as vlv_hub
from vlv.checkpoints import MINIATURE
from vlv.pipelines import load_reconstruction

from .machine import Machine
from .server import Hub, serve

pytestmark = pytest.mark.slow
REPO = "org/vlv-miniature"

CAPTION = """
import json, sys
from transformers import pipeline
captioner = pipeline("image-to-text", model=sys.argv[1], trust_remote_code=True)
print(json.dumps([row[0]["generated_text"] for row in captioner(sys.argv[2:], max_new_tokens=64)]))
"""

RECONSTRUCT = """
import json, sys, torch
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
generator = [torch.Generator().manual_seed(7) for _ in sys.argv[2:]]
images = pipeline(sys.argv[2:], num_inference_steps=5, generator=generator).images
for number, image in enumerate(images):
    image.save(f"{number}.png")
print(json.dumps(len(images)))
"""


def test_captions_and_reconstructions_are_the_same_without_the_package(tmp_path, request):
    images = sorted((request.config.rootpath / "examples" / "images").glob("*.png"))[:2]
    model, processor = vlv_hub.load_captioner(MINIATURE)
    ids = model.generate(**processor(images=images), max_new_tokens=64, do_sample=False)
    captions = [text.strip() for text in processor.batch_decode(ids, skip_special_tokens=True)]
    pipeline = load_reconstruction(MINIATURE)
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(7) for _ in images]
    reconstructions = pipeline(list(map(str, images)), num_inference_steps=5, generator=generators).images

    hub = Hub()
    with serve(hub) as endpoint:
        done = Machine(tmp_path / "owner", endpoint).vlv("push", MINIATURE, REPO, "--token", "hf_org")
        assert done.returncode == 0, done.stderr
        card = hub.repos[REPO].at("main").files["README.md"]
        written, _, stamp = card.decode().rpartition("\n<!-- pushed as ")
        assert written == (MINIATURE / "README.md").read_text(encoding="utf-8") and stamp
        assert Machine(tmp_path / "reader", endpoint).without_package(CAPTION, REPO, *images) == captions
        other = Machine(tmp_path / "other", endpoint)
        assert other.without_package(RECONSTRUCT, REPO, *images) == len(images)
    for number, expected in enumerate(reconstructions):
        assert Image.open(other.folder / f"{number}.png").tobytes() == expected.tobytes()
    assert json.loads((MINIATURE / "model_index.json").read_text())["_class_name"][1] == "VLVReconstructionPipeline"
