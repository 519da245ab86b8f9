"""What goes wrong in a training ends in one line that names a file or setting and says what to do; exit code 2."""

import errno
import shutil

import pytest
import torch
from transformers import TrainerCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from vlv.train import stage1, stage2
from vlv.train.parsing import FailedRun, errors_in_one_line
from vlv.train.stage1_trainer import DIFFUSION_MODEL
from vlv.train.stage2_trainer import LANGUAGE_MODEL


@pytest.fixture(scope="module")
def inputs(stage1_checkpoint, language_model, image_folder):
    return {
        "model": stage1_checkpoint,
        "language_model": language_model,
        "pairs": image_folder,
        "trainable": "projector",
        "max_steps": 6,
        "save_steps": 100,
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 0,
        "validation_steps": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def train(stage, settings) -> None:
    stage.main([f"--{name}={value}" for name, value in settings.items() if value is not None])


def fails(capsys, stage, settings) -> str:
    """The message of a training that cannot run: the last line on stderr."""
    with pytest.raises(SystemExit) as ended:
        train(stage, settings)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and "Traceback" not in said
    last = said.rstrip().splitlines()[-1]
    assert last.startswith(f"vlv train stage{1 if stage is stage1 else 2}: ")
    return last


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "LANGUAGE_MODEL"}, "has the model type 'qwen2'; expected a VLV model"),
        ({"language_model": "MODEL"}, "is not a causal language model of transformers; name another, such"),
        ({"pairs": "PARQUET"}, "odd.parquet cannot be read as parquet"),
        ({"output_dir": "FILE"}, "cannot be written: File exists; name another --output_dir"),
        ({"output_dir": "FILE/run"}, "cannot be written: Not a directory; name another --output_dir"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size is 0; expected 1 or more"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps is 0; expected 1 or more"),
        ({"max_caption_tokens": 0}, "max_caption_tokens is 0; expected 1 or more"),
        ({"deepspeed": "FILE"}, "deepspeed"),
    ],
)
def test_settings_that_cannot_work_are_named(settings, message, inputs, tmp_path, capsys, request):
    request.addfinalizer(unset_hf_deepspeed_config)  # transformers keeps it for all models to come
    (tmp_path / "odd.parquet").write_bytes(b"PAR1 no parquet")
    (tmp_path / "file").touch()
    places = {"MODEL": inputs["model"], "LANGUAGE_MODEL": inputs["language_model"], "FILE": tmp_path / "file"}
    places |= {"PARQUET": tmp_path / "odd.parquet", "FILE/run": tmp_path / "file" / "run"}
    changes = {name: places.get(value, value) for name, value in settings.items()}
    assert message in fails(capsys, stage2, inputs | {"output_dir": tmp_path / "run"} | changes)


def test_a_model_that_is_not_there_is_named_with_its_setting(inputs, tmp_path, capsys):
    settings = inputs | {"output_dir": tmp_path / "run", "language_model": None}
    message = fails(capsys, stage2, settings)
    assert f"language_model {LANGUAGE_MODEL} (the default of --language_model) could not be loaded: " in message
    assert "--model checkpoints/vlv-miniature" in message
    message = fails(capsys, stage2, settings | {"language_model": "nowhere"})
    assert "language_model nowhere could not be loaded: " in message
    images = {"images": inputs["pairs"], "output_dir": tmp_path / "run", "use_cpu": True}
    message = fails(capsys, stage1, images)
    assert f"diffusion_model {DIFFUSION_MODEL} (the default of --diffusion_model) could not be loaded: " in message
    assert "--model checkpoints/vlv-miniature" in message
    message = fails(capsys, stage1, images | {"model": inputs["model"], "diffusion_model": "nowhere"})
    assert "diffusion_model nowhere could not be loaded: " in message and "miniature" not in message


def test_a_folder_of_images_is_refused_and_a_refused_run_leaves_no_folder(inputs, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (pictures / name).touch()
    for more in ({}, {"dry_run": True}, {"overwrite_output_dir": True}):
        message = fails(capsys, stage2, inputs | {"output_dir": pictures} | more)
        assert f"output_dir {pictures} is a folder of images (a.png and 3 more); name another" in message
        assert len(list(pictures.iterdir())) == 4
    assert "pairs is not set" in fails(capsys, stage2, {"output_dir": tmp_path / "new" / "run", "use_cpu": True})
    assert not (tmp_path / "new").exists()
    kept = tmp_path / "kept"
    (kept / "logs").mkdir(parents=True)
    assert "pairs is not set" in fails(capsys, stage2, {"output_dir": kept, "use_cpu": True})
    assert kept.is_dir()


def test_a_folder_without_permission_is_named(folder_of_nobody, capsys):
    (folder_of_nobody / "locked").mkdir(mode=0o500)
    message = fails(capsys, stage2, {"output_dir": folder_of_nobody / "locked" / "run", "use_cpu": True})
    assert f"{folder_of_nobody / 'locked' / 'run'} cannot be written: Permission denied; name another" in message


@pytest.mark.slow
def test_the_folder_of_another_stage_is_refused(inputs, stable_diffusion, tmp_path, capsys):
    first = {name: value for name, value in inputs.items() if name not in ("language_model", "pairs")}
    first |= {"images": inputs["pairs"], "diffusion_model": stable_diffusion, "max_steps": 1, "save_steps": 1}
    train(stage1, first | {"output_dir": tmp_path / "a run"})
    said = capsys.readouterr().out
    assert said.rstrip().endswith(f"try: vlv reconstruct IMAGES --model '{tmp_path}/a run'")
    message = fails(capsys, stage2, inputs | {"output_dir": tmp_path / "a run"})
    assert "is of stage1, and this is stage2; name another --output_dir" in message
    train(stage2, inputs | {"output_dir": tmp_path / "next", "model": tmp_path / "a run", "max_steps": 1})
    assert capsys.readouterr().out.rstrip().endswith(f"try: vlv caption IMAGES --model {tmp_path}/next")


@pytest.mark.slow
def test_images_that_vanish_during_the_training_are_named(inputs, image_folder, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(image_folder, tmp_path / "images")

    class Remove(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            shutil.rmtree(folder, ignore_errors=True)

    original = stage2.Stage2Trainer.train_to_end

    def removing(trainer):
        trainer.add_callback(Remove())
        return original(trainer)

    monkeypatch.setattr(stage2.Stage2Trainer, "train_to_end", removing)
    message = fails(capsys, stage2, inputs | {"output_dir": tmp_path / "run", "pairs": folder, "max_steps": 12})
    assert "cannot be read (they are named above)" in message and "--max_bad_share" in message


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**50),  # RuntimeError
        lambda: bytearray(2**60),  # MemoryError, without a message
        lambda: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. ...")),
    ],
)
def test_too_little_memory_names_the_settings_that_save_it(allocate, capsys):
    with pytest.raises(FailedRun) as ended, errors_in_one_line("vlv train stage1"):
        next(allocate())
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1
    assert "memory" in said and "lower --per_device_train_batch_size" in said and "...: lower" not in said


def test_a_full_disk_names_the_file_and_an_error_of_the_code_keeps_its_traceback(capsys):
    with pytest.raises(FailedRun), errors_in_one_line("vlv train stage1"):
        raise OSError(errno.ENOSPC, "No space left on device", "/data/run/training.json")
    expected = "vlv train stage1: /data/run/training.json: No space left on device; make room, and the same command"
    assert capsys.readouterr().err.startswith(expected)
    with pytest.raises(RuntimeError, match="mat1 and mat2"), errors_in_one_line("vlv train stage1"):
        torch.ones(2, 3) @ torch.ones(2, 3)
