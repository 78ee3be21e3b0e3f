"""Which of a module's parameters are multiplied with what, seen as it runs, whatever its layers are.

A product is recognised by where its matrix lies in memory: a parameter as it is or turned, rows of it (a fused query,
key and value), one expert's matrix of a parameter (experts, ., .), or the kernel of a convolution. So layers that are
no `torch.nn.Linear` are seen too, as long as they hand their parameters to a function of torch.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

ROWS = 4096  # inputs of one product that are looked at, at most: of a convolution that is a sample of its patches

_LINEAR = {functional.linear}
_PRODUCTS = {torch.matmul, torch.mm, torch.bmm}
_PRODUCTS |= {torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm, torch.Tensor.__matmul__}
_ADDED = {torch.addmm, torch.baddbmm, torch.Tensor.addmm, torch.Tensor.baddbmm}
_CONVOLUTIONS = {functional.conv1d: 1, functional.conv2d: 2, functional.conv3d: 3}
_TURNED = {functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d}
_DEFAULTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a run: `out`, or a slice of it, is what `given` makes with a part of a parameter."""

    name: str
    part: int | None  # row at which the part begins, or the expert; None: the whole parameter
    turned: bool  # whether the parameter is stored (in, out)
    given: Any  # the tensor that is multiplied: products of one tensor share their second moment
    key: tuple[Any, ...]  # what else has to be equal for the inputs to be the same
    count: int  # inputs there are
    inputs: Callable[[Any], Any]  # of indices (n,) below `count`, or None for all, the inputs (n, in)
    outputs: Callable[[Any], Any]  # of a gradient of `out`, those at the outputs of each input (count, out)
    block: tuple[int, int]  # rows and columns of the part, as it is stored
    many: int = 1  # parts that the parameter has

    @property
    def width(self) -> int:
        """Numbers of an input."""
        return self.block[0] if self.turned else self.block[1]


class Watch(TorchFunctionMode):  # type: ignore[misc]
    """While it is open, `seen` is called with each product and its output, and returns what is handed on instead."""

    def __init__(self, parameters: Mapping[str, Any], seen: Callable[[list[Product], Any], Any]) -> None:
        super().__init__()
        self._seen = seen
        self._at: dict[int, list[tuple[str, Any]]] = {}
        for name, p in parameters.items():
            if p.dim() > 1 and p.is_floating_point() and p.is_contiguous() and p.device.type != "meta":
                self._at.setdefault(p.untyped_storage().data_ptr(), []).append((name, p))

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.multi_head_attention_forward:  # it is Python, and multiplies inside
            with _written_out(), self:
                return func(*args, **kwargs)
        out = func(*args, **kwargs)
        found = list(self._products(func, args, kwargs, out))
        return self._seen(found, out) if found else out

    def _products(self, func: Any, args: Any, kwargs: Any, out: Any) -> Iterator[Product]:
        if func in _CONVOLUTIONS or func in _TURNED:
            named = dict(zip(_DEFAULTS, args, strict=False)) | kwargs
            if (name := self._whole(named["weight"])) is None:
                return
            turned = func in _TURNED
            yield _transposed(name, named) if turned else _convolution(name, named, _CONVOLUTIONS[func], out)
        elif func in _LINEAR:
            named = dict(zip(_DEFAULTS, args, strict=False)) | kwargs
            yield from self._matrix(named["input"], named["weight"], out)
        elif func in _PRODUCTS and len(args) == 2:
            yield from self._factors(args[0], args[1], out)
        elif func in _ADDED and len(args) == 3:
            yield from self._factors(args[1], args[2], out)
        elif func is torch.einsum and len(args) == 3 and isinstance(args[0], str):
            for w, x, first in ((args[2], args[1], False), (args[1], args[2], True)):
                if (name := self._whole(w)) is not None and isinstance(x, torch.Tensor):
                    yield from _contracted(name, w, x, _letters(args[0], first))

    def _factors(self, x: Any, w: Any, out: Any) -> Iterator[Product]:
        if isinstance(w, torch.Tensor) and w.dim() == 2:
            yield from self._matrix(x, w.T, out)
        elif isinstance(w, torch.Tensor) and w.dim() == 3 and x.dim() == 3 and len(x) == len(w):
            for e in range(len(w)):  # all experts at once
                for one in self._matrix(x[e], w[e].T, out[e]):
                    yield Product(
                        *(one.name, one.part, one.turned, x, (*one.key, e), one.count, one.inputs),
                        outputs=partial(_of_expert, e),
                        block=one.block,
                        many=one.many,
                    )

    def _whole(self, w: Any) -> str | None:
        """The name of the parameter that `w` is."""
        held = self._at.get(w.untyped_storage().data_ptr(), ()) if isinstance(w, torch.Tensor) else ()
        return next((name for name, p in held if p.shape == w.shape and p.data_ptr() == w.data_ptr()), None)

    def _matrix(self, x: Any, w: Any, out: Any) -> Iterator[Product]:
        """The product of inputs (..., in) with a matrix (out, in)."""
        if not isinstance(w, torch.Tensor) or w.dim() != 2 or not isinstance(x, torch.Tensor):
            return
        for name, p in self._at.get(w.untyped_storage().data_ptr(), ()):
            found = _placed(p, w)
            if found is not None:
                part, turned = found
                yield Product(
                    *(name, part, turned, x, (), math.prod(x.shape[:-1])),
                    inputs=partial(_rows, x),
                    outputs=_flat,
                    block=tuple(w.T.shape if turned else w.shape),
                    many=len(p) if p.dim() == 3 and part is not None else 1,
                )
                return


def _placed(p: Any, w: Any) -> tuple[int | None, bool] | None:
    """Where in parameter `p` the matrix `w` (out, in) lies: the part, and whether it is stored (in, out)."""
    offset = w.storage_offset() - p.storage_offset()
    rows, cols = p.shape[-2:] if p.dim() < 4 else p.flatten(1).shape
    for turned, v in ((False, w), (True, w.T)):
        if v.stride() != (cols, 1) or v.shape[1] != cols:
            continue
        if p.dim() == 3 and v.shape[0] == rows and len(p) > 1:
            e, rest = divmod(offset, rows * cols)
            return (e, turned) if 0 <= e < len(p) and rest == 0 else None
        if p.numel() == v.numel() and offset == 0:
            return None, turned
        row, rest = divmod(offset, cols)
        if p.dim() == 2 and not turned and rest == 0 and 0 <= row <= rows - len(v):
            return row, turned
    return None


def _flat(x: Any) -> Any:
    return x.reshape(-1, x.shape[-1])


def _of_expert(e: int, g: Any) -> Any:
    return _flat(g[e])


def _rows(x: Any, at: Any) -> Any:
    return _taken(_flat(x), at)


def _taken(rows: Any, at: Any) -> Any:
    return rows if at is None else rows[at.to(rows.device)]


def _letters(equation: str, first: bool) -> tuple[str, str, str]:
    """Those of a weight, which is the first factor or not, of the other factor and of the result; empty: unknown."""
    given, _, out = equation.replace(" ", "").partition("->")
    one, _, two = given.partition(",")
    if "." in equation or not out:
        return "", "", ""
    return (one, two, out) if first else (two, one, out)


def _matrix(x: Any, letters: str, rows: str, columns: str) -> Any:
    """A tensor as a matrix whose rows are the dimensions `rows` of its `letters`."""
    x = x.permute([letters.index(c) for c in rows + columns])
    return x.reshape(math.prod(x.shape[: len(rows)]), -1)


def _contracted(name: str, w: Any, x: Any, letters: tuple[str, str, str]) -> Iterator[Product]:
    """The product of an einsum in which the first or the last dimensions of the weight are summed over."""
    of_w, of_x, of_out = letters
    summed = "".join(c for c in of_w if c in of_x)
    kept = "".join(c for c in of_w if c not in of_x)
    rest = "".join(c for c in of_x if c not in summed)
    turned = of_w == summed + kept
    if not summed or not kept or (not turned and of_w != kept + summed) or sorted(of_out) != sorted(rest + kept):
        return
    rows = math.prod(w.shape[: len(summed if turned else kept)])
    yield Product(
        *(name, None, turned, x, ("einsum", *letters), math.prod(x.shape[of_x.index(c)] for c in rest)),
        inputs=lambda at: _taken(_matrix(x, of_x, rest, summed), at),
        outputs=lambda g: _matrix(g, of_out, rest, kept),
        block=(rows, w.numel() // rows),
    )


def _each(value: Any, n: int) -> Sequence[int]:
    return [value] * n if isinstance(value, int) else [*value] * (n if len(value) == 1 else 1)


def _convolution(name: str, given: Mapping[str, Any], n: int, out: Any) -> Product:
    x, w = given["input"], given["weight"]
    x = x if x.dim() == n + 2 else x[None]
    stride, dilation = (_each(given.get(key, 1), n) for key in ("stride", "dilation"))
    padding, size, groups = given.get("padding", 0), w.shape[2:], given.get("groups", 1)
    sides: list[tuple[int, int]] = []
    for k, d, p in zip(size, dilation, [0] * n if isinstance(padding, str) else _each(padding, n), strict=True):
        whole = d * (k - 1) if padding == "same" else 2 * p
        sides.append((whole // 2, whole - whole // 2))
    positions = out.shape[-n:]

    def inputs(at: Any) -> Any:
        v = functional.pad(x, [side for pair in reversed(sides) for side in pair])
        for i, (k, s, d) in enumerate(zip(size, stride, dilation, strict=True)):
            v = v.unfold(2 + i, d * (k - 1) + 1, s)[..., ::d]
        v = v.movedim(1, 1 + n)  # (batch, positions, channels, kernel): a view, of which few patches are copied
        shape = (len(x), *positions)
        at = torch.arange(math.prod(shape)) if at is None else at
        taken = v[torch.unravel_index(at.to(v.device), shape)]
        return taken.reshape(len(at) * groups, -1)

    def outputs(g: Any) -> Any:
        g = g if g.dim() == n + 2 else g[None]
        return g.movedim(1, -1).reshape(-1, g.shape[1])

    key = (tuple(size), tuple(stride), str(padding), tuple(dilation), groups)
    block = (w.shape[0], math.prod(w.shape[1:]))
    return Product(name, None, False, given["input"], key, len(x) * math.prod(positions), inputs, outputs, block)


def _transposed(name: str, given: Mapping[str, Any]) -> Product:
    """The kernel (in, out, ...) of a transposed convolution as a matrix: each input makes a patch of the output."""
    x, w, groups = given["input"], given["weight"], given.get("groups", 1)
    n, kernel = w.dim() - 2, math.prod(w.shape[2:])
    x = x if x.dim() == n + 2 else x[None]

    def outputs(g: Any) -> Any:
        g = (g if g.dim() == n + 2 else g[None]).movedim(1, -1).reshape(-1, groups, w.shape[1])
        # an output is the sum of what several inputs make: how much each matters is known, not which of them
        return g.square().mean((0, 1)).sqrt().repeat_interleave(kernel)[None]

    return Product(
        *(name, None, True, given["input"], ("turned", groups), math.prod(x.shape) // x.shape[1]),
        inputs=lambda at: _taken(x.movedim(1, -1).reshape(-1, x.shape[1]), at),
        outputs=outputs,
        block=(w.shape[0], math.prod(w.shape[1:])),
    )


@contextlib.contextmanager
def _written_out() -> Iterator[None]:
    """Functions of `torch.nn.functional` that are Python run as they are written, each step of them seen."""
    names = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    before = {name: getattr(functional, name) for name in names}
    try:
        for name in names:
            setattr(functional, name, lambda *_: False)
        yield
    finally:
        for name, value in before.items():
            setattr(functional, name, value)
