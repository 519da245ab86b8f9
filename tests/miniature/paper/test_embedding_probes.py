"""Measures of what embeddings hold are right where the truth is known."""

import pytest
import torch

from vlv.miniature.encoder import build_image_processor
from vlv.miniature.paper.data_efficiency import to_pixel_values
from vlv.miniature.paper.embedding_probes import _may_be_mixed, deviations, locate
from vlv.miniature.world import Scene, SceneObject


def square(x: int, y: int, size: int) -> torch.Tensor:
    picture = torch.full((3, 64, 64), 200, dtype=torch.uint8)
    picture[:, y : y + size, x : x + size] = torch.tensor([200, 20, 20], dtype=torch.uint8)[:, None, None]
    return picture


def test_an_object_is_found_where_it_stands():
    x, y, size = locate(square(40, 10, 8), "top right")
    assert (x, y, size) == pytest.approx((43.5 / 64, 13.5 / 64, 8 / 64))
    assert locate(square(40, 10, 8), "bottom left") is None


def test_deviations_are_of_objects_that_both_show():
    scene = Scene("grey", (SceneObject("apple", "small", "top right"),))
    moved = deviations([square(40, 10, 8)], [square(44, 13, 10)], [scene], [scene])
    assert moved["centre"] == pytest.approx(((5 / 64) ** 2 + (4 / 64) ** 2) ** 0.5, abs=1e-4)
    assert moved["scale"] == pytest.approx(2 / 64, abs=1e-4) and moved["matched"] == 1
    assert deviations([square(40, 10, 8)], [square(40, 10, 8)], [scene], [Scene("grey", ())])["matched"] == 0


def test_pixels_are_those_of_the_image_processor():
    picture = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = build_image_processor()([picture], return_tensors="pt").pixel_values
    assert torch.allclose(to_pixel_values(picture[None]), expected, atol=1e-6)


def test_pictures_are_mixed_where_both_have_room():
    def scene(background, place):
        return Scene(background, (SceneObject("dog", "small", place),))

    first = scene("white", "top left")
    assert _may_be_mixed(first, scene("pink", "bottom right"), single=True)
    assert not _may_be_mixed(first, scene("pink", "top left"), single=True)
    assert _may_be_mixed(first, scene("pink", "top left"), single=False)
    assert not _may_be_mixed(first, scene("white", "bottom right"), single=False)
