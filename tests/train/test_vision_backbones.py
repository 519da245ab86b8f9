"""Training with a vision backbone: what each setting trains, stage 1 from a folder to a captioner, and estimates."""

import json

import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from vlv import VLVForConditionalGeneration, VLVModel, hub
from vlv.cli.main import main
from vlv.modeling_vlv import examine_backbone
from vlv.train import Stage1Config, freeze_for_stage1, freeze_for_stage2, stage1
from vlv.train.encoder_lora import add_encoder_lora, merge_encoder_lora
from vlv.train.freezing import trainable_names

from ..builders import QUERY_DECODER_CONFIG, assert_close_to_scale, backbone_configs, language_model_config, vlv_config
from ..hub.machine import Machine
from ..hub.server import nowhere

FAMILIES = list(backbone_configs())
START = {"query_tokens", "projector"}
DECODER = START | {"query_decoder", "multi_modal_projector"}


def config_of(family: str, **fields):
    own = {"image_encoder_config": backbone_configs()[family], "query_decoder_config": QUERY_DECODER_CONFIG}
    return vlv_config(task_prompt_ids=[], **own, **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_trainable_parameter_gets_a_gradient_and_no_other(family):
    torch.manual_seed(0)
    model = VLVModel(config_of(family)).eval()
    pixels = torch.randn(1, 3, 32, 32)
    for trainable, parts in (
        ("projector", START),
        ("query_decoder", DECODER),
        ("transformer", DECODER),
        ("all", DECODER | {"image_encoder"}),
    ):
        freeze_for_stage1(model, trainable)
        model.zero_grad()
        model(pixels).conditioning.square().sum().backward()
        names = trainable_names(model)
        assert {name.partition(".")[0] for name in names} == parts
        assert names == {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_stage_2_trains_the_same_parts():
    model = VLVForConditionalGeneration(config_of("siglip", text_config=language_model_config()))
    own = {"language_projection", "language_model"}
    for trainable, parts in (
        ("projector+lm", own),
        ("projector+lm+query_decoder", own | {"model.query_decoder", "model.multi_modal_projector"}),
        ("all", own | {"model.query_decoder", "model.multi_modal_projector"}),
        ("all+vision", own | {"model.query_decoder", "model.multi_modal_projector", "model.image_encoder"}),
    ):
        freeze_for_stage2(model, trainable)
        found = {".".join(name.split(".")[: 2 if name.startswith("model.") else 1]) for name in trainable_names(model)}
        assert found == parts


def test_lora_layers_are_the_backbones_and_the_query_decoder_is_trained_in_full():
    pytest.importorskip("peft")
    torch.manual_seed(0)
    model = VLVModel(config_of("vit")).eval()
    freeze_for_stage1(model, "query_decoder")
    with pytest.raises(ValueError, match="encoder_lora_rank is for the vision backbone, which is frozen"):
        add_encoder_lora(model, 2)
    freeze_for_stage1(model, "all")
    whole = {name for name in trainable_names(model) if not name.startswith("image_encoder.")}
    pixels = torch.randn(1, 3, 32, 32)
    before = model(pixels).conditioning
    add_encoder_lora(model, 2)
    adapted = {name for name in trainable_names(model) if name.startswith("image_encoder.")}
    assert adapted and all(".lora_" in name for name in adapted) and trainable_names(model) - adapted == whole
    merge_encoder_lora(model)
    assert_close_to_scale(model(pixels).conditioning, before)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A SigLIP of images and text, with its image processor."""
    folder = tmp_path_factory.mktemp("siglip")
    text = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text |= {"vocab_size": 9, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    torch.manual_seed(4)
    config = SiglipConfig(vision_config=backbone_configs()["siglip"].to_dict(), text_config=text)
    SiglipModel(config).save_pretrained(folder)
    own = {"image_processor_type": "SiglipImageProcessor", "size": {"height": 32, "width": 32}}
    (folder / "preprocessor_config.json").write_text(json.dumps(own))
    return folder


@pytest.fixture(scope="module")
def settings(backbone, stable_diffusion, image_folder):
    return {
        **{"image_encoder": backbone, "diffusion_model": stable_diffusion, "images": image_folder},
        **{"query_decoder_layers": 1, "query_decoder_width": 24, "query_decoder_heads": 2, "pre_crop_size": 0},
        **{"query_decoder_dropout": 0, "diffusion_image_size": 32, "num_query_tokens": 8, "max_steps": 2},
        **{"per_device_train_batch_size": 2, "learning_rate": 1e-3, "validation_steps": 0, "logging_steps": 1},
        **{"dataloader_num_workers": 0, "use_cpu": True, "disable_tqdm": True},
    }


def train(settings, **changes):
    return stage1.main([f"--{name}={value}" for name, value in (settings | changes).items()])


REMOTE = """
import json, sys, torch
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
torch.manual_seed(5)
pixels = torch.randn(1, 3, 32, 32)
print(json.dumps(model(pixels).conditioning.double().square().sum().item()))
"""


@pytest.mark.slow
def test_stage_1_starts_from_a_folder_and_what_it_saves_loads_everywhere(
    settings, backbone, language_model, tmp_path, capsys
):
    decoder = settings["diffusion_model"]
    trainer = train(settings, output_dir=tmp_path / "run", trainable="all", encoder_activation_checkpointing=True)
    model, processor = hub.load_encoder(tmp_path / "run")
    assert processor.size == {"height": 32, "width": 32} and list(processor.image_mean) == [0.5, 0.5, 0.5]
    start = SiglipModel.from_pretrained(backbone).vision_model.state_dict()
    _, used = examine_backbone(model.config.image_encoder_config)
    trained = {name for name, tensor in model.image_encoder.state_dict().items() if not tensor.equal(start[name])}
    assert used >= trained > {"encoder.layers.0.mlp.fc1.weight"}
    frozen = [name for name in start if name not in used]
    assert frozen and all(model.image_encoder.state_dict()[name].equal(start[name]) for name in frozen)
    assert model.query_decoder.config.decoder_layers == 1
    main(["info", str(tmp_path / "run")])
    assert "query decoder" in capsys.readouterr().out
    captioner = VLVForConditionalGeneration.from_vlv_text_pretrained(str(tmp_path / "run"), str(language_model))
    torch.manual_seed(5)
    pixels = torch.randn(1, 3, 32, 32)
    found = captioner.model(pixels).conditioning
    assert_close_to_scale(found, model(pixels).conditioning)
    assert captioner.generate(pixel_values=pixels, max_new_tokens=2).shape[0] == 1
    folder = hub.export(tmp_path / "exported", encoder=model, image_processor=processor, diffusion_model=decoder)
    remote = Machine(tmp_path / "machine", nowhere()).without_package(REMOTE, folder)
    assert remote == pytest.approx(found.double().square().sum().item(), rel=1e-5)
    assert trainer.state.global_step == 2


@pytest.mark.slow
def test_losses_with_cached_features_are_those_without(settings, tmp_path, capsys):
    losses = []
    for name, cache in (("plain", {}), ("cached", {"cache_vision_features": tmp_path / "features"})):
        trainer = train(settings, output_dir=tmp_path / name, trainable="query_decoder", **cache)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and len(set(losses[0])) == 2
    assert "2.06 kB an image" in capsys.readouterr().out  # of 32 x 4 x 4 float32


def test_settings_that_do_not_fit_are_errors_that_name_them(settings, language_model, tmp_path):
    for changes, words in (
        ({"encoder_image_size": 4}, "does not fit: SiglipVisionModel gives no features .* own size is 32 x 32"),
        ({"image_encoder": language_model}, f"image_encoder {language_model} does not fit.*'qwen2'"),
        ({"image_encoder": "org/never"}, "image_encoder org/never could not be loaded"),
        ({"query_decoder_heads": 5}, None),
    ):
        with pytest.raises(SystemExit, match=words):
            train(settings, output_dir=tmp_path / "run", **changes)
    VLVModel(vlv_config()).image_encoder.save_pretrained(tmp_path / "florence")
    with pytest.raises(SystemExit, match=r"query_decoder_layers is set, but image_encoder .* is a Florence-2"):
        train(settings, output_dir=tmp_path / "run", image_encoder=tmp_path / "florence")


def test_the_step_of_a_backbone_is_estimated_by_part(settings, capsys):
    from vlv.train.estimate import count_training_step

    names = ("image_encoder", "diffusion_model", "query_decoder_width", "query_decoder_heads", "num_query_tokens")
    own = {name: settings[name] for name in names} | {"diffusion_image_size": 32}
    own |= {name: str(own[name]) for name in ("image_encoder", "diffusion_model")}
    parts = count_training_step(Stage1Config(use_cpu=True, per_device_train_batch_size=2, **own)).count.parts
    assert {"vision_tower", "image_projection", "query_decoder"} <= set(parts) and "transformer_encoder" not in parts
    assert parts["query_decoder"].backward and not sum(parts["vision_tower"].backward.values())
