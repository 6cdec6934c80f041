"""Direct Preference Optimization for language models and image classifiers, with one loss.

After `import resdpo_trl`, transformers' auto classes and pipelines load the classifiers' folders. Nothing heavy is
imported for it: each part is registered right after the module of transformers that it registers with.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0.1.0"

_REGISTERS = {
    "transformers.models.auto.configuration_auto": "resdpo_trl.image.architecture",
    "transformers.models.auto.modeling_auto": "resdpo_trl.image.model",
}


class _ThenImport(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Loads the module `first` as ever, then imports `then`; once."""

    def __init__(self, first: str, then: str):
        self.first, self.then = first, then

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.first:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            self.loader, spec.loader = spec.loader, self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        importlib.import_module(self.then)


for _first, _then in _REGISTERS.items():
    if _first in sys.modules:
        importlib.import_module(_then)
    else:
        sys.meta_path.insert(0, _ThenImport(_first, _then))
