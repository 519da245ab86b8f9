"""Images in tar files, found and read without unpacking them."""

from collections import Counter
from collections.abc import Iterator
from pathlib import PurePosixPath

from vlv.image_files import image_suffixes


def tar_images(file: str, left_out: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """The images of a tar file, by their suffixes: name, offset and size in bytes. Hidden members are left out.

    Of members with equal names the second is called `NAME#2`, and so on.

    Args:
        left_out: Counts the members that are not images, by suffix.

    Raises:
        OSError, ValueError: If it cannot be read as a tar file, or holds no image.
    """
    from vlv.train.data.shards import read_members

    names: Counter[str] = Counter()
    for _, member in read_members(file):
        path = PurePosixPath(member.name)
        if not member.isfile() or path.name.startswith("."):
            continue
        if path.suffix.lower() not in image_suffixes():
            left_out[path.suffix.lower() or path.name] += 1
            continue
        names[member.name] += 1
        number = names[member.name]
        yield member.name if number == 1 else f"{member.name}#{number}", member.offset_data, member.size
    if not names:
        raise ValueError(f"no images in {file}; expected members such as 0001.jpg")


def read_member(file: str, offset: int, size: int) -> bytes:
    """The bytes of a member. Raises `OSError`, or `ValueError` if the file ends before it does."""
    with open(file, "rb") as archive:
        archive.seek(offset)
        data = archive.read(size)
    if len(data) < size:
        raise ValueError(f"{file} is cut off")
    return data
