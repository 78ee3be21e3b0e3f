"""What an index selects of an array, worked out before any of the array is read."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.errors import SliceError

Runs = list[tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Selection:
    """The ranges of each axis that are read, in ascending order, and the index of what was read, ranges joined."""

    runs: tuple[Runs, ...]
    inside: tuple[Any, ...]

    def of(self, read: NDArray[Any], framework: str) -> Any:
        """The part of `read` that is selected, dimensions in the order that numpy or torch (framework "pt") gives.

        They differ for an integer and an array with a slice in between: to numpy the integer is an array, too.
        """
        if framework == "np" or not any(isinstance(k, np.ndarray) for k in self.inside):
            return read[self.inside]
        first = tuple(slice(None) if isinstance(k, np.ndarray) else k for k in self.inside)
        left = (k for k in self.inside if not isinstance(k, int) and k is not Ellipsis)
        then = tuple(k if isinstance(k, np.ndarray) else slice(None) for k in left)
        return read[first][then]


def select(key: Any, shape: Sequence[int], gaps: Sequence[int]) -> Selection:
    """What `key` selects of an array of `shape`: integers, slices, `None`, one ellipsis, lists and masks, as in numpy.

    Ends of slices are clamped as in Python. `gaps[i]` is the distance along axis i from which two elements are read
    apart. SliceError where an index is out of range, of another kind, or a step is not positive.
    """
    terms = _terms(key if isinstance(key, tuple) else (key,), shape)
    runs: list[Runs] = []
    inside: list[Any] = []
    for term in terms:
        if term is None or term is Ellipsis:
            inside.append(term)
            continue
        axis = len(runs)
        # ranges along one axis alone, or their number would be a product
        gap = 1 << 63 if any(len(r) > 1 for r in runs) else gaps[axis]
        found, index = _along(term, shape[axis], axis, gap)
        runs.append(found)
        inside.append(index)
    return Selection(tuple(runs), tuple(inside))


def _terms(key: tuple[Any, ...], shape: Sequence[int]) -> list[Any]:
    """`None`, a slice, an integer or an array of integers for each axis: without masks."""
    terms: list[Any] = []
    for k in key:
        if k is None or k is Ellipsis or isinstance(k, slice):
            terms.append(k)
        elif getattr(k, "ndim", 0) or isinstance(k, Sequence):
            terms.append(_array(k))
        elif isinstance(k, bool) or "bool" in str(getattr(k, "dtype", "")) or not hasattr(k, "__index__"):
            raise SliceError(f"an index is an integer, a slice, None, an ellipsis, a list or a mask, not {k!r:.40}")
        else:
            terms.append(operator.index(k))
    axes = sum(_axes(k) for k in terms)
    dots = [i for i, k in enumerate(terms) if k is Ellipsis]
    if len(dots) > 1:
        raise SliceError("an index can only have a single ellipsis")
    if axes > len(shape):
        raise SliceError(f"{axes} indices for a tensor of {len(shape)} dimensions")
    at = dots[0] if dots else len(terms)
    # one that stands for nothing stays: to numpy it separates integers and arrays all the same
    terms[at : at + 1] = [slice(None)] * (len(shape) - axes) or terms[at : at + 1]
    out: list[Any] = []
    for k in terms:
        if isinstance(k, np.ndarray) and k.dtype == bool:
            first = sum(_axes(o) for o in out)
            there = tuple(shape[first : first + k.ndim])
            if k.shape != there:
                raise SliceError(f"a mask of shape {list(k.shape)} does not fit dimensions {list(there)}")
            out += k.nonzero()
        else:
            out.append(k)
    return out


def _array(k: Any) -> NDArray[Any]:
    """A list, an array or a torch tensor of integers, or of bools for a mask."""
    try:
        found = np.asarray(k.detach().cpu() if hasattr(k, "detach") else k)
    except (ValueError, TypeError, RuntimeError) as e:
        raise SliceError(f"an index of {type(k).__name__} is neither integers nor a mask: {e}") from e
    if found.size == 0 and found.dtype != bool:
        found = found.astype(np.intp)  # an empty list has floats in it, as far as numpy knows
    if not found.ndim or found.dtype.kind not in "iub":
        raise SliceError(f"a list that is an index holds integers, or bools as a mask, not {found.dtype}")
    return found


def _axes(k: Any) -> int:
    """How many axes of the tensor a term takes."""
    return 0 if k is None or k is Ellipsis else k.ndim if isinstance(k, np.ndarray) and k.dtype == bool else 1


def _along(term: Any, n: int, axis: int, gap: int) -> tuple[Runs, Any]:
    """The ranges of an axis of `n` elements that a term needs, and the index of what they hold."""
    if isinstance(term, int):
        if not -n <= term < n:
            raise SliceError(f"index {term} is out of range for dimension {axis} of size {n}")
        return [(term % n, term % n + 1)], 0
    if isinstance(term, slice):
        if term.step is not None and operator.index(term.step) < 1:
            raise SliceError(f"the step of a slice must be positive, not {term.step}; flip the part that comes back")
        chosen = range(*term.indices(n))
        if not chosen:
            return [(0, 0)], slice(0, 0)
        if chosen.step > gap:
            return [(i, i + 1) for i in chosen], slice(None)
        return [(chosen[0], chosen[-1] + 1)], slice(0, None, chosen.step)
    if not term.size:
        return [(0, 0)], term.astype(np.intp)
    low, high = int(term.min()), int(term.max())
    if not -n <= low <= high < n:
        raise SliceError(f"index {low if low < -n else high} is out of range for dimension {axis} of size {n}")
    where = term.astype(np.intp)
    where[where < 0] += n
    there = np.unique(where)
    cuts = np.flatnonzero(np.diff(there) > gap)
    starts, stops = there[[0, *(cuts + 1)]], there[[*cuts, -1]] + 1
    run = np.searchsorted(starts, where, "right") - 1
    before = np.concatenate(([0], np.cumsum(stops - starts)[:-1]))
    return [(int(a), int(b)) for a, b in zip(starts, stops, strict=True)], where - starts[run] + before[run]
