"""What is saved loads again, with and without this package, and the installed class runs no code of a repository."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, StableDiffusionPipeline
from transformers import CLIPTextModel

from vlv import VLVImageProcessor, VLVModel, hub
from vlv.miniature.tokenizer import build_tokenizer
from vlv.pipelines import VLVReconstructionPipeline, load_reconstruction

from ..builders import assert_close_to_scale, stable_diffusion_parts, text_encoder_config, vlv_config
from ..hub.machine import Machine
from ..hub.server import Hub, nowhere, serve
from ..interpreter import run_python

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"
FORMS = {  # arguments of save_pretrained, and of from_pretrained
    "whole": ({}, {}),
    "shards": ({"max_shard_size": "20KB"}, {}),
    "variant": ({"variant": "fp16"}, {"variant": "fp16"}),
    "variant in shards": ({"variant": "fp16", "max_shard_size": "20KB"}, {"variant": "fp16"}),
    "pickle": ({"safe_serialization": False}, {}),
}
CODE = {"pipeline_vlv_reconstruction.py", "encoder/modeling_vlv.py", "image_processor/processing_vlv.py"}

# Loads each folder with the code in it, saves the first in all forms with that code, and prints what it generates.
WITHOUT_PACKAGE = """
import json, os, sys, torch
from diffusers import DiffusionPipeline
image, output, forms = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
found = {}
for name, (save, load) in forms.items():
    pipe = DiffusionPipeline.from_pretrained(sys.argv[4] + "/" + name, trust_remote_code=True, **load)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    found[name] = pipe(image, num_inference_steps=2, generator=generator, output_type="latent").images.tolist()
    pipe.save_pretrained(output + "/" + name, **save)
print(json.dumps(found))
"""
UPLOAD = """
import json, sys
from huggingface_hub import HfApi
api = HfApi()
api.create_repo("org/vlv", private=True)
commit = api.upload_folder(repo_id="org/vlv", folder_path=sys.argv[1]).oid
api.delete_file("unet/config.json", "org/vlv")  # main is incomplete; the returned revision is not
print(json.dumps(commit))
"""
FROM_THE_HUB = """
import json, sys, torch
from vlv.pipelines import VLVReconstructionPipeline
image, revision, token = sys.argv[1:]
settings = {"revision": revision, "cache_dir": "cache", "dtype": torch.float32}
found = []
for more in ({"token": token}, {"token": token, "trust_remote_code": True}, {"local_files_only": True}):
    pipe = VLVReconstructionPipeline.from_pretrained("org/vlv", **settings, **more)
    assert type(pipe) is VLVReconstructionPipeline and pipe.config._name_or_path == "org/vlv"
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    found.append(pipe(image, num_inference_steps=2, generator=generator, output_type="latent").images.tolist())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def pipe(image_processor) -> VLVReconstructionPipeline:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(for_text_encoder=True)
    parts = stable_diffusion_parts(steps_offset=1)  # as StableDiffusionPipeline sets it
    encoder = VLVModel(vlv_config()).eval()
    return VLVReconstructionPipeline(encoder=encoder, **parts, image_processor=image_processor, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def image_file(tmp_path_factory, images):
    path = tmp_path_factory.mktemp("image") / "image.png"
    images[1].save(path)
    return path


@pytest.fixture(scope="module")
def expected(pipe, image_file) -> torch.Tensor:
    return generate(pipe, image_file)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, pipe):
    """A folder that holds what the installed class saves in each of `FORMS`."""
    folder = tmp_path_factory.mktemp("saved")
    for name, (arguments, _) in FORMS.items():
        pipe.save_pretrained(folder / name, **arguments)
    return folder


@pytest.fixture(scope="module")
def repository(tmp_path_factory, pipe):
    """A repository in the Hub layout, with a half-precision variant. Its code fails when it runs."""
    folder = tmp_path_factory.mktemp("repository") / "vlv"
    hub.export(
        folder,
        encoder=pipe.encoder,
        image_processor=pipe.image_processor,
        diffusion_model=pipe.components,
        half_variant=True,
    )
    for code in CODE:
        (folder / code).write_text("raise SystemExit('code of the repository ran')\n")
    return folder


def generate(pipe: DiffusionPipeline, image) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(str(image), num_inference_steps=2, generator=generator, output_type="latent").images


def assert_generates(pipe: DiffusionPipeline, image, expected: torch.Tensor) -> None:
    assert_close_to_scale(generate(pipe, image), expected, 1e-4)


def files(folder) -> set[str]:
    """Relative paths of the files, without the numbers of shards."""
    paths = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return {re.sub(r"-\d{5}-of-\d{5}", "-N-of-N", path) for path in paths}


def test_images_differ_or_no_comparison_here_could_fail(pipe, images, expected, tmp_path):
    images[0].save(tmp_path / "other.png")
    difference = (generate(pipe, tmp_path / "other.png") - expected).abs().max()
    assert difference > 1e-2 * expected.abs().max()


# --- the installed class --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [{}, {"trust_remote_code": True}])
def test_the_installed_class_runs_no_code_of_a_repository(repository, image_file, expected, trust):
    loaded = VLVReconstructionPipeline.from_pretrained(repository, **trust)
    assert type(loaded) is VLVReconstructionPipeline
    assert type(loaded.encoder) is VLVModel and type(loaded.image_processor) is VLVImageProcessor
    assert_generates(loaded, image_file, expected)


@pytest.mark.parametrize(
    ("module", "name", "model"),
    [
        ("pipeline_vlv_reconstruction", "VLVReconstructionPipeline", CHECKPOINTS / "vlv-miniature"),
        (
            "pipeline_vlv_pooled_reconstruction",
            "VLVPooledReconstructionPipeline",
            CHECKPOINTS / "vlv-miniature-mmdit",
        ),
    ],
)
def test_a_class_that_is_imported_from_its_module_loads_the_installed_components(module, name, model, tmp_path):
    code = f"""
import sys
from vlv.pipelines.{module} import {name}
index = {name}.load_config(sys.argv[1])
assert index["encoder"] == ["vlv.pipelines.components", "VLVModel"], index["encoder"]
"""
    done = run_python(code, [str(model)], cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_subclass_loads_as_itself(repository):
    class Own(VLVReconstructionPipeline):
        pass

    assert type(Own.from_pretrained(repository)) is Own


def test_code_of_other_components_needs_trust(tmp_path, pipe):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["own_unet", "OwnUNet"]}))
    code = "from diffusers import UNet2DConditionModel\nclass OwnUNet(UNet2DConditionModel): pass\n"
    (tmp_path / "unet" / "own_unet.py").write_text(code)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        VLVReconstructionPipeline.from_pretrained(tmp_path)
    loaded = VLVReconstructionPipeline.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(loaded.unet).__name__ == "OwnUNet" and type(loaded.encoder) is VLVModel


@pytest.mark.slow
def test_precisions_apply_to_all_components_or_to_each(repository):
    loaded = VLVReconstructionPipeline.from_pretrained(repository, dtype=torch.bfloat16)
    assert {loaded.encoder.dtype, loaded.unet.dtype, loaded.vae.dtype} == {torch.bfloat16}
    dtypes = {"unet": torch.float16, "default": torch.bfloat16}
    loaded = VLVReconstructionPipeline.from_pretrained(repository, torch_dtype=dtypes)
    assert [loaded.encoder.dtype, loaded.unet.dtype, loaded.vae.dtype] == [
        torch.bfloat16,
        torch.float16,
        torch.bfloat16,
    ]


def test_a_variant_is_read_from_its_own_files(repository, pipe):
    loaded = VLVReconstructionPipeline.from_pretrained(repository, variant="fp16", dtype=torch.float32)
    for name in ("encoder", "unet", "vae"):
        for (key, found), weight in zip(
            getattr(loaded, name).named_parameters(), getattr(pipe, name).parameters(), strict=True
        ):
            assert torch.equal(found, weight.half().float()), key
    with pytest.raises(ValueError, match="variant=ema"):
        VLVReconstructionPipeline.from_pretrained(repository, variant="ema")


@pytest.mark.parametrize("device_map", ["cpu", "balanced"])
def test_device_maps_are_taken(repository, image_file, expected, device_map):
    loaded = VLVReconstructionPipeline.from_pretrained(repository, device_map=device_map)
    assert {loaded.encoder.device, loaded.unet.device, loaded.vae.device} == {torch.device("cpu")}
    assert_generates(loaded, image_file, expected)


def test_components_are_passed_by_keyword(repository, pipe, image_file):
    scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    given = {"encoder": pipe.encoder, "image_processor": pipe.image_processor, "vae": pipe.vae, "scheduler": scheduler}
    loaded = VLVReconstructionPipeline.from_pretrained(repository, **given)
    assert all(getattr(loaded, name) is component for name, component in given.items())
    assert loaded.unet is not pipe.unet
    with pytest.raises(ValueError, match=r"should be .*PreTrainedModel"):
        VLVReconstructionPipeline.from_pretrained(repository, encoder=scheduler)


def test_components_can_be_left_out(repository, pipe, image_file):
    loaded = VLVReconstructionPipeline.from_pretrained(repository, vae=None, unet=None)
    assert loaded.vae is None and loaded.unet is None
    assert torch.equal(loaded.get_caption_embeds(str(image_file)), pipe.get_caption_embeds(str(image_file)))


def test_a_stable_diffusion_folder_loads_with_an_encoder_and_an_image_processor(
    stable_diffusion, pipe, image_file, expected
):
    given = {"encoder": pipe.encoder, "image_processor": pipe.image_processor}
    loaded = VLVReconstructionPipeline.from_pretrained(stable_diffusion, **given)
    assert_generates(loaded, image_file, expected)
    with pytest.raises(ValueError, match=r"expected .*'encoder'"):
        VLVReconstructionPipeline.from_pretrained(stable_diffusion)


@pytest.mark.slow
def test_a_repository_on_the_hub_loads_with_the_arguments_of_diffusers(repository, image_file, expected, tmp_path):
    with serve(Hub()) as endpoint:
        machine = Machine(tmp_path / "machine", endpoint)
        commit = machine.without_package(UPLOAD, repository, HF_TOKEN="hf_org")
        done = machine.python(FROM_THE_HUB, image_file, commit, "hf_org")
    assert done.returncode == 0, done.stderr[-3000:]
    for found in json.loads(done.stdout.splitlines()[-1]):
        assert_close_to_scale(torch.tensor(found), expected, 1e-4)
    weights = {path.name for path in (machine.folder / "cache").rglob("*.safetensors")}
    assert weights == {"model.safetensors", "diffusion_pytorch_model.safetensors"}  # and no variant


# --- saving ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_a_saved_pipeline_loads_with_the_package(saved, image_file, expected, form):
    folder, (_, arguments) = saved / form, FORMS[form]
    assert files(folder) >= CODE
    loaded = VLVReconstructionPipeline.from_pretrained(folder, **arguments)
    assert type(loaded) is VLVReconstructionPipeline
    assert_generates(loaded, image_file, expected)
    again = load_trusted(folder, **arguments)
    assert not isinstance(again, VLVReconstructionPipeline)
    assert_generates(again, image_file, expected)


@pytest.mark.parametrize("form", ["whole", "shards"])
def test_load_reconstruction_reads_a_saved_pipeline(saved, image_file, expected, form):
    assert len(list((saved / form / "encoder").glob("*.safetensors"))) > (form == "shards")
    assert_generates(load_reconstruction(saved / form), image_file, expected)


def test_load_reconstruction_takes_the_image_processor_of_the_pipeline(tmp_path, pipe):
    processor = VLVImageProcessor(size={"height": 48, "width": 48})
    parts = {**pipe.components, "image_processor": processor}
    VLVReconstructionPipeline(**parts).save_pretrained(tmp_path)
    VLVImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)  # as the captioner's beside it
    assert load_reconstruction(tmp_path).image_processor.size["height"] == 48


@pytest.mark.parametrize("form", ["variant", "variant in shards"])
def test_load_reconstruction_says_how_a_variant_is_loaded(saved, form):
    with pytest.raises(FileNotFoundError, match=r"only the variant 'fp16'.*variant='fp16'"):
        load_reconstruction(saved / form)


def test_load_reconstruction_refuses_pickles(saved):
    with pytest.raises(ValueError, match="pickled weights"):
        load_reconstruction(saved / "pickle")


@pytest.mark.slow
def test_a_saved_pipeline_loads_without_the_package_and_so_does_what_that_saves(saved, image_file, expected, tmp_path):
    machine = Machine(tmp_path / "machine", nowhere())
    first = machine.without_package(WITHOUT_PACKAGE, image_file, tmp_path / "2", json.dumps(FORMS), saved)
    second = machine.without_package(WITHOUT_PACKAGE, image_file, tmp_path / "3", json.dumps(FORMS), tmp_path / "2")
    for form, (_, arguments) in FORMS.items():
        assert_close_to_scale(torch.tensor(first[form]), expected, 1e-4)
        assert_close_to_scale(torch.tensor(second[form]), expected, 1e-4)
        assert files(tmp_path / "2" / form) == files(saved / form)
        loaded = VLVReconstructionPipeline.from_pretrained(tmp_path / "2" / form, **arguments)
        assert_generates(loaded, image_file, expected)


@pytest.mark.slow
def test_a_compiled_encoder_is_saved_with_its_own_code(tmp_path, pipe, image_file, expected):
    parts = {**pipe.components, "encoder": torch.compile(pipe.encoder, backend="eager")}
    VLVReconstructionPipeline(**parts).save_pretrained(tmp_path)
    assert_generates(VLVReconstructionPipeline.from_pretrained(tmp_path), image_file, expected)
    assert files(tmp_path) >= CODE
    assert_generates(load_trusted(tmp_path), image_file, expected)


@pytest.mark.slow
def test_save_pretrained_pushes_to_the_hub(pipe, tmp_path):
    script = """
import sys
from vlv.pipelines import VLVReconstructionPipeline
pipe = VLVReconstructionPipeline.from_pretrained(sys.argv[1])
pipe.save_pretrained("vlv", push_to_hub=True, repo_id="org/saved", token="hf_org", variant="fp16")
"""
    pipe.save_pretrained(tmp_path / "saved")
    server = Hub()
    with serve(server) as endpoint:
        machine = Machine(tmp_path / "machine", endpoint)
        done = machine.python(script, tmp_path / "saved")
        assert done.returncode == 0, done.stderr[-3000:]
        loaded = machine.without_package(
            "import json; from diffusers import DiffusionPipeline\n"
            "load = DiffusionPipeline.from_pretrained\n"
            "print(json.dumps(type(load('org/saved', variant='fp16', trust_remote_code=True)).__name__))"
        )
    assert loaded == "VLVReconstructionPipeline"
    assert server.repos["org/saved"].at("main").files.keys() >= CODE


# --- pipelines of the same components -------------------------------------------------------------------------------


def load_trusted(folder, **arguments) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(folder, trust_remote_code=True, **arguments)


def test_from_pipe_of_itself_shares_the_components(pipe, image_file, expected):
    for source in (pipe, VLVReconstructionPipeline.from_pipe(pipe)):
        new = VLVReconstructionPipeline.from_pipe(source)
        assert all(getattr(new, name) is component for name, component in pipe.components.items())
        assert_generates(new, image_file, expected)


def test_from_pipe_of_the_same_pipeline_as_remote_code(saved, image_file, expected):
    new = VLVReconstructionPipeline.from_pipe(load_trusted(saved / "whole"))
    assert type(new) is VLVReconstructionPipeline
    assert_generates(new, image_file, expected)


@pytest.mark.slow
def test_from_pipe_of_stable_diffusion_and_back(stable_diffusion, pipe, image_file, expected, tmp_path):
    source = StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None)
    with pytest.raises(ValueError, match=r"expected .*'encoder'"):
        VLVReconstructionPipeline.from_pipe(source)
    new = VLVReconstructionPipeline.from_pipe(source, encoder=pipe.encoder, image_processor=pipe.image_processor)
    assert new.unet is source.unet
    assert_generates(new, image_file, expected)
    new.save_pretrained(tmp_path)
    assert_generates(VLVReconstructionPipeline.from_pretrained(tmp_path), image_file, expected)
    torch.manual_seed(0)
    added = {"text_encoder": CLIPTextModel(text_encoder_config()), "safety_checker": None, "feature_extractor": None}
    back = StableDiffusionPipeline.from_pipe(new, **added, requires_safety_checker=False)
    assert back.unet is source.unet
    assert back("a small dog", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
