"""Evaluation while training: fixed noise, held-back samples, and no influence on the training."""

import json

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from vlv.train import Stage1Config, Stage2Collator, load_images, load_pairs, stage1, stage1_trainer, stage2
from vlv.train.caption_score import token_f1
from vlv.train.data.held_back import SelectedRows
from vlv.train.evaluating import seeded_generators, spread_timesteps
from vlv.train.meters import QUARTILES
from vlv.train.sharding import load_weights
from vlv.train.stage1_trainer import VALIDATION_SEED


def arguments(output_dir, **settings) -> list[str]:
    values = {
        "output_dir": output_dir,
        "max_steps": 4,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "dataloader_num_workers": 0,
        "validation_steps": 0,
        "disable_tqdm": True,
        "save_strategy": "no",
        **settings,
    }
    return ["--use_cpu", *(f"--{name}={value}" for name, value in values.items())]


def logged(trainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


@pytest.fixture(scope="module")
def stage1_runs(tmp_path_factory, image_folder, stable_diffusion, stage1_checkpoint):
    """Two trainings of stage 1 without learning: one without an evaluation, one with it."""
    folder = tmp_path_factory.mktemp("evaluated")
    inputs = {"model": stage1_checkpoint, "diffusion_model": stable_diffusion, "images": image_folder / "a"}
    inputs |= {"learning_rate": 1e-30, "weight_decay": 0}
    plain = stage1.main(arguments(folder / "plain", **inputs))
    more = {"eval_images": image_folder / "b", "eval_steps": 2, "per_device_eval_batch_size": 3}
    return plain, stage1.main(arguments(folder / "evaluated", **inputs, **more))


@pytest.mark.slow
def test_evaluation_changes_neither_the_losses_nor_the_model(stage1_runs):
    plain, evaluated = stage1_runs
    assert logged(plain, "loss") == logged(evaluated, "loss") and len(logged(plain, "loss")) == 4
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, evaluated.model.state_dict()[name])


@pytest.mark.slow
def test_the_evaluation_loss_has_the_same_noise_each_time_and_the_mean_over_all_images(stage1_runs):
    _, trainer = stage1_runs
    losses = logged(trainer, "eval_loss")
    assert len(losses) == 2 and losses[0] == losses[1]
    decoder, collator = trainer.diffusion_decoder, trainer.data_collator
    by_image, timesteps = [], spread_timesteps(range(8), 0, 999)
    for place in range(8):
        batch = collator([trainer.eval_dataset[place]])
        generators = seeded_generators(VALIDATION_SEED, places=[place])
        latents = decoder.encode_images(batch["diffusion_pixels"].float() / 127.5 - 1, generators)
        noise = torch.randn(latents.shape[1:], generator=generators[0])[None]
        with torch.no_grad():
            conditioning = trainer.model.eval()(pixel_values=batch["pixel_values"]).conditioning
            by_image.append(decoder.denoising_loss(latents, conditioning, noise, timesteps[place : place + 1]).item())
    assert losses[0] == pytest.approx(np.mean(by_image), rel=1e-5)
    for quarter, name in enumerate(QUARTILES):
        own = [loss for loss, t in zip(by_image, timesteps, strict=True) if t // 250 == quarter]
        assert logged(trainer, f"eval_{name}")[0] == pytest.approx(np.mean(own), rel=1e-5)


@pytest.mark.slow
def test_the_training_loss_is_the_mean_of_its_quartiles(stage1_runs):
    for row in (row for row in stage1_runs[0].state.log_history if "loss" in row):
        quarters = [row[name] for name in QUARTILES if name in row]
        assert quarters and min(quarters) <= row["loss"] * 1.0001 and max(quarters) >= row["loss"] * 0.9999
        assert 0 <= row["data_wait_share"] <= 1 and row["images_per_second"] > 0
        assert "tokens_per_second" not in row and "model_flops_utilisation" not in row


def test_timesteps_of_the_evaluation_cover_the_range_evenly():
    timesteps = spread_timesteps(range(40), 100, 499)
    assert timesteps.min() >= 100 and timesteps.max() <= 499
    assert all(8 <= ((timesteps - 100) // 100 == quarter).sum() <= 12 for quarter in range(4))
    assert torch.equal(spread_timesteps([7], 100, 499), timesteps[7:8])


@pytest.mark.slow
def test_stage_2_evaluates_held_back_pairs_by_the_mean_over_all_tokens(
    tmp_path, image_folder, stage1_checkpoint, language_model
):
    inputs = {"model": stage1_checkpoint, "language_model": language_model, "pairs": image_folder}
    settings = {"eval_share": 0.2, "eval_steps": 1, "validation_steps": 1, "num_validation_images": 2, "max_steps": 1}
    trainer = stage2.main(arguments(tmp_path, **inputs, **settings, per_device_eval_batch_size=2))
    assert len(trainer.train_dataset) == 13 and len(trainer.eval_dataset) == 3
    model, total, tokens = trainer.model.eval(), 0.0, 0
    collator = Stage2Collator(trainer.processing_class, 300)
    for item in trainer.eval_dataset.dataset:
        batch = collator([item])
        with torch.no_grad():
            logits = model(batch["pixel_values"], labels=batch["labels"]).logits
        total += F.cross_entropy(logits[0], batch["labels"][0], reduction="sum").item()
        tokens += batch["labels"].numel()
    assert logged(trainer, "eval_loss") == pytest.approx([total / tokens], rel=1e-5)
    assert logged(trainer, "tokens_per_second")[0] > 0 and len(logged(trainer, "loss")) == 1
    rows = json.loads((tmp_path / "samples" / "step-0000001.json").read_text())
    assert [row["reference"] for row in rows] == [item["caption"] for item in trainer.eval_dataset.dataset][:2]
    assert all(row["token_f1"] == round(token_f1(row["generated"], row["reference"]), 4) for row in rows)
    assert logged(trainer, "validation_token_f1") == [round(sum(row["token_f1"] for row in rows) / 2, 4)]


@pytest.mark.slow
def test_with_an_average_what_is_evaluated_is_what_is_saved_and_the_training_is_unchanged(
    tmp_path, monkeypatch, image_folder, stable_diffusion, stage1_checkpoint
):
    monkeypatch.setattr(stage1_trainer, "VALIDATION_INFERENCE_STEPS", 2)
    inputs = {"model": stage1_checkpoint, "diffusion_model": stable_diffusion, "images": image_folder / "a"}
    inputs |= {"eval_images": image_folder / "b", "learning_rate": 0.01, "lr_scheduler_type": "constant"}
    inputs |= {"max_steps": 3, "num_validation_images": 2, "ema_decay": 0.9, "save_strategy": "steps", "save_steps": 3}
    plain = stage1.main(arguments(tmp_path / "plain", **inputs, eval_steps=1000))
    trainer = stage1.main(arguments(tmp_path / "evaluated", **inputs, eval_steps=1, validation_steps=1))
    assert logged(trainer, "loss") == logged(plain, "loss")
    for file in (
        "encoder/model.safetensors",
        "checkpoint-3/encoder/model.safetensors",
        "checkpoint-3/average.safetensors",
    ):
        assert (tmp_path / "evaluated" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    evaluated = logged(trainer, "eval_loss")[-1]
    assert trainer.evaluate()["eval_loss"] == evaluated  # the model of the end is the average
    trainer.save_reconstructions(trainer.model.eval(), 0, tmp_path)
    sample = tmp_path / "evaluated" / "samples" / "step-0000003.png"
    assert (tmp_path / "step-0000000.png").read_bytes() == sample.read_bytes()
    load_weights(trainer.model, tmp_path / "evaluated" / "checkpoint-3")
    trainer.average = None
    assert trainer.evaluate()["eval_loss"] != pytest.approx(evaluated, rel=1e-4)
    trainer.save_reconstructions(trainer.model.eval(), 0, tmp_path)
    assert (tmp_path / "step-0000000.png").read_bytes() != sample.read_bytes()


def test_held_back_rows_are_never_trained_on_and_depend_on_the_seed_alone(image_folder):
    whole = load_images(str(image_folder))
    dataset = load_images([str(image_folder), f"{image_folder}@2"], eval_share=0.25, seed=3)
    trained = {dataset[epoch, place]["image"] for epoch in range(3) for place in range(len(dataset))}
    first = dataset.parts[0]
    held = [{part.source[row]["image"] for row in range(len(part.source))} for part in dataset.held_back.parts]
    assert [len(names) for names in held] == [4, 4] and held[0] != held[1]
    assert {first.source[row]["image"] for row in range(12)} == {item["image"] for item in whole} - held[0]
    assert len(dataset) == 12 + 2 * 12 and trained - held[0] | trained - held[1] == trained
    again = load_images(str(image_folder), eval_share=0.25, seed=3)
    assert {item["image"] for item in again.held_back} == held[0]
    assert {item["image"] for item in load_images(str(image_folder), eval_share=0.25, seed=4).held_back} != held[0]
    assert len({d.fingerprint() for d in (whole, again, again.held_back)}) == 3
    with pytest.raises(ValueError, match="leaves nothing to train on"):
        load_pairs(str(image_folder), eval_share=0.99)


def test_selected_rows_keep_shards_and_counts():
    class Shards:
        has_captions, has_prompts, num_streams = True, False, 8

        def __len__(self):
            return 10

        def shard_sizes(self):
            return [4, 3, 3]

        def count_captions(self):
            return np.arange(10)

    rows = SelectedRows(Shards(), np.array([0, 3, 7, 9]))
    assert rows.shard_sizes() == [2, 2] and rows.count_captions().tolist() == [0, 3, 7, 9]


def test_the_best_checkpoint_is_not_loaded_at_the_end():
    with pytest.raises(ValueError, match=r"load_best_model_at_end does not work .* the best one as --model"):
        Stage1Config(use_cpu=True, load_best_model_at_end=True, eval_strategy="steps", save_steps=10, eval_steps=10)


@pytest.mark.parametrize(
    ("stage", "settings", "words"),
    [
        (stage1, {"eval_share": 0.1, "eval_images": "x"}, "eval_images and eval_share are given"),
        (stage1, {"eval_share": 2}, "eval_share is 2.0; expected a share"),
        (stage1, {"eval_strategy": "steps", "eval_steps": 1}, "there is no evaluation data; give --eval_images"),
    ],
)
def test_contradicting_settings_of_the_evaluation_are_refused(
    tmp_path, image_folder, stage1_checkpoint, stable_diffusion, stage, settings, words
):
    inputs = {"model": stage1_checkpoint, "diffusion_model": stable_diffusion, "images": image_folder}
    with pytest.raises(SystemExit) as stopped:
        stage.main(arguments(tmp_path, **inputs, **settings))
    assert stopped.value.code == 2


def test_the_score_of_a_caption_by_its_formula():
    assert token_f1("A small dog", "a dog, small") == 1
    assert token_f1("a a cat", "a dog") == pytest.approx(2 * 1 / 5)
    assert token_f1("", "") == 1 and token_f1("", "dog") == 0
