"""Makes quantised versions of a Hugging Face model folder, as others' tools write them: for tests and tools.

python tools/quantised_models.py SCHEME FOLDER OUT
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def blocks(w: torch.Tensor, high: int, wide: int) -> torch.Tensor:
    """Largest magnitude of each block, (rows of blocks, columns of blocks)."""
    r, c = (-(-n // side) for n, side in zip(w.shape, (high, wide), strict=True))
    full = torch.zeros(r * high, c * wide)
    full[: w.shape[0], : w.shape[1]] = w.abs()
    return full.reshape(r, high, c, wide).amax((1, 3)).clamp_min(1e-12)


def spread(s: torch.Tensor, high: int, wide: int, shape: Any) -> torch.Tensor:
    """Numbers of blocks as a matrix."""
    return s.repeat_interleave(high, 0).repeat_interleave(wide, 1)[: shape[0], : shape[1]]


def fp8(name: str, w: torch.Tensor) -> Tensors:
    """As DeepSeek: E4M3, blocks of 128 x 128."""
    s = blocks(w, 128, 128) / 448
    codes = (w / spread(s, 128, 128, w.shape)).to(torch.float8_e4m3fn)
    return {f"{name}.weight": codes, f"{name}.weight_scale_inv": s}


def fp8_row(name: str, w: torch.Tensor) -> Tensors:
    """As compressed-tensors: E4M3, a scale for each row."""
    s = w.abs().amax(1, keepdim=True) / 448
    return {f"{name}.weight": (w / s).to(torch.float8_e4m3fn), f"{name}.weight_scale": s.bfloat16()}


def fp8_tensor(name: str, w: torch.Tensor) -> Tensors:
    """As modelopt: E4M3, one scale, and one for the activations."""
    s = w.abs().max() / 448
    more = {f"{name}.weight_scale": s, f"{name}.input_scale": torch.tensor(0.5)}
    return {f"{name}.weight": (w / s).to(torch.float8_e4m3fn), **more}


def fp8_e5m2(name: str, w: torch.Tensor) -> Tensors:
    """E5M2, one scale."""
    s = w.abs().max() / 57344
    return {f"{name}.weight": (w / s).to(torch.float8_e5m2), f"{name}.weight_scale": s.reshape(1)}


def int8(name: str, w: torch.Tensor) -> Tensors:
    """As compressed-tensors: I8, a scale for each row."""
    s = w.abs().amax(1, keepdim=True) / 127
    return {f"{name}.weight": (w / s).round().to(torch.int8), f"{name}.weight_scale": s}


def _compressed(kind: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "symmetric": True, **weights}}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


SCHEMES: dict[str, tuple[Callable[[str, torch.Tensor], Tensors], dict[str, Any] | None]] = {
    "fp8": (
        fp8,
        {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]},
    ),
    "fp8-row": (fp8_row, _compressed("float-quantized", type="float", strategy="channel")),
    "fp8-tensor": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8-e5m2": (fp8_e5m2, None),
    "int8": (int8, _compressed("int-quantized", type="int", strategy="channel")),
}
"""Functions that make the tensors of a linear layer's weight, and what config.json then says."""


def make(scheme: str, source: Path, out: Path, *keep: str) -> Path:
    """A version of the model in `source`: weights of linear layers quantised, but for names that hold one of `keep`."""
    quantise, stated = SCHEMES[scheme]
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors: Tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as f:
            for name in f.keys():  # noqa: SIM118 - no mapping
                w = f.get_tensor(name)
                kept = w.dim() != 2 or any(k in name for k in ("embed", "lm_head", "norm", *keep))
                made = {name: w} if kept else quantise(name.removesuffix(".weight"), w.float())
                tensors |= {n: t.contiguous() for n, t in made.items()}
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    if stated is not None:
        config = json.loads((out / "config.json").read_text())
        (out / "config.json").write_text(json.dumps({**config, "quantization_config": stated}, indent=2))
    return out


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
