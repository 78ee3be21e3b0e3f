"""Registers, spills, shared memory and instructions per weight of the GPU kernels, compiled without a GPU.

python tools/gpu_sass.py            # a table
python tools/gpu_sass.py --write    # tests/unit/decode/sass.json, which a test compares with
python tools/gpu_sass.py --show NAME CAP   # the inner loop
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rac.gpu import specs

ARCHITECTURES = (80, 90, 100)
RATCHET = Path(__file__).parents[1] / "tests" / "unit" / "decode" / "sass.json"
KEYS = {"per_weight": "", "alu": " alu", "slow": " slow"}
"""What the ratchet holds of a form, and what stands behind the architecture there."""
_TYPES = {"jobs": "*i64", "status": "*i32"}
_BF16 = {"WORD": 2, "SHIFT": 7, "SIGN": 1, "ZERO": 0, "RAW": 8, "CODED": True, "ROWS": 64, "COLS": 256}
FORMS: dict[str, tuple[str, dict[str, Any], str, int]] = {
    "lanes, pairs, 32": ("lanes", {"LANES": 32, "SPAN": 32, "PER": 2, "BLOCK": 32, "ENTRIES": 256}, "STG.E.U8", 1),
    "lanes, single, 16": ("lanes", {"LANES": 16, "SPAN": 16, "PER": 1, "BLOCK": 32, "ENTRIES": 64}, "STG.E.U8", 1),
    "lanes, single, 32": ("lanes", {"LANES": 32, "SPAN": 32, "PER": 1, "BLOCK": 32, "ENTRIES": 64}, "STG.E.U8", 1),
    "lanes, pairs, 128": ("lanes", {"LANES": 128, "SPAN": 128, "PER": 2, "BLOCK": 128, "ENTRIES": 256}, "STG.E.U8", 1),
    "lanes, single, 8": ("lanes", {"LANES": 8, "SPAN": 8, "PER": 1, "BLOCK": 32, "ENTRIES": 64}, "STG.E.U8", 1),
    "place BF16": ("place", _BF16, "STG", 1),
    "place F32": ("place", _BF16 | {"WORD": 4, "SHIFT": 23, "RAW": 24}, "STG", 1),
    "place raw": ("place", _BF16 | {"SHIFT": 0, "SIGN": 0, "RAW": 16, "CODED": False}, "STG", 1),
    "escapes": ("escapes", {"WORD": 2, "PLACED": True, "BLOCK": 64}, "STG.E.U16", 1),
    "escapes, lossy": ("escapes", {"WORD": 1, "PLACED": False, "BLOCK": 64}, "STG.E.U8", 1),
    "trellis": ("trellis", {"TO": "BF16", "COLS": 64, "PAIRS": True}, "STG", 2),
    "product": ("product", {"WORD": 2, "HALF": False, "ADDED": True, "ROWS": 16, "COLS": 32}, "FMUL", 1),
    "groups": ("groups", {"TO": "BF16", "PAIRS": True, "SAME": True, "ROWS": 32, "COLS": 256}, "STG", 2),
    "groups, apart": ("groups", {"TO": "BF16", "PAIRS": False, "SAME": False, "ROWS": 32, "COLS": 256}, "STG", 1),
    "place bits": ("place", _BF16 | {"WORD": 1, "SHIFT": 0, "SIGN": 0, "RAW": 4, "CODED": False}, "STG.E.U8", 1),
    "tables": ("tables", {"BLOCK": 2048}, "STG", 1),
    "outliers": ("outliers", {"WORD": 2, "BLOCK": 128}, "STG", 1),
}
"""Kernel, what it is compiled for, and the instruction that its inner loop is counted by, with the weights of each: a
store of a weight, an escape, a term of a product."""

ALU = (
    "LOP3",
    "SHF",
    "LEA",
    "IADD3",
    "IADD",
    "VIADD",
    "ISETP",
    "SEL",
    "VIMNMX",
    "VIMNMX3",
    "IMNMX",
    "PRMT",
    "P2R",
    "R2P",
    "PLOP3",
    "SGXT",
    "F2FP",
    "FSETP",
    "FSEL",
    "FMNMX",
    "MOV",
    "VOTE",
    "BMSK",
)
"""Instructions of the pipe that takes half a warp per cycle and scheduler; moves and sums that are written as IMAD are
those of another."""
SLOW = ("POPC", "F2F", "F2I", "I2F", "MUFU", "FLO", "BREV")
"""Of the one that takes an eighth of a warp per cycle and scheduler."""


@functools.cache
def compiled(name: str, cap: int) -> tuple[str, str]:
    """(SASS, resource usage) of a form."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    of, options, *_ = FORMS[name]
    fn, constants = specs.kernel(of), specs.constants(of, tuple(options.items()))
    signature = {a: "constexpr" if a in constants else _TYPES.get(a, "*u8") for a in fn.arg_names}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants)
    settings = specs.KERNELS[of].settings(options)
    kernel = triton.compile(source, target=GPUTarget("cuda", cap, 32), options=settings)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        out = [
            subprocess.run([tool, flag, f.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-sass", "-res-usage")
        ]
    return out[0], out[1]


def version() -> str:
    """Of triton, whose instructions are counted: 3.9."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def instructions(sass: str) -> list[tuple[int, str]]:
    """(Address, text) of each instruction."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.*?);", sass)
    return [(int(a, 16), text.strip()) for a, text in found]


def loops(code: list[tuple[int, str]]) -> list[range]:
    """Places of the instructions from the target of each backward branch to the branch."""
    place = {a: i for i, (a, _) in enumerate(code)}
    out = []
    for i, (a, text) in enumerate(code):
        m = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        if m and int(m[1], 16) < a:
            out.append(range(place[int(m[1], 16)], i + 1))
    return out


def inner(name: str, code: list[tuple[int, str]]) -> tuple[list[str], int]:
    """(Instructions, weights) of the loop that does the work: the innermost one with most weights in a round."""
    mark, each = FORMS[name][2:]

    def weights(body: range) -> int:
        return each * sum(mark in code[i][1] for i in body)

    found = loops(code) or [range(len(code))]
    inmost = [
        a
        for a in found
        if weights(a) and not any(weights(b) and b != a and b[0] >= a[0] and b[-1] <= a[-1] for b in found)
    ]
    best = max(inmost, key=weights)
    return [code[i][1] for i in best if not code[i][1].startswith("NOP")], weights(best)


def pipes(body: list[str]) -> tuple[int, int]:
    """How many instructions are among `ALU`, and how many among `SLOW`."""
    kinds = [t.split()[1 if t.startswith("@") else 0].split(".")[0] for t in body]
    return sum(k in ALU for k in kinds), sum(k in SLOW for k in kinds)


def measure(name: str, cap: int) -> dict[str, Any]:
    """What a form needs, and the instructions of its inner loop per weight."""
    sass, usage = compiled(name, cap)
    code = instructions(sass)
    body, weights = inner(name, code)
    numbers = {k: int(v) for k, v in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    spilled = numbers["STACK"] + numbers["LOCAL"] + sum(t.startswith(("LDL", "STL")) for _, t in code)
    alu, slow = pipes(body)
    return {
        "alu": round(alu / weights, 2),
        "slow": round(slow / weights, 2),
        "registers": numbers["REG"],
        "spilled": spilled,
        "shared": numbers["SHARED"],
        "per_weight": round(len(body) / weights, 2),
        "text": "\n".join(t for _, t in code),
        "loop": body,
    }


def main() -> None:
    """Print, or write."""
    if "--show" in sys.argv:
        name, cap = sys.argv[-2:]
        print("\n".join(measure(name, int(cap))["loop"]))
        return
    found = {f"sm_{cap}": {name: measure(name, cap) for name in FORMS} for cap in ARCHITECTURES}
    if "--write" in sys.argv:
        rows: dict[str, Any] = {"triton": version()}
        for key, suffix in KEYS.items():
            rows |= {arch + suffix: {name: m[key] for name, m in of.items()} for arch, of in found.items()}
        RATCHET.write_text(json.dumps(rows, indent=2) + "\n")
    print("| kernel | " + " | ".join(f"{arch}: per weight, registers" for arch in found) + " | spilled | shared |")
    print("| --- |" + " ---: |" * (len(found) + 2))
    for name in FORMS:
        of = [found[arch][name] for arch in found]
        cells = [f"{m['per_weight']:.1f}, {m['registers']}" for m in of]
        cells += [str(max(m[key] for m in of)) for key in ("spilled", "shared")]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
