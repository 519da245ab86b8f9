"""Stage 3: captions that a captioner samples itself, scored by the frozen text-to-image model."""

import json
import math
import os
import shutil
import signal
import sqlite3
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from PIL import Image

from vlv import VLVForConditionalGeneration, VLVModel, hub
from vlv.pipelines import DiffusionScorer, load_reconstruction, resized_pixels
from vlv.train import stage3
from vlv.train.fluency import measure_fluency
from vlv.train.parsing import FailedRun
from vlv.train.rounds import (
    RoundFile,
    ScoredCaptions,
)

from ..builders import VOCABULARY, language_model_config, vlv_config, with_text_encoder

ROUNDS, STEPS = 2, 2


@pytest.fixture(scope="module")
def start(tmp_path_factory, stable_diffusion, processor) -> Path:
    """An untrained captioner that refers to `stable_diffusion`."""
    torch.manual_seed(0)
    model = VLVForConditionalGeneration(vlv_config(text_config=language_model_config())).eval()
    with_text_encoder(model.model)
    model.config.image_token_id = VOCABULARY
    folder = tmp_path_factory.mktemp("start")
    decoder = hub.find_diffusion_model(str(stable_diffusion))
    return hub.export(folder, captioner=model, processor=processor, diffusion_model=decoder)


@pytest.fixture(scope="module")
def settings(start, image_folder):
    """The command line of a short run."""

    def build(output_dir: Path, **own) -> list[str]:
        values = {
            "model": start,
            "images": image_folder,
            "output_dir": output_dir,
            "rounds": ROUNDS,
            "round_images": 10,
            "round_steps": STEPS,
            "num_captions": 4,
            "sample_batch_size": 4,
            "reward_num_pairs": 1,
            "max_caption_tokens": 24,
            "diffusion_image_size": 32,
            "per_device_train_batch_size": 3,
            "learning_rate": 1e-3,
            "logging_steps": 1,
            "validation_steps": 0,
            "dataloader_num_workers": 0,
            "use_cpu": True,
            "disable_tqdm": True,
            **own,
        }
        return [f"--{name}={value}" for name, value in values.items()]

    return build


def history(folder: Path) -> list[dict]:
    rows = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    changing = ("per_second", "runtime", "wait_share", "flos", "train_loss")  # the last is a mean since the resumption
    return [{k: v for k, v in row.items() if not any(word in k for word in changing)} for row in rows]


def images_in(folder: Path, number: int) -> list[ScoredCaptions]:
    return list(RoundFile(folder / "rounds", number, None, None).images())


class _Counts(stage3.DiffusionScorer):
    """Counts the texts that it scores."""

    texts = 0

    def settings(self):
        return {**super().settings(), "scorer": "DiffusionScorer"}  # which computes the same

    def text_losses(self, latents, texts, seeds):
        type(self).texts += sum(map(len, texts))
        return super().text_losses(latents, texts, seeds)


class _Terminates(_Counts):
    """Asks the process to end when it scores its `parts`th part."""

    parts = 0

    def score_latents(self, *args, **kwargs):
        type(self).parts -= 1
        if self.parts == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().score_latents(*args, **kwargs)


@pytest.fixture(scope="module")
def unbroken(settings, tmp_path_factory) -> dict[str, Path]:
    """A finished run of each method."""
    folders = {method: tmp_path_factory.mktemp(method) / "run" for method in ("best_of_n", "grpo")}
    stage3.main(settings(folders["best_of_n"], save_steps=1))
    stage3.main(settings(folders["grpo"], save_steps=1, method="grpo", kl_weight=0.1))
    return folders


@pytest.mark.slow
def test_a_run_keeps_the_best_captions_and_trains_on_them(unbroken):
    run = unbroken["best_of_n"]
    buffer: dict = {}
    for number in range(ROUNDS):
        found = images_in(run, number)
        assert 6 <= len(found) <= 10 and all(len(image.sample_rewards) == 4 for image in found)
        for image in found:
            earlier = buffer.get(image.index)
            assert len(image.captions) == 5 + (earlier is not None)
            if earlier is not None:
                assert (image.captions[-1], image.rewards[-1]) == earlier
            if (best := image.best()) is not None:
                assert earlier is None or best[1] >= earlier[1]
                buffer[image.index] = best
        summary = json.loads((run / "rounds" / f"round-{number:04d}.json").read_text())
        best_rewards = [best[1] for image in found if (best := image.best()) is not None]
        assert summary["reward_best"] == pytest.approx(sum(best_rewards) / len(best_rewards), abs=1e-6)
        assert summary["unfinished"] == sum(image.unfinished for image in found) > 0
        assert summary["split"] == sum(image.split for image in found) > 0  # 12 positions
    assert any(len(image.captions) == 6 for image in found)  # an image of both rounds
    lines = [json.loads(line) for line in (run / "buffer.jsonl").read_text().splitlines()]
    assert [(row["caption"], row["reward"]) for row in lines] == list(buffer.values())
    assert all(Path(row["image"]).is_file() for row in lines)

    logged = history(run)
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in logged if "reward_best" in row] == [0, 2]
    record = json.loads((run / "training.json").read_text())["stage3"]
    assert record["steps"] == ROUNDS * STEPS and {"images", "diffusion_model", "model"} <= set(record)
    assert (record["method"], record["rounds"], record["num_captions"]) == ("best_of_n", ROUNDS, 4)


@pytest.mark.slow
def test_rewards_are_the_scores_of_vlv_score(unbroken):
    scorer = DiffusionScorer.from_pipeline(load_reconstruction(unbroken["best_of_n"]), num_pairs=1)
    compared = 0
    for image in images_in(unbroken["best_of_n"], 0):
        scored = [(c, r) for c, r in zip(image.captions, image.rewards, strict=True) if r is not None]
        if scored:
            pixels = resized_pixels([Image.open(image.name).convert("RGB")], 32)
            found = scorer.score(pixels, [[caption for caption, _ in scored]]).scores[0]
            assert found.tolist() == pytest.approx([reward for _, reward in scored], abs=2e-6)
            compared += len(scored)
    assert compared > 5


@pytest.mark.slow
def test_rounds_read_cached_conditioning_and_take_length_and_language_into_account(
    settings, unbroken, start, tmp_path, monkeypatch
):
    own = {"cache_conditioning": tmp_path / "cache", "conditioning_dtype": "float32", "cache_rewards": tmp_path}
    own |= {"rounds": 1, "round_steps": 1}
    stage3.main(settings(tmp_path / "cached", **own))
    expected, found = images_in(unbroken["best_of_n"], 0), images_in(tmp_path / "cached", 0)
    assert [image.captions for image in found] == [image.captions for image in expected]
    rewards = [[reward for image in images for reward in image.rewards] for images in (found, expected)]
    assert rewards[0] == pytest.approx(rewards[1], abs=2e-6)

    model, processor = hub.load_captioner(start)
    texts = [c for image in found for c, r in zip(image.captions, image.rewards, strict=True) if r is not None]
    fluency = measure_fluency(model, processor, texts, 24, True, batch_size=3)
    floor = sorted(set(fluency))[1] - 1e-3  # one is less likely
    monkeypatch.setattr(VLVModel, "get_caption_embeds", None)
    _Counts.texts = 0
    stage3.main(settings(tmp_path / "held", **own, fluency_floor=floor, length_penalty=0.01), scorer_class=_Counts)
    assert _Counts.texts == 0  # another run has scored them
    held = images_in(tmp_path / "held", 0)
    assert [image.captions for image in held] == [image.captions for image in expected]
    of_text = dict(zip(texts, fluency, strict=True))
    dropped = 0
    for image, before in zip(held, found, strict=True):
        for caption, reward, own_fluency, score in zip(
            image.captions, image.rewards, image.fluency or [None] * 5, before.rewards, strict=True
        ):
            if score is None:
                assert reward is None and own_fluency is None
                continue
            assert own_fluency == pytest.approx(of_text[caption], abs=1e-3)
            if own_fluency < floor:
                dropped += 1
                assert reward is None
            else:
                assert reward == pytest.approx(score - 0.01 * len(caption.split()), abs=2e-6)
    summary = json.loads((tmp_path / "held" / "rounds" / "round-0000.json").read_text())
    assert summary["not_fluent"] == dropped > 0 and summary["fluency_best"] > floor


@pytest.mark.slow
@pytest.mark.parametrize("method", ["best_of_n", "grpo"])
def test_a_run_that_is_ended_while_it_samples_and_while_it_trains_goes_on_as_an_unbroken_one(
    method, settings, unbroken, tmp_path
):
    expected, broken = unbroken[method], tmp_path / "broken"
    arguments = settings(broken, save_steps=1, **({"method": "grpo", "kl_weight": 0.1} if method == "grpo" else {}))
    for round_number in range(ROUNDS):  # 3 parts in the first round; the last of them is the first after the break
        _Terminates.parts = 2
        with pytest.raises(SystemExit) as ended:
            stage3.main(arguments, scorer_class=_Terminates)
        assert ended.value.code == 75
        text = (broken / "rounds" / f"round-{round_number:04d}.rank-0.jsonl").read_text()
        assert text.count('"made_of"') == (2, 1)[round_number]
    stage3.main(arguments)
    assert history(broken) == history(expected)
    for number in range(ROUNDS):
        assert images_in(broken, number) == images_in(expected, number)
    # From the middle of the last round's steps: its captions are on the disk, and are not scored again.
    shutil.rmtree(broken / "checkpoint-4")
    (broken / "run.json").unlink()
    if method == "grpo":  # whose samples have log-probabilities of these settings
        for own in ({"temperature": 0.5}, {"max_caption_tokens": 16}, {"kl_weight": 0}):
            changed = shutil.copytree(broken, tmp_path / next(iter(own)))
            with pytest.raises(FailedRun, match=f"round 1 has begun with another --{next(iter(own))}"):
                own = {"method": "grpo", "kl_weight": 0.1, "accept_changes": True} | own
                stage3.main(settings(changed, save_steps=1, **own))
    _Counts.texts = 0
    stage3.main(arguments, scorer_class=_Counts)
    assert _Counts.texts == 0 and history(broken) == history(expected)
    weights = [hub.load_captioner(folder)[0].state_dict() for folder in (broken, expected)]
    assert all(torch.equal(own, weights[1][name]) for name, own in weights[0].items())


@pytest.mark.slow
def test_captions_of_other_images_or_by_another_reward_are_not_trained_on(settings, unbroken, image_folder, tmp_path):
    other, run = tmp_path / "images", tmp_path / "run"
    shutil.copytree(image_folder, other)
    next(other.rglob("*.png")).unlink()
    _Terminates.parts = 2
    with pytest.raises(SystemExit):  # before the first checkpoint
        stage3.main(settings(run), scorer_class=_Terminates)
    first = (run / "rounds" / "round-0000.rank-0.jsonl").read_bytes()
    stage3.main(settings(run, images=other, rounds=1, round_steps=1, reward_num_pairs=2))
    found = images_in(run, 0)
    assert found and all(Path(image.name).is_relative_to(other) for image in found)
    assert first.splitlines()[0] not in (run / "rounds" / "round-0000.rank-0.jsonl").read_bytes()
    finished = tmp_path / "finished"
    shutil.copytree(unbroken["best_of_n"], finished)
    with pytest.raises(FailedRun, match=r"round 0 in .* is of other images; pass the former --images"):
        stage3.main(settings(finished, save_steps=1, images=other, rounds=ROUNDS + 1, accept_changes=True))
    # Parts of another size: those of earlier rounds are read as they are.
    stage3.main(settings(finished, save_steps=1, sample_batch_size=5, rounds=ROUNDS + 1, accept_changes=True))
    assert len(images_in(finished, ROUNDS)) >= 6


@pytest.mark.slow
def test_a_policy_gradient_starts_at_the_start_and_measures_the_way_from_there(unbroken):
    run = unbroken["grpo"]
    for number in range(ROUNDS):
        for image in images_in(run, number):
            for own, first, reward in zip(
                image.sampled_log_probs, image.start_log_probs, image.sample_rewards, strict=True
            ):
                assert (len(own) == len(first)) and bool(own) == (reward is not None)
                assert own == first if number == 0 or not own else own != first
    logged = [row for row in history(run) if "loss" in row]
    assert logged[0]["kl"] == pytest.approx(0, abs=1e-6) and logged[0]["clipped_share"] == 0
    assert all(row["kl"] > 1e-6 for row in logged[1:])
    assert not (run / "buffer.jsonl").exists()


class _NotFinite(stage3.DiffusionScorer):
    """A denoiser that overflows for some texts."""

    autocasts: ClassVar[set[bool]] = set()

    def text_losses(self, latents, texts, seeds):
        self.autocasts.add(torch.is_autocast_enabled("cpu"))
        found = super().text_losses(latents, texts, seeds)
        pairs = [zip(row, own, strict=True) for row, own in zip(texts, found, strict=True)]
        return [[math.nan if text and len(text) % 2 else loss for text, loss in row] for row in pairs]


@pytest.mark.slow
def test_rewards_that_are_not_finite_are_dropped_and_counted_as_are_unreadable_images(
    settings, image_folder, tmp_path
):
    folder = tmp_path / "images"
    shutil.copytree(image_folder, folder)
    (folder / "a" / "1.png").write_bytes(b"no image")
    own = {"images": folder, "rounds": 1, "round_steps": 1, "round_images": 16}
    own |= {"validation_steps": 1, "num_validation_images": 2, "bf16": True}
    stage3.main(settings(tmp_path / "run", max_bad_share=1, **own), scorer_class=_NotFinite)
    assert _NotFinite.autocasts == {True}  # rounds and validation share a cache of losses
    found = images_in(tmp_path / "run", 0)
    summary = json.loads((tmp_path / "run" / "rounds" / "round-0000.json").read_text())
    assert summary["not_finite"] == sum(image.not_finite for image in found) > 0
    missing = sum(reward is None for image in found for reward in image.rewards)
    assert missing == summary["not_finite"] + summary["unfinished"] + summary["empty"]
    rewards = [reward for image in found for reward in image.rewards if reward is not None]
    assert rewards and all(map(math.isfinite, rewards))
    assert summary["unreadable"] == 1 and len(found) == 15
    samples = json.loads((tmp_path / "run" / "samples" / "step-0000001.json").read_text())
    assert len(samples) == 2 and set(samples[0]) == {"generated", "reward"}
    with pytest.raises(FailedRun, match=r"a/1\.png"):
        stage3.main(settings(tmp_path / "strict", on_bad_image="error", **own))


@pytest.mark.slow
def test_a_round_without_rewards_says_what_is_the_reason(settings, tmp_path):
    (tmp_path / "images").mkdir()
    for number in range(4):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"no image")
    own = {"rounds": 1, "round_steps": 1, "round_images": 4, "max_bad_share": 1}
    with pytest.raises(FailedRun, match=r"round 0 leaves nothing to train on: none of its 4 images can be read"):
        stage3.main(settings(tmp_path / "run", images=tmp_path / "images", **own))
    with pytest.raises(FailedRun, match=r"nothing to train on: \d+ captions are below --fluency_floor; lower it"):
        stage3.main(settings(tmp_path / "second", fluency_floor=-1e-6, max_caption_tokens=60, **own))


@pytest.mark.slow
def test_groups_of_equal_captions_are_counted_and_leave_no_policy_gradient(settings, tmp_path):
    own = {"rounds": 1, "round_steps": 1, "round_images": 4, "temperature": 1e-4, "max_caption_tokens": 60}
    _Counts.texts = 0
    with pytest.raises(FailedRun, match=r"round 0 leaves nothing to train on: .*raise --temperature"):
        stage3.main(settings(tmp_path / "run", method="grpo", **own), scorer_class=_Counts)
    with sqlite3.connect(tmp_path / "run" / "rewards-0.sqlite") as cache:
        assert cache.execute("SELECT COUNT(*) FROM losses").fetchone() == (_Counts.texts,)  # each text once
    summary = json.loads((tmp_path / "run" / "rounds" / "round-0000.json").read_text())
    assert summary["equal_groups"] == 4 - summary["without_reward"] > 0


@pytest.mark.slow
def test_a_captioner_without_a_decoder_or_with_another_text_encoder_is_refused(
    settings, start, stable_diffusion, tmp_path
):
    model, processor = hub.load_captioner(start)
    hub.export(tmp_path / "alone", captioner=model, processor=processor)
    with pytest.raises(FailedRun, match=r"diffusion_model is not set, and .*alone does not name the one"):
        stage3.main(settings(tmp_path / "run", model=tmp_path / "alone"))
    with torch.no_grad():
        for parameter in model.model.text_encoder.parameters():
            parameter.add_(0.1)
    hub.export(tmp_path / "other", captioner=model, processor=processor)
    with pytest.raises(FailedRun, match=r"do not fit together: text_encoder of .* has other weights"):
        stage3.main(settings(tmp_path / "run", model=tmp_path / "other", diffusion_model=stable_diffusion))
    captioner, _ = hub.load_captioner(start)
    whole = hub.export(tmp_path / "whole", captioner=captioner, processor=processor, diffusion_model=stable_diffusion)
    assert not (whole / "text_encoder").exists()  # it is in `encoder`
    with pytest.raises(FailedRun, match=r"do not fit together: text_encoder of .*whole has other weights"):
        stage3.main(settings(tmp_path / "run", model=tmp_path / "other", diffusion_model=whole))
    fingerprints = [hub.text_encoders_fingerprint(own.model) for own in (model, captioner)]
    assert len(set(fingerprints)) == 2  # by which cached rewards are told apart


def test_a_model_of_stage_1_a_missing_one_and_weighted_images_are_refused(
    settings, stage1_checkpoint, stable_diffusion, image_folder, tmp_path
):
    with pytest.raises(FailedRun, match="is a stage-1 model, which writes no captions; train stage 2"):
        stage3.main(settings(tmp_path / "run", model=stage1_checkpoint))
    with pytest.raises(FailedRun, match="has the model type None; expected a VLV model"):
        stage3.main(settings(tmp_path / "run", model=stable_diffusion / "unet"))
    with pytest.raises(FailedRun, match=r"images have weights .*leave the weights out"):
        stage3.main(settings(tmp_path / "run", images=f"{image_folder}@0.5"))
    with pytest.raises(FailedRun, match="model is not set: give the captioner to start from"):
        stage3.main([argument for argument in settings(tmp_path / "run") if "--model" not in argument])


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"method": "ppo"}, "method is 'ppo'; expected one of"),
        ({"num_captions": 1}, "num_captions is 1; expected 2 or more"),
        ({"rounds": 0}, "rounds is 0; expected 1 or more"),
        ({"max_steps": 7}, "max_steps is 7, but stage 3 has rounds times round_steps"),
        ({"save_steps": 3, "round_steps": 4}, "save_steps is 3; expected a divisor of round_steps, 4"),
        ({"temperature": 0}, "temperature is 0.0 and top_p 1.0; expected a number above 0"),
        ({"reward_min_timestep": 0.9, "reward_max_timestep": 0.4}, "expected shares of the schedule"),
        ({"method": "grpo", "pairs": "somewhere"}, "pairs are mixed in by best_of_n alone"),
        ({"method": "grpo", "stop_loss_factor": 10}, "that of grpo lies around 0"),
        ({"cache_rewards": __file__}, "a file; expected a folder"),
        ({"method": "grpo", "packing": True}, "packing does not work with grpo"),
        ({"horizontal_flip": True}, "horizontal_flip does not work with stage 3"),
        ({"language_model": "somewhere"}, "language_model belongs to stage 2"),
        ({"clip_range": 1.5}, "clip_range 1.5"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is 'sequential'"),
        ({"pairs_share": 1}, "pairs_share is 1.0; expected a share"),
        ({"vae_dtype": "float8"}, "vae_dtype is 'float8'; expected one of ('float32', 'bfloat16')"),
        ({"length_penalty": -1}, "length_penalty is -1.0; expected 0 or more"),
        ({"fluency_floor": 0}, "fluency_floor is 0.0; expected a mean log-probability, below 0"),
        ({"reward_batch_size": 0}, "reward_batch_size is 0; expected 1 or more"),
        ({"max_caption_tokens": 0}, "max_caption_tokens is 0; expected 1 or more"),
        ({"method": "grpo", "kl_weight": "nan"}, "kl_weight is nan"),
    ],
)
def test_settings_that_cannot_be_used_are_errors(own, message, settings, tmp_path, capsys):
    with pytest.raises(SystemExit):
        stage3.main(settings(tmp_path / "run", **own))
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_a_dry_run_scores_one_part_and_leaves_nothing(settings, tmp_path, capsys):
    stage3.main(settings(tmp_path / "run", dry_run=True, cache_rewards=tmp_path / "rewards"))
    said = capsys.readouterr().out
    assert "plan of the run" in said and said.count("round 0: images 4, ") == 1 and "'round'" not in said
    assert f"images: 16; {ROUNDS} rounds, each samples captions of 10 images and trains {STEPS} steps\n" in said
    assert " epochs" not in said
    assert "diffusion model: unet: 0 trainable" in said and "vlv estimate counts" in said
    assert "sampling and scoring 4 images took " in said and " for the 20 of all rounds" in said
    assert not (tmp_path / "rewards").exists()
    assert not (tmp_path / "run").exists() or not [p for p in (tmp_path / "run").iterdir() if p.name != ".run.lock"]


@pytest.mark.slow
def test_pairs_are_mixed_in_and_lora_layers_are_merged(settings, start, image_folder, tmp_path):
    trainer = stage3.main(
        settings(tmp_path / "run", rounds=1, round_images=4, pairs=image_folder, pairs_share=0.5, lora_rank=2)
    )
    captions = [trainer.train_dataset[place]["caption"] for place in range(len(trainer.train_dataset))]
    given = {"a small dog", "a large apple at the top left"}
    assert sum(caption in given for caption in captions) == 3 and len(captions) == 6
    loaded, _ = hub.load_captioner(tmp_path / "run")
    before, _ = hub.load_captioner(start)
    names = {name for name, own in loaded.named_parameters() if not torch.equal(own, before.get_parameter(name))}
    assert any("q_proj" in name for name in names) and not any("norm" in name for name in names)
