"""SmolLM2-135M at given bits per weight: one calibration, a pack and a measurement for each budget and damping.

The original is the BF16 content of the GGUF file (`python tools/check_models.py` fetches it into demo/), saved by
transformers into FOLDER the first time. Calibrate on one text, measure on another.

  python tools/smollm2_bar.py demo/smollm2.gguf valid.txt test.txt --bits 3.05 2.56
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

import rac
from rac.calibrate.evaluate import Measure
from rac.calibrate.layers import calibrate
from rac.encode import ties
from rac.encode.align import recipe as rcp
from rac.encode.options import Budget
from rac.encode.pack import Summary, pack_source
from rac.encode.sources import open_source
from solve import solve

HEAD = (
    "| model | bits of quantised tensors | bits of the file | perplexity | KL | top-1 |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: |"
)


def dense(gguf: Path, folder: Path) -> None:
    """Save the model of a GGUF file as a BF16 Hugging Face folder."""
    how: Any = transformers.GgufConfig(gguf_file=gguf.name, dequantize=True)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=how, local_files_only=True
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def row(measure: Measure, name: str, done: Summary | None = None) -> str:
    """A row of the table for what a pack has written, or for the original."""
    if done is None:
        bits, found = "- | -", measure.figures()
    else:
        path = done.paths[0]
        bits = f"{done.quantised_bits:.4f} | {8 * done.stored / done.weights:.3f}"
        found = measure.figures(measure.load(rac.load_file(path, framework="pt"), path), name)
    return f"| {name} | {bits} | {found.perplexity:.3f} | {found.kl:.4f} | {found.top1:.2%} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("calibration", help="a text, self or none")
    parser.add_argument("test", type=Path)
    parser.add_argument("--folder", type=Path, default=Path("demo/smollm2-hf"))
    parser.add_argument("--bits", type=float, nargs="+", default=[3.05, 2.56])
    parser.add_argument("--damp", type=float, nargs="+", default=[rcp.DAMP])
    parser.add_argument("--effort", default="default")
    parser.add_argument("--tokens", type=int, default=40960)
    parser.add_argument("--cache", type=Path, help="folder where calibrations are kept")
    args = parser.parse_args()
    if not (args.folder / "config.json").exists():
        dense(args.gguf, args.folder)
    layers = None
    if args.calibration != "none":
        start = time.perf_counter()
        text = None if args.calibration == "self" else Path(args.calibration).read_text(encoding="utf-8")
        layers = calibrate(args.folder, text, tokens=args.tokens, cache=args.cache)
        seconds = time.perf_counter() - start
        print(f"calibration on {layers.tokens} tokens of {Path(args.calibration).name}: {seconds:.0f} s\n")
    print(HEAD, flush=True)
    measure = Measure(args.folder, args.test.read_text(encoding="utf-8"))
    print(row(measure, "original"), flush=True)
    source = open_source(args.folder)
    groups = ties.find(source.tensors)
    with tempfile.TemporaryDirectory() as temporary:
        path = os.path.join(temporary, "m.rac")
        for bits in args.bits:
            for damp in args.damp:
                start = time.perf_counter()
                if layers is None:
                    recipe = rcp.data_free(groups, (), args.effort)
                else:
                    recipe = rcp.calibrated(groups, layers, (), args.effort, sample=rcp.Sample(damp))
                recipe = solve(groups, recipe, Budget(bits=bits), 2)
                done = pack_source(source, path, recipe=recipe, jobs=2, force=True)
                seconds = time.perf_counter() - start
                print(row(measure, f"{bits} bits, damping {damp}, packed in {seconds:.0f} s", done), flush=True)


if __name__ == "__main__":
    main()
