"""Import paths that documentation named before the modules moved: they go on working, as the same module objects."""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

MOVED = {
    "rac.decode.cuda": "rac.gpu.decoder",
    "rac.decode.op": "rac.gpu.op",
    "rac.encode.gptq": "rac.methods.gptq",
    "rac.encode.grouped": "rac.methods.grouped",
    "rac.encode.layerwise": "rac.methods.layerwise",
    "rac.encode.rotations": "rac.methods.rotations",
    "rac.encode.smoothquant": "rac.methods.smoothquant",
    "rac.encode.transforms": "rac.methods.transforms",
    "rac.methods.recipes": "rac.methods.named",
    "rac.quantize.groups": "rac.stages.groups",
    "rac.runtime.lazy": "rac.runtime.vllm_plugin",
}
"""Old module to new one; what lies below a package moved with it."""


class _Finder:
    """Loads a moved module under its old name."""

    def find_spec(self, name: str, *_: object) -> ModuleSpec | None:
        for old, new in MOVED.items():
            if name == old or name.startswith(old + "."):
                return ModuleSpec(name, self, origin=new + name[len(old) :])  # type: ignore[arg-type]
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(str(spec.origin))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        given = module.__spec__  # nothing to run: the module was imported at its new place, whose spec it keeps
        module.__spec__ = given and given.loader_state


def install() -> None:
    """Make the old names importable."""
    sys.meta_path.insert(0, _Finder())  # before the path of a package that moved is searched
