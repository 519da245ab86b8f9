"""Near duplicates by the Hamming distance of 64-bit hashes: an exact index, in numpy."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

BITS = 64
MAX_DISTANCE = 8
_PAIRS_AT_ONCE = 2**22


def require_distance(distance: int) -> None:
    """Raises `ValueError` if a distance is out of range."""
    if not 0 <= distance <= MAX_DISTANCE:
        raise ValueError(f"the distance is {distance}; expected 0 to {MAX_DISTANCE} of {BITS} bits")


def find_near(hashes: np.ndarray, distance: int) -> np.ndarray:
    """All pairs of different hashes that differ in at most so many bits.

    The bits are cut into `distance + 1` bands. Two hashes that differ in `distance` bits have at least one band in
    common, so that only hashes of an equal band are compared.

    Args:
        hashes: `(N,)` uint64, each once.
        distance: From 0 to `MAX_DISTANCE`.

    Returns:
        `(pairs, 2)`: indices, the smaller first, in order, each pair once.
    """
    require_distance(distance)
    found = [np.empty((0, 2), np.int64)]
    edges = np.linspace(0, BITS, distance + 2).astype(int)
    masks = [np.uint64(((1 << int(high - low)) - 1) << int(low)) for low, high in pairwise(edges)]
    for number, (low, high) in enumerate(pairwise(edges)):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        for first, second in _pairs_of_equal(band):
            bits = hashes[first] ^ hashes[second]
            near = np.bitwise_count(bits) <= distance
            for mask in masks[:number]:
                near &= (bits & mask) != 0  # a pair of an earlier band has been found
            found.append(np.stack([first[near], second[near]], axis=1))
    pairs = np.sort(np.concatenate(found), axis=1)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]


def _pairs_of_equal(values: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Indices of all pairs of equal values, in pieces."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    ends = np.searchsorted(ordered, ordered, side="right")
    counts = ends - np.arange(len(values)) - 1  # partners behind each place
    starts, total = 0, np.concatenate([[0], np.cumsum(counts)])
    while starts < len(values):
        stop = max(int(np.searchsorted(total, total[starts] + _PAIRS_AT_ONCE, side="right")) - 1, starts + 1)
        own = counts[starts:stop]
        first = np.repeat(np.arange(starts, stop), own)
        second = first + 1 + np.arange(len(first)) - np.repeat(total[starts:stop] - total[starts], own)
        yield order[first], order[second]
        starts = stop


def choose_kept(hashes: np.ndarray, priority: np.ndarray, distance: int) -> np.ndarray:
    """`(N,)`: for each image the index of the image that stands for it, its own if it is kept.

    Images are taken in the order of `priority`; one is kept unless a kept image is near. So no two kept images are
    near,
    and each duplicate is near the one that stands for it: of several, the nearest, then the first.

    Args:
        hashes: `(N,)` uint64.
        priority: `(N,)`: the indices of all images, best first.
    """
    different, group = np.unique(hashes, return_inverse=True)
    best = np.full(len(different), len(hashes))  # the place in `priority` of the best image of each hash
    places = np.empty(len(hashes), np.int64)
    places[priority] = np.arange(len(priority))
    np.minimum.at(best, group, places)
    pairs = find_near(different, distance)
    both = np.concatenate([pairs, pairs[:, ::-1]])
    both = both[np.argsort(both[:, 0], kind="stable")]
    starts = np.searchsorted(both[:, 0], np.arange(len(different) + 1))
    is_alone = starts[1:] == starts[:-1]
    stands = np.where(is_alone, np.arange(len(different)), -1)
    order = np.argsort(best)
    for number in order[~is_alone[order]]:
        near = both[starts[number] : starts[number + 1], 1]
        kept = near[stands[near] == near]
        if len(kept):
            bits = np.bitwise_count(different[kept] ^ different[number]).astype(np.int64)
            stands[number] = kept[np.lexsort((best[kept], bits))[0]]
        else:
            stands[number] = number
    return priority[best[stands[group]]]
