"""Calibration: second moments of the inputs of layers and sensitivities of their outputs, from text or any batches.

`rac.calibrate(module, batches)` is `rac.calibrate.module.calibrate`: the package can be called.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any


class _Package(ModuleType):
    def __call__(self, module: Any, batches: Any, **how: Any) -> Any:
        try:
            from rac.calibrate.module import calibrate  # imports torch
        except ImportError as e:
            from rac.errors import MissingDependencyError

            raise MissingDependencyError("calibration needs torch: pip install rac-codec[calibrate]") from e
        return calibrate(module, batches, **how)


sys.modules[__name__].__class__ = _Package
