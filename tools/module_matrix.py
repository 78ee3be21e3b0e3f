"""Every architecture of tools/arch_matrix.py through `rac.calibrate`: which of its matrices a forward of it reaches.

    python tools/module_matrix.py                  all of them
    python tools/module_matrix.py mixtral whisper  these

A tiny random model is run on the inputs that its kind takes (text, pictures, sound), and what is found is brought to
the files that it was saved to. Printed are the architectures of which a tensor that a pack quantises is not reached,
has no sensitivities, or is not finite. Exits with 1 where there was an error other than one line.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers

import arch_matrix
import rac
from rac.encode import ties
from rac.encode.align.recipe import quantisable
from rac.encode.allocate.made import matched
from rac.encode.sources import open_source


def made(kind: str, folder: str | Path) -> tuple[Any, dict[str, Any]] | None:
    """The model of a kind, as it loads from `folder`, and a batch; None where it cannot be made or run here."""
    try:
        model: Any = arch_matrix.model_of(kind)
        model.save_pretrained(folder)
        model = type(model).from_pretrained(folder, dtype=torch.float32).eval()
        batch = {k: v.float() if v.is_floating_point() else v for k, v in arch_matrix.inputs(model).items()}
        model(**batch)
    except Exception as e:
        print(f"{kind}: not made: {type(e).__name__}", file=sys.stderr)
        return None
    return model, batch


def reached(model: Any, batch: dict[str, Any], folder: str | Path) -> str:
    """What a calibration of the model leaves to be said; empty where it is whole."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = rac.calibrate(model, [batch, batch])
    groups = ties.find(open_source(folder).tensors)
    layers = matched(groups, found)
    wanted = [g.tensor.name for g in groups if quantisable(g.tensor)]
    left = [name for name in wanted if name not in layers]
    blind = [n for n in wanted if n in layers and layers[n].sensitivity is None and not layers[n].experts]
    wrong = [name for name, layer in layers.items() if not layer.finite]
    every = (("not reached", left), ("without sensitivities", blind), ("not finite", wrong))
    return "; ".join(f"{len(names)} of {len(wanted)} {what} ({names[0]})" for what, names in every if names)


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("kinds", nargs="*", help="all by default")
    args = p.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    start, said, errors = time.time(), dict[str, str](), 0
    for kind in args.kinds or arch_matrix.kinds():
        with tempfile.TemporaryDirectory() as folder:
            if (case := made(kind, folder)) is None:
                continue
            try:
                said[kind] = reached(*case, folder)
            except rac.RacError as e:
                said[kind] = f"refused: {e}"
            except Exception as e:
                traceback.print_exc(limit=-3)
                said[kind], errors = f"ERROR {type(e).__name__}: {e}", errors + 1
        if said[kind]:
            print(f"{kind}: {said[kind]}", flush=True)
    whole = sum(not line for line in said.values())
    print(f"{len(said)} architectures, all matrices of {whole} reached, {time.time() - start:.0f} s")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
