"""Registers VLV in the `Auto` classes of transformers when these are first used, so that `import vlv` is light."""

import sys
import threading
from collections.abc import Sequence
from functools import wraps
from importlib.machinery import ModuleSpec
from types import ModuleType

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
    else:
        sys.meta_path.insert(0, _ImportWatcher())  # type: ignore[arg-type]


class _ImportWatcher(threading.local):
    """Counts the watched modules that this thread is importing, and registers when the outermost is complete."""

    depth = 0

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(WATCHED):
            return None
        finders = (finder for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        @wraps(execute)
        def execute_and_register(module: ModuleType) -> None:
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and AUTO_CLASSES in sys.modules and self in sys.meta_path:
                sys.meta_path.remove(self)
                register_auto_classes()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
