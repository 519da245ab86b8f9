"""The estimate of a training: full-size counts beside known figures, and arithmetic on small models."""

import logging
from pathlib import Path

import pytest
import torch

from vlv.train import Stage1Config, Stage2Config, configs
from vlv.train.estimate import count_training_step, estimate, find_stage, recipe_beside
from vlv.train.hardware import GPUS, UNET_TRAINING_SPEEDS, find_gpu
from vlv.train.meta_models import build_diffusion_decoder
from vlv.train.parsing import parse_config

H100 = GPUS["H100"]
RECIPES = Path(configs.__file__).parent


@pytest.fixture(scope="module")
def small1(stable_diffusion, stage1_checkpoint):
    def config(**settings) -> Stage1Config:
        defaults = {"model": str(stage1_checkpoint), "diffusion_model": str(stable_diffusion), "max_steps": 10}
        settings = {"encoder_image_size": 64, "diffusion_image_size": 32, "per_device_train_batch_size": 4, **settings}
        return Stage1Config(use_cpu=True, **{**defaults, **settings})

    return config


@pytest.fixture(scope="module")
def counted(small1):
    return count_training_step(small1())


@pytest.mark.slow
def test_the_cheap_recipe_of_stage_1_has_the_known_flops_and_a_low_price():
    """TFLOP of one image at 384 x 384 pixels, worked out by hand from the layers' sizes."""
    config = parse_config(Stage1Config, [str(RECIPES / "stage1_under_300.yaml"), "--use_cpu", "true"], "test")
    found = estimate(config, H100, 8)

    def tflop(*names: str) -> float:
        return sum(found.step.parts[name].total() for name in names) / found.batch / 1e12

    assert tflop("vision_tower") == pytest.approx(0.37, rel=0.03)
    assert tflop("vae_encoder") == pytest.approx(0.62, rel=0.03)
    assert tflop("text_encoder") == pytest.approx(0.09, rel=0.03)
    assert tflop("denoiser") == pytest.approx(0.864, rel=0.03)
    # By hand without the scores that fused attention computes again, and the gradient of the first layer's input.
    assert tflop("transformer_encoder", "transformer_decoder") == pytest.approx(0.25, rel=0.1)
    assert found.dollars() < 200 and found.memory.total() < 80e9


@pytest.mark.slow
def test_the_cheap_recipe_of_stage_2_has_a_low_price_and_needs_no_sharding():
    path = RECIPES / "stage2_under_300.yaml"
    config = parse_config(Stage2Config, [str(path), "--use_cpu", "true"], "test")
    found = estimate(config, H100, 8, stage1=recipe_beside(path, config.model, "test"))
    assert found.dollars() < 100 and found.memory.total() < 80e9


def test_hours_and_price_are_those_of_the_counted_flops(small1, counted):
    found = estimate(small1(gradient_accumulation_steps=3), H100, 2, counted=counted, price=4.0, utilization=0.5)
    seconds = 0.0
    for part in counted.count.parts.values():
        kinds = part.kinds()
        seconds += kinds["convolution"] / (494.7e12 * 0.5) + (kinds["matmul"] + kinds["attention"]) / (67e12 * 0.5)
    assert found.hours() == pytest.approx(10 * 3 * seconds / 3600)
    assert found.dollars() == pytest.approx(found.hours() * 2 * 4.0) and found.images() == 10 * 3 * 4 * 2
    figures = found.to_dict()
    assert figures["images_per_second"] == pytest.approx(8 / seconds)
    assert sum(part["share_of_time"] for part in figures["tflop_per_image"].values()) == pytest.approx(1)


def test_a_share_of_the_peak_can_be_given_by_part(small1, counted):
    one = estimate(small1(), H100, 1, counted=counted, utilization=0.4)
    other = estimate(small1(), H100, 1, counted=counted, utilization={"": 0.4, "denoiser": 0.1})
    assert other.seconds["denoiser"] == pytest.approx(4 * one.seconds["denoiser"])
    assert other.seconds["vision_tower"] == pytest.approx(one.seconds["vision_tower"])
    with pytest.raises(ValueError, match=r"names the part 'unet'; expected one of vae_encoder, vision_tower"):
        estimate(small1(), H100, 1, counted=counted, utilization={"unet": 0.1})
    with pytest.raises(ValueError, match="utilization is 35"):
        estimate(small1(), H100, 1, counted=counted, utilization=35)


@pytest.mark.slow
def test_half_precision_changes_speed_and_memory_and_leaves_the_autoencoder_alone(small1, counted):
    half = estimate(small1(bf16=True), H100, 1)
    full = estimate(small1(), H100, 1, counted=counted)
    assert half.step.total() == full.step.total()
    assert half.seconds["vae_encoder"] == full.seconds["vae_encoder"]
    assert half.seconds["text_encoder"] == pytest.approx(full.seconds["text_encoder"] * 67 / 989.4)
    assert half.memory.trained_weights == full.memory.trained_weights  # float32 master weights
    assert half.memory.frozen_weights < full.memory.frozen_weights  # the denoiser is loaded in bfloat16
    assert half.memory.activations < 0.85 * full.memory.activations


def test_the_denoiser_is_built_in_half_precision_without_a_warning(stable_diffusion, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("diffusers.models.modeling_utils"), "warning", said.append)
    assert build_diffusion_decoder(str(stable_diffusion), torch.bfloat16).unet.dtype == torch.bfloat16 and not said


@pytest.mark.slow
def test_what_is_trained_and_cached_decides_what_is_computed_and_stored(small1, counted):
    settings = {"trainable": "projector", "cache_vision_features": "features"}
    projector = estimate(small1(**settings), H100, 1, cached_moments=True)
    cached = {"vae_encoder", "vision_tower", "image_projection"}
    assert cached <= set(counted.count.parts) and not cached & set(projector.step.parts)
    for name in ("transformer_encoder", "transformer_decoder", "text_encoder"):
        assert projector.step.parts[name].forward == counted.count.parts[name].forward
    assert projector.step.parts["denoiser"].total() == counted.count.parts["denoiser"].total()
    assert not sum(projector.step.parts["transformer_encoder"].backward.values())
    assert sum(projector.step.parts["transformer_decoder"].backward.values())  # its query tokens are trained
    assert not sum(counted.count.parts["vision_tower"].backward.values())
    everything = estimate(small1(trainable="all"), H100, 1)
    assert sum(everything.step.parts["vision_tower"].backward.values())
    assert projector.trained < estimate(small1(), H100, 1, counted=counted).trained < everything.trained
    assert (
        everything.memory.optimizer == 8 * everything.trained and everything.memory.gradients == 4 * everything.trained
    )
    assert everything.trained + everything.frozen == projector.trained + projector.frozen


def test_copies_of_weights_are_counted_where_they_exist(small1, counted):
    one, two = (estimate(small1(), H100, cards, counted=counted).memory for cards in (1, 2))
    assert one.ddp_buckets == 0 and two.ddp_buckets == two.gradients
    config = small1(ema_decay=0.999)
    config.optim = "adamw_torch_8bit"  # only its name matters, so that its package need not be installed
    eight_bit = estimate(config, H100, 1, counted=counted).memory
    assert eight_bit.optimizer * 4 == one.optimizer and eight_bit.averaged_weights == eight_bit.trained_weights


@pytest.mark.slow
def test_stage_2_counts_the_tokens_of_captions(stage1_checkpoint, language_model):
    config = Stage2Config(
        use_cpu=True, model=str(stage1_checkpoint), language_model=str(language_model), per_device_train_batch_size=2
    )
    whole, short = (estimate(config, H100, 1, caption_tokens=tokens) for tokens in (None, 92))
    language_model = [found.step.parts["language_model"].total() for found in (whole, short)]
    assert 3 < language_model[0] / language_model[1] < 6  # 8 + 300 positions beside 8 + 92, and attention
    assert whole.step.parts["vision_tower"].total() == short.step.parts["vision_tower"].total()
    assert whole.step.parts["language_model"].kinds()["attention"] > 0


def test_epochs_need_the_size_of_the_data(small1, counted):
    config = small1(max_steps=200_000, num_train_epochs=2)
    with pytest.raises(ValueError, match="give --samples, or max_steps"):
        estimate(config, H100, 2, counted=counted)
    assert estimate(config, H100, 2, counted=counted, samples=17).steps == 2 * 3


def test_unknown_models_say_what_to_give():
    with pytest.raises(ValueError, match=r"image_encoder a/b is not known.*config\.json.*Florence-2-base"):
        count_training_step(Stage1Config(use_cpu=True, image_encoder="a/b"))
    with pytest.raises(ValueError, match=r"diffusion_model a/b is not known.*model_index\.json.*stable-diff.*-3\.5-l"):
        count_training_step(Stage1Config(use_cpu=True, diffusion_model="a/b"))
    with pytest.raises(ValueError, match=r"model is not set.*Florence-2-large"):
        count_training_step(Stage2Config(use_cpu=True))


def test_gpus_are_found_by_their_usual_spellings():
    assert find_gpu("rtx4090") is GPUS["RTX 4090"] and find_gpu("NVIDIA h100") is H100
    with pytest.raises(ValueError, match="'V100' is not known; expected one of A100, H100"):
        find_gpu("V100")
    assert set(UNET_TRAINING_SPEEDS) <= set(GPUS)


def test_the_stage_is_found_from_the_settings():
    assert find_stage({"images", "learning_rate"}) == 1 and find_stage({"pairs"}) == 2
    for names in ({"learning_rate"}, {"images", "pairs"}):
        with pytest.raises(ValueError, match="give --stage 1, 2 or 3"):
            find_stage(names)
    assert find_stage({"images", "num_captions"}) == 3
