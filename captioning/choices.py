"""Values of options, without imports, so that `vlv caption --help` is quick."""

KINDS = ("txt", "caption", "json")
"""Of sidecars: their suffixes."""
NAMES = ("stem", "full")
"""Of sidecars: whether `a.png` has `a.txt` or `a.png.txt`."""
ON_EXISTING = ("error", "skip", "overwrite", "append", "prepend")
"""What is done where an image has a caption."""
LENGTHS = {
    "short": ("short", "shortly", "brief", "briefly"),
    "medium": ("medium",),
    "long": ("long", "detail", "detailed"),
}
"""Lengths of captions, and the words of instructions that ask for them."""
MIN_REPEATS, MIN_LOOP_WORDS = 3, 8
"""A loop is a group of words that stands so often in a row, and makes up so many words together."""
TIME_LIMIT, SIZE_LIMIT = 30.0, 100 * 2**20
"""Seconds and bytes that the download of an image may take."""
