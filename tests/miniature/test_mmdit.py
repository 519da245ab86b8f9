"""The second recipe: an MMDiT for a teacher, and the first recipe's other parts."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from vlv import VLVModel, hub
from vlv.diffusion_decoder import StableDiffusion3Decoder
from vlv.diffusion_decoder.sd3 import EMPTY_POSITIONS, arrange_conditioning
from vlv.miniature import recipe
from vlv.miniature.captioner import train_captioner
from vlv.miniature.data import SceneDataset
from vlv.miniature.encoder import train_encoder
from vlv.miniature.evaluation import SCENE_CLASSIFIER_FILE, evaluate_miniature, teacher_pipeline
from vlv.miniature.folding import FoldedAttention, fold_empty_positions
from vlv.miniature.grammar import parse_caption
from vlv.miniature.latents import CHUNK, SCENE_SEED, encode_scenes, load_latents
from vlv.miniature.mmdit_teacher import (
    LatentCaptions,
    MMDiTTeacherLoss,
    build_text_encoders,
    build_transformer,
    initialize_transformer,
    train_mmdit_teacher,
)
from vlv.miniature.tokenizer import build_tokenizer
from vlv.modeling_vlv import TEXT_ENCODERS
from vlv.pipelines import VLVPooledReconstructionPipeline, build_reconstruction, load_reconstruction

from ..builders import assert_close_to_scale, vlv_config

MINIATURE = Path(__file__).parents[2] / "checkpoints" / "vlv-miniature"


@pytest.fixture(scope="module")
def untrained():
    """The teacher's text encoders and its MMDiT, whose output is not zero."""
    torch.manual_seed(0)
    encoders = [encoder.eval() for encoder in build_text_encoders(build_tokenizer(for_text_encoder=True))]
    transformer = build_transformer(latent_channels=16, joint_width=192).eval()
    initialize_transformer(transformer, encoders)
    torch.nn.init.normal_(transformer.proj_out.weight)
    return encoders, transformer


def test_one_empty_position_that_counts_256_times_gives_the_same_as_256(untrained):
    _, transformer = untrained
    folded = copy.deepcopy(transformer)
    fold_empty_positions(folded)
    folded = copy.deepcopy(folded)  # as the moving average does
    words = torch.randn(2, 10, 192)
    inputs = {
        "hidden_states": torch.randn(2, 16, 8, 8),
        "timestep": torch.tensor([50.0, 900.0]),
        "pooled_projections": torch.randn(2, 192),
    }

    def outputs(context: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(**inputs, encoder_hidden_states=context).sample for model in (transformer, folded)]

    expected, found = outputs(torch.cat([words, torch.zeros(2, EMPTY_POSITIONS, 192)], dim=1))
    assert_close_to_scale(found, expected)
    processor = folded.transformer_blocks[0].attn.processor
    assert isinstance(processor, FoldedAttention) and processor.copies == EMPTY_POSITIONS
    with_words, found = outputs(torch.randn(2, EMPTY_POSITIONS + 10, 192))
    assert_close_to_scale(found, with_words)
    assert processor.copies == 1 and (with_words - expected).abs().max() > 0.1


def test_the_teacher_is_trained_on_what_the_pipeline_of_diffusers_gives_it(untrained, stable_diffusion):
    encoders, transformer = untrained
    tokenizer = build_tokenizer(for_text_encoder=True)
    autoencoder = hub.load_diffusion_components(stable_diffusion)["vae"]
    loss = MMDiTTeacherLoss(encoders, transformer, autoencoder).eval()
    captions = ["a large cat at the centre", ""]
    ids = tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
    pipeline = StableDiffusion3Pipeline(
        transformer, None, autoencoder, encoders[0], tokenizer, encoders[1], tokenizer, None, None
    )
    with torch.no_grad():
        conditioning = loss.encode(ids)
        states, _, pooled, _ = pipeline.encode_prompt(captions, None, None, do_classifier_free_guidance=False)
    assert torch.equal(arrange_conditioning(conditioning.hidden_states, 192), states)
    assert torch.equal(conditioning.pooled, pooled)


def test_embedding_mixing_happens_in_training_alone(untrained, stable_diffusion):
    encoders, transformer = untrained
    autoencoder = hub.load_diffusion_components(stable_diffusion)["vae"]
    loss = MMDiTTeacherLoss(copy.deepcopy(encoders), transformer, autoencoder, embedding_mixing=1.0)
    ids = torch.randint(4, 50, (8, 12))
    with torch.no_grad():
        kept = [loss.eval().encode(ids).hidden_states for _ in range(2)]
        mixed = loss.train().encode(ids).hidden_states
    assert torch.equal(*kept)
    changed = (mixed - kept[0]).abs().amax(dim=1) > 1e-4  # (8, 192)
    assert changed[:, :128].any() and changed[:, 128:].any()


def test_only_the_first_text_encoder_is_frozen(untrained, stable_diffusion):
    encoders, transformer = copy.deepcopy(untrained)
    autoencoder = hub.load_diffusion_components(stable_diffusion)["vae"]
    loss = MMDiTTeacherLoss(encoders, transformer, autoencoder)
    loss(torch.randn(4, 16, 8, 8), torch.randint(4, 50, (4, 48)))["loss"].backward()
    assert all(parameter.grad is None for parameter in encoders[0].parameters())
    trained = [*encoders[1].parameters(), *transformer.parameters()]
    assert all(parameter.grad is not None for parameter in trained)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the embedded miniature's parts, where each part of the second recipe was trained for two steps."""
    root = tmp_path_factory.mktemp("mmdit")
    recipe.take_parts(MINIATURE, root)
    work, scene_classifier = root / "work", root / SCENE_CLASSIFIER_FILE
    encode_scenes(root / "latents", work / "latents", root / "autoencoder", scenes=16)
    first = (root / "autoencoder", root / "teacher-3", scene_classifier, root / "latents")
    train_mmdit_teacher(root / "mmdit-teacher", work / "mmdit-teacher", *first, images=8, batch_size=8)
    further = {"partial_captions": 0.5, "embedding_mixing": 0.5, "initial_teacher": root / "mmdit-teacher"}
    train_mmdit_teacher(root / "mmdit-teacher-2", work / "mmdit-teacher-2", *first, images=16, batch_size=8, **further)
    teacher = (root / "mmdit-teacher-2", scene_classifier)
    train_encoder(root / "mmdit-encoder", work / "mmdit-encoder", *teacher, images=16, batch_size=8)
    parts = (root / "mmdit-encoder", root / "language-model")
    train_captioner(root / "mmdit-captioner", work / "mmdit-captioner", *parts, pairs=16, epochs=1, batch_size=8)
    return root


@pytest.mark.slow
def test_its_parts_are_assembled_into_a_model_that_is_measured(trained, tmp_path):
    recipe.assemble(trained, tmp_path, "mmdit")
    pipeline = load_reconstruction(tmp_path)
    assert isinstance(pipeline, VLVPooledReconstructionPipeline)
    assert [encoder.config.hidden_size for encoder in pipeline.encoder.text_encoders] == [128, 64]
    found: dict = {}
    evaluate_miniature(tmp_path, found.__setitem__, n=2, steps=1)
    assert {"reconstructions, combo, guidance 2", "captions, combo"} <= set(found)
    assert found["autoencoder, test"]["psnr"] > 25
    with pytest.raises(ValueError, match="give a miniature of the first recipe"):
        recipe.take_parts(tmp_path, tmp_path / "parts")


@pytest.mark.slow
def test_the_encoder_has_the_text_encoders_of_the_teacher(trained):
    encoder = VLVModel.from_pretrained(trained / "mmdit-encoder")
    teacher = StableDiffusion3Pipeline.from_pretrained(
        trained / "mmdit-teacher-2", text_encoder_3=None, tokenizer_3=None
    )
    for own, other in zip(encoder.text_encoders, (teacher.text_encoder, teacher.text_encoder_2), strict=True):
        assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in own.state_dict().items())


@pytest.mark.slow
def test_only_missing_parts_are_in_the_plan(trained, tmp_path, monkeypatch):
    needed = [run.name for run in recipe.needed_runs(recipe.MMDIT_PARTS, trained)]
    assert needed == ["autoencoder", *[run.name for run in recipe.MMDIT_PARTS]]  # for the latents
    started = []
    monkeypatch.setattr(recipe, "_run_command", lambda command, root, name: started.append(name))
    monkeypatch.setattr(sys, "argv", ["vlv.miniature", "--root", str(trained), "--recipe", "mmdit"])
    recipe.main()
    assert started == ["latents"]  # of 16 scenes, so its last file is missing


def test_from_nothing_the_second_recipe_needs_the_first_ones_parts_but_not_its_encoder(tmp_path):
    names = [run.name for run in recipe.needed_runs(recipe.MMDIT_PARTS, tmp_path)]
    first = ["scene-classifier", "autoencoder", "teacher", "teacher-2", "teacher-3", "language-model"]
    assert names == [*first, *[run.name for run in recipe.MMDIT_PARTS]]


def test_scenes_are_encoded_once_and_described_in_other_words(tmp_path):
    encode_scenes(tmp_path / "latents", tmp_path, MINIATURE / "vae", scenes=4)
    file = tmp_path / "latents" / "latents-0000.safetensors"
    written = file.stat().st_mtime_ns
    encode_scenes(tmp_path / "latents", tmp_path, MINIATURE / "vae", scenes=4)
    assert file.stat().st_mtime_ns == written
    latents = load_latents(tmp_path / "latents")
    assert latents.shape == (4, 16, 8, 8)
    data = LatentCaptions(latents, SceneDataset(CHUNK, seed=SCENE_SEED, fields=("scene",)), 8, 0, 0.0)
    again = [data[index] for index in (1, 5)]
    assert all(torch.equal(item["latents"], latents[1]) for item in again)
    objects = data.scenes[1].objects
    assert [parse_caption(item["caption"]).objects for item in again] == [objects, objects]
    assert again[0]["caption"] != again[1]["caption"]
    with pytest.raises(FileNotFoundError, match="encode the scenes first"):
        load_latents(tmp_path)


def test_a_teacher_has_all_text_encoders_of_the_model(stable_diffusion_3, image_processor):
    components = DiffusionPipeline.from_pretrained(stable_diffusion_3).components
    configs = {f"{name}_config": components[name].config for name in TEXT_ENCODERS}
    model = VLVModel(vlv_config(**configs, **StableDiffusion3Decoder.text_settings(3)))
    parts = {name: part for name, part in components.items() if name.startswith(("vae", "tr", "sch", "tok"))}
    teacher = teacher_pipeline(build_reconstruction(model, image_processor, parts))
    assert [getattr(teacher, name) for name in TEXT_ENCODERS] == list(model.text_encoders)
