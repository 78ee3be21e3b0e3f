"""Forty kinds of model folder through `rac pack` and `rac unpack`: is the tree that comes back the one that was packed?

    python tools/folder_matrix.py                all of them, a line each
    python tools/folder_matrix.py peft-adapter   these

A folder is "equal" where names, links and the SHA-256 of every file are; else the differences are printed, or the line
that RAC refuses with. `EXPECTED` has those that are meant. Weights are tiny and random.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors.numpy as st

from rac.cli import main as rac_main

Make = Callable[[Path], None]
KINDS: dict[str, Make] = {}
"""What makes each kind of folder."""


def kind(make: Make) -> Make:
    """Enter a kind by the name of its function."""
    KINDS[make.__name__.replace("_", "-")] = make
    return make


def weights(
    seed: int, *names: str, shape: tuple[int, ...] = (64, 48), dtype: Any = ml_dtypes.bfloat16
) -> dict[str, Any]:
    """Gaussian matrices of these names."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name in names}


def save(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    st.save_file(tensors, path, metadata if metadata is not None else {"format": "pt"})


def text(path: Path, what: Any = "") -> None:
    """Write a small text or JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(what if isinstance(what, str) else json.dumps(what, indent=2))


def raw(path: Path, tensors: dict[str, Any], spacing: str = "", order: bool = False) -> None:
    """A safetensors file with a header of its own: spaces in it or behind it, names in another order than data."""
    at, header, data = 0, {}, b""
    for name, t in tensors.items():
        blob = t.tobytes()
        header[name] = {"dtype": "F32", "shape": list(t.shape), "data_offsets": [at, at + len(blob)]}
        at, data = at + len(blob), data + blob
    if order:
        header = dict(sorted(header.items(), reverse=True))
    body = json.dumps(header, separators=(",", ":") if not spacing else (", ", ": ")).encode() + spacing.encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(body)) + body + data)


CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48}


def index(folder: Path, parts: dict[str, dict[str, Any]], name: str = "model.safetensors.index.json") -> None:
    """The index of shards."""
    text(folder / name, {"metadata": {"total_size": 1}, "weight_map": {n: f for f, t in parts.items() for n in t}})


@kind
def single(folder: Path) -> None:
    save(folder / "model.safetensors", weights(1, "a", "b"))
    text(folder / "config.json", CONFIG)


@kind
def sharded(folder: Path) -> None:
    parts = {f"model-0000{i + 1}-of-00002.safetensors": weights(i, f"l.{i}.w", f"l.{i}.v") for i in range(2)}
    for name, tensors in parts.items():
        save(folder / name, tensors)
    index(folder, parts)
    text(folder / "config.json", CONFIG)


@kind
def header_order(folder: Path) -> None:
    raw(folder / "model.safetensors", weights(1, "a", "b", "c", dtype=np.float32), order=True)


@kind
def header_spaces(folder: Path) -> None:
    raw(folder / "model.safetensors", weights(1, "a", "b", dtype=np.float32), spacing="        ")


@kind
def no_metadata(folder: Path) -> None:
    raw(folder / "model.safetensors", weights(1, "a", dtype=np.float32))


@kind
def rich_metadata(folder: Path) -> None:
    save(folder / "model.safetensors", weights(1, "a"), {"format": "pt", "author": "é", "notes": "x" * 5000})


@kind
def peft_adapter(folder: Path) -> None:
    save(folder / "adapter_model.safetensors", weights(1, "base.q.lora_A.weight", "base.q.lora_B.weight"))
    text(folder / "adapter_config.json", {"peft_type": "LORA"})


@kind
def diffusers(folder: Path) -> None:
    text(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    save(folder / "unet" / "diffusion_pytorch_model.safetensors", weights(1, "conv_in.weight", "mid.weight"))
    save(folder / "vae" / "diffusion_pytorch_model.safetensors", weights(2, "encoder.weight"))
    save(folder / "text_encoder" / "model.safetensors", weights(3, "text_model.weight"))
    for part in ("unet", "vae", "text_encoder"):
        text(folder / part / "config.json", {"part": part})
    text(folder / "scheduler" / "scheduler_config.json", {})


@kind
def sdxl_two_encoders(folder: Path) -> None:
    for i, part in enumerate(("text_encoder", "text_encoder_2")):
        save(folder / part / "model.safetensors", weights(i, "text_model.weight"))
        text(folder / part / "config.json", {"part": part})


@kind
def unet_only(folder: Path) -> None:
    save(folder / "unet" / "diffusion_pytorch_model.safetensors", weights(1, "conv_in.weight"))


@kind
def open_clip(folder: Path) -> None:
    save(folder / "open_clip_model.safetensors", weights(1, "visual.proj"))
    text(folder / "open_clip_config.json", {})


@kind
def sentence_transformers(folder: Path) -> None:
    save(folder / "model.safetensors", weights(1, "encoder.weight"))
    text(folder / "modules.json", [{"idx": 0, "path": ""}, {"idx": 1, "path": "1_Pooling"}])
    text(folder / "1_Pooling" / "config.json", {})


@kind
def zero_transformer(folder: Path) -> None:
    save(folder / "0_Transformer" / "model.safetensors", weights(1, "encoder.weight"))
    text(folder / "modules.json", [{"idx": 0, "path": "0_Transformer"}])


@kind
def two_dense(folder: Path) -> None:
    save(folder / "model.safetensors", weights(1, "encoder.weight"))
    for i in (2, 3):
        save(folder / f"{i}_Dense" / "model.safetensors", weights(i, "linear.weight"))


@kind
def fp16_variant(folder: Path) -> None:
    found = weights(1, "w", dtype=np.float32)
    save(folder / "model.safetensors", found)
    save(folder / "model.fp16.safetensors", {k: v.astype(np.float16) for k, v in found.items()})


@kind
def llama_original(folder: Path) -> None:
    found = weights(1, "w")
    save(folder / "model.safetensors", found)
    save(folder / "original" / "consolidated.safetensors", found)
    text(folder / "original" / "params.json", {})


@kind
def mistral_consolidated(folder: Path) -> None:
    found = weights(1, "layers.0.w", "layers.1.w")
    save(folder / "consolidated.safetensors", found)
    save(folder / "model.safetensors", {f"model.{k}": v for k, v in found.items()})


@kind
def consolidated_same_names(folder: Path) -> None:
    save(folder / "consolidated.safetensors", weights(1, "w"))
    save(folder / "model.safetensors", weights(1, "w"))


@kind
def hub_cache(folder: Path) -> None:
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    text(folder / "refs" / "main", "abc")
    save(folder / "blobs" / "1234", weights(1, "w"))
    text(folder / "blobs" / "5678", json.dumps(CONFIG))
    os.symlink("../../blobs/1234", snapshot / "model.safetensors")
    os.symlink("../../blobs/5678", snapshot / "config.json")


@kind
def hub_snapshot(folder: Path) -> None:
    real = folder.parent / "blobs"
    save(real / "1234", weights(1, "w"))
    folder.mkdir(exist_ok=True)
    os.symlink(real / "1234", folder / "model.safetensors")


@kind
def hidden_files(folder: Path) -> None:
    single(folder)
    text(folder / ".gitattributes", "*.safetensors filter=lfs\n")


@kind
def download_bookkeeping(folder: Path) -> None:
    single(folder)
    text(folder / ".cache" / "huggingface" / "download.lock", "")


@kind
def custom_code(folder: Path) -> None:
    single(folder)
    text(folder / "modeling_custom.py", "class Custom: ...\n")
    text(folder / "README.md", "# Model\n")


@kind
def images_and_licence(folder: Path) -> None:
    single(folder)
    (folder / "assets").mkdir()
    (folder / "assets" / "logo.png").write_bytes(bytes(range(256)) * 8)
    text(folder / "LICENSE", "licence")


@kind
def empty_file_and_folder(folder: Path) -> None:
    single(folder)
    text(folder / "empty.txt")
    (folder / "nothing").mkdir()


@kind
def bin_beside(folder: Path) -> None:
    single(folder)
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04" + bytes(1000))


@kind
def onnx_beside(folder: Path) -> None:
    single(folder)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(bytes(range(256)) * 64)


@kind
def gguf_beside(folder: Path) -> None:
    single(folder)
    (folder / "model-q4.gguf").write_bytes(b"GGUF" + bytes(100))


@kind
def tied_copies(folder: Path) -> None:
    found = weights(1, "embed.weight")
    save(folder / "model.safetensors", found | {"lm_head.weight": found["embed.weight"].copy()})


@kind
def empty_tensors(folder: Path) -> None:
    save(folder / "model.safetensors", {"none": np.zeros((0, 4), np.float32), "scalar": np.array(3, np.float32)})


@kind
def many_types(folder: Path) -> None:
    types = (
        np.float64,
        np.float32,
        np.float16,
        ml_dtypes.bfloat16,
        np.int64,
        np.int32,
        np.int16,
        np.int8,
        np.uint8,
        np.bool_,
    )
    save(folder / "model.safetensors", {np.dtype(t).name: np.arange(60).reshape(6, 10).astype(t) for t in types})


@kind
def fp8(folder: Path) -> None:
    types = (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)
    found = {f"w{i}": np.random.default_rng(i).standard_normal((64, 64)).astype(t) for i, t in enumerate(types)}
    at, header, data = 0, {}, b""
    for (name, t), tag in zip(found.items(), ("F8_E4M3", "F8_E5M2"), strict=True):
        blob = t.tobytes()
        header[name] = {"dtype": tag, "shape": [64, 64], "data_offsets": [at, at + len(blob)]}
        at, data = at + len(blob), data + blob
    body = json.dumps(header).encode()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(body)) + body + data)


@kind
def gptq(folder: Path) -> None:
    rng = np.random.default_rng(1)
    found = {"q.qweight": rng.integers(0, 1 << 31, (8, 64), np.int32), "q.qzeros": rng.integers(0, 9, (1, 8), np.int32)}
    save(folder / "model.safetensors", found | weights(2, "q.scales", shape=(1, 64), dtype=np.float16))
    text(folder / "quantize_config.json", {"bits": 4})


@kind
def spaces_in_names(folder: Path) -> None:
    save(folder / "my model.safetensors", weights(1, "a b", "ü"))
    text(folder / "read me.txt", "x")


@kind
def deep_folders(folder: Path) -> None:
    save(folder / "a" / "b" / "c" / "model.safetensors", weights(1, "w"))


@kind
def index_without_shards_order(folder: Path) -> None:
    parts = {"b.safetensors": weights(1, "x"), "a.safetensors": weights(2, "y")}
    for name, tensors in parts.items():
        save(folder / name, tensors)
    index(folder, parts)


@kind
def stale_index(folder: Path) -> None:
    single(folder)
    index(folder, {"gone-00001-of-00001.safetensors": {"a": 0}})


@kind
def two_files_no_index(folder: Path) -> None:
    save(folder / "one.safetensors", weights(1, "a"))
    save(folder / "two.safetensors", weights(2, "b"))


@kind
def mlx(folder: Path) -> None:
    save(folder / "weights.safetensors", weights(1, "layers.0.w"), {"format": "mlx"})
    text(folder / "config.json", CONFIG)


@kind
def controlnet_file(folder: Path) -> None:
    save(folder / "control_v11p_sd15.safetensors", weights(1, "control_model.w", dtype=np.float16))


@kind
def executable_and_time(folder: Path) -> None:
    single(folder)
    text(folder / "run.sh", "#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)


@kind
def duplicate_files(folder: Path) -> None:
    single(folder)
    text(folder / "a" / "tokenizer.json", "x" * 9000)
    text(folder / "b" / "tokenizer.json", "x" * 9000)


EXPECTED = {
    "stale-index": "- rac: shard 'gone-00001-of-00001.safetensors' is missing",
    "download-bookkeeping": "differs: missing ['.cache', '.cache/huggingface', '.cache/huggingface/download.lock']",
}
"""How the line begins of a folder that does not come back equal: a half download; what a download leaves behind."""


def listing(folder: Path) -> dict[str, str]:
    """What lies in a folder: links by their targets, unless these are elsewhere, and files by SHA-256."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() and path.resolve().is_relative_to(folder.resolve()):
            found[name] = f"link to {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


def trial(name: str, work: Path) -> str:
    """What became of a folder."""
    source, archive, back = work / name / "model", work / f"{name}.rac", work / "back"
    source.parent.mkdir()
    KINDS[name](source)
    said = io.StringIO()
    for args in (("pack", str(source), "-o", str(archive)), ("unpack", str(archive), "-o", str(back / name))):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            try:
                status = rac_main(list(args))
            except Exception as e:
                return f"ERROR {args[0]}: {type(e).__name__}: {e}"
        if status:
            return f"- {said.getvalue().strip().replace(str(work), '')}"
    before, after = listing(source), listing(back / name)
    if before == after:
        return "equal"
    missing, more = before.keys() - after.keys(), after.keys() - before.keys()
    changed = sorted(k for k in before.keys() & after.keys() if before[k] != after[k])
    return f"differs: missing {sorted(missing)}, new {sorted(more)}, changed {changed}"


def main() -> int:
    """Print a line for each; 1 where one is an error or differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], metavar="KIND", help=", ".join(KINDS))
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.kinds or KINDS:
            results[name] = trial(name, Path(folder))
            print(f"{name:<28} {results[name]}", flush=True)
    wrong = [name for name, r in results.items() if not r.startswith(EXPECTED.get(name, "equal"))]
    print(f"{sum(r == 'equal' for r in results.values())} of {len(results)} equal, {len(wrong)} not as expected")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
