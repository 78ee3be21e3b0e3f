"""Which matrices of a model's blocks the named methods round, and which tensors of its files they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from rac.encode.align.recipe import KEEP
from rac.errors import UnsupportedError
from rac.models.linears import inside_blocks
from rac.stages.groups import Grouped

Piece = tuple[str, int, int]
"""Rows [start, stop) of a parameter, which counts those of all experts one after the other."""


def of_blocks(model: Any) -> dict[str, Any]:
    """Names to the modules in the blocks of a model whose matrices are rounded: linear layers, and fused experts.

    Routers, norms, convolutions and what else is no layer of this kind stay as they are. UnsupportedError where weights
    are stored (in, out): groups of columns share a scale along the inputs, which are rows there.
    """
    from torch import nn

    from rac.calibrate.experts import experts

    found: dict[str, Any] = {}
    every = dict(inside_blocks(model))
    fused = experts(every)
    for name, module in every.items():
        if any(fnmatchcase(f"{name}.weight", p) for p in KEEP):
            continue
        turned = type(module).__name__ == "Conv1D" or (name in fused and getattr(module, "is_transposed", True))
        if turned:
            what = f"a {type(module).__name__} stores its weights (in, out), and scales of groups run along the inputs"
            raise UnsupportedError(f"{what}; the aligned recipe, which is the default, takes them", unit=repr(name))
        if isinstance(module, nn.Linear) or name in fused:
            found[name] = module
    if not found:
        raise UnsupportedError(f"{type(model).__name__} has no blocks of linear layers; --recipe needs them")
    if any(str(p.dtype) != "torch.float32" for m in found.values() for p in m.parameters()):
        raise UnsupportedError("a model in float32 is needed")
    return found


def weights(name: str, module: Any) -> dict[str, list[Any]]:
    """Names of parameters to their matrices (out, in): one of a linear layer, one of each expert."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return {f"{name}.weight": [module.weight.data]}
    mine = {f"{name}.{k}": p.data for k, p in module.named_parameters(recurse=False)}
    return {key: list(p) for key, p in mine.items() if p.dim() == 3}


def joined(parts: Sequence[Grouped]) -> Grouped:
    """Matrices with the same columns, one below the other."""
    if len(parts) == 1:
        return parts[0]
    columns = (np.concatenate([getattr(g, k) for g in parts]) for k in ("codes", "scales", "zeros"))
    codes, scales, zeros = columns
    known = [g.lost for g in parts if g.lost is not None]
    lost = (sum(a for a, _ in known), sum(b for _, b in known)) if len(known) == len(parts) else None
    return Grouped(codes, scales, zeros, parts[0].group, parts[0].bits, lost)


def _rows(g: Grouped, start: int, stop: int) -> Grouped:
    return Grouped(g.codes[start:stop], g.scales[start:stop], g.zeros[start:stop], g.group, g.bits)


@dataclass(frozen=True, slots=True)
class Files:
    """Tensors in the files of a model, and the rows of its parameters that each is made of."""

    pieces: Mapping[str, Sequence[Piece]]

    @classmethod
    def of(cls, model: Any, stored: Any) -> Files:
        """What a model was made of (rac.calibrate.experts.Stored), before its weights are changed.

        UnsupportedError where a matrix that is rounded is in no file as it is.
        """
        from rac.models.names import renamed

        known = renamed(model, stored.names)
        every = {k: w for name, m in of_blocks(model).items() for k, w in weights(name, m).items()}
        pieces: dict[str, list[Piece]] = {}
        for name, (key, _) in known.items():
            w = every.get(key, ())
            if w and (len(w), *w[0].shape)[len(w) == 1 :] == stored.shape(name):
                pieces[name] = [(key, 0, len(w) * len(w[0]))]
        placed = {key for parts in pieces.values() for key, _, _ in parts}
        left = {key: w for key, w in every.items() if key not in placed}
        for key, matrices in left.items():
            at = 0
            for w in matrices:
                for name, start, stop in stored.find(w, pieces):
                    pieces[name] = [(key, at + start, at + stop)]
                at += len(w)
        found = cls(pieces | _gathered(left, stored, pieces))
        found.check(every)
        return found

    def check(self, every: Mapping[str, Sequence[Any]]) -> None:
        """UnsupportedError where some rows of the parameters are in no tensor."""
        count = dict.fromkeys(every, 0)
        for key, start, stop in {p for parts in self.pieces.values() for p in parts}:
            count[key] += stop - start
        if lost := [key for key, n in count.items() if n < sum(len(w) for w in every[key])]:
            raise UnsupportedError("is made of tensors of the files in a way that is not known", unit=repr(lost[0]))

    def apply(self, matrices: Mapping[str, Grouped]) -> dict[str, Grouped]:
        """What becomes of the tensors in the files, by their names."""
        return {
            name: joined([_rows(matrices[key], start, stop) for key, start, stop in parts])
            for name, parts in self.pieces.items()
        }


def _gathered(left: Mapping[str, Sequence[Any]], stored: Any, taken: Iterable[str]) -> dict[str, list[Piece]]:
    """Tensors that are made of rows of several parameters, in any order."""
    from rac.calibrate.experts import bits

    where: dict[bytes, tuple[str, int]] = {}
    for key, matrices in left.items():
        if len(matrices) == 1:
            where |= {row.tobytes(): (key, i) for i, row in enumerate(bits(matrices[0]))}
    found: dict[str, list[Piece]] = {}
    for name in stored.names if where else ():
        if name in taken or not stored.floats(name) or len(stored.shape(name)) != 2:
            continue
        at = [where.get(row.tobytes()) for row in bits(stored.read(name))]
        runs: list[Piece] = []
        for one in at:
            if one is None:
                break
            if runs and runs[-1][0] == one[0] and runs[-1][2] == one[1]:
                runs[-1] = (one[0], runs[-1][1], one[1] + 1)
            else:
                runs.append((one[0], one[1], one[1] + 1))
        else:
            found[name] = runs
    return found
