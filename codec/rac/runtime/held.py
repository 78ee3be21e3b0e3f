"""Modules of which some parameters are records of a file, and the names under which these are kept.

A parameter that is held is uint8, (bytes,), under its own name: the records of its tensor, or of the tensors that it is
made of, as they lie in the file (runtime/record.py). So state dictionaries, `.to()`, device maps and offloading work as
for any other tensor, and their bytes are the bytes that are held. It is a parameter while transformers loads it, and a
buffer from then on: the parameters of a model, which many programs ask for its data type, are all floating-point
numbers. Who asks the module for the name gets a `Weight` (runtime/weight.py), but for the libraries that move and load
what is held: they get the record.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from rac import frameworks
from rac.errors import MismatchError, SourceError, UnsupportedError
from rac.registry import DTYPES
from rac.runtime import device, made
from rac.runtime import record as stored_record
from rac.runtime.weight import Weight
from rac.runtime.workspace import Workspace

if TYPE_CHECKING:
    from rac.runtime.disk import Filed

_MOVERS = ("accelerate.", "torch.nn.modules.module", "transformers.modeling_utils", "transformers.core_model_loading")
"""Modules of libraries that load, tie and move what is held."""


@dataclass(frozen=True, slots=True)
class Head:
    """What must be known of a record before its bytes are there."""

    nbytes: int
    """Bytes of the record, of those of the objects that it uses, and the TAIL zeros behind them; of all parts.

    Of what stands for them where they stay in the file (rac.runtime.ranges)."""
    dtype: str
    shape: tuple[int, ...]
    """Shape of the tensor, and with several records of each of them."""
    parts: int = 1
    """Records: the matrices of experts, of one after the other, and all of one expert together."""

    turned: bool = False
    """Whether the parameter has the last two of three dimensions the other way round."""
    making: made.Making | None = None
    """How each is made of several records."""

    @property
    def records(self) -> int:
        """Records of a part."""
        return 1 if self.making is None else len(self.making.names)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a parameter of this shape can be made of the records.

        It is that of the record or, of several, (experts, R, C): equally many for each expert, one below the other.
        """
        if self.parts == 1:
            return (self.shape[0], self.shape[2], self.shape[1]) == shape if self.turned else self.shape == shape
        if len(shape) != 3 or len(self.shape) != 2 or self.parts % shape[0]:
            return False
        return (self.parts // shape[0] * self.shape[0], self.shape[1]) == shape[1:]


AWAY = "the bytes of the layer are not in memory; they are offloaded until it runs"


class Named:
    """A name of a module under which a record is kept: what reads it gets the weight."""

    def __init__(self, name: str) -> None:
        self.name = name

    @torch.compiler.disable
    def __get__(self, module: Holding | None, owner: type) -> Any:
        """The weight; the record for who moves it, and until it is loaded."""
        if module is None:
            return self
        if (loading := module._parameters.get(self.name)) is not None or _moves(sys._getframe(1)):
            return loading if loading is not None else module._buffers.get(self.name)
        if self.name not in module._buffers:
            raise AttributeError(self.name)
        return module.weight_of(self.name)

    def __set__(self, module: Holding, value: Any) -> None:
        """Through the module, which knows what to do."""
        setattr(module, self.name, value)


def _moves(frame: Any) -> bool:
    """Whether the caller is one of the libraries that move what is held."""
    while frame is not None and frame.f_globals.get("__name__", "").startswith("torch._dynamo"):
        frame = frame.f_back
    return frame is not None and frame.f_globals.get("__name__", "").startswith(_MOVERS)


class Holding(nn.Module):
    """A module that holds records under some of its names."""

    _names: tuple[str, ...] = ()

    def source(self, name: str) -> Any:
        """What the weight under a name is decoded from (rac.runtime.weight.Source)."""
        raise NotImplementedError

    def record_of(self, name: str) -> torch.Tensor:
        """(bytes,) uint8, as it is kept under a name."""
        found = self._parameters.get(name)
        out: Any = found if found is not None else self._buffers[name]
        return out

    def filed(self, name: str) -> Filed | None:
        """The records under a name where they are in a file; None: they are in memory, as a tensor."""
        source = self.source(name)
        if (store := source.workspace.store) is None:
            return None
        record = self.record_of(name)
        real(record)
        if record.device.type == "meta":
            record = self._offloaded(name)
        return store.of(record.detach().cpu().numpy().tobytes(), source.head)

    def _offloaded(self, name: str) -> torch.Tensor:
        """What accelerate has of a name while the module does not run; SourceError where it has nothing."""
        own: Any = getattr(self, "_hf_hook", None)
        for hook in getattr(own, "hooks", (own,)):
            if (kept := getattr(hook, "weights_map", None)) is not None and name in kept:
                found: torch.Tensor = kept[name]
                return found
        raise SourceError(AWAY)

    def weight_of(self, name: str) -> Weight:
        """The weight under a name; those who share a record share it, as long as somebody has it."""
        source, record = self.source(name), self.record_of(name)
        kept = source.workspace.weights
        found: Weight | None = kept.get(id(record))
        if found is None or found.source.record is not record or found.dtype != source.compute_dtype:
            found = kept[id(record)] = Weight(source)
        return found

    def settle(self) -> None:
        """Make records buffers, once they are loaded; what an offloader has is still offloaded."""
        for name in self._names:
            if (record := self._parameters.pop(name, None)) is not None:
                self._buffers[name] = record
        own: Any = getattr(self, "_hf_hook", None)  # of accelerate
        for hook in getattr(own, "hooks", (own,)):
            if hasattr(hook, "offload_buffers"):
                hook.offload_buffers = True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module; a record that several layers share stays one, as parameters do."""
        before = {name: self._buffers.get(name) for name in self._names}
        super()._apply(fn, recurse)
        for name, old in before.items():
            moved = self._buffers.get(name)
            if old is not None and moved is not old and torch._has_compatible_shallow_copy_type(old, moved):  # type: ignore[arg-type]
                old.data = moved  # type: ignore[assignment]
                self._buffers[name] = old
        return self

    def _replaces(self, value: Any) -> bool:
        """Whether a value can stand where a record does."""
        return isinstance(value, torch.Tensor) and value.dtype == torch.uint8 and value.dim() == 1

    def __setattr__(self, name: str, value: Any) -> None:
        """A record takes the place of a record; any other weight makes the module dense."""
        if name not in self._names:
            super().__setattr__(name, value)
            return
        if isinstance(value, Weight):
            value = value.source.record
        if self._replaces(value):
            kind: Any = self._parameters if name in self._parameters else self._buffers
            kind[name] = value
            return
        self.source(name).write()
        setattr(self, name, value)


@dataclass(slots=True)
class Kept:
    """What was parsed of a record, or of several, for the bytes that are there."""

    head: Head
    shape: tuple[int, ...]
    """Shape of the weight."""
    spans: list[tuple[int, int]] | None = None
    """Where each part begins and ends."""
    parsed: dict[int, made.Weight] = field(default_factory=dict)
    residents: dict[int, device.Resident] = field(default_factory=dict)

    def __deepcopy__(self, memo: Any) -> Kept:
        """What was parsed is parsed again."""
        return Kept(self.head, self.shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self.head, self.shape)


@dataclass(frozen=True, slots=True)
class Place:
    """A name of a module that holds a record under it: a `Source`."""

    module: Any
    name: str

    @property
    def kept(self) -> Kept:
        """What was parsed."""
        found: Kept = self.module._kept[self.name]
        return found

    @property
    def head(self) -> Head:
        """What was known of the record before its bytes were there."""
        return self.kept.head

    @property
    def record(self) -> torch.Tensor:
        """(bytes,) uint8."""
        found: torch.Tensor = self.module.record_of(self.name)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.kept.shape

    @property
    def compute_dtype(self) -> torch.dtype:
        """Follows `.to()` of the module."""
        found: torch.dtype = self.module._as.dtype
        return found

    @property
    def workspace(self) -> Workspace:
        """Threads."""
        found: Workspace = self.module.workspace
        return found

    def write(self) -> nn.Parameter:
        """Make the module dense."""
        from rac.runtime.replace import densify

        densify(self.module)
        found: nn.Parameter = getattr(self.module, self.name)
        return found

    def dense(self) -> torch.Tensor:
        """All of it."""
        return self.rows(torch.arange(self.shape[0]))

    @torch.compiler.disable
    def rows(self, found: torch.Tensor) -> torch.Tensor:
        """The rows, or the experts, with these indices, ascending."""
        record = self.record
        real(record)
        if record.device.type == "meta":
            raise SourceError(AWAY)
        if (filed := self.module.filed(self.name)) is not None:
            with filed.blamed():
                return self._filed(filed, found.cpu().numpy()).to(record.device)
        if record.device.type != "cpu":
            return self._on_device(record, found)
        data: stored_record.Bytes = record.detach().numpy()

        def part(i: int) -> tuple[made.Weight, stored_record.Bytes]:
            a, b = self._spans(data)[i]
            return self._stored(data[a:b], i), data[a:b]

        def rows(found: np.ndarray[Any, Any], pool: Executor | None) -> torch.Tensor:
            return decoded_rows(self._stored(data, 0), lambda first, last: data, found, pool)

        return self._on_host(part, rows, found.numpy())

    def _filed(self, filed: Filed, found: np.ndarray[Any, Any]) -> torch.Tensor:
        """The rows, or the experts, with these indices, from the file; one expert may be there decoded."""
        if len(found) != 1 or len(self.shape) != 3:
            return self._on_host(filed.part, filed.rows, found)
        key = filed.expert(int(found[0]), self.shape[0])
        if (ready := filed.store.decoded.find(key)) is None:
            ready = self._on_host(filed.part, filed.rows, found)
            filed.store.decoded.keep(key, ready)
        return ready

    def _on_host(
        self,
        part: Callable[[int], tuple[made.Weight, Any]],
        rows: Callable[[np.ndarray[Any, Any], Executor | None], torch.Tensor],
        found: np.ndarray[Any, Any],
    ) -> torch.Tensor:
        """The rows, or the experts, decoded; `part` gives one of several records, `rows` decodes those of one."""
        kept, pool = self.kept, self.workspace.executor()
        if kept.head.parts == 1:
            out = rows(found, pool)
            return out.transpose(1, 2).contiguous() if kept.head.turned else out
        each = kept.head.parts // kept.shape[0]
        stack = np.empty((len(found), *kept.shape[1:]), f"<u{DTYPES[kept.head.dtype].bits // 8}")
        for i, expert in enumerate(found.tolist()):
            for j, words in enumerate(np.split(stack[i], each)):
                s, data = part(expert * each + j)
                s.decode(data, words, pool=pool)
        dense: torch.Tensor = frameworks.to_framework(stack, kept.head.dtype, stack.shape, "pt")
        return dense

    def _on_device(self, record: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
        kept = self.kept
        each = kept.head.parts // kept.shape[0] if kept.head.parts > 1 else 1
        spans = self._spans(record.detach().cpu().numpy()) if kept.spans is None else kept.spans

        def whole(part: int) -> torch.Tensor:
            a, b = spans[part]
            mine = record.detach()[a:b]

            def fetch() -> tuple[made.Weight, stored_record.Bytes]:
                data = mine.cpu().numpy()
                return self._stored(data, part), data

            return kept.residents.setdefault(part, device.Resident()).dense(mine, fetch)

        if kept.head.parts == 1:
            key, last = device.version(record), self.workspace.fused
            if last is None or last[0] != key or len(kept.shape) != 3:
                last = key, whole(0).transpose(1, 2).contiguous() if kept.head.turned else whole(0)
            self.workspace.fused = last if len(kept.shape) == 3 else None  # experts are asked for one after the other
            return last[1][found.to(record.device)]
        return torch.stack([torch.cat([whole(e * each + j) for j in range(each)]) for e in found.tolist()])

    def _spans(self, data: stored_record.Bytes) -> list[tuple[int, int]]:
        kept = self.kept
        if kept.spans is None:
            spans, each = stored_record.split(data), kept.head.records
            if len(spans) != kept.head.parts * each:
                what = f"holds {len(spans)} records, {self.name!r} is made of {kept.head.parts * each}"
                raise MismatchError(what, unit=repr(self.name))
            kept.spans = [(spans[i][0], spans[i + each - 1][1]) for i in range(0, len(spans), each)]
        return kept.spans

    def _stored(self, data: stored_record.Bytes, part: int) -> made.Weight:
        kept = self.kept
        found = kept.parsed.get(part)
        if found is None or not found.describes(data):
            found = made.parse(data, kept.head.making)
            if ((t := found.tensor).dtype, t.shape) != (kept.head.dtype, kept.head.shape):
                what = f"is {t.dtype} {list(t.shape)}, the layer needs {kept.head.dtype} {list(kept.head.shape)}"
                raise MismatchError(what, unit=repr(t.name))
            kept.parsed[part] = found
        return found


def real(record: torch.Tensor) -> None:
    """UnsupportedError where a record is not there but traced: decoding is no operation of torch."""
    if torch.compiler.is_exporting() or isinstance(record, FakeTensor):
        raise UnsupportedError(
            "layers that stay compressed cannot be exported: load the model dense, or call model.dequantize() first"
        )


def spans_of(s: made.Weight, found: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """(first, last) of the rows of tiles that hold each of the parts along the first dimension with these indices."""
    grid, each = s.tensor.grid, s.tensor.grid.rows // s.tensor.shape[0]
    return list(zip((found * each // grid.tr).tolist(), (-(-(found + 1) * each // grid.tr)).tolist(), strict=True))


def whole(s: made.Weight, count: int) -> bool:
    """Whether all of a weight is decoded for `count` parts: all are wanted, or they lie across rows of the matrix."""
    return bool(s.tensor.grid.rows % s.tensor.shape[0]) or count == s.tensor.shape[0]


def decoded_rows(
    s: made.Weight, data: Callable[[int, int], Any], found: np.ndarray[Any, Any], pool: Executor | None
) -> torch.Tensor:
    """The parts along the first dimension of a tensor with these indices, ascending, on the host.

    The data type is that of the file. The tiles that hold them are decoded; `data` gives the bytes that have the rows
    of tiles first..last - 1.
    """
    grid, t = s.tensor.grid, s.tensor
    if whole(s, len(found)):
        words = s.room()
        s.decode(data(0, grid.down), words, pool=pool)
        dense: torch.Tensor = frameworks.to_framework(words, t.dtype, t.shape, "pt")
        return dense if len(found) == t.shape[0] else dense[torch.from_numpy(found)]
    each = grid.rows // t.shape[0]
    out = np.empty((len(found), each, grid.cols), f"<u{t.word}")
    spans = spans_of(s, found)
    for (first, last), group in itertools.groupby(range(len(found)), key=spans.__getitem__):
        mine = [*group]
        top, rows = first * grid.tr, min(grid.rows, last * grid.tr) - first * grid.tr
        if len(mine) * each == rows:  # they are whole rows of tiles
            s.decode(data(first, last), out[mine[0] : mine[-1] + 1].reshape(rows, grid.cols), first, last, pool)
            continue
        band = np.empty((rows, grid.cols), out.dtype)
        s.decode(data(first, last), band, first, last, pool)
        out[mine] = band[(found[mine] * each - top)[:, None] + np.arange(each)]
    shape = (len(found), *t.shape[1:])
    part: torch.Tensor = frameworks.to_framework(out.reshape(-1, grid.cols), t.dtype, shape, "pt")
    return part


class Held(Holding):
    """A module of any class of which the weights under some names are records; its own `forward` reads them.

    Made by `hold`, which changes the class of a module.
    """

    workspace: Workspace
    _kept: dict[str, Kept]
    _as: torch.Tensor

    def source(self, name: str) -> Place:
        """The place."""
        return Place(self, name)

    def _expect(self, found: np.ndarray[Any, Any]) -> None:
        """The experts with these indices will be asked for, one after the other."""
        counts = {name: kept.shape[0] for name, kept in self._kept.items() if len(kept.shape) == 3}
        every = [(filed, n) for name, n in counts.items() if (filed := self.filed(name)) is not None]
        if every:
            known = found[(found >= 0) & (found < min(counts.values()))].tolist()
            every[0][0].store.want([[key for filed, n in every for key in filed.keys(e, n)] for e in known])

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class was made here, and is made again."""
        return _again, (type(self).__bases__[1], self._names), self.__getstate__()

    def extra_repr(self) -> str:
        """As of the dense module, and the bytes."""
        held = ", ".join(f"{name}: {said(kept.head, self.workspace)}" for name, kept in self._kept.items())
        return f"{super().extra_repr()}{', ' if super().extra_repr() else ''}{held}"


def _class(base: Any, names: tuple[str, ...]) -> Any:
    """The class of modules of a class that hold records under these names; one for all of them."""
    if (base, names) not in _CLASSES:
        content: dict[str, Any] = {name: Named(name) for name in names}
        content |= {"_names": names, "__module__": base.__module__}
        content["forward"] = torch.compiler.disable(_foreseen(base.forward))  # a graph break: no operation of torch
        _CLASSES[base, names] = type(f"Rac{base.__name__}", (Held, base), content)
    return _CLASSES[base, names]


def _foreseen(forward: Any) -> Any:
    """The forward of experts, once those that the router has chosen were asked for, where they are in a file."""

    @functools.wraps(forward)
    def run(self: Held, *args: Any, **kwargs: Any) -> Any:
        if self.workspace.store is not None:
            chosen = (a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.dtype in _INDICES)
            if (index := next(chosen, None)) is not None:
                self._expect(torch.unique(index.detach()).cpu().numpy())
        return forward(self, *args, **kwargs)

    return run


_INDICES = (torch.int64, torch.int32)
_CLASSES: dict[tuple[Any, tuple[str, ...]], Any] = {}


def _again(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = _class(base, names)
    module: nn.Module = made.__new__(made)
    return module


def hold(module: Any, heads: Mapping[str, Head], workspace: Workspace, dtype: torch.dtype | None) -> None:
    """Let a module hold records under these names, which are its own parameters; their bytes are yet to be loaded.

    The class of the module changes. MismatchError where the records do not make up the parameter.
    """
    shapes = {name: tuple(module._parameters[name].shape) for name in heads}
    for name, head in heads.items():
        if not head.fits(shapes[name]):
            parts = f"{head.parts} times " if head.parts > 1 else ""
            what = f"the file has {parts}{list(head.shape)}, the layer needs {list(shapes[name])}"
            raise MismatchError(what, unit=repr(name))
    module.__class__ = _class(type(module), tuple(heads))
    module.workspace, module._kept = workspace, {n: Kept(head, shapes[n]) for n, head in heads.items()}
    for name, head in heads.items():
        where = module._parameters[name].device
        data = torch.empty(head.nbytes, dtype=torch.uint8, device=where)
        module._parameters[name] = record = nn.Parameter(data, requires_grad=False)
        record._is_hf_initialized = True  # type: ignore[attr-defined]  # never filled with random numbers
    module.register_buffer("_as", torch.empty(0, dtype=dtype), persistent=False)


def release(module: Held, weights: Mapping[str, nn.Parameter]) -> None:
    """Make a module one of its own class again, with these weights."""
    names = module._names
    del module._as
    module.__class__ = type(module).__bases__[1]  # type: ignore[assignment]
    for name in names:
        module._buffers.pop(name, None)
        module._parameters[name] = weights[name]
    for name in ("workspace", "_kept"):
        module.__dict__.pop(name, None)


def size_of(shape: tuple[int, ...], dtype: str) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * DTYPES[dtype].bits // 8


def said(head: Head, workspace: Workspace) -> str:
    """Where a record is, for people."""
    return f"{head.nbytes} bytes" if workspace.store is None else "in the file"
