"""Stage 2 with less work: packing, grouping by length and the cache of conditioning leave the losses as they are."""

import shutil

import numpy as np
import pytest
import torch
from transformers import BloomConfig
from transformers.models.florence2.modeling_florence2 import Florence2VisionBackbone

from vlv import VLVForConditionalGeneration, VLVModel
from vlv.train import ListDataset, Stage2Config, Stage2Trainer, TrainingDataset, freeze_for_stage2, stage2
from vlv.train.data import EpochSampler
from vlv.train.packing import PACKED_SDPA, is_packing

from ..builders import QUERIES, TEXT_WIDTH, VOCABULARY, language_model_config, vlv_config


@pytest.fixture(scope="module")
def settings(stage1_checkpoint, language_model, image_folder):
    return {
        "model": stage1_checkpoint,
        "language_model": language_model,
        "pairs": image_folder,
        "trainable": "projector+lm",
        "max_steps": 3,
        "save_steps": 10,
        "logging_steps": 1,
        "per_device_train_batch_size": 3,
        "learning_rate": 1e-3,
        "validation_steps": 0,
        "dataloader_num_workers": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    }


def train(settings, **changes) -> list[float]:
    trainer = stage2.main([f"--{name}={value}" for name, value in (settings | changes).items()])
    return [row[name] for row in trainer.state.log_history for name in ("loss", "eval_loss") if name in row]


@pytest.fixture(scope="module")
def plain(settings, tmp_path_factory) -> list[float]:
    """The losses of padded rows without a cache."""
    return train(settings, packing=False, output_dir=tmp_path_factory.mktemp("plain"))


@pytest.fixture
def encoded(monkeypatch) -> list[int]:
    """The number of images of each call of a vision tower."""
    counted: list[int] = []
    forward = Florence2VisionBackbone.forward

    def count(self, pixels, **kwargs):
        counted.append(len(pixels))
        return forward(self, pixels, **kwargs)

    monkeypatch.setattr(Florence2VisionBackbone, "forward", count)
    return counted


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"lora_rank": 2, "trainable": "projector"}, {"gradient_accumulation_steps": 2}]
)
def test_losses_of_a_packed_training_are_those_of_a_padded_one(changes, settings, plain, tmp_path):
    if changes:
        plain = train(settings, packing=False, output_dir=tmp_path / "plain", **changes)
    packed = train(settings, output_dir=tmp_path / "packed", **changes)  # packing is the default
    assert len(set(plain)) == 3 and packed == pytest.approx(plain, rel=1e-5)
    assert PACKED_SDPA not in (tmp_path / "packed" / "config.json").read_text()


@pytest.mark.slow
def test_losses_with_cached_conditioning_are_those_without_and_the_encoder_rests(
    settings, plain, encoded, tmp_path, capsys
):
    cached = {}
    for dtype in ("float32", "bfloat16"):
        encoded.clear()
        changes = {"cache_conditioning": tmp_path / dtype, "conditioning_dtype": dtype, "packing": False}
        cached[dtype] = train(settings, output_dir=tmp_path / f"run-{dtype}", **changes)
        assert sum(encoded) == 16  # each image once, before the training
    kilobytes = QUERIES * TEXT_WIDTH * 4 / 1000
    assert f"{kilobytes + 0.016:.3g} kB an image" in capsys.readouterr().out
    assert cached["float32"] == pytest.approx(plain, rel=1e-6)
    assert cached["bfloat16"] == pytest.approx(plain, rel=1e-2) and cached["bfloat16"] != cached["float32"]

    other = shutil.copytree(settings["model"], tmp_path / "other")
    model = VLVModel.from_pretrained(other)
    with torch.no_grad():
        model.projector.linear_1.bias.add_(1)
    model.save_pretrained(other)
    with pytest.raises(SystemExit, match=r"  encoder: [0-9a-f]{64} -> [0-9a-f]{64}\n"):
        train(settings, output_dir=tmp_path / "stale", model=other, cache_conditioning=tmp_path / "bfloat16")


@pytest.mark.slow
def test_a_run_that_packs_groups_and_caches_resumes_with_the_same_losses(settings, image_folder, tmp_path):
    saving = {
        "train_sampling_strategy": "group_by_length",
        "cache_conditioning": tmp_path / "conditioning",
        "max_steps": 8,  # of an epoch and a part of the second
        "save_steps": 4,
        "eval_pairs": image_folder / "b",
        "eval_steps": 4,
    }
    unbroken = train(settings, output_dir=tmp_path / "unbroken", **saving)
    (tmp_path / "broken").mkdir()
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    assert train(settings, output_dir=tmp_path / "broken", **saving) == unbroken
    assert len(set(unbroken)) > 8


@pytest.mark.parametrize("trainable", ["projector+lm+query_decoder", "all"])
def test_cached_conditioning_of_an_encoder_that_is_trained_is_refused(trainable, settings, tmp_path):
    with pytest.raises(SystemExit, match=f"does not work with trainable '{trainable}'".replace("+", "[+]")):
        train(settings, output_dir=tmp_path / "run", trainable=trainable, cache_conditioning=tmp_path / "conditioning")
    assert not (tmp_path / "conditioning").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing": True, "pad_to_max_length": True}, "packing does not work with pad_to_max_length"),
        ({"packing": True, "compile_blocks": True}, "packing does not work with compile_blocks"),
        ({"packing": True, "torch_compile": True}, "packing does not work with torch_compile"),
        ({"conditioning_dtype": "float16"}, "conditioning_dtype is 'float16'; expected one of"),
        ({"cache_conditioning": "a", "cache_vision_features": "b"}, "leave one of them out"),
        ({"cache_conditioning": "a", "random_crop": True}, "cache_conditioning does not work with random_crop"),
        ({"train_sampling_strategy": "group_by_length", "streaming": True}, "'group_by_length' does not work with"),
        ({"train_sampling_strategy": "batch_rebalance"}, "expected one of .*'group_by_length'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        Stage2Config(output_dir=str(tmp_path), use_cpu=True, **changes)


@pytest.mark.parametrize("name", ["pad_to_max_length", "torch_compile"])
def test_padding_and_compilation_turn_packing_off(name, tmp_path):
    assert Stage2Config(output_dir=str(tmp_path), use_cpu=True, **{name: True}).packing is False


def test_a_run_records_whether_cached_conditioning_is_rounded(tmp_path):
    def recorded(**changes):
        return Stage2Config(output_dir=str(tmp_path), use_cpu=True, **changes).result_settings()["cache_conditioning"]

    float32 = {"conditioning_dtype": "float32"}
    assert [recorded(), recorded(cache_conditioning="a", **float32), recorded(cache_conditioning="a")] == [
        *(False, False, True)
    ]
    in_half = Stage2Config(output_dir=str(tmp_path), use_cpu=True, bf16=True, cache_conditioning="a")
    assert "cache_conditioning" not in in_half.result_settings()


@pytest.fixture
def build(tmp_path, processor, images):
    """Makes a trainer of a captioner with a language model's configuration, or of a captioner."""

    def run(model, **changes) -> Stage2Trainer:
        if not isinstance(model, VLVForConditionalGeneration):
            torch.manual_seed(0)
            model = VLVForConditionalGeneration(vlv_config(text_config=model))
        freeze_for_stage2(model, "projector")
        options = {"dataloader_num_workers": 0, "validation_steps": 0, "max_steps": 1, "save_strategy": "no"}
        config = Stage2Config(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **options, **changes)
        return Stage2Trainer(model, config, [{"image": i, "caption": "a small dog"} for i in images[:2]], processor)

    return run


BLOOM = BloomConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    n_layer=2,
    n_head=2,
    bos_token_id=2,
    eos_token_id=3,
    initializer_range=0.3,
)


def test_a_language_model_that_cannot_pack_is_padded_and_refused_where_packing_is_asked_for(build, capsys):
    model = build(BLOOM).model
    reason = "packing needs sdpa or FlashAttention, which BloomForCausalLM does not have"
    assert capsys.readouterr().out == f"{reason}; captions are padded\n"
    assert not is_packing(model.language_model)
    with pytest.raises(ValueError, match=r"not work with BloomForCausalLM: it does not keep .* apart; leave"):
        build(model, packing=True)
    assert not is_packing(model.language_model)


def test_a_language_model_whose_code_fails_on_packed_rows_is_padded(build, capsys):
    model = build(language_model_config(), packing=False).model

    def refuse(module, args, kwargs) -> None:
        if len(kwargs["inputs_embeds"]) == 1:
            raise IndexError("one row\nis too few")

    model.get_decoder().register_forward_pre_hook(refuse, with_kwargs=True)
    assert not build(model).speed.is_packed
    printed = "packing does not work with Qwen2ForCausalLM: IndexError: one row is too few; captions are padded\n"
    assert capsys.readouterr().out == printed
    assert not is_packing(model.language_model)
    assert model.language_model.config._attn_implementation == "sdpa"


def test_trainers_of_one_model_pack_or_pad_as_each_of_them_is_told_and_leave_it_as_it_was(build):
    first = build(language_model_config())
    language_model = first.model.language_model
    rows = []
    first.model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs["inputs_embeds"])), with_kwargs=True
    )
    second = build(first.model, packing=True)
    assert len(language_model._forward_pre_hooks) == 1
    padding = build(first.model, packing=False)
    assert not is_packing(language_model)
    for trainer, trained_rows in ((second, 1), (padding, 2), (first, 1)):
        trainer.train()
        assert rows[-1] == trained_rows
        assert not language_model._forward_pre_hooks
        assert language_model.config._attn_implementation == "sdpa"


def test_grouping_by_length_of_a_plain_list_is_refused(build):
    trainer = build(language_model_config(), packing=False, train_sampling_strategy="group_by_length")
    with pytest.raises(ValueError, match=r"needs a TrainingDataset, .* got list; pass load_pairs"):
        trainer.train()


def test_several_gpus_in_one_process_are_refused(build, monkeypatch):
    monkeypatch.setattr(Stage2Config, "n_gpu", 2)
    with pytest.raises(ValueError, match="sees 2 GPUs, and trains on one; launch with torchrun --nproc_per_node 2"):
        build(language_model_config())


@pytest.fixture
def captions() -> TrainingDataset:
    """Captions of 1 to 40 letters, in no order."""
    lengths = np.random.default_rng(0).permutation(np.arange(403) % 40 + 1)
    return TrainingDataset([ListDataset({"image": f"{n}.png", "caption": "a" * int(n)} for n in lengths)])


def widths(sampler: EpochSampler, batch: int) -> list[int]:
    """The sum of the padded lengths of each batch."""
    lengths = [sampler.dataset.text_length(index) for index in sampler]
    return [max(lengths[a : a + batch]) * batch for a in range(0, len(lengths), batch)]


def test_grouping_by_length_leaves_little_padding_and_keeps_every_sample(captions):
    plain, grouped = (
        EpochSampler(captions, 0, batch_size=4, num_ranks=2, group_by_length=grouping) for grouping in (False, True)
    )
    first, again, second = (
        list(grouped),
        list(EpochSampler(captions, 0, batch_size=4, num_ranks=2, group_by_length=True)),
        list(grouped),
    )
    assert first == again and first != [(0, place) for _, place in second]
    assert sorted(place for _, place in first) == sorted(place for _, place in second) == list(range(403))
    words = sum(captions.text_length(place) for place in range(403))
    plain.set_epoch(0), grouped.set_epoch(0)
    assert sum(widths(grouped, 8)) < 1.1 * words < 1.4 * words < sum(widths(plain, 8))
    grouped.set_epoch(0)
    found = widths(grouped, 8)
    assert found[:50] != sorted(found[:50])  # steps of one length do not follow each other
