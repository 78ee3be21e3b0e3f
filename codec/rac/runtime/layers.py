"""Layers whose weight stays compressed in memory and is decoded when they run.

`weight` is uint8, (bytes,): the record of the tensor as it lies in the file (runtime/record.py). So state dictionaries,
`.to()`, device maps, offloading and tied weights work as for any other tensor, and their bytes are the bytes that are
held. It is a parameter while transformers loads it, and a buffer from then on: the parameters of a model, which many
programs ask for its data type, are all floating-point numbers. What a layer computes is what the dense one does, bit
for bit: the same product with the same weight.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from rac import frameworks
from rac.errors import MismatchError, SourceError
from rac.linalg.transform import Transform
from rac.registry import DTYPES
from rac.runtime import device
from rac.runtime import record as stored_record
from rac.runtime.workspace import Workspace


@dataclass(frozen=True, slots=True)
class Head:
    """What must be known of a record before its bytes are there."""

    nbytes: int
    """Bytes of the record, of those of the objects that it uses, and the TAIL zeros behind them."""
    dtype: str
    shape: tuple[int, ...]


class Compressed(nn.Module):
    """What linear layers and embeddings have in common. `weight`: (bytes of the record,) uint8, no gradient."""

    weight: torch.Tensor

    def _hold(self, head: Head, workspace: Workspace, dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)
        self.head, self.workspace = head, workspace
        self.dense_bytes = math.prod(head.shape) * DTYPES[head.dtype].bits // 8
        self._stored: stored_record.Stored | None = None
        self._resident = device.Resident()
        self._online: tuple[tuple[int, int], Transform | None] | None = None
        self._is_hf_initialized = True  # a record is never filled with random numbers
        self.weight = nn.Parameter(torch.empty(head.nbytes, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("_as", torch.empty(0, dtype=dtype), persistent=False)

    def settle(self) -> None:
        """Make the record a buffer, once it is loaded; what an offloader has is still offloaded."""
        if (record := self._parameters.pop("weight", None)) is not None:
            self.register_buffer("weight", record)
        own: Any = getattr(self, "_hf_hook", None)  # of accelerate
        for hook in getattr(own, "hooks", (own,)):
            if hasattr(hook, "offload_buffers"):
                hook.offload_buffers = True

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """As of any module; a record that several layers share stays one, as parameters do."""
        before = self._buffers.get("weight")
        super()._apply(fn, recurse)
        moved = self._buffers.get("weight")
        if before is not None and moved is not before and torch._has_compatible_shallow_copy_type(before, moved):
            before.data = moved
            self._buffers["weight"] = before
        return self

    @property
    def compute_dtype(self) -> torch.dtype:
        """Data type of the numbers that go in or come out; follows `.to()`."""
        return self._as.dtype

    def stored(self) -> tuple[stored_record.Stored, stored_record.Bytes]:
        """The record and its bytes, on the host. RacError where they are damaged or of another tensor."""
        data: stored_record.Bytes = self.weight.detach().cpu().numpy()
        if self._stored is None or not self._stored.describes(data):
            found, head = stored_record.parse(data), self.head
            if ((t := found.tensor).dtype, t.shape) != (head.dtype, head.shape):
                what = f"is {t.dtype} {list(t.shape)}, the layer needs {head.dtype} {list(head.shape)}"
                raise MismatchError(what, unit=repr(t.name))
            self._stored = found
        return self._stored, data

    def online(self) -> Transform | None:
        """What the layer does to its input, as the record states it; read once for the bytes that are there."""
        key = device.version(self.weight)
        if self._online is None or self._online[0] != key:
            self._online = key, stored_record.transform(*self.stored())
        return self._online[1]

    def version(self) -> tuple[int, int] | None:
        """Changes when the bytes do; None where they are not on the host."""
        return device.version(self.weight) if self.weight.device.type == "cpu" else None

    def dense(self) -> torch.Tensor:
        """The weight as the file has it, in memory of its own, on the device of the layer.

        RacError where the record is damaged, or its bytes are not in memory: an offloader has them.
        """
        if self.weight.device.type == "meta":
            raise SourceError("the bytes of the layer are not in memory; they are offloaded until it runs")
        if self.weight.device.type != "cpu":
            return self._resident.dense(self.weight.detach(), self.stored)
        return device.decoded(*self.stored(), pool=self.workspace.executor())

    def resident(self) -> tuple[int, int] | None:
        """Changes when the record on a device does; None where `decode_into` cannot be used, or not yet."""
        return self._resident.ready(self.weight.detach())

    def decode_into(self, buffer: torch.Tensor) -> torch.Tensor:
        """The weight in the first bytes of a buffer of the same device, by launches alone."""
        return self._resident.into(self.weight.detach(), buffer)

    @contextlib.contextmanager
    def opened(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The weight in a data type, on the device of the layer; only valid inside."""
        if self.weight.device.type != "cpu":
            with self.workspace.on_device(self) as found:
                yield found.to(dtype)
            return
        with self.workspace.weight(self) as words:
            yield frameworks.to_framework(words, self.head.dtype, self.head.shape, "pt").to(dtype)

    def extra_repr(self) -> str:
        """As of the dense layer, and the bytes."""
        return f"{super().extra_repr()}, {self.head.nbytes} bytes"

    def __getstate__(self) -> dict[str, Any]:
        """For copies: what was parsed is parsed again."""
        return self.__dict__ | {"_stored": None, "_resident": device.Resident(), "_online": None}


class _Product(torch.autograd.Function):
    """x W' + b. The weight is decoded again for the gradient of x; it has none itself."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor | None, layer: RacLinear) -> torch.Tensor:
        ctx.layer, ctx.biased = layer, bias is not None
        return layer.product(x, bias)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:  # type: ignore[override]
        x = bias = None
        if ctx.needs_input_grad[0]:
            with ctx.layer.opened(g.dtype) as w:
                x = g @ (w.t() if ctx.layer.transposed else w)
        if ctx.biased and ctx.needs_input_grad[1]:
            bias = torch.zeros_like(ctx.layer.bias)
            bias[: g.shape[-1]] = g.reshape(-1, g.shape[-1]).sum(0)
        return x, bias, None


class RacLinear(Compressed, nn.Linear):
    """A linear layer, with the online transform that its record states.

    `head` is that of the record that `weight` will hold, (out, in) or, `transposed` as the Conv1D of GPT-2 has it, (in,
    out); `workspace` is shared by the layers of the model, `bias` the parameter (out,), `dtype` the torch data type of
    the numbers that go in.
    """

    def __init__(
        self, head: Head, workspace: Workspace, bias: Any = None, transposed: bool = False, dtype: Any = None
    ) -> None:
        self._hold(head, workspace, dtype)
        self.in_features, self.out_features = head.shape if transposed else head.shape[::-1]
        self.transposed, self.bias = transposed, bias
        workspace.expect(self.dense_bytes)

    @torch.compiler.disable  # a graph break; decoding is no operation of torch
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), the data type of x kept. RacError where the record is damaged."""
        if not x.is_floating_point():
            raise TypeError(f"the input is {x.dtype}; a model that casts to the data type of `weight` needs it dense")
        if (online := self.online()) is not None:
            x = online.apply(x)
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return _Product.apply(x, self.bias, self)  # type: ignore[no-any-return]
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The output; no gradient is kept."""
        with self.opened(x.dtype) as w:
            # transformers pads the bias of a tied output layer to the first dimension of `weight`
            mine = bias if bias is None or len(bias) == self.out_features else bias[: self.out_features]
            return functional.linear(x, w.t() if self.transposed else w, mine)


class RacEmbedding(Compressed, nn.Embedding):
    """An embedding; the tiles that hold the rows asked for are decoded, the others are not.

    `head` is that of the record that `weight` will hold, (rows, columns); of the `workspace` that the layers of the
    model share threads are used, not the buffer; `dtype` is the data type of what comes out.
    """

    def __init__(self, head: Head, workspace: Workspace, padding_idx: int | None = None, dtype: Any = None) -> None:
        self._hold(head, workspace, dtype)
        (self.num_embeddings, self.embedding_dim), self.padding_idx = head.shape, padding_idx
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    @torch.compiler.disable
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Indices (...) to rows (..., columns). IndexError where there is no such row."""
        if self.online() is not None:
            raise MismatchError("the record states an online transform, and an embedding has no input to apply it to")
        found, inverse = torch.unique(ids, return_inverse=True)
        if len(found) and not (int(found[0]) >= 0 and int(found[-1]) < self.num_embeddings):
            raise IndexError(f"index out of range: {int(found[0])} to {int(found[-1])} of {self.num_embeddings} rows")
        if self.weight.device.type != "cpu":
            return self.dense()[found].to(self.compute_dtype)[inverse]
        return self._rows(found.cpu().numpy()).to(self.compute_dtype)[inverse]

    def _rows(self, rows: np.ndarray[Any, Any]) -> torch.Tensor:
        """The rows of the weight, ascending, in the data type of the file; one row of tiles in memory at a time."""
        s, data = self.stored()
        grid, t = s.tensor.grid, s.tensor
        if s.shape != t.shape:  # a row of the matrix is no row of the tensor
            return self.dense()[torch.from_numpy(rows)]
        out, step = np.empty((len(rows), grid.cols), f"<u{t.word}"), grid.tr
        for a in np.unique(rows // step).tolist():
            band = np.empty((min(step, grid.rows - a * step), grid.cols), out.dtype)
            stored_record.decode(s, data, band, a, a + 1, self.workspace.executor())
            mine = rows // step == a
            out[mine] = band[rows[mine] - a * step]
        return frameworks.to_framework(out, t.dtype, out.shape, "pt")  # type: ignore[no-any-return]
