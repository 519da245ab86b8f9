"""`vlv info`: what a checkpoint holds."""

import argparse
import json
from dataclasses import asdict

from vlv.errors import UserError
from vlv.hub import Description, describe
from vlv.image_files import PLUGIN_SUFFIXES, readable_formats

from .models import loading


def run(arguments: argparse.Namespace) -> int:
    if arguments.formats == (arguments.source is not None):
        raise UserError("give DIR_OR_REPO or --formats, and not both")
    if arguments.formats:
        formats = readable_formats()
        print(json.dumps(formats, indent=2) if arguments.json else formats_as_text(formats))
        return 0
    with loading(arguments.source):
        found = describe(arguments.source, revision=arguments.revision, token=arguments.token)
    print(json.dumps(asdict(found), indent=2) if arguments.json else as_text(found))
    return 0


def formats_as_text(formats: dict[str, list[str]]) -> str:
    """A line for each format, and one for those that need another package."""
    lines = [f"{name}: {' '.join(suffixes)}" for name, suffixes in formats.items()]
    missing = sorted(set(PLUGIN_SUFFIXES) - {suffix for suffixes in formats.values() for suffix in suffixes})
    if missing:
        lines.append(f"not readable here: {' '.join(missing)} (install pillow-heif, pillow-jxl-plugin)")
    return "\n".join(lines)


def as_text(found: Description) -> str:
    """The description as lines of text."""
    lines = [f"{found.source}: {found.kind}"]
    lines += [f"{name}: {value}" for name, value in found.properties.items() if value is not None]
    lines.append(f"text-to-image model: {found.family or 'none'}")
    rows = [(p.name, f"{p.parameters:,}", _dtypes(p.dtypes), f"{p.bytes / 1e6:,.1f}") for p in found.parts]
    total = (
        "all",
        f"{sum(p.parameters for p in found.parts):,}",
        "",
        f"{sum(p.bytes for p in found.parts) / 1e6:,.1f}",
    )
    lines += ["", *_table([("part", "parameters", "stored as", "MB"), *rows, total]), ""]
    if found.licences:
        lines += ["licences", *(f"  {name}: {licence}" for name, licence in found.licences.items()), ""]
    else:
        lines += ["licences: not stated; each part keeps its own", ""]
    lines += [f"files: {len(found.files)}, {sum(found.files.values()):,} bytes"]
    width = max(map(len, found.files), default=0)
    lines += [f"  {name:{width}}  {size:>15,}" for name, size in found.files.items()]
    return "\n".join(lines)


def _dtypes(dtypes: dict[str, int]) -> str:
    return ", ".join(sorted(dtypes, key=lambda name: -dtypes[name]))


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]:>{widths[3]}}".rstrip()
        for row in rows
    ]
