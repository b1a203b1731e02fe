"""Makes zoobot_hf's classes known to transformers' Auto classes, without importing either before it is needed.

transformers imports its Auto classes when they are first used, and together with ours they take longer than PyTorch
does. So ours are registered when transformers has imported its own; at once where that has happened already.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

AUTO_CLASSES = "transformers.models.auto.configuration_auto"
WATCHED = ("transformers", __name__.split(".")[0])


def register_when_imported() -> None:
    """Registers our classes with the Auto classes, now or when transformers imports these."""
    if AUTO_CLASSES in sys.modules:
        _register()
    else:
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from transformers import (  # noqa: PLC0415  not before somebody needs them
        AutoConfig,
        AutoImageProcessor,
        AutoModel,
        AutoModelForImageClassification,
    )

    from .models.configuration_zoobot import ZoobotConfig  # noqa: PLC0415
    from .models.image_processing_zoobot import ZoobotImageProcessor  # noqa: PLC0415
    from .models.modeling_zoobot import ZoobotForImageClassification, ZoobotModel  # noqa: PLC0415

    AutoConfig.register(ZoobotConfig.model_type, ZoobotConfig, exist_ok=True)
    AutoModel.register(ZoobotConfig, ZoobotModel, exist_ok=True)
    AutoModelForImageClassification.register(ZoobotConfig, ZoobotForImageClassification, exist_ok=True)
    processors = {"torchvision": ZoobotImageProcessor}
    AutoImageProcessor.register(ZoobotConfig, image_processor_classes=processors, exist_ok=True)


class _AfterImport(MetaPathFinder):
    """Watches the imports of transformers' modules and ours, and registers after the one that brought the Auto classes.

    These modules import one another, and half of one is of no use. So it is the outermost import that has to end first.
    """

    def __init__(self) -> None:
        self.depth = 0

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname.split(".")[0] not in WATCHED:
            return None
        # The ordinary finders, which don't include this one.
        others = [finder for finder in sys.meta_path if finder is not self]
        specs = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((found for found in specs if found is not None), None)
        if spec is not None and spec.loader is not None:
            self._watch(spec)
        return spec

    def _watch(self, spec: ModuleSpec) -> None:
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            self.depth += 1
            try:
                execute(module)
            finally:
                self.depth -= 1
            if self.depth == 0 and self in sys.meta_path and AUTO_CLASSES in sys.modules:
                sys.meta_path.remove(self)
                _register()

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
