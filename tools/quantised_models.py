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


def nearest(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Index of the nearest number of an increasing table."""
    return torch.bucketize(x, (table[1:] + table[:-1]) / 2)


def fp4(x: torch.Tensor) -> torch.Tensor:
    """Codes (R, C) of E2M1."""
    return nearest(x.abs(), FP4) + 8 * (x < 0)


def halves(codes: torch.Tensor) -> torch.Tensor:
    """Codes (R, C) of four bits in bytes (R, C / 2), the first one low."""
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8)


def exponents(w: torch.Tensor) -> torch.Tensor:
    """Exponents (R, C / 32) of MXFP4, with their bias."""
    return blocks(w, 1, 32).log2().floor().clamp(-120, 120) - 2 + 127


def mxfp4(name: str, w: torch.Tensor) -> Tensors:
    """As compressed-tensors: E2M1 in blocks of 32, scales are exponents."""
    e = exponents(w)
    codes = fp4(w / spread((e - 127).exp2(), 1, 32, w.shape))
    return {f"{name}.weight_packed": halves(codes), f"{name}.weight_scale": e.to(torch.uint8)}


def experts(name: str, w: torch.Tensor) -> Tensors:
    """As GPT-OSS: experts (E, in, out) as blocks (E, out, in / 32, 16) of E2M1, scales are exponents."""
    turned = w.transpose(1, 2).reshape(-1, w.shape[1])
    of, shape = mxfp4("", turned), (w.shape[0], w.shape[2], w.shape[1] // 32)
    codes = of[".weight_packed"].reshape(*shape, 16)
    return {f"{name}_blocks": codes, f"{name}_scales": of[".weight_scale"].reshape(shape)}


def nvfp4(name: str, w: torch.Tensor) -> Tensors:
    """As modelopt: E2M1 in blocks of 16, scales are E4M3 times one number."""
    most = blocks(w, 1, 16) / 6
    second = most.max() / 448
    scale = (most / second).to(torch.float8_e4m3fn)
    codes = fp4(w / spread(scale.float() * second, 1, 16, w.shape).clamp_min(1e-12))
    more = {f"{name}.weight_scale": scale, f"{name}.weight_scale_2": second, f"{name}.input_scale": torch.tensor(0.5)}
    return {f"{name}.weight": halves(codes), **more}


def nvfp4_packed(name: str, w: torch.Tensor) -> Tensors:
    """As compressed-tensors: the second scale divides."""
    of = nvfp4(name, w)
    more = {f"{name}.weight_global_scale": 1 / of[f"{name}.weight_scale_2"].reshape(1)}
    more |= {f"{name}.weight_scale": of[f"{name}.weight_scale"], f"{name}.input_global_scale": torch.tensor([9.0])}
    return {f"{name}.weight_packed": of[f"{name}.weight"], **more}


def words(codes: torch.Tensor, bits: int = 4) -> torch.Tensor:
    """Integers (R, C) in words (R, C bits / 32), from the lowest bit on."""
    every = (codes.long()[:, :, None] >> torch.arange(bits) & 1).reshape(len(codes), -1, 32)
    return (every << torch.arange(32)).sum(2).to(torch.int64).to(torch.int32)


def grid(w: torch.Tensor, group: int, bits: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(scales, zero points, codes) of a matrix (R, C): scales (R, C / group) of half precision."""
    parts = w.reshape(len(w), -1, group)
    low, high = parts.amin(2), parts.amax(2)
    scale = ((high - low) / (2**bits - 1)).half().float().clamp_min(1e-6)
    zero = (-low / scale).round().clamp(1, 2**bits - 1)
    codes = (parts / scale[..., None]).round().add(zero[..., None]).clamp(0, 2**bits - 1)
    return scale, zero, codes.reshape(w.shape)


def gptq(name: str, w: torch.Tensor, bits: int = 4, more: int = 1) -> Tensors:
    """As GPTQ, inputs in an order of importance: words along the inputs, zero points less one."""
    order = torch.randperm(w.shape[1], generator=torch.Generator().manual_seed(0))
    scale, zero, codes = grid(w[:, order], 32, bits)
    back = order.argsort()
    out = {"qweight": words(codes[:, back], bits).T, "qzeros": words(zero.T - more, bits), "scales": scale.T.half()}
    return {f"{name}.{n}": t for n, t in (out | {"g_idx": (back // 32).to(torch.int32)}).items()}


def awq(name: str, w: torch.Tensor) -> Tensors:
    """As AWQ: words along the outputs, eight in an order of their own."""
    scale, zero, codes = grid(w, 32)

    def mixed(x: torch.Tensor) -> torch.Tensor:
        return words(x.reshape(len(x), -1, 8)[:, :, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(x.shape))

    out = {"qweight": mixed(codes.T), "qzeros": mixed(zero.T), "scales": scale.T.half()}
    return {f"{name}.{n}": t for n, t in out.items()}


def int4(name: str, w: torch.Tensor) -> Tensors:
    """As compressed-tensors: symmetric, words along the inputs."""
    scale = blocks(w, 1, 32) / 7.5
    codes = (w / spread(scale, 1, 32, w.shape)).round().clamp(-8, 7) + 8
    out = {"packed": words(codes), "scale": scale.bfloat16(), "shape": torch.tensor(w.shape)}
    return {f"{name}.weight_{n}": t for n, t in out.items()}


def int4_zero(name: str, w: torch.Tensor) -> Tensors:
    """As compressed-tensors: asymmetric."""
    scale, zero, codes = grid(w, 32)
    out = {"packed": words(codes), "scale": scale, "shape": torch.tensor(w.shape), "zero_point": words(zero.T).T}
    return {f"{name}.weight_{n}": t for n, t in out.items()}


def nf4(name: str, w: torch.Tensor) -> Tensors:
    """As bitsandbytes with nested scales."""
    table = torch.erfinv(torch.linspace(-0.93, 0.93, 16))
    table = table / table.abs().max()
    flat = torch.nn.functional.pad(w.reshape(-1), (0, -w.numel() % 64)).reshape(-1, 64)
    most = flat.abs().amax(1).clamp_min(1e-6)
    offset, inner = float(most.mean()), torch.linspace(-1, 1, 256)
    centred = torch.nn.functional.pad(most - offset, (0, -len(most) % 256)).reshape(-1, 256)
    top = centred.abs().amax(1).clamp_min(1e-6)
    index = nearest(centred / top[:, None], inner).reshape(-1)[: len(most)]
    real = inner[index] * top.repeat_interleave(256)[: len(most)] + offset
    codes = nearest(flat / real[:, None], table).reshape(-1)[: w.numel()]
    about = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
    about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    state = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    more = {"absmax": index.to(torch.uint8), "quant_map": table, "nested_absmax": top, "nested_quant_map": inner}
    more |= {"quant_state.bitsandbytes__nf4": state}
    packed = (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None]
    return {f"{name}.weight": packed, **{f"{name}.weight.{n}": t for n, t in more.items()}}


def _compressed(kind: str, **weights: Any) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "symmetric": True, **weights}}}
    return {"quant_method": "compressed-tensors", "format": kind, "config_groups": groups}


Scheme = tuple[Callable[[str, torch.Tensor], Tensors], dict[str, Any] | None]
_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
_NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
SCHEMES: dict[str, Scheme] = {
    "fp8": (fp8, _FP8),
    "fp8-row": (fp8_row, _compressed("float-quantized", type="float", strategy="channel")),
    "fp8-tensor": (fp8_tensor, {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "fp8-e5m2": (fp8_e5m2, None),
    "int8": (int8, _compressed("int-quantized", type="int", strategy="channel")),
    "mxfp4": (mxfp4, _compressed("mxfp4-pack-quantized", num_bits=4, type="float", group_size=32)),
    "nvfp4": (nvfp4, {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
    "nvfp4-packed": (nvfp4_packed, _compressed("nvfp4-pack-quantized", num_bits=4, type="float", group_size=16)),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}),
    "gptq-3": (
        lambda name, w: gptq(name, w, 3, 0),
        {"quant_method": "gptq", "bits": 3, "group_size": 32, "checkpoint_format": "gptq_v2"},
    ),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}),
    "int4": (int4, _compressed("pack-quantized", num_bits=4, type="int", group_size=32)),
    "int4-zero": (int4_zero, _compressed("pack-quantized", num_bits=4, type="int", group_size=32, symmetric=False)),
    "nf4": (nf4, _NF4),
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
