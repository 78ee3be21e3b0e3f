"""RAC, the rate-aligned container: model weights in one small, checked, streamable file.

    import rac
    rac.save_file({"w": array}, "model.rac")
    tensors = rac.load_file("model.rac")
    with rac.open("model.rac", framework="pt", device="cpu") as f:
        part = f.get_slice("w")[10:20, :]

`rac.torch`, `rac.numpy` and `rac.safe_open` have the names, arguments and results of safetensors' modules.
The stages as functions of numpy arrays are in `rac.align`, `rac.split`, `rac.quantize` and `rac.entropy`.

Importing this loads neither numpy nor torch, triton, numba or constriction: names arrive when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rac import moved
from rac.errors import (
    BudgetError,
    ChecksumError,
    DamagedError,
    DivergedError,
    FormatError,
    LimitError,
    MismatchError,
    MissingDependencyError,
    MissingFileError,
    NameNotFoundError,
    OutputError,
    RacError,
    SliceError,
    SourceError,
    StateDictError,
    TransformError,
    TruncatedError,
    UnstorableError,
    UnsupportedError,
)
from rac.registry import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from rac import align, entropy, quantize, split
    from rac.calibrate.module import calibrate
    from rac.decode.archive import RacFile, load, load_file
    from rac.decode.archive import RacFile as open  # noqa: A004, N813
    from rac.decode.handle import safe_open
    from rac.decode.stream import iter_tensors, stream
    from rac.decode.unpack import unpack
    from rac.encode.pack import pack, save_file
    from rac.encode.verify import verify
    from rac.runtime.model import load_model, load_tokenizer

__all__ = ["BudgetError", "ChecksumError", "DamagedError", "DivergedError", "FormatError", "LimitError"]
__all__ += ["MismatchError", "MissingDependencyError", "MissingFileError", "NameNotFoundError", "OutputError"]
__all__ += ["RacError", "SliceError", "SourceError", "StateDictError", "TransformError", "TruncatedError"]
__all__ += ["UnstorableError", "UnsupportedError"]
__all__ += ["RacFile", "iter_tensors", "load", "load_file", "load_model", "load_tokenizer", "open", "safe_open"]
__all__ += ["__version__", "align", "calibrate", "entropy", "pack", "quantize", "save_file", "split", "stream"]
__all__ += ["unpack", "verify"]

_WHERE = {
    "decode.archive": ("RacFile", "load", "load_file", "open"),
    "decode.handle": ("safe_open",),
    "decode.stream": ("iter_tensors", "stream"),
    "decode.unpack": ("unpack",),
    "encode.pack": ("pack", "save_file"),
    "encode.verify": ("verify",),
    "runtime": ("load_model", "load_tokenizer"),
}
_MODULES = ("align", "calibrate", "entropy", "numpy", "quantize", "split", "torch")  # used without an import of theirs
moved.install()


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"rac.{name}")
    for module, names in _WHERE.items():
        if name in names:
            found = importlib.import_module(f"rac.{module}")
            globals()[name] = value = getattr(found, "RacFile" if name == "open" else name)
            return value
    raise AttributeError(f"module 'rac' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
