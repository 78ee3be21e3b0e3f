"""What errors of each group of tensors of a lossy file cost: measured one group at a time, beside what was foretold.

Tensors get bits by what their errors cost as the calibration has it: half of the sum of s_i e_i S e_i over rows, in
nats a token. Here the tensors of a role, of a third of the blocks, or all, are taken from the file, the others from the
original, and the divergence is measured. The quotient of both is what the costs of a group are to be multiplied by.

With `windows` for a file: what the calibration itself measures of its tables, by errors of their shape
(calibrate/slopes.py), for each sequence of text, the last ones of the built-in mix.

  python tools/slopes.py demo/smollm2-hf model.rac valid.txt test.txt --cache DIR
  python tools/slopes.py demo/smollm2-hf windows valid.txt --cache DIR
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np

import rac
from rac.calibrate import passes
from rac.calibrate.chain import Chain
from rac.calibrate.endings import Predictions
from rac.calibrate.evaluate import Measure
from rac.calibrate.experts import Stored
from rac.calibrate.folder import Folder
from rac.calibrate.layers import Layer, calibrate
from rac.calibrate.names import as_they_are
from rac.calibrate.slopes import FORETOLD, Slopes, held_out
from rac.calibrate.wide import Wide
from rac.study import role

BLOCK = re.compile(r"\.(\d+)\.")


def cost(layer: Layer, error: np.ndarray) -> float:
    """Nats a token that an error (out, in) is said to cost."""
    sensitivity = np.ones(len(error)) if layer.sensitivity is None else layer.sensitivity
    second, total = np.ascontiguousarray(layer.second, np.float32), 0.0
    for a in range(0, len(error), 4096):
        e = error[a : a + 4096]
        total += float(((e @ second) * e).sum(1).astype(np.float64) @ sensitivity[a : a + 4096])
    return total / 2


def windows(args: argparse.Namespace, text: str, digest: str) -> None:
    """Print what the calibration of a digest measures."""
    folder, path = Folder(args.cache, digest), str(args.folder)
    kind, config = passes.model_class(path)
    model = passes.load_model(kind, passes.Asked(path, args.tokens, args.tokens, True), config, "auto")
    ids = np.array(folder.array("ids.npy"))
    with Wide():
        chain = Chain(model, True, ids[:1])
    end = Predictions(ids.shape[1])
    of = Slopes.of(chain, end, as_they_are(model, Stored(args.folder)), folder, held_out(path, text, ids))
    print("| layers: nats | of what is foretold | tables: times that of layers |\n| ---: | ---: | ---: |", flush=True)
    every = [row for number in range(of.parts) for row in of.part(number)]
    for layers, *each in every:
        nats = layers / ids.shape[1]
        print(f"| {nats:.4f} | {nats / FORETOLD:.2f} | {', '.join(f'{one / layers:.2f}' for one in each)} |")
    of.put(every)
    print("slopes:", *(f"{table.errors.entry['slope']:.2f}" for table in of.tables))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", help="packed model, or `windows`")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path, nargs="?")
    parser.add_argument("--tokens", type=int, default=40960, help="to calibrate on")
    parser.add_argument("--measured", type=int, default=4096, help="tokens to measure on")
    parser.add_argument("--cache", help="folder where the calibration is kept")
    args = parser.parse_args()
    if (args.test is None) != (args.file == "windows"):
        parser.error("a packed model and a text to measure on, or `windows` and --cache")
    text = args.calibration.read_text("utf-8")
    layers = calibrate(args.folder, text, tokens=args.tokens, cache=args.cache)
    if args.test is None:
        windows(args, text, layers.digest)
        return
    measure = Measure(args.folder, args.test.read_text(encoding="utf-8"), args.measured)
    measure.figures()
    own = dict(measure.model.state_dict())
    packed = {k: v.float() for k, v in rac.load_file(args.file, framework="pt").items()}
    changed = {k: (packed[k] - own[k]).numpy() for k in packed if k in layers and not packed[k].equal(own[k])}
    foretold = {name: cost(layers[name], error) for name, error in changed.items()}
    blocks = [int(m[1]) for name in changed if (m := BLOCK.search(name))]
    third = max(blocks, default=0) // 3 + 1
    groups: dict[str, Callable[[str], bool]] = {"all": lambda _: True}
    groups |= {one: lambda name, one=one: role(name) == one for one in dict.fromkeys(map(role, changed))}  # type: ignore[misc]
    for a in range(0, max(blocks, default=-1) + 1, third):
        groups[f"blocks {a} to {a + third - 1}"] = lambda n, a=a: any(a <= int(b) < a + third for b in BLOCK.findall(n))  # type: ignore[misc]
    print("| group | weights | foretold | measured | quotient |\n| --- | ---: | ---: | ---: | ---: |", flush=True)
    other = measure.load({name: tensor.clone() for name, tensor in own.items()}, str(args.folder))
    state = other.state_dict()
    for group, mine in groups.items():
        names = [name for name in changed if mine(name)]
        for name in changed:
            state[name].copy_(packed[name] if name in names else own[name])
        kl, said = measure.figures(other, "packed").kl, sum(foretold[name] for name in names)
        weights = sum(changed[name].size for name in names)
        print(f"| {group} | {weights:,} | {said:.4f} | {kl:.4f} | {kl / max(said, 1e-9):.2f} |", flush=True)


if __name__ == "__main__":
    main()
