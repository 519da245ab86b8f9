"""Registers VLV in the `Auto` classes of transformers when these are first used, so that `import vlv` is light."""

import sys
import threading
from collections.abc import Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
WATCHED = ("transformers.", "vlv.")


def register_auto_classes() -> None:
    """Makes the `Auto` classes of transformers load VLV's models and processors without their code of the Hub.

    Their `save_pretrained` and `push_to_hub` also write their code, so that they load where vlv is not installed.
    """
    from transformers import (
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageTextToText,
        AutoModelForMultimodalLM,
        AutoProcessor,
    )

    from .modeling_vlv import VLVConfig, VLVModel
    from .modeling_vlv_captioner import VLVForConditionalGeneration
    from .processing_vlv import VLVImageProcessor
    from .processing_vlv_captioner import VLVProcessor

    AutoConfig.register("vlv", VLVConfig, exist_ok=True)
    AutoModel.register(VLVConfig, VLVModel, exist_ok=True)
    AutoModelForImageTextToText.register(VLVConfig, VLVForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(VLVConfig, VLVForConditionalGeneration, exist_ok=True)
    AutoImageProcessor.register(VLVConfig, image_processor_classes={"pil": VLVImageProcessor}, exist_ok=True)
    AutoProcessor.register(VLVConfig, VLVProcessor, exist_ok=True)
    VLVConfig.register_for_auto_class()
    VLVModel.register_for_auto_class("AutoModel")
    VLVForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
    VLVImageProcessor.register_for_auto_class("AutoImageProcessor")
    VLVProcessor.register_for_auto_class()


def register_when_used() -> None:
    """Registers at once where the `Auto` classes are imported, else as soon as they are.

    While a module of transformers or of vlv is being imported, what it defines is not complete. Registration therefore
    waits for the outermost import of such a module to end.
    """
    if AUTO_CLASSES in sys.modules:
        register_auto_classes()
        return
    # By name: where modules were removed from `sys.modules`, an earlier import of this one defined another class.
    watchers = (finder for finder in sys.meta_path if type(finder).__name__ == _ImportWatcher.__name__)
    watcher: Any = next(watchers, None)
    if watcher is None:
        sys.meta_path.insert(0, _ImportWatcher())  # type: ignore[arg-type]
    else:
        watcher.is_done = False


class _ImportWatcher:
    """Counts the watched modules that each thread is importing, and registers when its outermost one has ended.

    After registration it stays in `sys.meta_path`, which other threads may be iterating over, and finds nothing.
    """

    def __init__(self) -> None:
        self.is_done = False
        self.registering = threading.Lock()
        self.depths: dict[int, int] = {}  # of each thread that imports a watched module

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if self.is_done or not name.startswith(WATCHED) or self not in sys.meta_path:
            return None
        behind = sys.meta_path[sys.meta_path.index(self) + 1 :]  # type: ignore[arg-type]
        finds = filter(None, (getattr(finder, "find_spec", None) for finder in behind))
        spec = next(filter(None, (find(name, path, target) for find in finds)), None)
        execute = getattr(spec and spec.loader, "exec_module", None)
        if spec is None or execute is None or getattr(execute, "is_watched", False):  # some loaders have many modules
            return spec

        @wraps(execute)
        def execute_and_register(module: ModuleType) -> None:
            thread = threading.get_ident()
            self.depths[thread] = self.depths.get(thread, 0) + 1
            failed = True
            try:
                execute(module)
                failed = False
            finally:
                if self.depths[thread] == 1:
                    self._register(keep_errors=failed)
                self.depths[thread] -= 1
                if not self.depths[thread]:
                    del self.depths[thread]

        execute_and_register.is_watched = True  # type: ignore[attr-defined]
        spec.loader.exec_module = execute_and_register  # type: ignore[union-attr, method-assign]
        return spec

    def _register(self, keep_errors: bool) -> None:
        """Registers if that is due, and else leaves it to the next import that ends.

        It is not due where vlv was taken out of `sys.modules`: its next import asks for it again. Another thread may
        be importing the modules that registration needs; waiting for it could be a deadlock.

        Args:
            keep_errors: Whether an error is not raised, since that of the import is.
        """
        if self.is_done or AUTO_CLASSES not in sys.modules or sys.modules.get(__package__) is None:
            return
        if not self.registering.acquire(blocking=False):
            return
        try:
            register_auto_classes()
            self.is_done = True
        except Exception:
            if not keep_errors and len(self.depths) == 1:
                raise
        finally:
            self.registering.release()
