"""Training changes the chosen parts, its loss does not depend on accumulation, and LoRA layers are merged."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from PIL import Image
from transformers import AutoModelForCausalLM

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.train import Stage2Collator, Stage2Config, Stage2Trainer, freeze_for_stage1, freeze_for_stage2, stage1, stage2

from ..builders import assert_close_to_scale


def trainable_names(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_trainable_parts_of_stage_1(encoder):
    freeze_for_stage1(encoder, "projector")
    first = trainable_names(encoder)
    assert {name.split(".")[0] for name in first} == {"query_tokens", "projector"}
    freeze_for_stage1(encoder, "transformer")
    second = trainable_names(encoder)
    assert first < second and not any("vision_tower" in n or "multi_modal" in n or "text_encoder" in n for n in second)
    assert "image_encoder.language_model.shared.weight" in second  # the task prompt uses it
    freeze_for_stage1(encoder, "all")
    assert trainable_names(encoder) == {n for n, _ in encoder.named_parameters() if not n.startswith("text_encoder")}


def test_trainable_parts_of_stage_2(captioner):
    parts = []
    for trainable in ("projector", "projector+lm", "all"):
        freeze_for_stage2(captioner, trainable)
        parts.append({name.removeprefix("model.").split(".")[0] for name in trainable_names(captioner)})
        assert not captioner.model.query_tokens.requires_grad
    assert parts == [
        {"language_projection"},
        {"language_projection", "language_model"},
        {"language_projection", "language_model", "image_encoder"},
    ]


def stage2_trainer(tmp_path, captioner, processor, dataset, **settings) -> Stage2Trainer:
    config = Stage2Config(
        output_dir=str(tmp_path),
        learning_rate=1e-2,
        max_steps=settings.pop("max_steps", 1),
        logging_steps=1,
        dataloader_num_workers=0,
        use_cpu=True,
        disable_tqdm=True,
        validation_steps=settings.pop("validation_steps", 0),
        **settings,
    )
    freeze_for_stage2(captioner, config.trainable)
    return Stage2Trainer(captioner, config, dataset, processor)


@pytest.fixture
def pairs(images) -> list[dict]:
    captions = ["a", "a small dog", "a large apple at the top left", "a cat"] * 2
    return [{"image": p, "caption": c} for p, c in zip(images, captions, strict=True)]


def test_stage_2_gives_a_captioner_the_image_token_of_its_processor(tmp_path, captioner, processor, pairs):
    captioner.config.image_token_id = None
    stage2_trainer(tmp_path, captioner, processor, pairs)
    assert captioner.config.image_token_id == processor.image_token_id


@pytest.mark.slow
def test_gradient_accumulation_gives_the_loss_of_the_complete_batch(tmp_path, captioner, processor, pairs):
    losses = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = VLVForConditionalGeneration(captioner.config)
        model.load_state_dict(captioner.state_dict())
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = stage2_trainer(tmp_path / str(size), model, processor, pairs, trainable="projector", **settings)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    batch = Stage2Collator(processor, 300)(pairs)
    mean_over_tokens = captioner(batch["pixel_values"], labels=batch["labels"]).loss.item()
    assert losses == pytest.approx([mean_over_tokens] * 2, rel=1e-4)


@pytest.mark.slow
def test_a_trained_model_ends_its_captions(tmp_path, captioner, processor, images):
    """A model trained on one caption generates that caption and then EOS."""
    data = [{"image": images[0], "caption": "a small dog"}] * 8
    trainer = stage2_trainer(tmp_path, captioner, processor, data, per_device_train_batch_size=4, max_steps=60)
    trainer.train()
    ids = captioner.eval().generate(processor(images=images[0]).pixel_values, max_new_tokens=20)
    assert ids[0, -1] == processor.tokenizer.eos_token_id and ids.shape[1] == 4
    assert processor.decode(ids[0], skip_special_tokens=True) == "a small dog"


@pytest.mark.slow
def test_rates_norms_and_skipped_images_are_logged(tmp_path, captioner, processor, pairs):
    pairs[3] = {"image": b"broken", "caption": "a"}
    trainer = stage2_trainer(tmp_path, captioner, processor, pairs, per_device_train_batch_size=8)
    trainer.train()
    row = trainer.state.log_history[0]
    assert {"loss", "learning_rate", "grad_norm", "images_per_second"} <= set(row)
    assert row["images_skipped"] == 1 and row["images_per_second"] > 0


@pytest.mark.slow
def test_lora_layers_are_trained_resumed_and_merged_into_a_plain_model(
    tmp_path, stage1_checkpoint, language_model, image_folder, monkeypatch
):
    merge = stage2.merge_lora
    pixels, labels, losses = torch.randn(1, 3, 64, 64), torch.tensor([[5, 3]]), []

    def recorded_merge(model) -> None:
        assert any("lora_A" in name for name in trainable_names(model))
        losses.append(model.eval()(pixels, labels=labels).loss)
        merge(model)

    monkeypatch.setattr(stage2, "merge_lora", recorded_merge)
    settings = [
        f"--model={stage1_checkpoint}",
        f"--language_model={language_model}",
        f"--pairs={image_folder}",
        "--trainable=projector",
        "--lora_rank=2",
        "--max_steps=2",
        "--save_steps=1",
        "--learning_rate=1e-2",
        "--dataloader_num_workers=0",
        "--validation_steps=0",
        "--use_cpu",
        "--disable_tqdm=true",
    ]
    run, resumed = tmp_path / "run", tmp_path / "resumed"
    trainer = stage2.main([f"--output_dir={run}", *settings])
    assert len(set(trainer.processing_class.tokenizer("a large dog").input_ids)) == 3  # read as it was saved
    with pytest.raises(FileNotFoundError, match=r"checkpoint-1 is a checkpoint of a LoRA run, without the language"):
        hub.load_captioner(run / "checkpoint-1")
    shutil.copytree(run / "checkpoint-1", resumed / "checkpoint-1")
    stage2.main([f"--output_dir={resumed}", *settings, "--merge_lora_checkpoints"])
    unbroken = VLVForConditionalGeneration.from_pretrained(run).eval()
    assert_close_to_scale(unbroken(pixels, labels=labels).loss, losses[0])
    for folder in (resumed, resumed / "checkpoint-2"):
        weights = VLVForConditionalGeneration.from_pretrained(folder).state_dict()
        assert all(weights[name].equal(tensor) for name, tensor in unbroken.state_dict().items())
    assert isinstance(VLVProcessor.from_pretrained(run), VLVProcessor)
    base = AutoModelForCausalLM.from_pretrained(language_model)
    adapted = PeftModel.from_pretrained(base, str(run / "adapter")).eval()
    ids = torch.tensor([[5, 3, 7]])
    assert_close_to_scale(adapted(ids).logits, unbroken.language_model(ids).logits)
    assert not torch.allclose(unbroken.language_model(ids).logits, adapted.unload()(ids).logits)


def train_stage1(tmp_path, image_folder, stable_diffusion, stage1_checkpoint, validation_steps: int) -> list[float]:
    trainer = stage1.main(
        [
            f"--output_dir={tmp_path / str(validation_steps)}",
            f"--model={stage1_checkpoint}",
            f"--diffusion_model={stable_diffusion}",
            f"--images={image_folder}",
            "--max_steps=4",
            "--logging_steps=1",
            "--per_device_train_batch_size=4",
            "--dataloader_num_workers=0",
            f"--validation_steps={validation_steps}",
            "--num_validation_images=2",
            "--use_cpu",
            "--disable_tqdm=true",
        ]
    )
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.slow
def test_validation_does_not_change_the_losses(tmp_path, image_folder, stable_diffusion, stage1_checkpoint):
    inputs = (tmp_path, image_folder, stable_diffusion, stage1_checkpoint)
    assert train_stage1(*inputs, validation_steps=2) == train_stage1(*inputs, validation_steps=0)
    with Image.open(tmp_path / "2" / "samples" / "step-0000004.png") as grid:
        assert grid.size == (2 * 32, 2 * 32)  # two originals above two reconstructions
        assert len(grid.getcolors(2**16)) > 100


@pytest.mark.slow
def test_validation_writes_generated_and_reference_captions(tmp_path, captioner, processor, pairs):
    trainer = stage2_trainer(tmp_path, captioner, processor, pairs, validation_steps=1, num_validation_images=3)
    trainer.train()
    rows = json.loads((tmp_path / "samples" / "step-0000001.json").read_text())
    assert [row["reference"] for row in rows] == [pair["caption"] for pair in pairs[:3]]
    pixel_values = processor(images=[pair["image"] for pair in pairs[:3]]).pixel_values
    ids = captioner.eval().generate(pixel_values, max_new_tokens=300, do_sample=False)
    assert [row["generated"] for row in rows] == processor.batch_decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_query_tokens": 4}, "num_query_tokens is 4, but .* has 8"),
        ({"attend_all_queries": True}, "attend_all_queries is True, but .* has False"),
        ({"encoder_image_size": 32}, "encoder_image_size is 32, but .* has 64"),
        ({"pre_crop_size": 32}, "pre_crop_size is 32, but .* has None"),
    ],
)
def test_settings_that_contradict_the_model_to_continue_from_are_refused(
    tmp_path, image_folder, stable_diffusion, stage1_checkpoint, settings, words
):
    arguments = {
        "output_dir": tmp_path,
        "model": stage1_checkpoint,
        "diffusion_model": stable_diffusion,
        "images": image_folder,
        **settings,
    }
    with pytest.raises(SystemExit, match=f"vlv train stage1: {words}"):
        stage1.main(["--use_cpu", *(f"--{name}={value}" for name, value in arguments.items())])


@pytest.mark.parametrize(
    ("stage", "given", "missing"), [(stage1, [], "images"), (stage2, [], "pairs"), (stage2, ["--pairs=x"], "model")]
)
def test_a_missing_input_is_named(tmp_path, stage, given, missing):
    with pytest.raises(SystemExit, match=f"{missing} is not set: .*--{missing}"):
        stage.main(["--use_cpu", f"--output_dir={tmp_path}", *given])
