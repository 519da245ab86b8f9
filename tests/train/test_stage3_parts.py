"""Parts of stage 3: rounds on disk, samples of captions, the loss of a policy gradient, rewards."""

import json
import math
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vlv import VLVForConditionalGeneration, hub
from vlv.checkpoints import MINIATURE
from vlv.miniature.data import evaluation_items
from vlv.miniature.grammar import write_caption
from vlv.train import stage3
from vlv.train.data import load_images, load_pairs
from vlv.train.fluency import measure_fluency
from vlv.train.parsing import parse_config
from vlv.train.policy_gradient import PolicySamples, group_advantages, policy_loss, token_log_probabilities
from vlv.train.proposals import ImagePart, Proposer
from vlv.train.reward_cache import RewardCache
from vlv.train.rounds import (
    RoundDataset,
    RoundFile,
    ScoredCaptions,
    as_caption,
    images_of_round,
    repeated_share,
    summarise,
    update_buffer,
    write_buffer,
)
from vlv.train.stage3_config import Stage3Config

from ..builders import language_model_config, vlv_config

CONFIGS = Path(stage3.__file__).parent / "configs" / "stage3"


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


def test_a_token_that_is_far_from_the_start_does_not_decide_a_step():
    far = policy_loss(*torch.tensor([[[-95.0]], [[-95.0]], [[-1.0]]]), torch.zeros(1), torch.ones(1, 1).bool(), 0.2, 1)
    assert far.loss == far.kl == 10


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
    assert (
        again.missing == [0] and list(again.read_part(1)) == [scored(5, 1.0, None, 3.0)] and again.num_unreadable == 2
    )
    with pytest.raises(ValueError, match="lacks parts of round 3, which this run has trained on"):
        again.images()
    again.remove_others()
    again.add(0, [], 0)
    assert [image.index for image in RoundFile(tmp_path, 3, None, None).images()] == [5, 6]


@pytest.mark.parametrize("lost", [1, 200])
def test_a_part_that_lacks_the_end_of_its_lines_is_computed_again(lost, tmp_path):
    file = RoundFile(tmp_path, 0, [[1, 5], [2]], {})
    file.add(0, [scored(1, 1.0, 2.0, 3.0), scored(5, 1.0, 2.0, 3.0)], 0)
    file.path.write_bytes(file.path.read_bytes()[:-lost])  # within the last line
    RoundFile(tmp_path, 0, [[1, 5], [2]], {}).add(1, [scored(2, 1.0, 2.0, 3.0)], 0)  # begins in the same line
    again = RoundFile(tmp_path, 0, [[1, 5], [2]], {})
    assert again.missing == [0, 1]
    again.remove_others()
    assert file.path.read_bytes() == b""
    again.add(0, [], 2)
    again.add(1, [scored(2, 1.0, 2.0, 3.0)], 0)
    assert [image.index for image in RoundFile(tmp_path, 0, None, None).images()] == [2]


def test_files_of_an_earlier_version_are_refused(tmp_path):
    (tmp_path / "round-0000.rank-0.jsonl").write_text('{"part": 0, "num_parts": 1, "images": []}\n')
    with pytest.raises(ValueError, match=r"rank-0\.jsonl was written by an earlier version.*another --output_dir"):
        RoundFile(tmp_path, 0, None, None)


def test_training_items_are_read_from_the_files_when_they_are_needed(tmp_path):
    """The captions on the disk change after a round has chosen its samples: items have the changed ones."""
    file = RoundFile(tmp_path, 0, [[0, 1], [2]], {})
    for part, indices in enumerate(([0, 1], [2])):
        images = [scored(index, 1.0, 2.0, None, 4.0) for index in indices]
        for image in images:
            image.num_samples = 3
            image.sampled_log_probs = image.start_log_probs = [[-1.0], [], [-3.0]]
        file.add(part, images, 0)
    samples = PolicySamples(file)
    dataset = RoundDataset([{"image": n} for n in range(3)], length=6)
    dataset.fill(samples.groups(), samples, number=0, seed=0, share=0.0)
    file.path.write_bytes(file.path.read_bytes().replace(b"caption ", b"CAPTION "))
    items = [pickle.loads(pickle.dumps(dataset))[place] for place in range(6)]
    assert sorted(item["image"] for item in items) == [0, 0, 1, 1, 2, 2]
    assert {item["caption"] for item in items} == {"CAPTION 1", "CAPTION 3"}
    assert {item["caption"]: item["advantage"] for item in items} == {"CAPTION 1": -1.0, "CAPTION 3": 1.0}
    assert {item["caption"]: item["start_log_probs"] for item in items} == {"CAPTION 1": [-1.0], "CAPTION 3": [-3.0]}


def test_repeated_words_are_those_of_three_in_a_row():
    assert repeated_share("a dog and a cat") == repeated_share("a dog") == 0.0
    assert repeated_share("a red dog a red dog a red dog") == pytest.approx(4 / 7)


def test_captions_may_have_any_line_separator_of_unicode(tmp_path):
    image = ScoredCaptions(0, "0.png", ["a\u2028dog", "a\x85cat", "a\x0bcar é"], [1.0, 2.0, 3.0], 2)
    RoundFile(tmp_path, 0, [[0]], {}).add(0, [image], 0)
    file = RoundFile(tmp_path, 0, [[0]], {})
    assert file.missing == [] and list(file.images()) == [image]
    file.remove_others()
    assert list(RoundFile(tmp_path, 0, [[0]], {}).images()) == [image]


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
    update_buffer(buffer, [scored(4, 1.0, 2.0, 3.0)], 0)
    update_buffer(buffer, [scored(1, None, None, None), scored(2, 2.0, 2.0, 1.0)], 1)
    update_buffer(buffer, [scored(4, None, None, None, None)], 1)  # the last is that of the buffer, not fluent now
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
    args = SimpleNamespace(
        **{"max_caption_tokens": 8, "append_eos": True, "num_captions": 3, "temperature": 1.0, "top_p": 1.0},
        **{"method": "best_of_n", "fluency_floor": None, "length_penalty": 0.0, "per_device_train_batch_size": 2},
    )
    cache = RewardCache(tmp_path_factory.mktemp("rewards") / "rewards.sqlite", {})
    scorer: Any = None
    return Proposer(args, processor, scorer, cache)


@pytest.fixture
def captioner() -> VLVForConditionalGeneration:
    torch.manual_seed(0)
    return VLVForConditionalGeneration(vlv_config(text_config=language_model_config())).eval()


def test_samples_do_not_depend_on_the_generation_settings_of_the_model(captioner, proposer):
    conditioning = torch.randn(2, *captioner.model(torch.zeros(1, 3, 64, 64)).conditioning.shape[1:])
    found = []
    for settings in ({}, {"repetition_penalty": 9.0, "no_repeat_ngram_size": 1, "min_p": 0.9, "typical_p": 0.1}):
        for part in (captioner, captioner.language_model):
            part.generation_config.update(**settings)
        torch.manual_seed(1)
        found.append(
            proposer.generate(captioner, conditioning, do_sample=True, temperature=1.0, num_return_sequences=3)
        )
    assert found[0] == found[1]
    assert captioner.generation_config.repetition_penalty == 9.0


def test_each_end_token_of_the_model_ends_a_caption_and_empty_captions_have_no_reward(captioner, proposer):
    pixels = torch.zeros(1, 3, 64, 64)
    conditioning = captioner.model(pixels).conditioning
    other_end = 7
    captioner.language_model.lm_head.register_forward_hook(lambda module, inputs, logits: _only(logits, token))
    captioner.generation_config.eos_token_id = [proposer.processor.tokenizer.eos_token_id, other_end]
    token = other_end
    assert proposer.generate(captioner, conditioning)[1] == [True]
    token = other_end + 1
    assert proposer.generate(captioner, conditioning)[1] == [False]
    token = proposer.processor.tokenizer.eos_token_id
    part = ImagePart([0], ["0.png"], pixels, None, torch.zeros(1, 3, 32, 32, dtype=torch.uint8), [])
    (found,) = proposer.propose(captioner, part, {}, (0, 0, 0))
    assert found.captions == [""] * 4 and found.rewards == [None] * 4
    assert (found.empty, found.unfinished) == (4, 0) and summarise([found], 0)["empty"] == 4


def test_fluency_is_the_mean_log_probability_of_the_text_alone(captioner, processor):
    captions = ["a small dog at the top left", "a cat"]
    found = measure_fluency(captioner, processor, captions, max_tokens=30, append_eos=True, batch_size=2)
    for caption, value in zip(captions, found, strict=True):
        ids = torch.tensor(
            [*processor.tokenizer(caption, add_special_tokens=False).input_ids, processor.tokenizer.eos_token_id]
        )
        logits = captioner.language_model(ids[None]).logits[0]
        by_hand = torch.log_softmax(logits[:-1], dim=-1).gather(1, ids[1:, None]).mean()
        assert value == pytest.approx(by_hand.item(), abs=1e-5)
    assert measure_fluency(captioner, processor, ["a"], 1, True, 1) == [0.0]


def test_words_without_an_order_are_less_fluent_than_captions():
    model, processor = hub.load_captioner(MINIATURE)
    captions = [write_caption(scene) for scene in evaluation_items("combo", 8)[1]]
    shuffled = [" ".join(np.random.default_rng(0).permutation(caption.split())) for caption in captions]
    values = measure_fluency(model, processor, captions + shuffled, max_tokens=64, append_eos=True, batch_size=16)
    assert min(values[:8]) > max(values[8:]) + 0.5


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
    dataset.fill([[(n, f"{n}{x}") for x in "ab"] for n in range(3)], as_caption, number=0, seed=0, share=0.5)
    items = [dataset[place] for place in range(12)]
    assert all(items[i]["image"] == items[i + 1]["image"] for i in range(0, 12, 2))
    assert sorted(item["caption"] for item in items[:6]) == ["0a", "0b", "1a", "1b", "2a", "2b"]
    assert sorted(item["caption"] for item in items[6:]) == ["0a", "0b", "1a", "1b", "2a", "2b"]


def test_a_summary_counts_what_was_dropped():
    images = [scored(1, 1.0, 5.0, 2.0), scored(2, None, 3.0, None), scored(3, None, None, None)]
    images[1].unfinished, images[2].not_finite, images[2].not_fluent = 2, 3, 1
    images[0].fluency = [-1.0, -2.0, -3.0]
    summary = summarise(images, unreadable=4)
    assert summary["images"] == 3 and summary["unreadable"] == 4 and summary["without_reward"] == 1
    assert summary["equal_groups"] == 1 and summary["unfinished"] == 2 and summary["not_finite"] == 3
    assert summary["not_fluent"] == 1 and (summary["fluency_greedy"], summary["fluency_best"]) == (-1, -2)
    assert summary["reward_greedy"] == 1 and summary["reward_best"] == 4
    assert summary["reward_sampled"] == pytest.approx(10 / 3, abs=1e-6)
