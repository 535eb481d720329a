"""With this folder on PYTHONPATH, vLLM's LLaVA models load where torchvision is not installed.

They import a function that counts tokens from a module of transformers that imports torchvision;
the same function stands in that module's twin for PIL, which is given to them instead.
"""

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType

MODULE = "transformers.models.pixtral.image_processing_pixtral"
TWIN = "transformers.models.pixtral.image_processing_pil_pixtral"


class TwinFinder(MetaPathFinder, Loader):
    """Finds the twin where the module is asked for."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return spec_from_loader(name, self) if name == MODULE else None

    def exec_module(self, module: ModuleType) -> None:
        twin = vars(importlib.import_module(TWIN))
        vars(module).update({name: twin[name] for name in twin if not name.startswith("__")})


if find_spec("torchvision") is None:
    sys.meta_path.insert(0, TwinFinder())
