"""Features of images by models of transformers, and the resizing of Inception's images."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPProcessor, Dinov2Model

from vlv.evaluation.caption_metrics import bert_score, clip_scores
from vlv.evaluation.features import AutoModelFeatures, InceptionFeatures, resize_for_inception, scale_for_inception


def as_tensors(images: list[Image.Image]) -> list[torch.Tensor]:
    return [torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images]


def test_clips_features_are_its_image_embeddings_and_clip_score_is_2_5_cosines(clip_model, images):
    captions = ["a small dog", "a large apple at the top left", "a cat"]
    extractor = AutoModelFeatures(str(clip_model))
    features = extractor(as_tensors(images[:3]))
    model, processor = CLIPModel.from_pretrained(clip_model), CLIPProcessor.from_pretrained(clip_model)
    with torch.no_grad():
        inputs = processor(text=captions, images=images[:3], padding="max_length", max_length=12, return_tensors="pt")
        outputs = model(**inputs)
    unit = torch.nn.functional.normalize(features, dim=-1)
    assert torch.allclose(unit, outputs.image_embeds, atol=1e-5)
    scores = clip_scores(extractor, captions, features, [[caption] for caption in captions])
    expected = 2.5 * outputs.logits_per_image.diagonal().div(model.logit_scale.exp()).clamp_min(0)  # (3,)
    assert scores["clip_score"] == pytest.approx(expected.tolist(), abs=1e-5)
    assert scores["ref_clip_score"] == pytest.approx((2 * expected / (expected + 1)).tolist(), abs=1e-5)
    assert scores["cut"] == 0


def test_a_caption_longer_than_clip_reads_is_counted(clip_model):
    assert AutoModelFeatures(str(clip_model)).embed_texts(["a dog", "a dog " * 20])[1] == [False, True]


def test_texts_are_embedded_in_batches(clip_model):
    extractor, texts, sizes = AutoModelFeatures(str(clip_model)), ["a dog", "a cat", "a large apple"], []
    extractor.model.text_model.register_forward_hook(lambda module, args, output: sizes.append(len(output[0])))
    batches, _ = extractor.embed_texts(texts, batch_size=2)
    assert sizes == [2, 1]
    assert torch.allclose(batches, extractor.embed_texts(texts)[0], atol=1e-5)


def test_dinov2s_features_are_its_pooled_first_token(dinov2_model, images):
    extractor = AutoModelFeatures(str(dinov2_model))
    features = extractor(as_tensors(images[:2]))  # of two shapes
    with torch.no_grad():
        inputs = extractor.image_processor(images=images[:2], return_tensors="pt")
        expected = Dinov2Model.from_pretrained(dinov2_model)(**inputs).last_hidden_state[:, 0]
    assert torch.allclose(features, expected, atol=1e-5) and not torch.allclose(features[0], features[1])
    assert extractor.name.startswith("dinov2") and not extractor.is_contrastive
    with pytest.raises(ValueError, match="embeds no texts; pass a CLIP or SigLIP model"):
        extractor.embed_texts(["a dog"])


def test_fingerprints_of_extractors_differ_where_their_weights_do(clip_model, dinov2_model):
    first, second = AutoModelFeatures(str(clip_model)), AutoModelFeatures(str(dinov2_model))
    assert first.fingerprint != second.fingerprint
    assert first.fingerprint == AutoModelFeatures(str(clip_model)).fingerprint


def test_a_language_model_is_refused(language_model):
    with pytest.raises(ValueError, match=r"has no image processor, so its model \(qwen2\) gives no image features"):
        AutoModelFeatures(str(language_model))


def test_images_are_resized_for_inception_as_clean_fid_and_pytorch_fid_do():
    random = np.random.RandomState(3)
    image = torch.tensor(random.randint(0, 256, (3, 420, 350)), dtype=torch.uint8)
    # build_resizer of clean-fid 0.1.35 with "clean" and "legacy_pytorch", at the pixel (150, 150)
    clean, bilinear = [80.540894, 57.136875, 157.984818], [92.846024, 57.353962, 122.331596]
    for resize, expected in (("clean-fid", clean), ("pytorch-fid", bilinear)):
        resized = resize_for_inception(image, resize)
        assert resized.shape == (1, 3, 299, 299)
        assert resized[0, :, 150, 150].tolist() == pytest.approx(expected, abs=1e-3)
    with pytest.raises(ValueError, match="pytorch-fid, clean-fid or torch-fidelity, not 'nearest'"):
        resize_for_inception(image, "nearest")


def test_pixels_are_scaled_for_inception_as_each_package_does():
    pixels = torch.tensor([0.0, 128, 255])
    assert scale_for_inception(pixels, "pytorch-fid").tolist() == pytest.approx([-1, 1 / 255, 1], abs=1e-6)
    assert scale_for_inception(pixels, "clean-fid").tolist() == pytest.approx([-1, 0, 127 / 128])


def test_inception_without_its_package_or_weights_says_what_to_do(tmp_path):
    with pytest.raises((ImportError, FileNotFoundError), match="torch-fidelity"):
        InceptionFeatures(weights=tmp_path / "none.pth")


@pytest.mark.parametrize("kind", ["vision", "text"])
def test_encoders_have_weights_in_safetensors(kind, dinov2_model, bert_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(dinov2_model if kind == "vision" else bert_model, folder)
    weights = folder / "model.safetensors"
    torch.save(load_file(weights), folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(OSError, match=r"model has no weights in safetensors, .*; pass a model that has them"):
        AutoModelFeatures(str(folder)) if kind == "vision" else bert_score(["a"], [["a"]], str(folder))
