"""The folders are the architecture: setup.cfg names them all, and imports point one way."""

import ast
import configparser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Each layer may import those before it, and `train` not `evaluation`.
LAYERS = [
    "modeling_vlv",
    "hub",
    "pipelines",
    "train",
    "evaluation",
    "preparation",
    "miniature",
    "space",
    "serving",
    "captioning",
    "cli",
]
PACKAGES = {"modeling_vlv": "vlv", **{layer: f"vlv.{layer}" for layer in LAYERS[1:]}}
SHIPPED_TO_THE_HUB = [
    *("modeling_vlv/modeling_vlv.py", "modeling_vlv/modeling_vlv_captioner.py", "modeling_vlv/generation_vlv.py"),
    *("modeling_vlv/processing_vlv.py", "modeling_vlv/processing_vlv_captioner.py"),
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "pipelines").glob("pipeline_*.py"))),
    *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "pipelines").glob("modular_*.py"))),
]
LOADED_BY_PATH = ROOT / "evaluation" / "metrics"  # scripts of the library `evaluate`, which copies each one
FILES = [
    path
    for layer in LAYERS
    for path in sorted((ROOT / layer).rglob("*.py"))
    if not path.is_relative_to(LOADED_BY_PATH)
]
NOT_PACKAGES = {"tests", "build", "dist", "outputs", "runs"}


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(nodes) -> list[tuple[int, str, list[str]]]:
    """`(level, module, names)` of every import among the nodes."""
    found: list[tuple[int, str, list[str]]] = []
    for node in nodes:
        if isinstance(node, ast.Import):
            found += [(0, alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or "", [alias.name for alias in node.names]))
    return found


def layers_used(path: Path) -> set[str]:
    """The layers that a file imports by absolute names."""
    used = set()
    for level, module, names in imports(ast.walk(parse(path))):
        if level or not (module + ".").startswith("vlv."):
            continue
        for target in [f"{module}.{name}" for name in names] or [module]:
            owner = next((layer for layer in LAYERS[1:] if (target + ".").startswith(f"vlv.{layer}.")), None)
            used.add(owner or ("checkpoints" if target.startswith("vlv.checkpoints") else "modeling_vlv"))
    return used


def module_name(path: Path) -> str:
    """`vlv.hub.load` of `hub/load.py`."""
    layer, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([PACKAGES[layer], *(part for part in rest if part != "__init__")])


def code_at_import(nodes) -> list[ast.AST]:
    """The statements that run when a module is imported: all but those in functions and under `TYPE_CHECKING`."""
    found: list[ast.AST] = []
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            found += code_at_import(node.orelse)
            continue
        found += [node, *code_at_import(ast.iter_child_nodes(node))]
    return found


def import_graph(files: list[Path]) -> dict[str, set[str]]:
    """Each module with the modules of the same layer that it needs when it is imported.

    `from . import x` and `from .x import y` need the module x. The `__init__` of a package is no node: every import of
    a module runs it, and Python accepts that circle as long as the modules themselves have none.
    """
    modules = {module_name(path): path for path in files if path.name != "__init__.py"}
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for level, module, names in imports(code_at_import(parse(path).body)):
            if not level:
                continue
            package = ".".join(name.split(".")[:-level] + ([module] if module else []))
            graph[name] |= {t for t in [package, *(f"{package}.{n}" for n in names)] if t in modules}
    return graph


def find_cycle(graph: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a circle, or an empty list."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return path[path.index(name) :]
        if name not in done:
            for other in sorted(graph[name]):
                if cycle := visit(other, [*path, name]):
                    return cycle
            done.add(name)
        return []

    return next((cycle for name in sorted(graph) if (cycle := visit(name, []))), [])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_one_way(path):
    layer = path.relative_to(ROOT).parts[0]
    allowed = set(LAYERS[: LAYERS.index(layer)]) | ({"checkpoints"} if layer == "cli" else set())
    if layer == "train":
        allowed.discard("evaluation")
    assert layers_used(path) <= allowed


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_inside_a_layer_are_relative_and_stay_in_it(path):
    parts = path.relative_to(ROOT).parts
    assert parts[0] not in layers_used(path), f"import {parts[0]} by a relative import"
    for level, module, _ in imports(ast.walk(parse(path))):
        assert level < len(parts), f"relative import out of {parts[0]}"
        assert level or module.split(".")[0] not in LAYERS, f"{module} is installed as vlv.{module}"


@pytest.mark.parametrize("layer", LAYERS)
def test_no_modules_of_a_layer_import_each_other_in_a_circle(layer):
    assert find_cycle(import_graph([path for path in FILES if path.relative_to(ROOT).parts[0] == layer])) == []


def test_the_import_graph_has_edges_and_its_cycles_are_found():
    graph = import_graph(FILES)
    assert "vlv.hub.layout" in graph["vlv.hub.export"] and "vlv.miniature.world" in graph["vlv.miniature.render"]
    assert find_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    code = "import a\nif x:\n    import b\nif TYPE_CHECKING:\n    import c\ndef f():\n    import d\n"
    assert [module for _, module, _ in imports(code_at_import(ast.parse(code).body))] == ["a", "b"]


def test_setup_cfg_lists_the_folders_that_are_packages():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    options = config["options"]
    names = options["packages"].split()
    folders = dict(map(str.strip, line.split("=")) for line in options["package_dir"].strip().splitlines())
    assert list(folders) == names
    on_disk = {
        str(path.parent.relative_to(ROOT))
        for path in ROOT.glob("*/**/__init__.py")
        if not path.relative_to(ROOT).parts[0].startswith(".") and path.relative_to(ROOT).parts[0] not in NOT_PACKAGES
    }
    assert set(folders.values()) == on_disk
    for name, folder in folders.items():
        expected = (
            "vlv" if folder == "modeling_vlv" else "vlv." + folder.removeprefix("modeling_vlv/").replace("/", ".")
        )
        assert name == expected


@pytest.mark.parametrize(
    "name", ["modeling_vlv", "pipelines", "train", "tests", "model_card.md", "setup.cfg", "pyproject.toml"]
)
def test_the_top_level_has_what_readers_look_for(name):
    assert (ROOT / name).exists()


@pytest.mark.parametrize("name", SHIPPED_TO_THE_HUB)
def test_files_for_the_hub_stand_alone(name):
    for level, module, _ in imports(ast.walk(parse(ROOT / name))):
        own = {"modeling_vlv_captioner.py": ("modeling_vlv", "generation_vlv")}
        own["processing_vlv_captioner.py"] = ("processing_vlv",)
        own["modular_vlv_sd.py"] = ("modular_vlv", "pipeline_vlv_reconstruction")
        own["modular_vlv_sdxl.py"] = ("modular_vlv", "pipeline_vlv_pooled_reconstruction")
        if level == 1 and module in own.get(Path(name).name, ()):
            continue  # transformers, which alone loads captioners, and Modular Diffusers download it as well
        assert level == 0 and module.split(".")[0] != "vlv"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_short(path):
    limit = 500
    if str(path.relative_to(ROOT)) in SHIPPED_TO_THE_HUB:  # one self-contained file each
        limit = 900 if path.name == "modeling_vlv.py" else 600
    assert len(path.read_text(encoding="utf-8").splitlines()) <= limit


def test_tests_import_no_conftest():
    """Helpers are in tests/builders.py; pytest alone imports conftest.py, which holds fixtures."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        assert all("conftest" not in module for _, module, _ in imports(ast.walk(parse(path)))), path
