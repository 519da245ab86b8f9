"""A damaged image file is captioned or named, whatever is wrong with it."""

import pytest

from .fuzz_images import MUTATIONS, check, write_files


@pytest.mark.slow
def test_every_damaged_file_is_captioned_or_named(tmp_path):
    found = check(210, 1, tmp_path)
    assert found["captioned"] > 20 and found["named"] > 50


def test_the_damaged_files_depend_on_the_seed_alone(tmp_path):
    contents = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        (tmp_path / name).mkdir()
        names = write_files(tmp_path / name, 2 * 7 * len(MUTATIONS), seed)
        contents.append([(tmp_path / name / file).read_bytes() for file in names])
    assert contents[0] == contents[1] and sum(a != b for a, b in zip(contents[0], contents[2], strict=True)) > 60
