"""Direct Preference Optimization for language models and image classifiers, with one loss.

After `import resdpo_trl`, transformers' auto classes and pipelines load the classifiers' folders. Nothing heavy is
imported for it: the classifiers are registered when transformers' AutoConfig is first used.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

__version__ = "0.1.0"

_AUTO = "transformers.models.auto.configuration_auto"


class _RegisterClassifiers(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands before the import of AutoConfig's module once, and registers the classifiers right after it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _AUTO:
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
        _register()


def _register() -> None:
    importlib.import_module("resdpo_trl.image.model")  # registers them; where it is being imported, at its end


if _AUTO in sys.modules:
    _register()
else:
    sys.meta_path.insert(0, _RegisterClassifiers())
