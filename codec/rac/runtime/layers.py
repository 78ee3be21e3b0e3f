"""Layers whose weight stays compressed in memory and is decoded when they run.

Under `weight` they hold the record of the tensor as it lies in the file (runtime/held.py). What a layer computes is
what the dense one does, bit for bit: the same product with the same weight.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from rac import frameworks
from rac.errors import MismatchError, SourceError
from rac.linalg.transform import Transform
from rac.native import coded
from rac.runtime import device, made
from rac.runtime import record as stored_record
from rac.runtime.held import AWAY, Head, Holding, Named, decoded_rows, real, said, size_of
from rac.runtime.products import multiply
from rac.runtime.workspace import Workspace


class Compressed(Holding):
    """What linear layers and embeddings have in common. `record`: (bytes of the record,) uint8, no gradient."""

    _names = ("weight",)
    beside: tuple[str, ...] = ()
    """Names of buffers that the weight needs besides."""
    banded = False
    """Whether the product is made of one band of rows after the other: all of them would not fit into memory."""
    stay = "stay compressed"
    """What its weight does, for people."""
    weight: Any = Named("weight")

    def _hold(self, head: Head, workspace: Workspace, dtype: torch.dtype | None) -> None:
        nn.Module.__init__(self)
        self.head, self.workspace = head, workspace
        self.dense_bytes = size_of(head.shape, head.dtype)
        self._stored: made.Weight | None = None
        self._resident = device.Resident()
        self._online: tuple[tuple[int, int], Transform | None] | None = None
        self._is_hf_initialized = True  # a record is never filled with random numbers
        self._parameters["weight"] = nn.Parameter(torch.empty(head.nbytes, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("_as", torch.empty(0, dtype=dtype), persistent=False)

    def source(self, name: str) -> Compressed:
        """What decodes the weight."""
        return self

    @property
    def record(self) -> torch.Tensor:
        """(bytes,) uint8."""
        return self.record_of("weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return self.head.shape

    @torch.compiler.disable
    def rows(self, found: torch.Tensor) -> torch.Tensor:
        """Rows of the weight with these indices, ascending, in the data type of the file."""
        if (filed := self.filed("weight")) is not None:
            with filed.blamed():
                return filed.rows(found.cpu().numpy(), self.workspace.executor()).to(self.record.device)
        if self.record.device.type != "cpu":
            return self.dense()[found]
        s, data = self.stored()
        return decoded_rows(s, lambda first, last: data, found.numpy(), self.workspace.executor())

    def write(self) -> nn.Parameter:
        """Make the layer dense."""
        from rac.runtime.replace import densify

        densify(self)
        found: nn.Parameter = self.weight
        return found

    @property
    def compute_dtype(self) -> torch.dtype:
        """Data type of the numbers that go in or come out; follows `.to()`."""
        return self._as.dtype

    def stored(self) -> tuple[made.Weight, stored_record.Bytes]:
        """The record and its bytes, on the host. RacError where they are damaged or of another tensor."""
        real(self.record)
        if (filed := self.filed("weight")) is not None:
            return filed.part()
        data: stored_record.Bytes = self.record.detach().cpu().numpy()
        if self._stored is None or not self._stored.describes(data):
            found, head = made.parse(data, self.head.making), self.head
            if ((t := found.tensor).dtype, t.shape) != (head.dtype, head.shape):
                what = f"is {t.dtype} {list(t.shape)}, the layer needs {head.dtype} {list(head.shape)}"
                raise MismatchError(what, unit=repr(t.name))
            self._stored = found
        return self._stored, data

    def here(self) -> tuple[made.Weight, stored_record.Bytes] | None:
        """As `stored`, where that waits for no file; None where it would, and the bytes were asked for.

        RacError as there.
        """
        if (filed := self.filed("weight")) is None:
            return self.stored()
        return filed.here()

    def online(self) -> Transform | None:
        """What the layer does to its input, as the record states it; read once for the bytes that are there."""
        real(self.record)
        key = device.version(self.record)
        if self._online is None or self._online[0] != key:
            filed = self.filed("weight") if self.banded else None
            s, data = self.stored() if filed is None else filed.front()
            self._online = key, s.transform(data)
        return self._online[1]

    def version(self) -> tuple[int, int] | None:
        """Changes when the bytes do; None where they are not on the host."""
        return device.version(self.record) if self.record.device.type == "cpu" else None

    @torch.compiler.disable
    def dense(self) -> torch.Tensor:
        """The weight as the file has it, in memory of its own, on the device of the layer.

        RacError where the record is damaged, or its bytes are not in memory: an offloader has them.
        """
        if self.record.device.type == "meta":
            raise SourceError(AWAY)
        if (filed := self.filed("weight")) is not None:
            with filed.blamed():
                return device.decoded(*filed.part(), str(self.record.device), self.workspace.executor())
        if self.record.device.type != "cpu":
            return self._resident.dense(self.record.detach(), self.stored)
        return device.decoded(*self.stored(), pool=self.workspace.executor())

    def resident(self) -> tuple[int, int] | None:
        """Changes when the record on a device does; None where `decode_into` cannot be used, or not yet."""
        return self._resident.ready(self.record.detach())

    def decode_into(self, buffer: torch.Tensor) -> torch.Tensor:
        """The weight in the first bytes of a buffer of the same device, by launches alone."""
        return self._resident.into(self.record.detach(), buffer)

    @contextlib.contextmanager
    def opened(self, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The weight in a data type, on the device of the layer; only valid inside."""
        if self.record.device.type != "cpu":
            with self.workspace.on_device(self) as found:
                yield found.to(dtype)
            return
        with self._words() as words:
            yield frameworks.to_framework(words, self.head.dtype, self.head.shape, "pt").to(dtype)

    @contextlib.contextmanager
    def _words(self) -> Iterator[Any]:
        """The words of the weight, (R, C), on the CPU; only valid inside."""
        filed = self.filed("weight")
        with filed.blamed() if filed else contextlib.nullcontext(), self.workspace.weight(self) as words:
            yield words

    def extra_repr(self) -> str:
        """As of the dense layer, and the bytes."""
        return f"{super().extra_repr()}, {said(self.head, self.workspace)}"

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
            if ctx.layer.banded:
                parts = ((g[..., rows] @ w).float() for rows, w in ctx.layer.bands(g.dtype))
                x = functools.reduce(torch.add, parts).to(g.dtype)
            else:
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

    few = 0
    """Rows of an input up to which weights of BF16 are multiplied in float32, by rac.native.coded, and not by torch."""

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
        return self.result(x)

    def result(self, x: torch.Tensor) -> torch.Tensor:
        """The output for what the transform made of the input."""
        if torch.is_grad_enabled() and (x.requires_grad or (self.bias is not None and self.bias.requires_grad)):
            return _Product.apply(x, self.bias, self)  # type: ignore[no-any-return]
        return self.product(x, self.bias)

    def product(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The output; no gradient is kept."""
        # transformers pads the bias of a tied output layer to the first dimension of `weight`
        mine = bias if bias is None or len(bias) == self.out_features else bias[: self.out_features]
        if self.banded:
            out = x.new_empty(*x.shape[:-1], self.out_features)
            for rows, w in self.bands(x.dtype):
                out[..., rows] = functional.linear(x, w, None if mine is None else mine[rows])
            return out
        if self.few and 0 < x.numel() <= self.few * self.in_features and x.is_cpu and self.record.device.type == "cpu":
            with self._words() as words:  # by this thread alone: others decode
                y = multiply(x, coded.Weight(coded.Kind.WORDS, words), alone=True)
            return (y if mine is None else y + mine).to(x.dtype)
        with self.opened(x.dtype) as w:
            return functional.linear(x, w.t() if self.transposed else w, mine)

    def bands(self, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
        """The rows of the weight in a data type, some at a time, on the device of the layer, from its file."""
        filed = self.filed("weight")
        if filed is None:
            raise SourceError("the weight is no longer in its file; load the model again")
        with filed.blamed():
            for top, w in filed.bands(self.workspace.executor()):
                yield slice(top, top + len(w)), w.to(self.record.device, dtype)


class RacEmbedding(Compressed, nn.Embedding):
    """An embedding; the tiles that hold the rows asked for are decoded, the others are not.

    `head` is that of the record that `weight` will hold, (rows, columns); of the `workspace` that the layers of the
    model share threads are used, not the buffer; `dtype` is the data type of what comes out.
    """

    def __init__(self, head: Head, workspace: Workspace, padding_idx: int | None = None, dtype: Any = None) -> None:
        self._hold(head, workspace, dtype)
        (self.num_embeddings, self.embedding_dim), self._padding = head.shape, padding_idx
        self.padding_idx: int | None = None  # some models zero that row of what is loaded, here of bytes
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False

    def settle(self) -> None:
        """The record is there."""
        super().settle()
        self.padding_idx = self.__dict__.pop("_padding", self.padding_idx)

    @torch.compiler.disable
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Indices (...) to rows (..., columns). IndexError where there is no such row."""
        if self.online() is not None:
            raise MismatchError("the record states an online transform, and an embedding has no input to apply it to")
        found, inverse = torch.unique(ids, return_inverse=True)
        if len(found) and not (int(found[0]) >= 0 and int(found[-1]) < self.num_embeddings):
            raise IndexError(f"index out of range: {int(found[0])} to {int(found[-1])} of {self.num_embeddings} rows")
        return self.rows(found).to(self.compute_dtype)[inverse]
