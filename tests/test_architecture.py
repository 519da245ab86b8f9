"""The folders are the architecture: what may import what, and nothing under two names."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    "modeling_vlv",
    "hub",
    "pipelines",
    "train",
    "evaluation",
    "miniature",
    "space",
    "cli",
]  # each may import those before it
PACKAGES = {"modeling_vlv": "vlv", **{layer: f"vlv.{layer}" for layer in LAYERS[1:]}}
SHIPPED_TO_THE_HUB = ["modeling_vlv/modeling_vlv.py", "modeling_vlv/processing_vlv.py"] + [
    str(p.relative_to(ROOT)) for p in sorted((ROOT / "pipelines").glob("pipeline_*.py"))
]
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imports(path: Path) -> list[tuple[int, str, list[str]]]:
    """`(level, module, names)` of every import."""
    found: list[tuple[int, str, list[str]]] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def layers_used(path: Path) -> set[str]:
    used = set()
    for level, module, names in imports(path):
        if level or not (module == "vlv" or module.startswith("vlv.")):
            continue
        for target in [module, *(f"{module}.{name}" for name in names)]:
            owner = next((layer for layer in LAYERS[1:] if (target + ".").startswith(f"vlv.{layer}.")), None)
            used.add(owner or ("checkpoints" if target.startswith("vlv.checkpoints") else "modeling_vlv"))
    return used


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    layer = path.relative_to(ROOT).parts[0]
    allowed = set(LAYERS[: LAYERS.index(layer) + 1]) | ({"checkpoints"} if layer == "cli" else set())
    if layer == "train":
        allowed.discard("evaluation")
    assert layers_used(path) <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_inside_a_folder_imports_are_relative_and_stay_in_it(path):
    parts = path.relative_to(ROOT).parts
    own = PACKAGES[parts[0]]
    for level, module, _ in imports(path):
        if level:
            assert level <= len(parts) - 1, f"relative import out of {parts[0]}"
        elif parts[0] != "modeling_vlv":
            assert not (module + ".").startswith(own + ".")
        else:
            assert module.split(".")[0] not in LAYERS


@pytest.mark.parametrize("name", SHIPPED_TO_THE_HUB)
def test_files_for_the_hub_stand_alone(name):
    for level, module, _ in imports(ROOT / name):
        assert level == 0 and module.split(".")[0] != "vlv"


def test_files_stay_short():
    for path in FILES:
        limit = 700 if path.name == "modeling_vlv.py" else 500
        assert len(path.read_text(encoding="utf-8").splitlines()) <= limit, path
