"""A calibrated pack on the CPU and on a device, side by side: seconds of each part, bytes, and how good each file is.

  python tools/device_pack.py MODEL_FOLDER TEXT --device cuda --bits 3
  python tools/device_pack.py --memory          without a device: what blocks of 8B and of 70B shape need

Prints a table for docs/gpu.md. The device that is named must be there: nothing is measured on another in its place.
`--memory` runs the backward step of one block on torch's `meta` device, where tensors have shapes and no numbers, and
adds up what is alive at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import tempfile
import time
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rac
from rac.calibrate.moments import Collector
from rac.calibrate.place import Device, Held
from rac.calibrate.wide import Wide
from rac.encode.options import DEVICES
from rac.linalg.device import check, factor_of, feeds_of

ROWS, CONTEXT = 2048, 1024
"""Tokens that a block takes at once, and that a sequence has."""


class Peak(TorchDispatchMode):  # type: ignore[misc]
    """Bytes of the tensors that operations have made and that are alive, while it is open, `but` some."""

    def __init__(self, but: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.now = self.most = 0
        self._but = {x.untyped_storage()._cdata: x for x in but}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.add(x)
        return out

    def add(self, x: torch.Tensor) -> None:
        """Count what a tensor lies in, once."""
        storage = x.untyped_storage()
        if storage._cdata in self._known or storage._cdata in self._but:
            return
        size, at = storage.nbytes(), storage._cdata

        def gone(_: Any) -> None:
            self.now -= size
            del self._known[at]

        self._known[at] = weakref.ref(storage, gone)
        self.now += size
        self.most = max(self.most, self.now)


class Shapes(Device):
    """The `meta` device, from which no number comes back."""

    def __init__(self) -> None:
        super().__init__("meta")

    def numbers(self, x: Any) -> NDArray[Any]:
        """Zeros."""
        return np.zeros(tuple(x.shape), np.float32)


@dataclass(frozen=True)
class Need:
    """Bytes of a device."""

    weights: int
    """Of one block."""
    sums: int
    """Second moments of its inputs."""
    block: int
    """All at most in its backward step, the weights of the next block beside."""
    factor: int
    """The factor of its widest inputs, without what its solver takes."""


def need(width: int, inner: int, heads: int) -> Need:
    """What a block of Llama of BF16 needs, with 8 heads of keys and values."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaDecoderLayer

    many = {"num_attention_heads": heads, "num_key_value_heads": 8, "attn_implementation": "sdpa"}
    config = LlamaConfig(hidden_size=width, intermediate_size=inner, **many)
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0).to(torch.bfloat16).requires_grad_(False)
        turn = torch.empty(1, CONTEXT, width // heads), torch.empty(1, CONTEXT, width // heads)
    modules = {name: m for name, m in block.named_modules() if isinstance(m, torch.nn.Linear)}
    place, peak = Shapes(), Peak(but=block.parameters())
    held = Held(place)
    brought, following = ([(p, torch.empty_like(x)) for p, x in held.brought([block])] for _ in range(2))
    for _, x in (*brought, *following):
        peak.add(x)
    with contextlib.closing(place), Wide(), peak:
        x = torch.empty(ROWS // CONTEXT, CONTEXT, width, device="meta", requires_grad=True)
        with Collector(modules, outputs=True, place=place) as found, held.use(brought):
            out = block(x, position_embeddings=turn)
            out = out[0] if isinstance(out, tuple) else out
            out.backward(torch.empty_like(out))
            sums = sum(4 * math.prod(total.shape) for total in found.second.values())
    n = max(width, inner)
    with Peak() as factor:
        s = torch.empty(n, n, dtype=torch.float64, device="meta")
        lower = factor_of(s, 0.1)
        del s
        feeds_of(lower)
    return Need(sum(x.untyped_storage().nbytes() for _, x in brought), sums, peak.most, factor.most)


def needs() -> None:
    """Print what blocks need."""
    print("| block | its weights, GB | second moments | all at most, the next block's weights beside | widest factor |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, shape in (("8B", (4096, 14336, 32)), ("70B", (8192, 28672, 64))):
        found = need(*shape)
        row = (found.weights, found.sums, found.block, found.factor)
        print(f"| {name} | {' | '.join(f'{size / 1e9:.2f}' for size in row)} |")


def packed(folder: str, text: str, device: str, args: argparse.Namespace, out: Path) -> list[str]:
    """A row: device, seconds until the calibration is done and until the end, bytes, bits, mean signal to noise."""
    start, calibrated = time.perf_counter(), 0.0

    def note(what: str, done: int, of: int) -> None:
        nonlocal calibrated
        if what.startswith("looking") and not calibrated:
            calibrated = time.perf_counter() - start

    how = {"bits": args.bits, "calibrate": text, "tokens": args.tokens, "effort": args.effort}
    done = rac.pack(folder, out, device=device, note=note, force=True, **how)
    took = time.perf_counter() - start
    snr = sum(f.snr for f in done.fidelity) / len(done.fidelity)
    numbers = (f"{calibrated:.1f}", f"{took:.1f}", f"{done.stored:,}", f"{done.quantised_bits:.3f}", f"{snr:.2f}")
    return [device, *numbers, f"{_peak(device) / 1e9:.2f}"]


def _peak(device: str) -> float:
    """Bytes of a CUDA device at most; not known of others."""
    if device != "cuda":
        return float("nan")
    import torch

    return float(torch.cuda.max_memory_allocated())


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true", help="only what blocks need, without a device")
    parser.add_argument("folder", nargs="?", help="Hugging Face folder of a causal language model")
    parser.add_argument("text", nargs="?", help="a text file to calibrate on")
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="compared with the CPU; default: cuda")
    parser.add_argument("--bits", type=float, default=3.0, help="default: 3")
    parser.add_argument("--tokens", type=int, default=40960, help="default: 40960")
    parser.add_argument("--effort", choices=("fast", "default", "max"), default="default", help="default: default")
    args = parser.parse_args()
    if args.memory:
        needs()
        return
    if not args.text:
        parser.error("a model and a text are needed")
    check(args.device)
    print("| device | calibration and recipe, s | all, s | bytes | bits | mean SNR, dB | device memory, GB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        for device in dict.fromkeys(("cpu", args.device)):
            row = packed(args.folder, args.text, device, args, Path(folder) / f"{device}.rac")
            print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
