"""How the weights of a model are held in memory: a row for each value of `resident=`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rac.errors import UnsupportedError
from rac.linalg.transform import hooked
from rac.runtime import replace
from rac.runtime.codes import Coded, become
from rac.runtime.layers import Compressed
from rac.stages.table import is_quantised


@dataclass(frozen=True, slots=True)
class Residency:
    """One way."""

    name: str
    holds: Callable[[Any], bool] | None
    """Whether a layer is to load the record of a tensor as it is (rac.runtime.model.Lazy); None: all are dense."""
    settle: Callable[[Any], str]
    """Called with the model once all bytes are there; what it says goes to the log."""
    filed: bool = False
    """Whether records stay in the file, and layers have their places."""


def worth(tensor: Any) -> bool:
    """Whether a layer may hold the record of a tensor."""
    return bool(tensor.worth())


def _records(model: Any) -> str:
    return str(replace.residency(model))


def _quantised(tensor: Any) -> bool:
    """Whether a record may hold integers; what is lossless in the file is dense, as are experts."""
    return worth(tensor) and len(tensor.shape) == 2 and is_quantised(getattr(tensor, "method", ""))


def _codes(model: Any) -> str:
    why = become([m for m in model.modules() if isinstance(m, Compressed)])
    if any(hooked(m) is not None for m in model.modules()):
        replace.guard(model)
    model.save_pretrained = functools.partial(_refuse, model, model.save_pretrained)
    found = dataclasses.replace(replace.residency(model), stay=Coded.stay)
    said = f"{found}; what is lossless in the file is dense"
    return said + "".join(f"; dense, since {reason}: {_some(names)}" for reason, names in sorted(why.items()))


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _refuse(model: Any, save: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`save_pretrained` of a model whose weights are codes; of one that became dense, as always."""
    if any(isinstance(m, Coded) for m in model.modules()):
        what = "has weights that are codes, which files do not hold"
        raise UnsupportedError(f'{type(model).__name__} {what}; load it resident="compressed" or "dense" to save it')
    return save(*args, **kwargs)


_WAYS = (
    Residency("dense", None, lambda model: ""),
    Residency("compressed", worth, _records),
    Residency("codes", _quantised, _codes),
    Residency("disk", worth, _records, filed=True),
)
TABLE = {way.name: way for way in _WAYS}
