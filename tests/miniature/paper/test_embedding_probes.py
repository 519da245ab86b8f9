"""Measures of caption embeddings are right where the truth is known."""

import pytest
import torch

from vlv.miniature.encoder import build_image_processor
from vlv.miniature.paper import embedding_probes
from vlv.miniature.paper.data_efficiency import to_pixel_values
from vlv.miniature.paper.embedding_probes import (
    _fit_together,
    build_pipeline,
    deviations,
    encode_images,
    generate_from_embeds,
)
from vlv.miniature.scene_detector import locate
from vlv.miniature.world import Scene, SceneObject

from ...builders import assert_close_to_scale


def square(x: int, y: int, size: int) -> torch.Tensor:
    image = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    image[:, y : y + size, x : x + size] = torch.tensor([200, 20, 20], dtype=torch.uint8)[:, None, None]
    return image


def test_an_object_is_located_at_its_place():
    x, y, size = locate(square(40, 10, 8), "top right")
    assert (x, y, size) == pytest.approx((43.5 / 64, 13.5 / 64, 8 / 64))
    assert locate(square(40, 10, 8), "bottom left") is None


def test_deviations_compare_objects_that_both_images_show():
    scene = Scene("grey", (SceneObject("apple", "small", "top right"),))
    original = square(40, 10, 8)[None]
    moved = deviations(original, square(44, 13, 10)[None], [scene], [scene])
    assert moved["centre"] == pytest.approx(((5 / 64) ** 2 + (4 / 64) ** 2) ** 0.5, abs=1e-4)
    assert moved["scale"] == pytest.approx(2 / 64, abs=1e-4) and moved["matched"] == 1
    assert deviations(original, original, [scene], [Scene("grey", ())])["matched"] == 0


def test_pixel_values_equal_those_of_the_image_processor():
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = build_image_processor()([image], return_tensors="pt").pixel_values
    assert_close_to_scale(to_pixel_values(image[None]), expected, 1e-6)


def test_single_objects_are_composed_only_at_different_places():
    def scene(background, place):
        return Scene(background, (SceneObject("dog", "small", place),))

    first = scene("white", "top left")
    assert _fit_together(first, scene("pink", "bottom right"), single=True)
    assert not _fit_together(first, scene("pink", "top left"), single=True)
    assert _fit_together(first, scene("pink", "top left"), single=False)
    assert not _fit_together(first, scene("white", "bottom right"), single=False)


def test_an_image_depends_on_its_number_and_not_on_its_batch(monkeypatch, encoder, stable_diffusion):
    pipeline = build_pipeline(encoder, stable_diffusion)
    embeds = encode_images(encoder, torch.arange(3 * 3 * 64 * 64).reshape(3, 3, 64, 64).remainder(251).to(torch.uint8))
    monkeypatch.setattr(embedding_probes, "STEPS", 2)
    together = generate_from_embeds(pipeline, embeds)
    assert together.dtype == torch.uint8 and together.shape[:2] == (3, 3)
    monkeypatch.setattr(embedding_probes, "BATCH_SIZE", 2)
    in_batches = generate_from_embeds(pipeline, embeds)
    assert (together.int() - in_batches.int()).abs().max() <= 1  # another batch size may round differently
    same_embeds = generate_from_embeds(pipeline, embeds[:1].expand(2, -1, -1))
    assert not torch.equal(same_embeds[0], same_embeds[1])  # each image has noise of its own
