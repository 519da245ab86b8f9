"""A pushed model loads over HTTP and from a folder, with and without this package."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from vlv import hub as vlv_hub
from vlv.cli.main import main
from vlv.pipelines import VLVReconstructionPipeline

from ..builders import GOLDEN
from .machine import WITHOUT_PACKAGE, Machine
from .server import Hub, nowhere, serve

pytestmark = pytest.mark.slow
REPO = "org/vlv"

CAPTION = """
import json, sys, torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoProcessor,
    pipeline,
)
source, image, revision = sys.argv[1], Image.open(sys.argv[2]), (sys.argv[3:] or [None])[0]
trusted = {"trust_remote_code": True, "revision": revision}
found = {}
captioner = pipeline("image-to-text", model=source, **trusted)
found["caption"] = captioner(image, max_new_tokens=5)[0]["generated_text"]
built_in = pipeline("image-text-to-text", model=source, **trusted)
plain = built_in(images=image, text="a", max_new_tokens=4, return_full_text=False)
found["after a word"] = plain[0]["generated_text"]
content = [{"type": "image", "image": image}, {"type": "text", "text": ""}]
chat = built_in(text=[{"role": "user", "content": content}], max_new_tokens=5, return_full_text=False)
found["chat"] = chat[0]["generated_text"]
config = AutoConfig.from_pretrained(source, **trusted)
found["queries"] = config.num_query_tokens
processor = AutoProcessor.from_pretrained(source, **trusted)
pixels = processor(images=image).pixel_values
found["same pixels"] = torch.equal(
    pixels, AutoImageProcessor.from_pretrained(source, **trusted)(image, return_tensors="pt").pixel_values
)
model = AutoModelForImageTextToText.from_pretrained(source, **trusted)
ids = model.generate(pixel_values=pixels, max_new_tokens=5, do_sample=False)
found["auto"] = processor.batch_decode(ids, skip_special_tokens=True)[0]
multimodal = AutoModelForMultimodalLM.from_pretrained(source, **trusted)
ids = multimodal.generate(pixel_values=pixels, max_new_tokens=5, do_sample=False)
found["multimodal"] = processor.batch_decode(ids, skip_special_tokens=True)[0]
half = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.bfloat16, **trusted)
found["half"] = str(half.dtype)
encoder = AutoModel.from_pretrained(source, subfolder="encoder", **trusted)
found["z"] = encoder(pixel_values=pixels).caption_embeds.sum().item()
print(json.dumps(found))
"""

RECONSTRUCT = """
import json, sys, torch
from PIL import Image
from diffusers import DiffusionPipeline
source, image, revision = sys.argv[1], Image.open(sys.argv[2]), (sys.argv[3:] or [None])[0]
pipeline = DiffusionPipeline.from_pretrained(source, trust_remote_code=True, revision=revision)
pipeline.set_progress_bar_config(disable=True)

def reconstruct(pipeline):
    generator = torch.Generator().manual_seed(0)
    return pipeline(image, num_inference_steps=2, generator=generator, output_type="pt").images

reconstruction = reconstruct(pipeline)
found = {"sum": reconstruction.double().sum().item(), "offload": pipeline.model_cpu_offload_seq.split("->")}
pipeline.save_pretrained("resaved")
again = DiffusionPipeline.from_pretrained("resaved", trust_remote_code=True)
again.set_progress_bar_config(disable=True)
found["resaved"] = reconstruct(again).double().sum().item()
pipeline.to(torch.bfloat16)
found["half"] = bool(torch.isfinite(reconstruct(pipeline).float()).all())
print(json.dumps(found))
"""


# What diffusers downloads from the top of a repository.
RECONSTRUCTION_FILES = (
    "chat_template.jinja config.json generation_config.json model_index.json pipeline_vlv_reconstruction.py "
    "preprocessor_config.json processor_config.json tokenizer.json tokenizer_config.json"
)


@pytest.fixture(scope="module")
def pushed(tmp_path_factory, model):
    """`(hub, its address)` with what `vlv push` uploaded."""
    hub = Hub()
    with serve(hub) as endpoint:
        machine = Machine(tmp_path_factory.mktemp("owner"), endpoint)
        results = machine.folder / "results.json"
        results.write_text(json.dumps({"captions, combo": {"object_f1": 0.5}}))
        done = machine.vlv(
            "push", model, REPO, "--token", "hf_org", "--results", results, "--results-command", "vlv evaluate x"
        )
        assert done.returncode == 0, done.stderr
        assert f"{REPO}/commit/" in done.stdout
        yield hub, endpoint


@pytest.fixture(scope="module")
def expected(model, image_file) -> dict:
    """The same from the parts, loaded in this process."""
    captioner, processor = vlv_hub.load_captioner(model)
    encoder, image_processor = vlv_hub.load_encoder(model)
    pixels = processor(images=str(image_file)).pixel_values

    def caption(length: int, **inputs) -> str:
        ids = captioner.generate(pixel_values=pixels, max_new_tokens=length, do_sample=False, **inputs)
        return processor.batch_decode(ids, skip_special_tokens=True)[0]

    prefix = processor(text="a")
    pipeline = VLVReconstructionPipeline(
        encoder=encoder, image_processor=image_processor, **vlv_hub.load_diffusion_components(model)
    )
    pipeline.set_progress_bar_config(disable=True)
    reconstruction = pipeline(
        Image.open(image_file), num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt"
    ).images
    with torch.no_grad():
        z = encoder(pixel_values=pixels).caption_embeds.sum().item()
    return {
        "caption": caption(5),
        "after a word": caption(4, **prefix),
        "z": z,
        "sum": reconstruction.double().sum().item(),
    }


def check_captions(found: dict, expected: dict) -> None:
    assert found["caption"] == found["chat"] == found["auto"] == found["multimodal"] == expected["caption"]
    assert found["after a word"].strip() == expected["after a word"].strip()
    assert found["queries"] == 8 and found["same pixels"] and found["half"] == "torch.bfloat16"
    assert np.isclose(found["z"], expected["z"], rtol=1e-5)


def check_reconstruction(found: dict, expected: dict) -> None:
    assert np.isclose(found["sum"], expected["sum"], rtol=1e-5)
    assert np.isclose(found["resaved"], expected["sum"], rtol=1e-5)
    assert found["half"] and found["offload"][0] == "encoder"


def test_captioning_over_http_without_the_package_then_offline(pushed, expected, image_file, tmp_path):
    hub, endpoint = pushed
    hub.forget_traffic()
    machine = Machine(tmp_path / "reader", endpoint)
    pinned = hub.repos[REPO].branches["main"]
    check_captions(machine.without_package(CAPTION, REPO, image_file, pinned), expected)
    fetched = {name.removeprefix(REPO + "/"): size for name, size in hub.downloads.items()}
    assert not [name for name in fetched if name.startswith(("unet/", "vae/", "scheduler/", "tokenizer/"))]
    repo = hub.repos[REPO].at("main").files
    assert fetched["encoder/model.safetensors"] == len(repo["encoder/model.safetensors"])  # once, for all of these
    assert fetched["captioner.safetensors"] == len(repo["captioner.safetensors"])
    hub.forget_traffic()
    check_captions(machine.without_package(CAPTION, REPO, image_file, pinned, HF_HUB_OFFLINE="1"), expected)
    assert not hub.requests


def test_reconstruction_over_http_does_not_download_the_language_model(pushed, expected, image_file, tmp_path):
    hub, endpoint = pushed
    hub.forget_traffic()
    revision = hub.repos[REPO].branches["main"]
    check_reconstruction(
        Machine(tmp_path / "reader", endpoint).without_package(RECONSTRUCT, REPO, image_file, revision), expected
    )
    fetched = {name.removeprefix(REPO + "/"): size for name, size in hub.downloads.items()}
    repo = hub.repos[REPO].at("main").files
    assert "captioner.safetensors" not in fetched
    assert all(fetched[name] == len(repo[name]) for name in fetched if name.endswith(".safetensors"))  # each once
    weights = {f"{part}/diffusion_pytorch_model.safetensors" for part in ("unet", "vae")}
    assert {name for name in fetched if ".safetensors" in name} == weights | {"encoder/model.safetensors"}
    assert {name for name in fetched if "/" not in name} == set(RECONSTRUCTION_FILES.split())


def test_diffusers_loads_a_downloaded_folder_offline(pushed, expected, image_file, tmp_path):
    machine = Machine(tmp_path / "reader", pushed[1])
    download = "import json; from huggingface_hub import snapshot_download; "
    folder = machine.without_package(download + f"print(json.dumps(snapshot_download({REPO!r})))")
    check_reconstruction(machine.without_package(RECONSTRUCT, folder, image_file, HF_HUB_OFFLINE="1"), expected)


def test_the_half_precision_variant_is_downloaded_alone(model, image_file, tmp_path):
    hub = Hub()
    with serve(hub) as endpoint:
        owner = Machine(tmp_path / "owner", endpoint)
        assert owner.vlv("push", model, REPO, "--half-variant", "--token", "hf_org").returncode == 0
        hub.forget_traffic()
        script = """
import json, sys, torch
from diffusers import DiffusionPipeline
from transformers import AutoModelForImageTextToText, AutoProcessor
trusted = {"trust_remote_code": True, "variant": "fp16"}
pipeline = DiffusionPipeline.from_pretrained("org/vlv", torch_dtype=torch.float16, **trusted)
model = AutoModelForImageTextToText.from_pretrained("org/vlv", dtype=torch.float32, **trusted)
processor = AutoProcessor.from_pretrained("org/vlv", trust_remote_code=True)
ids = model.generate(**processor(images=sys.argv[1]), max_new_tokens=5)
print(json.dumps({"dtypes": [str(pipeline.unet.dtype), str(pipeline.encoder.dtype)], "length": ids.shape[1]}))
"""
        found = Machine(tmp_path / "reader", endpoint).without_package(script, image_file)
        assert found == {"dtypes": ["torch.float16"] * 2, "length": 5}
        weights = {name for name in hub.downloads if name.endswith(".safetensors")}
        assert weights and all(".fp16." in name for name in weights), weights


def test_save_pretrained_alone_loads_without_the_package(model, expected, image_file, tmp_path):
    captioner, processor = vlv_hub.load_captioner(model)
    captioner.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    script = """
import json, sys
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = model.generate(**processor(images=sys.argv[2]), max_new_tokens=5, do_sample=False)
print(json.dumps(processor.batch_decode(ids, skip_special_tokens=True)[0]))
"""
    found = Machine(tmp_path / "reader", nowhere()).without_package(script, tmp_path / "saved", image_file)
    assert found == expected["caption"]


def test_push_to_hub_of_the_parts(model, expected, image_file, hub_server, tmp_path):
    _, endpoint = hub_server
    push = """
import sys
from vlv import hub
from vlv.pipelines import load_reconstruction
for part in hub.load_captioner(sys.argv[1]):
    part.push_to_hub("org/captioner")
load_reconstruction(sys.argv[1]).push_to_hub("org/reconstruction")
"""
    done = Machine(tmp_path / "owner", endpoint).python(push, model, HF_TOKEN="hf_org")
    assert done.returncode == 0, done.stderr[-3000:]
    script = """
import json, sys, torch
from diffusers import DiffusionPipeline
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained("org/captioner", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("org/captioner", trust_remote_code=True)
ids = model.generate(**processor(images=sys.argv[1]), max_new_tokens=5, do_sample=False)
pipeline = DiffusionPipeline.from_pretrained("org/reconstruction", trust_remote_code=True)
pipeline.set_progress_bar_config(disable=True)
generator = torch.Generator().manual_seed(0)
reconstruction = pipeline(sys.argv[1], num_inference_steps=2, generator=generator, output_type="pt").images
print(json.dumps([processor.batch_decode(ids, skip_special_tokens=True)[0], reconstruction.double().sum().item()]))
"""
    caption, total = Machine(tmp_path / "reader", endpoint).without_package(script, image_file)
    assert caption == expected["caption"] and np.isclose(total, expected["sum"], rtol=1e-5)


def test_a_folder_loads_without_the_package(pushed, model, expected, image_file, tmp_path):
    machine = Machine(tmp_path / "reader", pushed[1])
    check_captions(machine.without_package(CAPTION, model, image_file), expected)


def test_no_code_of_a_repository_runs_unless_it_is_trusted(pushed, tmp_path):
    machine = Machine(tmp_path / "reader", pushed[1])
    for script in (
        'from transformers import pipeline; pipeline("image-to-text", model="org/vlv")',
        'from diffusers import DiffusionPipeline; DiffusionPipeline.from_pretrained("org/vlv")',
    ):
        done = machine.python(WITHOUT_PACKAGE + script)
        assert done.returncode and "trust_remote_code=True" in done.stderr
    assert not list((machine.folder / "hf").rglob("modules/**/modeling_vlv.py"))


def test_the_package_needs_no_trust(pushed, expected, image_file, tmp_path):
    machine = Machine(tmp_path / "colleague", pushed[1])
    script = """
import json, sys, vlv
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline
from vlv.pipelines import VLVCaptioningPipeline, load_reconstruction
captioner = pipeline("image-to-text", model="org/vlv", pipeline_class=VLVCaptioningPipeline)
model = AutoModelForImageTextToText.from_pretrained("org/vlv")
print(json.dumps({
    "caption": captioner(sys.argv[1], max_new_tokens=5)[0]["generated_text"],
    "own": type(model).__module__, "processor": type(AutoProcessor.from_pretrained("org/vlv")).__module__,
    "pipeline": type(load_reconstruction("org/vlv")).__module__,
}))
"""
    done = machine.python(script, image_file)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["caption"] == expected["caption"]
    assert all(found[key].startswith("vlv.") for key in ("own", "processor", "pipeline"))
    assert not list((machine.folder / "hf").rglob("modules/**/modeling_vlv.py"))
    captions = machine.folder / "captions.json"
    done = machine.vlv("caption", image_file, "--model", REPO, "--output", captions, "--max-new-tokens", 5)
    assert done.returncode == 0, done.stderr
    assert json.loads(captions.read_text()) == {"image.png": expected["caption"]}


def test_the_card_describes_the_checkpoint(pushed, image_file):
    card = pushed[0].repos[REPO].at("main").files["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["pipeline_tag"] == "image-text-to-text" and front["library_name"] == "transformers"
    assert front["base_model"] == ["florence-community/Florence-2-base"] and front["datasets"] == ["org/images"]
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert "vlv evaluate x" in card and "| captions, combo | object_f1 | 0.5 |" in card


def test_a_cached_model_loads_without_a_network(pushed, expected, image_file, tmp_path):
    command = ["caption", image_file, "--model", REPO, "--max-new-tokens", 5, "--output"]
    done = Machine(tmp_path / "machine", pushed[1]).vlv(*command, tmp_path / "first.json")
    assert done.returncode == 0, done.stderr
    machine = Machine(tmp_path / "machine", nowhere())  # nothing answers there
    done = machine.vlv(*command, tmp_path / "second.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "second.json").read_text()) == {"image.png": expected["caption"]}
    done = machine.vlv("caption", image_file, "--model", "org/never-seen")
    assert done.returncode == 2 and "cannot load org/never-seen" in done.stderr


def test_stage_2_of_a_repository_keeps_the_training_metadata_of_stage_1(
    stage1_checkpoint, language_model, hub_server, image_folder, tmp_path
):
    _, endpoint = hub_server
    machine = Machine(tmp_path / "machine", endpoint)
    source = shutil.copytree(stage1_checkpoint, tmp_path / "stage1")
    (source / vlv_hub.TRAINING_FILE).write_text(json.dumps({"stage1": {"images": "org/images"}}))
    assert machine.vlv("push", source, REPO, "--token", "hf_org").returncode == 0
    run = tmp_path / "run"
    config = tmp_path / "stage2.yaml"
    settings = {"model": REPO, "language_model": language_model, "pairs": image_folder, "output_dir": run}
    settings |= {"max_steps": 1, "validation_steps": 0, "per_device_train_batch_size": 2, "dataloader_num_workers": 0}
    settings |= {"use_cpu": True, "trainable": "projector"}
    config.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    done = machine.vlv("train", "stage2", config)
    assert done.returncode == 0, done.stderr[-3000:]
    metadata = json.loads((run / vlv_hub.TRAINING_FILE).read_text())
    assert metadata["stage1"] == {"images": "org/images"} and metadata["stage2"]["steps"] == 1
    assert metadata["stage2"]["language_model"] == str(language_model)
    more = tmp_path / "more.yaml"
    settings = {**settings, "model": run, "output_dir": tmp_path / "run-2"}
    settings.pop("language_model")
    more.write_text("".join(f"{name}: {value}\n" for name, value in settings.items()))
    done = machine.vlv("train", "stage2", more)
    assert done.returncode == 0, done.stderr[-3000:]
    metadata = json.loads((tmp_path / "run-2" / vlv_hub.TRAINING_FILE).read_text())
    assert "language_model" not in metadata["stage2"]  # it was not read: the captioner brought its own


def test_the_snippets_of_the_card_run(pushed, images, tmp_path):
    machine = Machine(tmp_path / "reader", pushed[1])
    images[0].save(machine.folder / "image.png")
    card = pushed[0].repos[REPO].at("main").files["README.md"].decode()
    snippets = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    assert len(snippets) == 3
    printed = []
    for snippet in snippets:
        done = machine.python(WITHOUT_PACKAGE + snippet.replace("num_inference_steps=50", "num_inference_steps=2"))
        assert done.returncode == 0, done.stderr[-3000:]
        printed.append(done.stdout)
    captions = [re.search(r"'generated_text': '(.*?)'", text) for text in printed[:2]]
    assert all(captions) and captions[0].group(1) == captions[1].group(1)
    assert Image.open(machine.folder / "reconstruction.png").size == (32, 32)


def test_pushing_again_uploads_nothing_and_a_broken_push_continues(model, hub_server, capsys):
    hub, _ = hub_server
    push = ["push", str(model), REPO, "--private", "--token"]
    hub.broken_uploads = 1000
    assert main([*push, "hf_org"]) == 2
    assert "run the same command again" in capsys.readouterr().err
    hub.broken_uploads = 0
    assert main([*push, "hf_org"]) == 0
    assert "captioner.safetensors: 100%" in capsys.readouterr().err
    assert hub.repos[REPO].private
    hub.forget_traffic()
    assert main([*push, "hf_org"]) == 0
    assert hub.uploads == 0
    files = hub.repos[REPO].at("main").files
    hub.repos[REPO].commit("main", "an older push", {**files, "encoder/model.fp16.safetensors": b"", "LICENSE": b""})
    assert main([*push, "hf_org"]) == 0
    assert set(hub.repos[REPO].at("main").files) == {*files, "LICENSE"}  # stale weights are gone, other files stay
    hub.repos[REPO].private = False
    capsys.readouterr()
    assert main([*push, "hf_org"]) == 2
    assert "exists and is public; nothing was uploaded" in capsys.readouterr().err
    hub.repos[REPO].private = True
    for token, reason in (("hf_other", "may not write to org/vlv"), ("wrong", "wants a token")):
        assert main([*push, token]) == 2
        assert reason in capsys.readouterr().err


def test_a_repository_with_a_pickle_is_refused(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    for name in ("training_args.bin", "optimizer.pt", "checkpoint-3/rng_state.pth", "checkpoint-3/global_step3/x.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        torch.save({}, folder / name)  # a trainer's own, which nothing here opens
    vlv_hub.load_encoder(folder)
    torch.save({}, folder / "pytorch_model.bin")
    for load in (vlv_hub.load_captioner, vlv_hub.load_encoder):
        with pytest.raises(ValueError, match=r"holds pickled weights \(pytorch_model.bin\), which can run code"):
            load(folder)


def test_code_of_a_tokenizer_is_not_run(model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "copy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": [None, "evil.Evil"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(ValueError, match="trust_remote_code"):
        vlv_hub.load_captioner(folder)
    assert not (tmp_path / "ran").exists()


def test_writing_a_repository_never_changes_its_source_or_other_files(model, tmp_path):
    before = {path: path.read_bytes() for path in model.rglob("*") if path.is_file()}
    for folder in (model, model / "inside", model.parent):
        with pytest.raises(ValueError, match="write to another folder"):
            vlv_hub.write_repository(model, folder, dtype=torch.float16)
    (tmp_path / "old.txt").write_text("")
    with pytest.raises(ValueError, match="not empty"):
        vlv_hub.write_repository(model, tmp_path)
    assert {path: path.read_bytes() for path in model.rglob("*") if path.is_file()} == before


def test_a_model_is_exported_again_without_loss(model, tmp_path):
    again = vlv_hub.write_repository(model, tmp_path / "again")
    for path in model.rglob("*.safetensors"):
        before, after = load_file(path), load_file(again / path.relative_to(model))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before), path
    code = {p.relative_to(model) for p in model.rglob("*.py")} | {Path("modular_vlv.py"), Path("modular_vlv_sd.py")}
    assert {p.relative_to(again) for p in again.rglob("*.py")} == code  # a push adds the blocks of Modular Diffusers
    both = vlv_hub.write_repository(
        vlv_hub.write_repository(model, tmp_path / "v", half_variant=True), tmp_path / "vv"
    )
    for path in both.rglob("*.safetensors"):  # the full weights are not taken from their half-precision variant
        assert all(t.dtype != torch.float16 for t in load_file(path).values()), path
    half = vlv_hub.write_repository(model, tmp_path / "half", dtype=torch.float16)
    third = vlv_hub.write_repository(half, tmp_path / "third")
    for path in half.rglob("*.safetensors"):
        tensors = load_file(third / path.relative_to(half))
        assert all(not t.is_floating_point() or t.dtype == torch.float16 for t in tensors.values()), path


def test_a_stage_1_checkpoint_is_pushed_and_reconstructs(stage1_checkpoint, stable_diffusion, image_file, tmp_path):
    hub = Hub()
    with serve(hub) as endpoint:
        machine = Machine(tmp_path / "owner", endpoint)
        done = machine.vlv(
            "push",
            stage1_checkpoint,
            REPO,
            "--diffusion-model",
            stable_diffusion,
            "--token",
            "hf_org",
            "--revision",
            "first",
        )
        assert done.returncode == 0, done.stderr
        card = hub.repos[REPO].at("first").files["README.md"].decode()
        assert "writes no captions" in card and "DiffusionPipeline" in card and 'pipeline("image-to-text"' not in card
        found = Machine(tmp_path / "reader", endpoint).without_package(RECONSTRUCT, REPO, image_file, "first")
        assert np.isclose(found["sum"], found["resaved"], rtol=1e-5)


def test_the_embedded_code_equals_its_sources():
    from vlv.checkpoints import MINIATURE
    from vlv.hub.remote_code import code_file

    second = Path(__file__).parents[2] / "checkpoints" / "vlv-miniature-mmdit"
    files = [*MINIATURE.rglob("*.py"), *second.rglob("*.py")]
    assert len(files) > 10
    for path in files:
        assert path.read_bytes() == code_file(path.name).read_bytes(), path


def test_a_converted_checkpoint_serves_both_encoders_over_http(converted, golden, tmp_path):
    """Captions by stage 2's encoder, reconstructions by stage 1's, without the package."""
    script = """
import json, sys
from diffusers import DiffusionPipeline
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText
golden = load_file(sys.argv[1])
model = AutoModelForImageTextToText.from_pretrained("org/vlv", trust_remote_code=True).eval()
pipeline = DiffusionPipeline.from_pretrained("org/vlv", trust_remote_code=True)
pixels = golden["pixel_values"]
ids = model.generate(pixels, max_new_tokens=24, do_sample=False)
off = (pipeline.encoder(pixel_values=pixels).conditioning - golden["text_encoder"]).abs().max().item()
print(json.dumps([bool((ids == golden["stage2/generated_beams1_fp32"]).all()), off]))
"""
    with serve(Hub()) as endpoint:
        owner = Machine(tmp_path / "owner", endpoint)
        assert owner.vlv("push", converted, REPO, "--token", "hf_org").returncode == 0
        same, off = Machine(tmp_path / "reader", endpoint).without_package(script, GOLDEN / "golden.safetensors")
    assert same and off < 1e-4
