"""What learns is what was chosen; the loss does not depend on how the batch is cut; LoRA merges away."""

import json

import pytest
import torch

from vlv import VLVForConditionalGeneration, VLVProcessor, hub
from vlv.train.data import Stage2Collator
from vlv.train.stage1 import Stage1Config, Stage1Trainer, freeze_for_stage1
from vlv.train.stage2 import Stage2Config, Stage2Trainer, build_stage2, freeze_for_stage2, merge_lora


def learning(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_what_learns_in_stage_1(encoder):
    freeze_for_stage1(encoder, "projector")
    first = learning(encoder)
    assert {name.split(".")[0] for name in first} == {"query_tokens", "projector"}
    freeze_for_stage1(encoder, "transformer")
    second = learning(encoder)
    assert first < second and not any("vision_tower" in n or "multi_modal" in n or "text_encoder" in n for n in second)
    assert "image_encoder.language_model.shared.weight" in second  # the task prompt uses it
    freeze_for_stage1(encoder, "all")
    assert learning(encoder) == {n for n, _ in encoder.named_parameters() if not n.startswith("text_encoder")}


def test_what_learns_in_stage_2(captioner):
    parts = []
    for trainable in ("projector", "projector+lm", "all"):
        freeze_for_stage2(captioner, trainable)
        parts.append({name.removeprefix("model.").split(".")[0] for name in learning(captioner)})
        assert not captioner.model.query_tokens.requires_grad
    assert parts == [
        {"language_projection"},
        {"language_projection", "language_model"},
        {"language_projection", "language_model", "image_encoder"},
    ]


def stage2(tmp_path, captioner, processor, dataset, **settings) -> Stage2Trainer:
    config = Stage2Config(
        output_dir=str(tmp_path),
        learning_rate=1e-2,
        max_steps=settings.pop("max_steps", 1),
        logging_steps=1,
        dataloader_num_workers=0,
        use_cpu=True,
        disable_tqdm=True,
        validation_steps=0,
        **settings,
    )
    freeze_for_stage2(captioner, config.trainable)
    return Stage2Trainer(captioner, config, dataset, processor)


@pytest.fixture
def pairs(pictures) -> list[dict]:
    captions = ["a", "a small dog", "a large apple at the top left", "a cat"] * 2
    return [{"image": p, "caption": c} for p, c in zip(pictures, captions, strict=True)]


def test_accumulating_gradients_gives_the_loss_of_the_whole_batch(tmp_path, captioner, processor, pairs):
    losses = []
    for size, accumulation in ((8, 1), (2, 4)):
        model = VLVForConditionalGeneration(captioner.config)
        model.load_state_dict(captioner.state_dict())
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = stage2(tmp_path / str(size), model, processor, pairs, trainable="projector", **settings)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    batch = Stage2Collator(processor, 300)(pairs)
    mean_over_words = captioner(batch["pixel_values"], labels=batch["labels"]).loss.item()
    assert losses == pytest.approx([mean_over_words] * 2, rel=1e-4)


def test_captions_learn_to_end(tmp_path, captioner, processor, pictures):
    """A model that saw the EOS of one caption writes that caption and stops by itself."""
    data = [{"image": pictures[0], "caption": "a small dog"}] * 8
    trainer = stage2(tmp_path, captioner, processor, data, per_device_train_batch_size=4, max_steps=60)
    trainer.train()
    ids = captioner.eval().generate(processor(images=pictures[0]).pixel_values, max_new_tokens=20)
    assert ids[0, -1] == processor.tokenizer.eos_token_id and ids.shape[1] == 4
    assert processor.decode(ids[0], skip_special_tokens=True) == "a small dog"


def test_rates_norms_and_skipped_images_are_logged(tmp_path, captioner, processor, pairs):
    pairs[3] = {"image": b"broken", "caption": "a"}
    trainer = stage2(tmp_path, captioner, processor, pairs, per_device_train_batch_size=8)
    trainer.train()
    row = trainer.state.log_history[0]
    assert {"loss", "learning_rate", "grad_norm", "images_per_second"} <= set(row)
    assert row["images_skipped"] == 1 and row["images_per_second"] > 0


def test_lora_trains_and_merges_into_a_plain_model(tmp_path, stage1_checkpoint, language_model, image_folder):
    config = Stage2Config(
        output_dir=str(tmp_path / "run"),
        model=str(stage1_checkpoint),
        language_model=str(language_model),
        pairs=str(image_folder),
        trainable="projector",
        lora_rank=2,
        max_steps=2,
        learning_rate=1e-2,
        dataloader_num_workers=0,
        use_cpu=True,
        disable_tqdm=True,
        validation_steps=0,
    )
    trainer = build_stage2(config)
    assert len(set(trainer.processing_class.tokenizer("a large dog").input_ids)) == 3  # read as it was saved
    assert any("lora_A" in name for name in learning(trainer.model))
    trainer.train()
    with pytest.raises(ValueError, match=r"checkpoint-2 is a checkpoint of a LoRA run that has not ended; go on with"):
        hub.load_captioner(tmp_path / "run" / "checkpoint-2")
    trainer.model.eval()
    pixels = torch.randn(1, 3, 64, 64)
    labels = torch.tensor([[5, 3]])
    before = trainer.model(pixels, labels=labels).loss
    merge_lora(trainer.model)
    trainer.save_model()
    loaded = VLVForConditionalGeneration.from_pretrained(tmp_path / "run").eval()
    torch.testing.assert_close(loaded(pixels, labels=labels).loss, before, rtol=1e-4, atol=1e-5)
    assert isinstance(VLVProcessor.from_pretrained(tmp_path / "run"), VLVProcessor)


def test_samples_do_not_disturb_the_random_state(tmp_path, image_folder, stable_diffusion, stage1_checkpoint):
    from vlv.train.stage1 import build_stage1

    def run(validation_steps: int) -> list[float]:
        config = Stage1Config(
            output_dir=str(tmp_path / str(validation_steps)),
            model=str(stage1_checkpoint),
            diffusion_model=str(stable_diffusion),
            images=str(image_folder),
            max_steps=4,
            logging_steps=1,
            per_device_train_batch_size=4,
            dataloader_num_workers=0,
            validation_steps=validation_steps,
            num_validation_images=2,
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = build_stage1(config)
        assert isinstance(trainer, Stage1Trainer)
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row]

    assert run(validation_steps=2) == run(validation_steps=0)
    assert (tmp_path / "2" / "samples" / "step-0000004.png").stat().st_size > 100


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_query_tokens": 4}, "num_query_tokens is 4, but .* has 8"),
        ({"attend_all_queries": True}, "attend_all_queries is True, but .* has False"),
        ({"encoder_image_size": 32}, "encoder_image_size is 32, but .* has 64"),
        ({"pre_crop_size": 32}, "pre_crop_size is 32, but .* has None"),
    ],
)
def test_a_model_to_go_on_from_keeps_its_shape(
    tmp_path, image_folder, stable_diffusion, stage1_checkpoint, settings, words
):
    from vlv.train.stage1 import build_stage1

    parts = {"model": str(stage1_checkpoint), "diffusion_model": str(stable_diffusion), "images": str(image_folder)}
    with pytest.raises(ValueError, match=words):
        build_stage1(Stage1Config(output_dir=str(tmp_path), use_cpu=True, **parts, **settings))


def test_inputs_that_are_missing_are_asked_for(tmp_path):
    from vlv.train.stage1 import build_stage1

    with pytest.raises(ValueError, match="--images"):
        build_stage1(Stage1Config(output_dir=str(tmp_path), use_cpu=True))
    with pytest.raises(ValueError, match="--pairs"):
        build_stage2(Stage2Config(output_dir=str(tmp_path), use_cpu=True))
    json.dumps(Stage1Config(output_dir=str(tmp_path), use_cpu=True).to_dict())  # saved with every checkpoint
