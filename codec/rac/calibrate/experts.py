"""Experts that a model holds fused, as one parameter (experts, out, in) or (experts, in, out) without a module each.

What such a module multiplies is seen as it runs: a slice of the parameter, one expert's matrix, is recognised by where
it lies in memory. Which tensor of the files an expert's rows are is found by their values, since the files often hold
a matrix for each expert and projection, under other names.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from rac.calibrate.layers import Low
from rac.calibrate.leading import Leading

Array = NDArray[Any]
Arrays = Mapping[str, Array]

Seen = Callable[[str, int, int, bool, Any, Any], None]
"""Called with the parameter's name, the expert, how many there are, whether they are stored (in, out), and a product's
input and output."""

_NAME = re.compile(r"(.+)\.([^.]+)\[(\d*)\]")


def experts(modules: Mapping[str, Any]) -> dict[str, Any]:
    """The modules that own fused parameters, by name: floating-point, (experts, ., .), more than one expert."""
    own = {name: m.parameters(recurse=False) for name, m in modules.items() if not isinstance(m, _ConvNd)}
    return {name: modules[name] for name, parameters in own.items() if any(map(fused, parameters))}


def fused(p: Any) -> bool:
    """Whether a parameter holds the matrices of experts: floating-point, (experts, ., .), more than one."""
    return bool(p.dim() == 3 and p.shape[0] > 1 and p.is_floating_point())


def watch(modules: Mapping[str, Any], seen: Seen) -> contextlib.AbstractContextManager[Any]:
    """While it is open, `seen` is called for each product with an expert's matrix in the modules."""
    every = [
        (f"{name}.{k}", p) for name, m in modules.items() for k, p in m.named_parameters(recurse=False) if fused(p)
    ]
    linear = torch.nn.functional.linear
    products = {linear, torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.__matmul__}

    class Watching(TorchFunctionMode):  # type: ignore[misc]
        def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if func is torch.bmm and (whole := next((k for k, p in every if p is args[1]), "")):
                each = out.unbind()  # one product for each expert; what follows depends on these
                for e, one in enumerate(each):
                    seen(whole, e, len(each), True, args[0][e], one)
                return torch.stack(each)
            if func in products and len(args) > 1 and args[1].dim() == 2 and (found := _expert(args[1], every)):
                name, number, count, turned = found
                seen(name, number, count, turned == (func is linear), args[0], out)
            return out

    return Watching() if every else contextlib.nullcontext()


def _expert(w: Any, every: Sequence[tuple[str, Any]]) -> tuple[str, int, int, bool] | None:
    """The parameter that `w` is an expert's matrix of, its number, how many there are, and whether it is turned."""
    at = w.data_ptr()
    for name, p in every:
        number, rest = divmod(at - p.data_ptr(), p.stride(0) * p.element_size())
        if 0 <= number < len(p) and rest == 0:
            for turned, v in ((False, w), (True, w.T)):
                if v.shape == p.shape[1:] and v.stride() == p.stride()[1:]:
                    return name, number, len(p), turned
    return None


Second = Array | Low
"""A second moment, dense or not."""
ALIKE = 0.05  # cosine of what lies off the diagonals of two experts, from which on all of them tell of each
_PAIRS = 16  # of experts that are looked at for that


def settled(
    whole: str, rows: Sequence[int], sums: Mapping[str, Array | Leading], weights: Mapping[str, float], squares: Arrays
) -> Iterator[tuple[str, Second, Array | None]]:
    """(name, second moment, sensitivity) of the parameter, as `whole[]`, and of each expert's matrix.

    An expert sees few tokens: its second moment, which is summed over the rows seen, goes towards another one as if it
    had seen as many more rows as the matrix has inputs: towards the mean of all where experts' inputs have something in
    common, else, where the inputs are neurons of its own, towards its own diagonal. What no token came to counts as if
    one had. `sums` and `weights` are by the name of the expert's matrix, or of all by that of the parameter; without
    `squares`, sums of squared gradients, no sensitivities are known.
    """
    n = np.maximum(np.asarray(rows, np.float64), 1)
    every = [f"{whole}[{e}]" for e in range(len(rows))]
    usual: Array = np.sum([*squares.values()], 0) / max(sum(rows), 1)
    sensitivity = [squares[name] / n[e] if name in squares else usual for e, name in enumerate(every)]
    of_all = np.concatenate([s * k / n.mean() for s, k in zip(sensitivity, n, strict=True)]) if squares else None
    own = {name: sums[name] for name in every if name in sums and weights[name] > 0}
    of = [whole] if whole in sums else list(sums)
    total: Array = functools.reduce(np.add, (sums[name] for name in of))  # type: ignore[arg-type, misc]
    mean: Array = total / np.float32(max(sum(weights[name] for name in of), 1e-30))
    common = alike(list(own.values())) >= ALIKE
    yield f"{whole}[]", (usually := mean * np.float32(n.mean())), of_all
    for e, name in enumerate(every):
        second: Second = mean * np.float32(n[e])
        if name in own:
            seen = rows[e] / (rows[e] + len(mean))
            second = _drawn(own[name], n[e] / weights[name], seen, usually if common else None, n[e] / n.mean())
        elif whole in sums:
            second = Low(np.zeros((1, len(mean)), np.float32), usually, float(n[e] / n.mean()))
        yield name, second, sensitivity[e] if squares else None


def _drawn(own: Array | Leading, factor: float, seen: float, all_of: Array | None, share: float) -> Second:
    """A sum times a factor, of which a part was seen: the rest is a share of that of all, or its own diagonal."""
    if isinstance(own, Leading):
        part = own.least().array
        diagonal = np.square(part[:-1]).sum(0) + part[-1]
        part[:-1] *= np.float32(math.sqrt(factor * seen))
        part[-1] *= np.float32(factor * seen)
        if all_of is not None:
            return Low(part, all_of, float(share * (1 - seen)))
        part[-1] += diagonal * np.float32(factor * (1 - seen))
        return Low(part)
    out: Array = own * np.float32(factor * seen)
    if all_of is not None:
        return np.asarray(out + all_of * np.float32(share * (1 - seen)))
    out[np.diag_indices_from(out)] = np.diag(own) * np.float32(factor)
    return out


def alike(sums: Sequence[Array | Leading]) -> float:
    """Mean cosine of what lies off the diagonals of the second moments of neighbours, 1 where there are none."""
    pairs = list(itertools.islice(itertools.pairwise(sums), _PAIRS))
    found = [_cosine(a, b) for a, b in pairs]
    return float(np.mean(found)) if found else 1.0


def _cosine(a: Array | Leading, b: Array | Leading) -> float:
    across, one, other = (_inner(x, y) for x, y in ((a, b), (a, a), (b, b)))
    return across / math.sqrt(one * other) if one > 0 and other > 0 else 0.0


def _inner(a: Array | Leading, b: Array | Leading) -> float:
    """Sum of the products of what lies off two diagonals."""
    if isinstance(a, Leading) and isinstance(b, Leading):
        r, s = (np.asarray(x.rows.cpu().numpy(), np.float64) for x in (a, b))
        return float(np.square(r @ s.T).sum() - np.square(r).sum(0) @ np.square(s).sum(0))
    return float(np.vdot(a, b) - np.diag(a) @ np.diag(b))  # type: ignore[arg-type]


def parts(name: str) -> tuple[str, str, int | None] | None:
    """(module, parameter, number) of a name that `settled` gives; the number is None of the parameter as a whole."""
    found = _NAME.fullmatch(name)
    return (found[1], found[2], int(found[3]) if found[3] else None) if found else None


class Stored:
    """The tensors in the safetensors files of a folder, or given ones: their matrices can be found by their values."""

    def __init__(self, folder: Path | Mapping[str, Any]) -> None:
        from safetensors import safe_open

        self._parts: dict[str, Any] = {} if isinstance(folder, Path) else dict(folder)
        for file in sorted(folder.glob("*.safetensors")) if isinstance(folder, Path) else ():
            held: Any = safe_open(file, "pt")
            self._parts |= {name: held.get_slice(name) for name in held.keys()}  # noqa: SIM118
        self._first: dict[tuple[int, bytes], list[str]] | None = None
        self._rows: dict[int, set[int]] = {}

    @property
    def names(self) -> list[str]:
        """Names of all tensors."""
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._parts[name].get_shape())

    def floats(self, name: str) -> bool:
        """Whether a tensor is of floating-point numbers that are no scales or codes of others."""
        return self._parts[name].get_dtype() in ("F32", "F16", "BF16")

    def read(self, name: str) -> Any:
        """A tensor."""
        return self._parts[name][:]

    def same(self, p: Any, taken: Container[str]) -> str | None:
        """The name of the tensor, not taken, with the shape and, by three rows, the values of `p`; None: none has."""
        shape = list(p.shape)
        at = [(0, 0), (len(p) // 2, shape[1] // 2), (len(p) - 1, shape[1] - 1)]
        for name, part in self._parts.items():
            if name in taken or part.get_shape() != shape:
                continue
            if all(_bytes(part[e, r]) == _bytes(p[e, r]) for e, r in at):
                return name
        return None

    def find(self, w: Any, taken: Container[str]) -> Iterator[tuple[str, int, int]]:
        """(name, first row, row behind the last) of the matrices that are rows of `w` (rows, columns), if not taken."""
        if self._first is None:
            self._first = {}
            for name, part in self._parts.items():
                if len(part.get_shape()) == 2 and self.floats(name):
                    rows, columns = part.get_shape()
                    self._rows.setdefault(columns, set()).add(rows)
                    self._first.setdefault((rows, _bytes(part[0])), []).append(name)
        for rows in sorted(self._rows.get(w.shape[1], ())):
            for a in range(0, len(w) - rows + 1, rows):
                for name in self._first.get((rows, _bytes(w[a])), ()):
                    part = self._parts[name]
                    if name not in taken and all(_bytes(part[i]) == _bytes(w[a + i]) for i in (rows // 2, rows - 1)):
                        yield name, a, a + rows
                        break


def bits(w: Any) -> Array:
    """Words of numbers in bfloat16: equal for numbers of wider types of which one was rounded from the other."""
    return w.to(torch.bfloat16).contiguous().view(torch.int16).numpy()  # type: ignore[no-any-return]


def _bytes(row: Any) -> bytes:
    return bits(row).tobytes()
