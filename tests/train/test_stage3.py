"""Stage 3: captions that a captioner samples itself, scored by the frozen text-to-image model."""

import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from vlv import VLVForConditionalGeneration, hub
from vlv.pipelines import DiffusionScorer, load_reconstruction, resized_pixels
from vlv.train import stage3
from vlv.train.data import load_images, load_pairs
from vlv.train.parsing import FailedRun, parse_config
from vlv.train.policy_gradient import group_advantages, policy_loss, token_log_probabilities
from vlv.train.proposals import ImagePart, Proposer
from vlv.train.reward_cache import RewardCache
from vlv.train.rounds import (
    RoundDataset,
    RoundFile,
    ScoredCaptions,
    images_of_round,
    summarise,
    update_buffer,
    write_buffer,
)
from vlv.train.stage3_config import Stage3Config

from ..builders import VOCABULARY, language_model_config, vlv_config, with_text_encoder

ROUNDS, STEPS = 2, 2
CONFIGS = Path(stage3.__file__).parent / "configs" / "stage3"


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
    return RoundFile(folder / "rounds", number, None, None).images()


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
        lines = (broken / "rounds" / f"round-{round_number:04d}.rank-0.jsonl").read_text().splitlines()
        assert len(lines) == (2, 1)[round_number]
    stage3.main(arguments)
    assert history(broken) == history(expected)
    for number in range(ROUNDS):
        assert images_in(broken, number) == images_in(expected, number)
    # From the middle of the last round's steps: its captions are on the disk, and are not scored again.
    shutil.rmtree(broken / "checkpoint-4")
    (broken / "run.json").unlink()
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

    def text_losses(self, latents, texts, seeds):
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
    own |= {"validation_steps": 1, "num_validation_images": 2}
    stage3.main(settings(tmp_path / "run", max_bad_share=1, **own), scorer_class=_NotFinite)
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
def test_groups_of_equal_captions_are_counted_and_leave_no_policy_gradient(settings, tmp_path):
    own = {"rounds": 1, "round_steps": 1, "round_images": 4, "temperature": 1e-4, "max_caption_tokens": 60}
    with pytest.raises(FailedRun, match=r"round 0 leaves nothing to train on: .*raise --temperature"):
        stage3.main(settings(tmp_path / "run", method="grpo", **own))
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


def test_a_model_of_stage_1_a_missing_one_and_weighted_images_are_refused(
    settings, stage1_checkpoint, image_folder, tmp_path
):
    with pytest.raises(FailedRun, match="is a stage-1 model, which writes no captions; train stage 2"):
        stage3.main(settings(tmp_path / "run", model=stage1_checkpoint))
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
        ({"method": "grpo", "packing": True}, "packing does not work with grpo"),
        ({"horizontal_flip": True}, "horizontal_flip does not work with stage 3"),
        ({"language_model": "somewhere"}, "language_model belongs to stage 2"),
        ({"clip_range": 1.5}, "clip_range 1.5"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy is 'sequential'"),
        ({"pairs_share": 1}, "pairs_share is 1.0; expected a share"),
        ({"vae_dtype": "float8"}, "vae_dtype is 'float8'; expected one of ('float32', 'bfloat16')"),
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
    assert "plan of the run" in said and "round 0: images 4, " in said
    assert "sampling and scoring 4 images took " in said and " for the 20 of all rounds" in said
    assert "cannot tell it: stage 3 is not counted" in said
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


# The parts.


def test_advantages_are_deviations_within_the_group():
    assert group_advantages([1.0, 3.0, None, 2.0]) == pytest.approx([-(1.5**0.5), 1.5**0.5, None, 0.0])
    assert group_advantages([2.0, 2.0, None]) == [None] * 3
    assert group_advantages([2.0]) == [None] and group_advantages([None, None]) == [None] * 2


def test_the_first_gradient_is_that_of_the_weighted_log_probabilities():
    torch.manual_seed(0)
    logits = torch.randn(3, 4, 7, requires_grad=True)
    labels = torch.tensor([[1, 2, 3, -100], [4, 5, -100, -100], [6, 0, 1, 2]])
    gains, mask = torch.tensor([1.0, -2.0, 0.5]), labels != -100
    probs = token_log_probabilities(logits, labels, temperature=2.0)
    by_hand = torch.log_softmax(logits / 2.0, dim=-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(probs[mask], by_hand[mask])
    found = policy_loss(probs, probs.detach(), probs.detach(), gains, mask, 0.2, 0.1)
    (own,) = torch.autograd.grad(found.loss, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-(by_hand * gains[:, None])[mask].sum(), logits)
    assert torch.allclose(own, expected, atol=1e-6)
    assert found.kl == 0 and found.clipped == 0 and found.tokens == 9


def test_ratios_out_of_range_have_no_gradient_and_are_counted():
    sampled = torch.zeros(2, 2)
    log_probs = torch.tensor([[0.5, 0.1], [0.5, -0.5]], requires_grad=True)  # ratios 1.65, 1.11, 1.65, 0.61
    gains, mask = torch.tensor([1.0, -1.0]), torch.ones(2, 2, dtype=torch.bool)
    found = policy_loss(log_probs, sampled, log_probs.detach(), gains, mask, 0.2, 0.0)
    (gradient,) = torch.autograd.grad(found.loss, log_probs)
    assert (gradient == 0).tolist() == [[True, False], [False, True]]  # better and likelier already, worse and rarer
    assert found.clipped == 2 and found.loss.item() == pytest.approx(-1.2 - math.exp(0.1) + math.exp(0.5) + 0.8)


def test_the_divergence_from_the_start_is_never_negative_and_pulls_back():
    log_probs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    start = torch.tensor([[-2.0, -2.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    found = policy_loss(log_probs, log_probs.detach(), start, torch.zeros(1), mask, 0.2, 1.0)
    assert found.kl == pytest.approx(math.exp(-1) + math.exp(1) - 2)
    (gradient,) = torch.autograd.grad(found.loss, log_probs)
    assert gradient[0, 0] > 0 > gradient[0, 1]  # towards the start


def test_rewards_are_kept_by_scorer_image_and_text(tmp_path):
    scorer = {"timesteps": [1, 2], "seed": 0}
    cache = RewardCache(tmp_path / "a" / "rewards.sqlite", scorer)
    cache.add({7: {None: 1.0, "": 2.0, "a dog": 0.1 + 0.2, "a cat": math.nan}, 2**64 - 1: {"a dog": 4.0}})
    cache.close()
    again = RewardCache(tmp_path / "a" / "rewards.sqlite", dict(reversed(scorer.items())))
    assert again.read(7) == {None: 1.0, "": 2.0, "a dog": 0.1 + 0.2}
    assert again.read(2**64 - 1) == {"a dog": 4.0} and again.read(8) == {}
    assert RewardCache(tmp_path / "a" / "rewards.sqlite", {**scorer, "seed": 1}).read(7) == {}
    (tmp_path / "damaged").write_bytes(b"not a database " * 100)
    with pytest.raises(OSError, match=r"the cache of rewards .*damaged: file is not a database; name another"):
        RewardCache(tmp_path / "damaged", scorer)


def scored(index: int, *rewards: float | None) -> ScoredCaptions:
    return ScoredCaptions(index, f"{index}.png", [f"caption {n}" for n in range(len(rewards))], list(rewards), 2)


def test_a_part_that_a_kill_has_cut_off_is_computed_again(tmp_path):
    made_of, parts = {"weights": "a", "seed": 0}, [[4], [5], [6]]
    file = RoundFile(tmp_path, 3, parts, made_of)
    file.add(1, [scored(5, 1.0, None, 3.0)], unreadable=2)
    RoundFile(tmp_path, 3, parts, made_of, rank=1).add(2, [scored(6, 1.0, 2.0, 3.0)], 0)
    with open(file.path, "ab") as cut:
        cut.write('{"part": 0, "made_of": {"weights": "é'.encode()[:-1])  # within a character
    again = RoundFile(tmp_path, 3, parts, made_of)
    assert again.missing == [0] and again.parts[1] == [scored(5, 1.0, None, 3.0)] and again.unreadable[1] == 2
    with pytest.raises(ValueError, match="lacks parts of round 3, which this run has trained on"):
        again.images()
    again.remove_others()
    again.add(0, [], 0)
    assert [image.index for image in RoundFile(tmp_path, 3, None, None).images()] == [5, 6]


def test_captions_may_have_any_line_separator_of_unicode(tmp_path):
    image = ScoredCaptions(0, "0.png", ["a\u2028dog", "a\x85cat", "a\x0bcar é"], [1.0, 2.0, 3.0], 2)
    RoundFile(tmp_path, 0, [[0]], {}).add(0, [image], 0)
    file = RoundFile(tmp_path, 0, [[0]], {})
    assert file.missing == [] and file.images() == [image]
    file.remove_others()
    assert RoundFile(tmp_path, 0, [[0]], {}).images() == [image]


def test_parts_of_other_images_are_not_used_and_a_finished_round_knows_its_number_of_parts(tmp_path):
    file = RoundFile(tmp_path, 0, [[1], [2]], {})
    file.add(0, [scored(1, 1.0, 2.0, 3.0)], 0)
    with pytest.raises(ValueError, match="lacks parts of round 0"):
        RoundFile(tmp_path, 0, None, None).images()
    file.add(1, [scored(2, 1.0, 2.0, 3.0)], 0)
    assert [image.index for image in RoundFile(tmp_path, 0, None, None).images()] == [1, 2]
    assert RoundFile(tmp_path, 0, [[1], [3]], {}).missing == [1]
    assert RoundFile(tmp_path, 0, [[1], [2], [3]], {}).missing == [0, 1, 2]


def test_parts_of_other_weights_are_not_used_and_removed(tmp_path):
    RoundFile(tmp_path, 0, [[1]], {"weights": "a"}).add(0, [scored(1, 1.0, 2.0, 3.0)], 0)
    other = RoundFile(tmp_path, 0, [[1]], {"weights": "b"})
    assert other.missing == [0]
    other.remove_others()
    assert RoundFile(tmp_path, 0, [[1]], None).missing == [0]


def test_rounds_go_through_all_images_in_turn():
    rounds = [images_of_round(10, 4, number, seed=3) for number in range(5)]
    assert sorted(rounds[0] + rounds[1] + rounds[2][:2]) == list(range(10))
    assert all(len(own) == len(set(own)) for own in rounds) and rounds[0] != images_of_round(10, 4, 0, seed=4)
    assert sorted(images_of_round(3, 8, 1, seed=0)) == [0, 1, 2]


def test_the_buffer_keeps_an_image_that_got_no_reward_and_takes_the_newest_best(tmp_path):
    buffer: dict = {}
    update_buffer(buffer, [scored(1, 1.0, 5.0, 2.0), scored(2, None, None, 1.0), scored(3, None, None, None)], 0)
    update_buffer(buffer, [scored(1, None, None, None), scored(2, 2.0, 2.0, 1.0)], 1)
    write_buffer(tmp_path / "buffer.jsonl", buffer)
    rows = [json.loads(line) for line in (tmp_path / "buffer.jsonl").read_text().splitlines()]
    assert rows == [
        {"image": "1.png", "caption": "caption 1", "reward": 5.0, "round": 0},
        {"image": "2.png", "caption": "caption 0", "reward": 2.0, "round": 1},
    ]


def test_stage_2_reads_the_buffer_of_images_with_relative_paths(image_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(image_folder.parent)
    images = load_images(image_folder.name)
    name = images[0]["image"]
    buffer: dict = {}
    update_buffer(buffer, [ScoredCaptions(0, name, ["a dog"], [1.0], 0)], 0)
    write_buffer(tmp_path / "buffer.jsonl", buffer)
    (pair,) = list(load_pairs(tmp_path / "buffer.jsonl"))
    assert pair["caption"] == "a dog" and Path(pair["image"]).samefile(name)


@pytest.fixture(scope="module")
def proposer(processor, tmp_path_factory) -> Proposer:
    args = SimpleNamespace(max_caption_tokens=8, append_eos=True, num_captions=3, temperature=1.0, top_p=1.0)
    cache = RewardCache(tmp_path_factory.mktemp("rewards") / "rewards.sqlite", {})
    scorer: Any = None
    return Proposer(args, processor, scorer, cache)


@pytest.fixture
def captioner() -> VLVForConditionalGeneration:
    torch.manual_seed(0)
    return VLVForConditionalGeneration(vlv_config(text_config=language_model_config())).eval()


def test_samples_do_not_depend_on_the_generation_settings_of_the_model(captioner, proposer):
    embeds = torch.randn(2, *captioner.model.get_caption_embeds(torch.zeros(1, 3, 64, 64)).shape[1:])
    found = []
    for settings in ({}, {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_p": 0.9, "typical_p": 0.1}):
        for part in (captioner, captioner.language_model):
            part.generation_config.update(**settings)
        torch.manual_seed(1)
        found.append(proposer.generate(captioner, embeds, do_sample=True, temperature=1.0, num_return_sequences=3))
    assert found[0] == found[1]
    assert captioner.generation_config.repetition_penalty == 9.0


def test_each_end_token_of_the_model_ends_a_caption_and_empty_captions_have_no_reward(captioner, proposer):
    pixels = torch.zeros(1, 3, 64, 64)
    embeds = captioner.model.get_caption_embeds(pixels)
    other_end = 7
    captioner.language_model.lm_head.register_forward_hook(lambda module, inputs, logits: _only(logits, token))
    captioner.generation_config.eos_token_id = [proposer.processor.tokenizer.eos_token_id, other_end]
    token = other_end
    assert proposer.generate(captioner, embeds)[1] == [True]
    token = other_end + 1
    assert proposer.generate(captioner, embeds)[1] == [False]
    token = proposer.processor.tokenizer.eos_token_id
    part = ImagePart([0], ["0.png"], pixels, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [])
    (found,) = proposer.propose(captioner, part, {}, (0, 0, 0))
    assert found.captions == [""] * 4 and found.rewards == [None] * 4
    assert (found.empty, found.unfinished) == (4, 0) and summarise([found], 0)["empty"] == 4


def _only(logits: torch.Tensor, token: int) -> torch.Tensor:
    """Logits with which a token is all but certain."""
    logits = logits.clone()
    logits[..., token] += 1e4
    return logits


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_are_valid(recipe):
    config = parse_config(Stage3Config, [str(recipe), "--use_cpu=true"], "stage3")
    assert config.max_steps == config.rounds * config.round_steps and config.model


def test_groups_stay_together_and_pass_after_pass_is_complete():
    dataset = RoundDataset([{"image": n} for n in range(3)], length=12)
    dataset.fill([[(n, {"caption": f"{n}{x}"}) for x in "ab"] for n in range(3)], number=0, seed=0, share=0.5)
    items = [dataset[place] for place in range(12)]
    assert all(items[i]["image"] == items[i + 1]["image"] for i in range(0, 12, 2))
    assert sorted(item["caption"] for item in items[:6]) == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert sorted(item["caption"] for item in items[6:]) == ["0a", "0b", "1a", "1b", "2a", "2b"]


def test_a_summary_counts_what_was_dropped():
    images = [scored(1, 1.0, 5.0, 2.0), scored(2, None, 3.0, None), scored(3, None, None, None)]
    images[1].unfinished, images[2].not_finite = 2, 3
    summary = summarise(images, unreadable=4)
    assert summary["images"] == 3 and summary["unreadable"] == 4 and summary["without_reward"] == 1
    assert summary["equal_groups"] == 1 and summary["unfinished"] == 2 and summary["not_finite"] == 3
    assert summary["reward_greedy"] == 1 and summary["reward_best"] == 4
    assert summary["reward_sampled"] == pytest.approx(10 / 3, abs=1e-6)
