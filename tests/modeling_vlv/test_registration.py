"""Registration in the `Auto` classes, whatever is imported first, twice, at once or in vain."""

import os
import pickle
from pathlib import Path

import pytest

from vlv import VLVConfig

from ..builders import vlv_config
from ..interpreter import run_python

PREPARE = """
import importlib, os, pickle, sys, threading
def check(what):
    from transformers import AutoConfig
    assert type(AutoConfig.for_model("vlv")).__module__ == "vlv.modeling_vlv", what
"""
FRESH = (
    PREPARE
    + """
import vlv
importlib.reload(vlv)
del sys.modules["vlv"]
import vlv
for name in [name for name in sys.modules if name.startswith("vlv")]:
    del sys.modules[name]
import vlv
assert [type(finder).__name__ for finder in sys.meta_path].count("_ImportWatcher") == 1
class Old:
    "A finder without find_spec."
    def find_module(self, name, path=None):
        return None
sys.meta_path.insert(1, Old())
assert "transformers" not in sys.modules
child = os.fork()
if child:
    vlv.__path__.append(sys.argv[1])
    try:
        import vlv.failing
    except RuntimeError:
        pass
    else:
        raise AssertionError("the import succeeded")
    check("a failing import")
    assert os.waitpid(child, 0)[1] == 0
else:
    import transformers.models.auto  # these packages replace themselves, which no second thread may meet
    assert "transformers.models.auto.configuration_auto" not in sys.modules
    errors = []
    def unpickle():
        try:
            with open(sys.argv[2], "rb") as file:
                assert type(pickle.load(file)).__module__ == "vlv.modeling_vlv"
        except BaseException as error:
            errors.append(repr(error))
    def import_auto():
        try:
            from transformers import AutoConfig, AutoProcessor
        except BaseException as error:
            errors.append(repr(error))
    threads = [threading.Thread(target=work) for work in (unpickle, import_auto)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    try:
        check("two threads")
    except BaseException as error:
        errors.append(repr(error))
    if errors:
        print(errors, file=sys.stderr, flush=True)
    os._exit(bool(errors))
"""
)
AFTER_TRANSFORMERS = (
    PREPARE
    + """
import transformers.models.auto.configuration_auto
with open(sys.argv[2], "rb") as file:
    pickle.load(file)
check("transformers first")
importlib.reload(sys.modules["vlv"])
check("a second import")
assert "_ImportWatcher" not in [type(finder).__name__ for finder in sys.meta_path]
"""
)
REMOVED = """
import sys
import vlv
assert "transformers.models.auto.configuration_auto" not in sys.modules
for name in [name for name in sys.modules if name.split(".")[0] == "vlv"]:
    sys.modules[name] = None
from transformers import AutoConfig
try:
    AutoConfig.for_model("vlv")
except ValueError:
    pass
else:
    raise AssertionError("a package that was removed is registered")
"""


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    """A folder with a module that fails, and a file with a pickled configuration."""
    folder: Path = tmp_path_factory.mktemp("registration")
    (folder / "failing.py").write_text("import transformers.models.auto.configuration_auto\nraise RuntimeError\n")
    config = vlv_config()
    assert type(config) is VLVConfig
    (folder / "config.pickle").write_bytes(pickle.dumps(config))
    return [str(folder), str(folder / "config.pickle")]


@pytest.mark.slow
def test_the_auto_classes_know_vlv_after_a_reload_a_failing_import_and_imports_of_two_threads(arguments, tmp_path):
    done = run_python(FRESH, arguments, cwd=tmp_path, env=os.environ, with_libraries=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_auto_classes_know_vlv_where_transformers_is_imported_first(arguments, tmp_path):
    done = run_python(AFTER_TRANSFORMERS, arguments, cwd=tmp_path, env=os.environ)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_auto_classes_can_be_imported_where_vlv_was_removed(tmp_path):
    done = run_python(REMOVED, [], cwd=tmp_path, env=os.environ, with_libraries=False)
    assert done.returncode == 0, done.stderr[-2000:]
