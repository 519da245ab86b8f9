"""What a folder holds is an image, or not one, or named with the reason why it cannot be read."""

import io
import os
from collections import Counter

import pytest
from PIL import Image, features

from vlv.image_files import find_images, image_suffixes, walk_images

PICTURE = Image.new("RGB", (8, 8), "pink")


def encoded(format: str) -> bytes:
    buffer = io.BytesIO()
    PICTURE.save(buffer, format=format)
    return buffer.getvalue()


def walk(folder) -> dict[str, str | None]:
    return {path.relative_to(folder).as_posix(): problem for path, problem in walk_images(folder)}


@pytest.mark.parametrize(
    ("name", "format"),
    [
        *(("a.jfif", "JPEG"), ("a.JPE", "JPEG"), ("a.apng", "PNG"), ("a.tga", "TGA"), ("a.ppm", "PPM")),
        *(("a.ico", "ICO"), ("a.qoi", "QOI"), ("a.webp", "WEBP"), ("a.bmp", "BMP"), ("a.Tif", "TIFF")),
        pytest.param("a.avif", "AVIF", marks=pytest.mark.skipif(not features.check("avif"), reason="no AVIF")),
        pytest.param(
            "a.jp2", "JPEG2000", marks=pytest.mark.skipif(not features.check("jpg_2000"), reason="no JPEG 2000")
        ),
    ],
)
def test_every_format_that_pillow_reads_is_found(tmp_path, name, format):
    (tmp_path / name).write_bytes(encoded(format))
    assert find_images(tmp_path) == [tmp_path / name]


def test_content_counts_where_the_suffix_says_nothing(tmp_path):
    for name in ("no_suffix", "photo.jpg_large", "a.bak", "__metadata__", "list.txt"):
        (tmp_path / name).write_bytes(encoded("JPEG"))
    for number, text in enumerate(("a large dog", "BMW parked on a street", "P1 fix the bug", "P6\nhello", "")):
        (tmp_path / f"{number}.txt").write_text(text)
    (tmp_path / "header.h").write_text("#define width 3\nint main();")
    (tmp_path / "weights.bin").write_bytes(bytes(1000))
    (tmp_path / "movie.mpg").write_bytes(b"\0\0\1\xb3" + bytes(100))
    (tmp_path / "table.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(100))
    left_out: Counter[str] = Counter()
    found = [path.name for path, problem in walk_images(tmp_path, left_out) if problem is None]
    assert found == ["__metadata__", "a.bak", "list.txt", "no_suffix", "photo.jpg_large"]
    assert left_out == {".txt": 5, ".h": 1, ".bin": 1, ".mpg": 1, ".h5": 1}


def test_a_file_with_the_suffix_of_an_image_is_never_left_out(tmp_path):
    for name in ("text.png", "photo.heic", "photo.JXL"):
        (tmp_path / name).write_text("not an image")
    assert walk(tmp_path) == {"photo.JXL": None, "photo.heic": None, "text.png": None}
    assert {".heic", ".heif", ".jxl", ".png", ".jpg"} <= image_suffixes()
    assert not {".mpg", ".h5", ".grib", ".pdf", ".txt"} & image_suffixes()


def test_formats_of_other_packages_are_found_by_content(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(PICTURE.resize((64, 64))).save(tmp_path / "a.heic")
    (tmp_path / "a.heic").rename(tmp_path / "IMG_1")
    assert walk(tmp_path) == {"IMG_1": None}


def test_hidden_files_and_folders_are_left_out(tmp_path):
    (tmp_path / ".cache").mkdir()
    for name in (".hidden.png", "._a.png", ".cache/a.png", "a.png"):
        PICTURE.save(tmp_path / name)
    assert walk(tmp_path) == {"a.png": None}


def test_entries_come_in_the_order_of_their_names(tmp_path):
    for name in ("b.png", "a/z.png", "a/b/c.png", "a.png", "c/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        PICTURE.save(tmp_path / name)
    assert list(walk(tmp_path)) == ["a/b/c.png", "a/z.png", "a.png", "b.png", "c/a.png"]


def test_a_folder_named_like_an_image_is_searched(tmp_path):
    (tmp_path / "x.png").mkdir()
    PICTURE.save(tmp_path / "x.png" / "y.png")
    assert walk(tmp_path) == {"x.png/y.png": None}


def test_links_are_followed_and_loops_end(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    (outside / "deep").mkdir(parents=True)
    (inside / "z").mkdir(parents=True)
    PICTURE.save(outside / "deep" / "o.png")
    PICTURE.save(inside / "z" / "i.png")
    (inside / "a_loop").symlink_to(inside)
    (inside / "elsewhere").symlink_to(outside)
    (inside / "again").symlink_to(outside / "deep")
    (outside / "back").symlink_to(inside)
    (inside / "file.png").symlink_to(outside / "deep" / "o.png")
    (inside / "b_same").symlink_to(inside / "z")
    assert walk(inside) == {"file.png": None, "z/i.png": None, "again/o.png": None}
    (inside / "again").unlink()
    assert walk(inside) == {"file.png": None, "z/i.png": None, "elsewhere/deep/o.png": None}


def test_what_is_no_regular_file_is_named(tmp_path):
    (tmp_path / "gone.png").symlink_to("nowhere.png")
    (tmp_path / "to_itself").symlink_to("to_itself")
    os.mkfifo(tmp_path / "pipe.png")
    os.mkfifo(tmp_path / "pipe")
    problems = walk(tmp_path)
    assert set(problems) == {"gone.png", "to_itself", "pipe.png"}
    assert "link to nowhere.png, which does not exist" in problems["gone.png"]
    assert "symbolic links" in problems["to_itself"] and "not a regular file" in problems["pipe.png"]


def test_a_folder_without_permission_is_named_and_the_rest_is_found(folder_of_nobody):
    for name in ("locked", "closed", "open"):
        (folder_of_nobody / name).mkdir()
        PICTURE.save(folder_of_nobody / name / "a.png")
    PICTURE.save(folder_of_nobody / "secret.dat", format="PNG")
    (folder_of_nobody / "secret.dat").chmod(0o000)
    (folder_of_nobody / "locked").chmod(0o000)
    (folder_of_nobody / "closed").chmod(0o444)
    problems = walk(folder_of_nobody)
    assert problems.pop("open/a.png") is None
    assert set(problems) == {"locked", "closed/a.png", "secret.dat"}
    assert all("Permission denied" in problem for problem in problems.values())


def test_a_very_deep_folder_is_searched(tmp_path):
    folders = [tmp_path]
    for _ in range(1100):  # more than Python's limit of recursion
        folders.append(folders[-1] / "d")
        folders[-1].mkdir()
    image = folders[-1] / "a.png"
    PICTURE.save(image)
    try:
        assert find_images(tmp_path) == [image]
    finally:  # pytest removes old folders by recursion
        image.unlink()
        for folder in reversed(folders[1:]):
            folder.rmdir()
