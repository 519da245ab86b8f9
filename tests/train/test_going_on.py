"""A run given again: finished, raised, changed, damaged, locked, terminated."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from transformers import TrainerCallback

from vlv.train import last_checkpoint, stage2
from vlv.train.checkpoints import RECORD_FILE, only_run_in
from vlv.train.trainer import RESUMABLE_EXIT_CODE

from ..interpreter import MODULE, PythonProcess

STEPS = 2


@pytest.fixture(scope="module")
def train(stage1_checkpoint, language_model, image_folder):
    """Trains stage 2 with the given settings; returns the steps that it computed."""

    def run(output_dir: Path, **settings) -> list[int]:
        values = {
            "model": stage1_checkpoint,
            "language_model": language_model,
            "pairs": image_folder,
            "output_dir": output_dir,
            "trainable": "projector",
            "max_steps": STEPS,
            "save_steps": 1,
            "logging_steps": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-3,
            "dataloader_num_workers": 0,
            "validation_steps": 0,
            "use_cpu": True,
            "disable_tqdm": True,
            **settings,
        }
        steps: list[int] = []

        class Recorder(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                steps.append(state.global_step)

        original = stage2.Stage2Trainer.train_to_end

        def recorded(trainer):
            trainer.add_callback(Recorder())
            return original(trainer)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage2.Stage2Trainer, "train_to_end", recorded)
            stage2.main([f"--{name}={value}" for name, value in values.items() if value is not None])
        return steps

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, train) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train(folder) == [1, 2]
    return folder


@pytest.fixture
def run_folder(tmp_path, finished) -> Path:
    """A copy of a finished run with checkpoints at steps 1 and 2."""
    return shutil.copytree(finished, tmp_path / "run")


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_run_is_left_as_it_is(run_folder, train, capsys):
    before = content(run_folder)
    assert train(run_folder) == [] and content(run_folder) == before
    assert f"{run_folder} holds the finished run of 2 steps" in capsys.readouterr().out
    shutil.rmtree(run_folder / "checkpoint-2")
    shutil.rmtree(run_folder / "checkpoint-1")
    assert train(run_folder) == []


@pytest.mark.slow
def test_a_run_of_epochs_that_is_finished_is_left_as_it_is(tmp_path, train):
    settings = {"max_steps": None, "num_train_epochs": 0.5}
    assert train(tmp_path / "run", **settings) == [1, 2]
    before = content(tmp_path / "run")
    assert train(tmp_path / "run", **settings) == [] and content(tmp_path / "run") == before


def test_a_run_that_ended_before_it_saved_its_model_saves_it(run_folder, finished, train):
    for name in ("captioner.safetensors", RECORD_FILE, "training.json"):
        (run_folder / name).unlink()
    assert train(run_folder) == []
    before, after = (load_file(folder / "captioner.safetensors") for folder in (finished, run_folder))
    assert all(before[name].equal(after[name]) for name in before)
    assert json.loads((run_folder / "training.json").read_text())["stage2"]["steps"] == STEPS


@pytest.mark.slow
def test_more_steps_go_on_and_the_schedule_is_said(run_folder, train, capsys):
    assert train(run_folder, max_steps=4) == [3, 4]
    said = capsys.readouterr().out
    assert "max_steps: 2 -> 4" in said and "schedule of the new length" in said
    assert json.loads((run_folder / "training.json").read_text())["stage2"]["steps"] == 4


@pytest.mark.parametrize(
    ("changes", "row"),
    [
        ({"learning_rate": 1e-2}, "learning_rate: 0.001 -> 0.01"),
        ({"per_device_train_batch_size": 2}, "per_device_train_batch_size: 4 -> 2"),
        ({"trainable": "projector+lm"}, "trainable: projector -> projector+lm"),
        ({"seed": 7}, "seed: 42 -> 7"),
        ({"lora_rank": 2, "trainable": "projector+lm"}, "lora_rank: 0 -> 2"),
    ],
)
def test_other_settings_are_refused_with_a_table(changes, row, run_folder, train, capsys):
    before = content(run_folder)
    with pytest.raises(SystemExit) as ending:
        train(run_folder, max_steps=4, **changes)
    assert f"\n  {row}\n" in str(ending.value) and "--accept_changes" in str(ending.value)
    assert content(run_folder) == before


@pytest.mark.slow
def test_other_data_and_another_model_are_refused(run_folder, train, image_folder, stage1_checkpoint, tmp_path):
    other = shutil.copytree(image_folder, tmp_path / "moved")
    assert train(run_folder, max_steps=3, pairs=other) == [3]  # the same data in another folder
    (other / "a" / "1.txt").write_text("another caption")
    model = shutil.copytree(stage1_checkpoint, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"other": 1}))
    with pytest.raises(SystemExit) as ending:
        train(run_folder, max_steps=4, pairs=other, model=model)
    assert f"\n  pairs: {other} (" in str(ending.value) and f"\n  model: {stage1_checkpoint} (" in str(ending.value)


@pytest.mark.slow
def test_accepted_changes_take_effect_and_are_said(run_folder, train, capsys):
    assert train(run_folder, max_steps=4, learning_rate=1e-2, accept_changes=True) == [3, 4]
    assert "learning_rate: 0.001 -> 0.01" in capsys.readouterr().out
    assert json.loads((run_folder / RECORD_FILE).read_text())["settings"]["learning_rate"] == 1e-2
    (change,) = json.loads((run_folder / "training.json").read_text())["stage2"]["changes"]
    assert change == {"step": 2, "changes": {"learning_rate": [0.001, 0.01], "max_steps": [2, 4]}}


@pytest.mark.slow
def test_settings_without_effect_on_the_result_take_effect_and_are_said(run_folder, train, capsys):
    assert train(run_folder, max_steps=6, save_steps=2, logging_steps=3, dataloader_num_workers=1) == [3, 4, 5, 6]
    said = capsys.readouterr().out
    assert "without effect on the result:\n" in said and "  save_steps: 1 -> 2\n" in said
    assert {path.name for path in run_folder.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (1, 2, 4, 6)}
    history = json.loads((run_folder / "trainer_state.json").read_text())["log_history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 6]


@pytest.mark.slow
def test_a_new_start_moves_the_old_run_aside(run_folder, train, finished):
    assert train(run_folder, learning_rate=1e-2, overwrite_output_dir=True) == [1, 2]
    assert content(run_folder.with_name("run-old-1")) == content(finished)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
@pytest.mark.parametrize(
    "name",
    [
        *("captioner.safetensors", "encoder/model.safetensors", "encoder/config.json", "tokenizer.json"),
        *("optimizer.pt", "scheduler.pt", "trainer_state.json", "rng_state.pth"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(name, damage, run_folder, capsys):
    damage(run_folder / "checkpoint-2" / name)
    assert last_checkpoint(run_folder) == str(run_folder / "checkpoint-1")
    said = capsys.readouterr().out
    assert "checkpoint-2 is left out: " in said and name in said and "resuming from" in said


@pytest.mark.slow
def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run_folder, train):
    (run_folder / RECORD_FILE).unlink()  # the run did not end
    truncate(run_folder / "checkpoint-2" / "captioner.safetensors")
    assert train(run_folder) == [2]


def test_a_byte_in_the_middle_of_an_optimiser_is_noticed(run_folder):
    path = run_folder / "checkpoint-2" / "optimizer.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert last_checkpoint(run_folder) == str(run_folder / "checkpoint-1")


def test_where_all_checkpoints_are_damaged_nothing_is_overwritten(run_folder, train):
    (run_folder / RECORD_FILE).unlink()
    for step in (1, 2):
        truncate(run_folder / f"checkpoint-{step}" / "optimizer.pt")
    before = content(run_folder)
    with pytest.raises(SystemExit, match=r"no checkpoint in .* is undamaged"):
        train(run_folder)
    assert content(run_folder) == before


def test_a_checkpoint_that_was_being_written_is_none(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "model.safetensors").touch()
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "nowhere") is None


def test_a_second_run_in_a_folder_is_refused(run_folder, train):
    code = "import sys, time\nfrom filelock import FileLock\n"
    code += "with FileLock(sys.argv[1]):\n    print(flush=True)\n    time.sleep(100)"
    other = subprocess.Popen([sys.executable, "-c", code, str(run_folder / ".run.lock")], stdout=subprocess.PIPE)
    try:
        other.stdout.readline()
        with pytest.raises(SystemExit, match="another run writes into"):
            train(run_folder, max_steps=4)
    finally:
        other.kill()
        other.wait()
    with only_run_in(run_folder):
        pass
    assert not (run_folder / ".run.lock").exists()


@pytest.fixture
def press_ctrl_c(monkeypatch):
    """Sends SIGINT to this process and those of the data loader before each of the given steps, as a terminal does."""

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it

    def at(*steps: int) -> None:
        original = stage2.Stage2Trainer.training_step

        def training_step(trainer, *args, **kwargs):
            if trainer.state.global_step + 1 in steps:
                for process in (*multiprocessing.active_children(), multiprocessing.current_process()):
                    os.kill(process.pid, signal.SIGINT)
            return original(trainer, *args, **kwargs)

        monkeypatch.setattr(stage2.Stage2Trainer, "training_step", training_step)

    yield at
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_saves_a_checkpoint_from_which_the_run_goes_on(tmp_path, train, press_ctrl_c, capfd):
    folder, handlers = tmp_path / "run", [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    press_ctrl_c(2)
    with pytest.raises(SystemExit) as ended:
        train(folder, max_steps=50, save_steps=1000, dataloader_num_workers=2)
    assert ended.value.code == 130
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    message = capfd.readouterr().err
    assert "interrupted at step 2; the same command goes on from there" in message and "Traceback" not in message
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    press_ctrl_c()
    assert train(folder, max_steps=3, save_steps=1000) == [3]


def test_a_second_ctrl_c_ends_the_run_at_once_and_its_message_knows_whether_there_is_a_checkpoint(
    tmp_path, run_folder, train, press_ctrl_c, capfd
):
    accumulation = {"gradient_accumulation_steps": 2, "save_steps": 1000}  # two calls, two signals in a step
    press_ctrl_c(1)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "new", **accumulation)
    assert ended.value.code == 130 and not list((tmp_path / "new").glob("checkpoint-*"))
    assert f"interrupted; {tmp_path / 'new'} has no checkpoint yet, so the same command" in capfd.readouterr().err
    press_ctrl_c(3)
    with pytest.raises(SystemExit) as ended:
        train(run_folder, max_steps=4, accept_changes=True, **accumulation)
    assert ended.value.code == 130
    assert "interrupted; the same command goes on from the last checkpoint" in capfd.readouterr().err
    press_ctrl_c(1)
    with pytest.raises(SystemExit) as ended:
        train(tmp_path / "rehearsal", dry_run=True)
    assert ended.value.code == 130 and not (tmp_path / "rehearsal").exists()
    assert "interrupted; a dry run leaves nothing" in capfd.readouterr().err


@pytest.mark.slow
def test_a_terminated_run_saves_and_says_that_it_can_go_on(
    tmp_path, stage1_checkpoint, language_model, image_folder, train
):
    settings = {"model": stage1_checkpoint, "language_model": language_model, "pairs": image_folder, "max_steps": 500}
    settings |= {"trainable": "projector", "learning_rate": 1e-3, "per_device_train_batch_size": 4, "logging_steps": 1}
    settings |= {"dataloader_num_workers": 0, "validation_steps": 0, "use_cpu": True, "disable_tqdm": True}
    settings |= {"output_dir": tmp_path / "run", "save_steps": 1000}
    arguments = ["vlv.train.stage2", *(f"--{name}={value}" for name, value in settings.items())]
    log = tmp_path / "log"
    log.touch()
    process = PythonProcess(MODULE, arguments, stdout=log, stderr=log)
    while "'loss'" not in log.read_text():
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == RESUMABLE_EXIT_CODE
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert f"terminated at step {step}; the same command goes on" in log.read_text()
    assert not (tmp_path / "run" / "training.json").exists()
    assert train(tmp_path / "run", max_steps=step + 1, save_steps=1000) == [step + 1]
