"""The reconstruction pipeline has what diffusers expects of a pipeline: arguments, members, memory use, precisions."""

import inspect

import numpy as np
import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderTiny,
    ConsistencyDecoderVAE,
    DDIMScheduler,
)
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin

from vlv import hub
from vlv.diffusion_decoder import load_diffusion_decoder
from vlv.pipelines import VLVReconstructionPipeline, load_reconstruction

from ..builders import assert_close_to_scale

MODELS = ("encoder", "unet", "vae")
UP, DOWN = "UpDecoderBlock2D", "DownEncoderBlock2D"
AUTOENCODERS = {  # factories, each with the same latents as the pipeline's: 4 channels, a quarter of the image's sides
    "asymmetric": lambda: AsymmetricAutoencoderKL(
        down_block_types=(DOWN,) * 3,
        down_block_out_channels=(4, 4, 4),
        up_block_types=(UP,) * 3,
        up_block_out_channels=(8, 8, 16),
        norm_num_groups=4,
    ),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ),
    "consistency decoder": lambda: ConsistencyDecoderVAE(
        encoder_block_out_channels=(8, 8, 8),
        encoder_down_block_types=(DOWN,) * 3,
        encoder_norm_num_groups=4,
        decoder_block_out_channels=(8, 8, 8),
        decoder_down_block_types=("ResnetDownsampleBlock2D",) * 3,
        decoder_up_block_types=("ResnetUpsampleBlock2D",) * 3,
        decoder_layers_per_block=1,
        decoder_norm_num_groups=4,
    ),
}


@pytest.fixture
def pipe(reconstruction):
    reconstruction.scheduler = DDIMScheduler.from_config(reconstruction.scheduler.config)  # draws no noise of its own
    return reconstruction


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in range(count)]


def generate(pipe, images, **settings) -> torch.Tensor:
    """Latents `(B, 4, h, w)`, or what `output_type` says."""
    settings = {"num_inference_steps": 2, "generator": seeds(len(images)), "output_type": "latent", **settings}
    return pipe(images, **settings).images


# --- members and arguments ------------------------------------------------------------------------------------------


def test_components_are_the_arguments_of_the_constructor(pipe):
    names = set(inspect.signature(type(pipe).__init__).parameters) - {"self", "diffusion_model"}
    assert set(pipe.components) == names
    assert all(pipe.components[name] is getattr(pipe, name) for name in names)
    assert type(pipe)(**pipe.components).components == pipe.components
    assert set(pipe._optional_components) == names - {"encoder", "image_processor"}


def test_the_call_has_the_arguments_that_image_pipelines_share():
    parameters = inspect.signature(VLVReconstructionPipeline.__call__).parameters
    expected = {"num_inference_steps", "num_images_per_prompt", "generator", "latents", "output_type", "return_dict"}
    expected |= {"height", "width", "timesteps", "sigmas", "guidance_scale", "guidance_rescale", "negative_prompt"}
    expected |= {"eta", "callback_on_step_end", "callback_on_step_end_tensor_inputs"}
    assert expected <= set(parameters)
    assert not [p for p in parameters.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def test_an_unknown_argument_is_refused(pipe, images):
    with pytest.raises(TypeError, match="guidance"):
        pipe(images[0], guidance=2.0)


def test_models_are_offloaded_in_the_order_of_their_use(pipe, images):
    order = []
    for name in MODELS:
        module = getattr(pipe, name) if name != "vae" else pipe.vae.decoder
        module.register_forward_pre_hook(lambda *_, name=name: order.append(name))
    pipe(images[0], num_inference_steps=1)
    first_uses = list(dict.fromkeys(order))
    assert first_uses == VLVReconstructionPipeline.model_cpu_offload_seq.split("->") == list(MODELS)
    assert order == sorted(order, key=first_uses.index)  # none is used again after the next


def test_a_dict_and_a_tuple_hold_the_same_images(pipe, images):
    settings = {"num_inference_steps": 2, "output_type": "np"}
    output = pipe(images[0], generator=seeds(1), **settings)
    as_tuple = pipe(images[0], generator=seeds(1), return_dict=False, **settings)
    assert isinstance(as_tuple, tuple) and len(as_tuple) == 1
    assert np.array_equal(output.images, as_tuple[0]) and np.array_equal(output[0], as_tuple[0])


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("copies", [1, 2])
def test_each_image_of_a_batch_has_num_images_per_prompt_reconstructions(pipe, images, count, copies):
    got = generate(pipe, images[:count], num_images_per_prompt=copies, generator=seeds(count * copies))
    assert len(got) == count * copies
    for position, seed in enumerate(seeds(count * copies)):
        alone = generate(pipe, [images[position // copies]], generator=[seed])
        assert_close_to_scale(got[position], alone[0], 1e-4)
    pil = pipe(images[:count], num_inference_steps=1, num_images_per_prompt=copies).images
    assert [image.size for image in pil] == [(32, 32)] * (count * copies)


def test_callback_tensor_inputs_are_all_that_a_callback_may_name(pipe, images):
    seen = []

    def zero_at_the_end(pipeline, step, timestep, callback_kwargs):
        seen.append(sorted(callback_kwargs))
        last = step == pipeline.num_timesteps - 1
        return {"latents": torch.zeros_like(callback_kwargs["latents"])} if last else callback_kwargs

    names = VLVReconstructionPipeline._callback_tensor_inputs
    settings = {"callback_on_step_end": zero_at_the_end, "callback_on_step_end_tensor_inputs": names}
    assert not generate(pipe, images[:2], **settings).any()
    assert seen == [sorted(names)] * 2


def test_a_callback_changes_the_guidance_scale(pipe, images):
    def increase(pipeline, step, timestep, callback_kwargs):
        pipeline._guidance_scale += 1.0
        return callback_kwargs

    changed = generate(pipe, images[:1], guidance_scale=3.0, callback_on_step_end=increase)
    assert pipe.guidance_scale == 3.0 + pipe.num_timesteps
    assert not torch.equal(changed, generate(pipe, images[:1], guidance_scale=3.0))


def test_the_progress_bar_follows_its_settings(pipe, images, capsys):
    pipe(images[0], num_inference_steps=2)
    assert "2/2" not in capsys.readouterr().err
    pipe.set_progress_bar_config(desc="reconstruct", disable=False)
    pipe(images[0], num_inference_steps=2)
    printed = capsys.readouterr().err
    assert "reconstruct" in printed and "2/2" in printed


# --- memory ---------------------------------------------------------------------------------------------------------


def test_vae_slicing_gives_the_same_images(pipe, images):
    expected = generate(pipe, images[:3], output_type="pt")
    rows = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    pipe.vae.enable_slicing()
    assert_close_to_scale(generate(pipe, images[:3], output_type="pt"), expected, 1e-4)
    pipe.vae.disable_slicing()
    assert torch.equal(generate(pipe, images[:3], output_type="pt"), expected)
    assert rows == [1, 1, 1, 3]


def test_vae_tiling_decodes_sizes_beyond_a_tile_in_several_tiles(pipe, images):
    size = {"height": 64, "width": 96, "output_type": "pt"}
    expected = generate(pipe, images[:1], **size)
    sizes = []
    pipe.vae.decoder.register_forward_pre_hook(lambda module, inputs: sizes.append(tuple(inputs[0].shape[-2:])))
    pipe.vae.enable_tiling()
    tiled = generate(pipe, images[:1], **size)
    assert tiled.shape == expected.shape == (1, 3, 64, 96)
    assert len(sizes) > 4 and max(sizes) == (8, 8)  # tiles of the size that the autoencoder was trained for
    pipe.vae.disable_tiling()
    assert torch.equal(generate(pipe, images[:1], **size), expected)


@pytest.mark.parametrize("slice_size", ["auto", "max", 1])
def test_attention_slicing_gives_the_same_images(pipe, images, slice_size):
    expected = generate(pipe, images[:2])
    whole = {type(processor) for processor in pipe.unet.attn_processors.values()}
    pipe.enable_attention_slicing(slice_size)
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} != whole
    assert_close_to_scale(generate(pipe, images[:2]), expected, 1e-4)
    pipe.disable_attention_slicing()
    assert torch.equal(generate(pipe, images[:2]), expected)


@pytest.mark.slow
def test_model_cpu_offload_gives_the_same_images_twice(pipe, images):
    expected = generate(pipe, images[:1], output_type="pt")
    pipe.enable_model_cpu_offload(device="cpu")
    assert all(hasattr(getattr(pipe, name), "_hf_hook") for name in MODELS)
    for _ in range(2):
        assert_close_to_scale(generate(pipe, images[:1], output_type="pt"), expected, 1e-4)


def test_weights_that_are_loaded_only_while_their_module_runs_give_the_same_images_twice(pipe, images):
    """What `enable_sequential_cpu_offload` does; itself it needs an accelerator."""
    expected = generate(pipe, images[:1], output_type="pt")
    for name in MODELS:
        model = getattr(pipe, name)
        cpu_offload(model, torch.device("cpu"), offload_buffers=len(model._parameters) > 0)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert pipe._execution_device == torch.device("cpu")
    for _ in range(2):
        assert_close_to_scale(generate(pipe, images[:1], output_type="pt"), expected, 1e-4)


# --- StableDiffusionMixin -------------------------------------------------------------------------------------------


def test_free_u_changes_the_image_until_it_is_disabled(pipe, images):
    assert isinstance(pipe, StableDiffusionMixin)
    plain = generate(pipe, images[:1])
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert (generate(pipe, images[:1]) - plain).abs().max() > 1e-3
    pipe.disable_freeu()
    assert torch.equal(generate(pipe, images[:1]), plain)


def test_fused_projections_give_the_same_images(pipe, images):
    expected = generate(pipe, images[:2], output_type="pt")
    pipe.fuse_qkv_projections()
    assert all("Fused" in type(processor).__name__ for processor in pipe.unet.attn_processors.values())
    assert_close_to_scale(generate(pipe, images[:2], output_type="pt"), expected, 1e-3)
    pipe.unfuse_qkv_projections()
    assert_close_to_scale(generate(pipe, images[:2], output_type="pt"), expected, 1e-3)


# --- other autoencoders ---------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", AUTOENCODERS)
def test_other_autoencoders_decode(pipe, images, name, tmp_path, caplog):
    torch.manual_seed(3)
    other = VLVReconstructionPipeline(**{**pipe.components, "vae": AUTOENCODERS[name]()})
    other.set_progress_bar_config(disable=True)
    assert other.vae_scale_factor == 4 and other.default_size == 32
    got = generate(other, images[:2], output_type="pt", height=24, width=40)
    assert got.shape == (2, 3, 24, 40)
    assert torch.equal(got, generate(other, images[:2], output_type="pt", height=24, width=40))  # seeds decide all
    with pytest.raises(ValueError, match="divisible by 4"):
        generate(other, images[:1], height=30)
    other.save_pretrained(tmp_path)
    caplog.clear()
    loaded = VLVReconstructionPipeline.from_pretrained(tmp_path)
    assert "Expected types for vae" not in caplog.text
    assert_close_to_scale(generate(loaded, images[:2], output_type="pt", height=24, width=40), got, 1e-3)
    assert VLVReconstructionPipeline.from_pipe(loaded).vae is loaded.vae
    assert type(load_reconstruction(tmp_path).vae) is type(other.vae)
    with pytest.raises(ValueError, match=f"vae is a {type(other.vae).__name__}; expected AutoencoderKL"):
        load_diffusion_decoder(str(tmp_path))  # of which stage 1 needs the distribution of latents


def test_the_scale_factor_is_that_of_the_autoencoder_s_decoder(pipe, images):
    vae = AsymmetricAutoencoderKL(
        down_block_types=(DOWN,) * 2,
        down_block_out_channels=(8, 8),
        up_block_types=(UP,) * 4,
        up_block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
    )
    other = VLVReconstructionPipeline(**{**pipe.components, "vae": vae})
    assert other.vae_scale_factor == 8 and other.default_size == 64
    assert generate(other, images[:1], output_type="pt").shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_latents_that_another_autoencoder_encodes_are_decoded_by_the_pipeline(pipe, name):
    torch.manual_seed(3)
    vae = AUTOENCODERS[name]()
    other = VLVReconstructionPipeline(**{**pipe.components, "vae": vae})
    with torch.no_grad():
        encoded = vae.encode(torch.rand(2, 3, 40, 24))
        latents = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
        expected = vae.decode(latents, generator=seeds(2)).sample / 2 + 0.5
    got = other.decode_latents(latents * vae.config.scaling_factor, "pt", generator=seeds(2))
    assert got.shape == (2, 3, 40, 24)
    assert_close_to_scale(got, expected.clamp(0, 1), 1e-3)


def test_an_exported_repository_names_the_autoencoder_s_class(pipe, tmp_path):
    torch.manual_seed(3)
    parts = {**pipe.components, "vae": AUTOENCODERS["tiny"]()}
    encoder, image_processor = parts["encoder"], parts["image_processor"]
    hub.export(tmp_path, encoder=encoder, image_processor=image_processor, diffusion_model=parts)
    assert type(VLVReconstructionPipeline.from_pretrained(tmp_path).vae) is AutoencoderTiny


# --- precisions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_to_casts_all_components_and_images_stay_float32(pipe, images, dtype):
    expected = generate(pipe, images[:1], output_type="np")
    assert pipe.to(dtype) is pipe and pipe.dtype == dtype
    assert {pipe.encoder.dtype, pipe.unet.dtype, pipe.vae.dtype} == {dtype}
    got = generate(pipe, images[:1], output_type="np")
    assert got.shape == expected.shape and np.isfinite(got).all()
    assert generate(pipe, images[:1]).dtype == dtype
    pipe.to(dtype=torch.float32, device="cpu")
    assert generate(pipe, images[:1]).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("load", [VLVReconstructionPipeline.from_pretrained, load_reconstruction])
def test_half_precision_is_saved_and_loaded(pipe, tmp_path, dtype, load):
    pipe.to(dtype).save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=dtype)
    for name in MODELS:
        weights = getattr(loaded, name).state_dict()
        for key, weight in getattr(pipe, name).state_dict().items():
            assert torch.equal(weights[key], weight) and weights[key].dtype == weight.dtype, key
