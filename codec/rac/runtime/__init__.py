"""Models that run from a .rac file, in transformers (docs/loading.md); `dcp` for torch.distributed.checkpoint.

Importing this lets `from_pretrained` load a folder that `rac pack --format hf` wrote, and other libraries an archive
(rac.runtime.libraries). Needs torch and transformers;
nothing else of the package does, but for calibration and evaluation.
"""

from __future__ import annotations

from typing import Any

from rac.errors import MissingDependencyError

__all__ = ["RacConfig", "RacEmbedding", "RacLinear", "Workspace", "fold", "load_model", "load_tokenizer"]

try:
    import safetensors  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
except ImportError as _why:  # rac.runtime.dcp does without
    _missing = str(_why)

    def __getattr__(name: str) -> Any:
        if name in __all__:
            raise MissingDependencyError(
                f"models need torch and transformers ({_missing}): pip install rac-codec[transformers]"
            )
        raise AttributeError(f"module 'rac.runtime' has no attribute {name!r}")
else:
    from rac.runtime import libraries
    from rac.runtime.layers import RacEmbedding, RacLinear
    from rac.runtime.model import load_model, load_tokenizer
    from rac.runtime.quantizer import RacConfig
    from rac.runtime.replace import fold
    from rac.runtime.workspace import Workspace

    libraries.install()
