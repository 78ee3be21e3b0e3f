"""Weights as int8 codes: round(diag(rows) . codes . diag(columns)), plus a product of low rank where the file has one.

What trellis/1 quantises to are integers with a scale for each row and each column (rac.stages.base.Integers), so that
entropy decoding once, at load, gives codes of one byte that no token decodes again. Integers that eight bits do not
hold, and outliers, are kept beside the codes. Products (rac.native.coded) are of float32 inputs with the numbers of the
file, whose rounding to BF16 is done where they are multiplied.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from rac.cpu.work import Place, Work
from rac.decoder import Decoder
from rac.errors import LimitError, MismatchError, SourceError, UnsupportedError
from rac.linalg.transform import Transform
from rac.native import coded
from rac.native.prototypes import F32
from rac.runtime import made, record
from rac.runtime.layers import Compressed, RacEmbedding, RacLinear
from rac.runtime.products import multiply, weight_of
from rac.runtime.record import Bytes
from rac.stages.base import Integers
from rac.stages.words import from_words, to_words

MOST = 127
SHARE = 4
"""Numbers beside the codes are at most as many as the columns divided by this."""
NAMES = ("weight_rows", "weight_columns", "weight_places", "weight_values", "weight_left", "weight_right")
"""Names of the buffers beside the codes. Scales are int32 of the same bits: no `.to()` rounds them."""


@dataclass(frozen=True, slots=True)
class Codes:
    """A weight (out, in) for products with inputs (..., in)."""

    kind: coded.Kind
    codes: NDArray[np.int8]
    """(out, in), 0 at `places`"""
    rows: F32
    """(out,)"""
    columns: F32
    """(in,)"""
    places: NDArray[np.int64]
    """(N, 2) row and column of the numbers beside the codes, ascending"""
    values: F32
    """(N,)"""
    factors: tuple[F32, F32] | None
    """(out, r) and (r, in)"""


class _Found(NamedTuple):
    """What was decoded of a matrix."""

    codes: NDArray[np.int8]
    """(R, C), 0 at `places`"""
    places: NDArray[np.int64]
    """(N, 2)"""
    values: F32
    """(N,)"""


def codes(s: made.Weight, data: Bytes, turned: bool = False) -> Codes | str:
    """The codes of a record; a string says why it has none. `turned`: the weight is (in, out), as that of Conv1D.

    RacError where a unit is damaged.
    """
    if isinstance(s, made.Made):
        return "quantised by another tool"
    dec = record.opened(s, data)
    whole = None if dec.numbers is None else dec.numbers.integers()
    if whole is None:
        return "no integers with scales of rows and columns"
    product = s.tensor.chain.product
    factors = None if product is None else product.factors(record.matrices(s, data))
    if product is not None and factors is None:
        return "in another basis than its input"
    try:
        found = _decoded(s, dec, data, whole)
    except MemoryError as e:
        raise LimitError(f"not enough memory for {s.tensor.nbytes // 2} bytes", unit=repr(s.tensor.name)) from e
    if not np.isfinite(found.values).all():
        return "outliers that are no finite numbers"
    rows, cols = whole.rows, whole.cols
    if turned:
        found = _Found(np.ascontiguousarray(found.codes.T), found.places[:, ::-1], found.values)
        rows, cols = cols, rows
        factors = factors and (np.ascontiguousarray(factors[1].T), np.ascontiguousarray(factors[0].T))
    if len(found.places) * SHARE > found.codes.shape[1]:
        return "integers that eight bits do not hold"
    kind = coded.Kind.ROUNDED if s.tensor.context.dtype == "BF16" else coded.Kind.EXACT
    if kind == coded.Kind.ROUNDED and not _in_range(rows, cols):
        return "scales of very small or very great numbers"
    order = np.lexsort(found.places.T[::-1])
    return Codes(kind, found.codes, rows, cols, found.places[order], found.values[order], factors)


def _in_range(rows: F32, columns: F32) -> bool:
    """Whether all weights are such that products round them to BF16."""
    r, c = (np.abs(v[v != 0], dtype=np.float64) for v in (rows, columns))
    if not len(r) or not len(c):
        return True
    return bool(r.min() * c.min() >= coded.SMALLEST and MOST * r.max() * c.max() <= coded.GREATEST)


def _decoded(s: record.Stored, dec: Decoder, data: Bytes, whole: Integers) -> _Found:
    """The integers, a row of tiles after the other; what is no code is apart."""
    t, grid = s.tensor, s.tensor.grid
    out = np.empty((grid.rows, grid.cols), np.int8)
    plain = copy.copy(dec)
    plain.numbers = whole.halves
    dtype = t.context.dtype
    apart, values = [whole.places], [from_words(whole.values, dtype)]
    for a in range(0, grid.rows, grid.tr):
        half = np.empty((min(grid.tr, grid.rows - a), grid.cols), "<u4")
        tiles = range(a // grid.tr * grid.across, (a // grid.tr + 1) * grid.across)
        work = Work()
        work.add(plain, tiles, record.unit(data, t, tiles.start + t.first, len(tiles)), Place(half, a))
        work.run()
        k = half.view(np.float32)
        k *= np.where(whole.cols > 0, np.float32(2), np.float32(0))  # words of dead columns are free
        mine = whole.places[(whole.places[:, 0] >= a) & (whole.places[:, 0] < a + len(k))]
        k[mine[:, 0] - a, mine[:, 1]] = 0
        if max(k.max(initial=0), -k.min(initial=0)) > MOST:
            y, x = np.nonzero(np.abs(k) > MOST)
            apart.append(np.stack([y + a, x], axis=1))
            values.append(from_words(to_words(k[y, x] * whole.cols[x] * whole.rows[y + a], dtype), dtype))
            k[y, x] = 0
        out[a : a + len(k)] = k
    return _Found(out, np.concatenate(apart), np.concatenate(values))


class Coded(Compressed):
    """What linear layers and embeddings of codes have in common. `weight`: (out, K) int8, a buffer."""

    beside, stay = NAMES, "are int8 codes"
    turned = False
    """Whether the weight is (in, out), and the codes are (out, in)."""
    _kind: int
    _map: Transform | None
    _views: dict[str, Any]

    def _become(self, kind: coded.Kind, buffers: dict[str, torch.Tensor], online: Transform | None) -> None:
        """Hold these instead of a record."""
        self._kind = int(kind)
        self._buffers.pop("weight", None)
        for name, tensor in buffers.items():
            self._buffers[name] = tensor
        self._map, self._views, self._stored = online, {}, None

    def online(self) -> Transform | None:
        """What the layer does to its input."""
        return self._map

    def _replaces(self, value: Any) -> bool:
        return isinstance(value, torch.Tensor) and value.dtype == torch.int8 and value.shape == self.record.shape

    def _numbers(self, name: str) -> torch.Tensor:
        """The scales, or a factor, under a name."""
        bits: Any = self._buffers[name]
        found = self._views.get(name)
        if found is None or found[0] is not bits:
            found = self._views[name] = bits, bits.view(torch.float32)
        return found[1]

    def _matrix(self, found: torch.Tensor | None = None) -> torch.Tensor:
        """(out, in) float32, or the rows with these indices."""
        if self.record.device.type == "meta":
            raise SourceError("the codes of the layer are not in memory; they are offloaded until it runs")
        rows, places = self._numbers("weight_rows"), self._buffers["weight_places"]
        codes = self.record if found is None else self.record[found]
        w = codes * self._numbers("weight_columns") * (rows if found is None else rows[found])[:, None]
        if found is None:
            w[places[:, 0], places[:, 1]] = self._numbers("weight_values")
        elif len(places):
            i, k = torch.nonzero(found[:, None] == places[:, 0], as_tuple=True)
            w[i, places[k, 1]] = self._numbers("weight_values")[k]
        if "weight_left" in self._buffers:
            left = self._numbers("weight_left")
            w = w + (left if found is None else left[found]) @ self._numbers("weight_right")
        return w

    def dense(self) -> torch.Tensor:
        """The weight in memory of its own, in the data type of the file."""
        w = self._matrix()
        return (w.t() if self.turned else w).to(_DTYPES[self.head.dtype]).contiguous()

    def rows(self, found: torch.Tensor) -> torch.Tensor:
        """Rows of the weight with these indices, in the data type of the file."""
        if self.turned:
            return self.dense()[found]
        return self._matrix(found.to(self.record.device)).to(_DTYPES[self.head.dtype])

    def opened(self, dtype: torch.dtype) -> Any:
        """The weight in a data type; only valid inside."""
        return _Opened(self, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes that stand for the weight."""
        return sum(b.nbytes for name in ("weight", *NAMES) if (b := self._buffers.get(name)) is not None)

    def extra_repr(self) -> str:
        """As of the dense layer, and the bytes."""
        return f"{super(Compressed, self).extra_repr()}, {self.nbytes} bytes of codes"

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_views": {}}


_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class _Opened:
    """A context with the weight of a layer."""

    def __init__(self, layer: Coded, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype

    def __enter__(self) -> torch.Tensor:
        return self._layer.dense().to(self._dtype)

    def __exit__(self, *_: object) -> None:
        return


class CodedLinear(Coded, RacLinear):
    """A linear layer of codes. Made by `become` of a `RacLinear`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), the data type of x kept."""
        quick = x.dtype == torch.float32 and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if quick and (weight := self._alone()) is not None:  # where a token is written, what Python does here counts
            bias, y = self.bias, multiply(x, weight)
            return y if bias is None else y + bias[: y.shape[-1]]
        if not x.is_floating_point():
            raise TypeError(f"the input is {x.dtype}; a model that casts to the data type of `weight` needs it dense")
        if self._map is not None:
            x = self._map.apply(x)
        return self.result(x)

    def _alone(self) -> coded.Weight | None:
        """The weight for products, where it is ready and nothing but a product is to be done."""
        found, codes = self._views.get("ready"), self._buffers["weight"]
        if found is None or found[0] is not codes or found[1] != codes.data_ptr():  # type: ignore[union-attr]
            return None
        return None if self._map is not None or "weight_left" in self._buffers else found[2]

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The output, on a CPU of float32 products; no gradient is kept."""
        if self.record.device.type != "cpu":
            w = self.dense().to(x.dtype)
            return functional.linear(
                x, w.t() if self.turned else w, bias if bias is None else bias[: self.out_features]
            )
        if torch.compiler.is_compiling():
            y = torch.ops.rac.multiply(x, self.record, self._beside(), self._kind)
        else:
            y = multiply(x, self._ready())
        if "weight_left" in self._buffers:
            left, right = self._numbers("weight_left"), self._numbers("weight_right")
            y += functional.linear(functional.linear(x.float(), right), left)
        # transformers pads the bias of a tied output layer to the first dimension of `weight`
        return (y if bias is None else y + bias[: y.shape[-1]]).to(x.dtype)

    def _beside(self) -> list[Any]:
        return [self._buffers[name] for name in NAMES[:4]]

    def _ready(self) -> coded.Weight:
        """The weight for products, made once for the memory that it has."""
        codes: Any = self.record
        found = self._views.get("ready")
        if found is None or found[0] is not codes or found[1] != codes.data_ptr():
            weight = weight_of(codes, self._beside(), self._kind)
            found = self._views["ready"] = codes, codes.data_ptr(), weight
        return found[2]  # type: ignore[no-any-return]


class CodedEmbedding(Coded, RacEmbedding):
    """An embedding of codes. Made by `become` of a `RacEmbedding`."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Indices (...) to rows (..., columns). IndexError where there is no such row."""
        if self._map is not None:
            raise MismatchError("the record states an online transform, and an embedding has no input to apply it to")
        flat = ids.reshape(-1)
        if len(flat) and not (int(flat.min()) >= 0 and int(flat.max()) < self.num_embeddings):
            raise IndexError(f"index out of range: {int(flat.min())} to {int(flat.max())} of {self.num_embeddings}")
        return self.rows(flat).to(self.compute_dtype).view(*ids.shape, -1)


def become(layers: list[Compressed]) -> dict[str, list[str]]:
    """Turn layers that hold records, in their places, into ones of codes; those that share a record share its codes.

    Layers whose record has no codes become dense. Returns the names of their tensors by the reason. RacError where a
    record is damaged, or an offloader has it.
    """
    from rac.runtime.replace import densify

    sharing: dict[int, list[Any]] = {}
    for layer in layers:
        sharing.setdefault(id(layer.record), []).append(layer)
    why: dict[str, list[str]] = {}
    for group in sharing.values():  # one after the other: the record goes when its codes are there
        first = group[0]
        if first.record.device.type == "meta":
            raise UnsupportedError('what an offloader has cannot become codes; load it resident="compressed"')
        s, data = first.stored()
        turned = isinstance(first, RacLinear) and first.transposed
        found = codes(s, data, turned)
        if isinstance(found, str):
            why.setdefault(found, []).append(s.tensor.name)
            densify(*group)
            continue
        buffers, online = _buffers(found, first.record.device), first.online()
        for layer in group:
            layer.workspace.forget(layer)
            layer.__class__ = CodedLinear if isinstance(layer, RacLinear) else CodedEmbedding
            layer.turned = turned
            layer._become(found.kind, buffers, online)
    return why


def _buffers(found: Codes, device: torch.device) -> dict[str, torch.Tensor]:
    """The buffers of a layer."""
    parts = [found.rows, found.columns, found.places, found.values, *(found.factors or (None, None))]
    out = {"weight": torch.from_numpy(found.codes).to(device)}
    for name, part in zip(NAMES, parts, strict=True):
        if part is not None:
            bits = part if part.dtype == np.int64 else np.array(part, np.float32).view(np.int32)
            out[name] = torch.from_numpy(bits).to(device)
    return out
