"""Memory of small mixtures of experts, and of Falcon, that stay compressed: of what the dense model holds.

    python tools/moe_memory.py                     tiny models at 4 bits, a row each
    python tools/moe_memory.py mixtral --bits 3 --width 512 --layers 4 --process
                                                   larger, and what the memory of a process grows by
    python tools/moe_memory.py llama mixtral qwen3_moe --scheme fp8
                                                   versions that others have quantised, packed losslessly

Random models are packed at so many bits from their weights alone and loaded dense and compressed. A row has the bytes
of all parameters and buffers without embedding and output layer, dense and compressed, with what is kept of the records
that were parsed, and their ratio; that logits and 12 generated tokens are the same, bit for bit, is checked. Exits with
1 where the ratio is above 0.5. With `--scheme` (of tools/quantised_models.py) dense is what the codes stand for, in
BF16, and a second ratio is that to the bytes of codes, scales and all else in the folder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

import quantised_models
import rac
from rac.encode.sources import open_source
from rac.runtime.held import Held
from runtime_bar import kept, parsed_bytes, rss

KINDS = ("mixtral", "gpt_oss", "qwen3_moe", "falcon")
BAR = 0.5


def make(kind: str, width: int, layers: int) -> Any:
    """A random model in BF16: four experts, two of them used, each of the width's size; a vocabulary of 300."""
    given = {
        "vocab_size": 300,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    experts = {
        "head_dim": width // 4,
        "intermediate_size": width,
        "moe_intermediate_size": width,
        "num_experts_per_tok": 2,
    }
    experts |= dict.fromkeys(("num_local_experts", "num_experts"), 4)
    config = transformers.AutoConfig.for_model(kind, **(given if kind == "falcon" else given | experts))
    config.pad_token_id = config.eos_token_id = config.bos_token_id = None
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()


def held(model: Any) -> int:
    """Bytes of parameters and buffers, and of what is kept of parsed records, without embedding and output layer."""
    ends = {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    out, seen = 0, set[int]()
    for m in (m for m in model.modules() if id(m) not in ends):
        for t in (*m._parameters.values(), *m._buffers.values()):
            if t is not None and id(t) not in seen:
                seen.add(id(t))
                out += t.nbytes
        if isinstance(m, Held):
            out += sum(parsed_bytes(s) for k in m._kept.values() for s in k.parsed.values())
        elif hasattr(m, "_stored"):
            out += kept(m)
    return out


def said(model: Any) -> tuple[torch.Tensor, list[int]]:
    """Logits of 24 tokens, and 12 tokens that are generated."""
    ids = torch.arange(24)[None] * 7 % 250
    with torch.no_grad():
        logits = model(ids).logits
    return logits, model.generate(ids, max_new_tokens=12, do_sample=False)[0].tolist()


def measure(kind: str, folder: Path, bits: float | str, width: int, layers: int) -> dict[str, Any]:
    """Bytes that are held dense and compressed, and whether both say the same; `bits` or a scheme of others."""
    source = folder / "hf"
    make(kind, width, layers).save_pretrained(source)
    if isinstance(bits, str):
        source = quantised_models.make(bits, source, folder / bits, ".gate.")
        rac.pack(source, folder / "m.rac")
    else:
        rac.pack(source, folder / "m.rac", bits=bits, effort="fast", calibrate="none")
    found = {}
    for resident in ("dense", "compressed"):
        model = rac.load_model(folder / "m.rac", resident=resident)
        found[resident] = said(model), held(model)
    (a, dense), (b, compressed) = found.values()
    same = torch.equal(a[0], b[0]) and a[1] == b[1]
    stored = sum(t.nbytes for t in open_source(source).tensors if not any(n in t.name for n in ("embed", "lm_head")))
    row = {"kind": kind, "dense": dense, "compressed": compressed, "ratio": compressed / dense, "same": same}
    return row | {"stored": compressed / stored}


def grown(file: str, resident: str) -> int:
    """Bytes by which the memory of a process of its own grows while it loads a model and generates 12 tokens."""
    command = [sys.executable, __file__, "--child", json.dumps([file, resident])]
    return int(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()[-1])


def child(file: str, resident: str) -> None:
    """Print the bytes by which memory grows."""
    import rac.runtime

    before = rss()
    model = rac.load_model(file, resident=resident)
    said(model)
    print(rss() - before)


def main() -> int:
    """Print the rows; 1 where one misses the bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", default=KINDS, help=f"of {', '.join(KINDS)} (default: all)")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--scheme", choices=quantised_models.SCHEMES, help="quantised by others, instead of --bits")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--process", action="store_true", help="measure processes, too")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if args.child:
        child(*json.loads(args.child))
        return 0
    missed = False
    for kind in args.kinds:
        with tempfile.TemporaryDirectory() as folder:
            row = measure(kind, Path(folder), args.scheme or args.bits, args.width, args.layers)
            line = f"{kind:<10} dense {row['dense']:>12,}  compressed {row['compressed']:>12,}  {row['ratio']:.3f}"
            line += f"  {'same bits' if row['same'] else 'OTHER BITS'}"
            if args.scheme:
                line += f"  of what is stored {row['stored']:.3f}"
            if args.process:
                both = [grown(f"{folder}/m.rac", resident) for resident in ("dense", "compressed")]
                line += f"  process {both[0] / 1e6:.0f} MB, {both[1] / 1e6:.0f} MB"
            print(line, flush=True)
            missed |= row["ratio"] > BAR or not row["same"]
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
