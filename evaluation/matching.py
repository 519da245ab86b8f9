"""Finds the entry of each image: by its name, or by its name without suffix, or without folders."""

from collections.abc import Callable, Iterable
from pathlib import PurePath


def match_names(names: Iterable[str], entries: Iterable[str], source: str) -> dict[str, str]:
    """The entry that belongs to each name: the equal one, else the one that is equal without its suffix, else without
    folders and suffix. Names without an entry are left out.

    Args:
        entries: Names as well.
        source: Of the entries, for messages.

    Raises:
        ValueError: If a name could have two entries, or an entry belongs to two names.
    """
    entries = list(entries)
    forms: list[Callable[[str], str]] = [str, _without_suffix, _stem]
    levels = [(form, _group(entries, form)) for form in forms]
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for name in names:
        for form, groups in levels:
            candidates = groups.get(form(name), [])
            if candidates:
                break
        else:
            continue
        if len(candidates) > 1:
            raise ValueError(f"{source}: {name!r} could be {candidates[0]!r} or {candidates[1]!r}; use the same names")
        entry = candidates[0]
        if owners.setdefault(entry, name) != name:
            raise ValueError(f"{source}: {owners[entry]!r} and {name!r} could both be {entry!r}; use the same names")
        found[name] = entry
    return found


def _group(entries: Iterable[str], form: Callable[[str], str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for entry in entries:
        groups.setdefault(form(entry), []).append(entry)
    return groups


def _without_suffix(name: str) -> str:
    return PurePath(name).with_suffix("").as_posix() if PurePath(name).name else name


def _stem(name: str) -> str:
    return PurePath(name).stem
