"""How a model runs on this machine: in which data type, and with weights laid out as the processor's products want."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rac.native import coded
from rac.runtime.codes import Coded
from rac.runtime.layers import RacLinear
from rac.runtime.products import multiply, weight_of

LEAST = 1 << 14
"""Weights of a layer from which on packing pays."""
FEW = 8
"""Rows of an input up to which products of layers that are decoded as they run are quicker in float32 than in BF16."""
_HALVES = (torch.bfloat16, torch.float16)


def has_units() -> bool:
    """Whether the processor multiplies BF16; where it does not, widening each number costs more than reading F32."""
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported", "_is_arm_bf16_supported")
    return any(bool(known()) for name in asked if (known := getattr(torch.cpu, name, None)) is not None)


def dtype_for(resident: str, stated: torch.dtype) -> torch.dtype:
    """The data type between layers that is quickest on this CPU for a model whose weights are stated in `stated`.

    Codes are multiplied in float32 whatever it is.
    """
    if stated not in _HALVES:
        return stated
    if resident == "codes" or not has_units():
        return torch.float32
    return torch.bfloat16


class PackedLinear(nn.Linear):
    """A linear layer of torch whose weight oneDNN has laid out for its products; nothing is trained or saved."""

    _packed: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), the data type of x kept."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")  # type: ignore[no-any-return]


class WordsLinear(nn.Linear):
    """A linear layer whose weight is BF16 words and whose products are of float32; nothing is trained or saved."""

    _words: coded.Weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) to (..., out), the data type of x kept."""
        y = multiply(x, self._words)
        return (y if self.bias is None else y + self.bias).to(x.dtype)


def pack(model: Any) -> int:
    """Lay the weights of plain linear layers out anew; returns the number of layers.

    Weights that nothing else uses are given up for it. Beside layers of codes, numbers of BF16 are held in so many
    bits, and multiplied as codes are. All others are for oneDNN, where that is.
    """
    coded_ = any(isinstance(m, Coded) for m in model.modules())
    shared = _shared(model)
    count = 0
    for layer in [m for m in model.modules() if type(m) is nn.Linear]:
        weight = layer.weight
        if weight.device.type != "cpu" or weight.numel() < LEAST or weight.dtype not in (torch.float32, torch.bfloat16):
            continue
        if coded_ and torch.equal(weight, (half := weight.detach().bfloat16()).to(weight.dtype)):
            layer.__class__ = WordsLinear
            layer._words = weight_of(half.view(torch.int16), [], coded.Kind.WORDS)  # type: ignore[assignment]
        elif torch.backends.mkldnn.is_available() and (weight.dtype == torch.float32 or has_units()):
            layer.__class__ = PackedLinear
            layer._packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)
        else:
            continue
        if id(weight) not in shared:
            layer.weight = nn.Parameter(torch.empty(0, dtype=weight.dtype), requires_grad=False)
        count += 1
    return count


def _shared(model: Any) -> set[int]:
    """Identities of the weights that several modules have."""
    seen: set[int] = set()
    out: set[int] = set()
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None:
                (out if id(p) in seen else seen).add(id(p))
    return out


def run_as(model: Any, resident: str, stated: torch.dtype) -> str:
    """Lay a model on the CPU out for running; says how it runs, on one line."""
    name = str(model.dtype).removeprefix("torch.")
    if model.device.type != "cpu":
        return f"{resident}, {name}, on {model.device}"
    packed = pack(model) if resident in ("dense", "codes") else 0
    few = [m for m in model.modules() if type(m) is RacLinear and m.head.dtype == "BF16" and not m.transposed]
    for layer in few:
        layer.few = FEW
    units = "" if has_units() else ", for this processor has no BF16 units" * (stated in _HALVES)
    parts = [resident, name + units]
    parts += ["int8 codes"] * any(isinstance(m, Coded) for m in model.modules())
    parts += [f"float32 products of up to {FEW} rows"] * bool(few)
    words = sum(isinstance(m, WordsLinear) for m in model.modules())
    parts += [f"{words} layers of BF16 words"] * bool(words)
    parts += [f"{packed - words} layers packed by oneDNN"] * (packed > words)
    return ", ".join([*parts, f"{torch.get_num_threads()} threads"])
