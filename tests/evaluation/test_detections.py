"""Objects with boxes: read from answers, found by a detector, matched, and compared."""

import math

import pytest

from vlv.evaluation.detections import (
    Detection,
    EndpointDetector,
    PipelineDetector,
    deviations,
    match_detections,
    parse_boxes,
)
from vlv.evaluation.endpoint import EndpointSettings

from .openai_server import Reply, scripted_endpoint

BOX = '{"label": "Red  Apple", "box_3d": [1, 2, 3, 0.5, -0.5, 1, 90, 0, -180]}'


@pytest.mark.parametrize(
    "text",
    [
        f"[{BOX}]",
        f"Here it is:\n```json\n[{BOX}]\n```\nDone [as asked].",
        f'{{"objects": [{BOX}]}}',
        f"Boxes are [x, y]: [{BOX}, 7, [1]] or rather [{BOX}]",
        f'[{BOX}, {{"label": "dog"}}, {{"label": "dog", "box_3d": [1, 2]}}, {{"label": 3, "box_3d": [0]}}]',
        f'[{BOX}, {{"label": "dog", "box_3d": [1, 2, 3, 4, 5, 6, 7, 8, "far"]}}]',
        f'[{BOX}, {{"label": "dog", "box_3d": [1, 2, 3, 4, 5, 6, 7, 8, NaN]}}]',
    ],
)
def test_boxes_are_read_from_unruly_answers(text):
    (found,) = parse_boxes(text, "3d")
    assert (found.label, found.centre, found.size) == ("red apple", (1, 2, 3), (0.5, 0.5, 1))
    assert found.angles == pytest.approx((math.pi / 2, 0, -math.pi))


def test_boxes_in_two_dimensions_are_shares_of_the_image():
    (found,) = parse_boxes('[{"label": "cat", "box_2d": [100, 200, 300, 600]}]', "2d")
    assert found.centre == pytest.approx((0.4, 0.2)) and found.size == pytest.approx((0.4, 0.2)) and not found.angles


@pytest.mark.parametrize(
    "text",
    ["no objects", "[1, 2]", "[{", '[{"label": "dog"}]', f"[{BOX}]".replace("3d", "2d"), "[{" * 9000, "[" * 9000],
)
def test_an_answer_without_boxes_is_none_of_no_objects(text):
    assert parse_boxes(text, "3d") is None
    assert parse_boxes("There are none: []", "3d") == []


def test_objects_with_the_same_label_are_matched_from_the_nearest():
    one = [Detection("cat", (0.1, 0.1)), Detection("cat", (0.5, 0.5)), Detection("dog", (0.9, 0.9))]
    other = [Detection("cat", (0.52, 0.5)), Detection("cow", (0.9, 0.9)), Detection("cat", (0.4, 0.4))]
    assert match_detections(one, other) == [(one[0], other[2]), (one[1], other[0])]
    assert match_detections(one[:2], other[:1]) == [(one[1], other[0])]
    sky = Detection("sky", kind="background")
    assert match_detections([sky], [sky]) == []


def test_deviations_are_means_over_coordinates_and_angles_go_around():
    one = Detection("cat", (0, 0, 0), (1, 1, 1), (math.radians(170), 0, 0))
    other = Detection("cat", (0.3, 0, 0.4), (1, 1.6, 1), (math.radians(-170), 0, math.tau))
    found = deviations(one, other)
    assert found["centre"] == pytest.approx(0.7 / 3) and found["distance"] == pytest.approx(0.5)
    assert found["scale"] == pytest.approx(0.2) and found["angle"] == pytest.approx(math.radians(20) / 3)
    flat = Detection("cat", (0, 0), (1, 1))
    assert "angle" not in deviations(flat, flat)


def test_a_detector_of_transformers_gives_shares_of_the_image(object_detector, images, tmp_path):
    images[1].save(tmp_path / "wide.png")
    detector = PipelineDetector(str(object_detector), threshold=0.0)
    (found,) = detector.detect([tmp_path / "wide.png"])
    raw = detector.pipeline(images[1].convert("RGB"), threshold=0.0)
    width, height = images[1].size
    assert width != height and {own.label for own in found.detections} <= {"cat", "dog"}
    for own, box in zip(found.detections, (entry["box"] for entry in raw), strict=True):
        left, bottom = (own.centre[0] - own.size[0] / 2) * width, (own.centre[1] + own.size[1] / 2) * height
        assert (left, bottom) == pytest.approx((box["xmin"], box["ymax"]))
    assert found.detections and "yolos" in detector.name
    (none,) = PipelineDetector(str(object_detector), threshold=0.999).detect([tmp_path / "wide.png"])
    assert none.detections == []


@pytest.mark.slow
def test_an_endpoint_that_does_not_answer_leaves_a_reason(images, tmp_path):
    paths = []
    for number, image in enumerate(images[:3]):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    replies = iter([Reply(f"[{BOX}]"), Reply("I see a cat."), Reply(status=400, body=b"{}")])
    with scripted_endpoint(lambda words, before: next(replies)) as script:
        settings = EndpointSettings("m", script.url, concurrency=1, max_retries=0)
        detector = EndpointDetector(settings, tmp_path / "new" / "log.jsonl")
        found = list(detector.detect(paths))
        moved = tmp_path / "moved"
        moved.mkdir()
        again = EndpointDetector(settings, tmp_path / "new" / "log.jsonl")
        assert list(again.detect([paths[0].rename(moved / paths[0].name)])) == found[:1]
        assert len(script.requests) == 3  # an answer is kept wherever the image lies
    assert found[0].detections[0].label == "red apple" and "box_3d" in str(script.requests[0])
    assert found[1].error == "the answer gives no JSON list of boxes: 'I see a cat.'" and found[1].detections is None
    assert "status 400" in found[2].error
