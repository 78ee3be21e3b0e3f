"""RAC, the rate-aligned container: model weights in one small, checked, streamable file.

    import rac
    rac.save_file({"w": array}, "model.rac")
    tensors = rac.load_file("model.rac")
    with rac.open("model.rac", framework="pt", device="cpu") as f:
        part = f.get_slice("w")[10:20, :]

The stages as functions of numpy arrays are in `rac.align`, `rac.split`, `rac.quantize` and `rac.entropy`.

Importing this loads neither numpy nor torch, triton, numba or constriction: names arrive when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rac import moved
from rac.errors import (
    ChecksumError,
    DamagedError,
    FormatError,
    LimitError,
    MismatchError,
    MissingDependencyError,
    NameNotFoundError,
    OutputError,
    RacError,
    SourceError,
    TruncatedError,
    UnsupportedError,
)
from rac.registry import VERSION as __version__  # noqa: N811

if TYPE_CHECKING:
    from rac import align, entropy, quantize, split
    from rac.decode.archive import RacFile, load, load_file
    from rac.decode.archive import RacFile as open  # noqa: A004, N813
    from rac.decode.stream import iter_tensors, stream
    from rac.decode.unpack import unpack
    from rac.encode.pack import pack, save_file
    from rac.encode.verify import verify
    from rac.runtime.model import load_model, load_tokenizer

__all__ = [
    "ChecksumError",
    "DamagedError",
    "FormatError",
    "LimitError",
    "MismatchError",
    "MissingDependencyError",
    "NameNotFoundError",
    "OutputError",
    "RacError",
    "RacFile",
    "SourceError",
    "TruncatedError",
    "UnsupportedError",
    "__version__",
    "align",
    "entropy",
    "iter_tensors",
    "load",
    "load_file",
    "load_model",
    "load_tokenizer",
    "open",
    "pack",
    "quantize",
    "save_file",
    "split",
    "stream",
    "unpack",
    "verify",
]

_WHERE = {
    "RacFile": "rac.decode.archive:RacFile",
    "open": "rac.decode.archive:RacFile",
    "iter_tensors": "rac.decode.stream:iter_tensors",
    "load": "rac.decode.archive:load",
    "load_file": "rac.decode.archive:load_file",
    "load_model": "rac.runtime:load_model",
    "load_tokenizer": "rac.runtime:load_tokenizer",
    "pack": "rac.encode.pack:pack",
    "save_file": "rac.encode.pack:save_file",
    "stream": "rac.decode.stream:stream",
    "unpack": "rac.decode.unpack:unpack",
    "verify": "rac.encode.verify:verify",
}
_STAGES = ("align", "entropy", "quantize", "split")
"""Packages that can be used without importing them by name."""


moved.install()


def __getattr__(name: str) -> Any:
    if name in _STAGES:
        return importlib.import_module(f"rac.{name}")
    if name not in _WHERE:
        raise AttributeError(f"module 'rac' has no attribute {name!r}")
    module, attribute = _WHERE[name].split(":")
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
