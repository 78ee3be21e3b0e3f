"""What experts lose that do not have a second moment of their own: real layers, whose tokens a router deals out.

No model with experts is at hand where this runs, so layers of SmolLM2 are upcycled: each of E experts has the weights
of the dense layer, its neurons in an order of its own (nothing ties those of two experts), and sees the real tokens
that a router sends it: the nearest of E centroids (`near`: as different as experts can be), or the two largest of E
random projections (`random`: nearly alike). Second moments are of some tokens for each expert of one text, and of all
its tokens for all experts; errors are measured on the experts' tokens of another. Printed is tr(E S E^T) over all
experts at equal bits, 1 where all share one second moment, and what a second moment takes on the disk.

  python tools/experts_bar.py demo/smollm2-hf valid.txt test.txt --cache DIR
"""

from __future__ import annotations

import argparse
import functools
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from rac.calibrate.layers import Layer
from rac.encode import ties
from rac.encode.align.recipe import calibrated
from rac.encode.options import Budget
from rac.encode.quantise.tensor import code
from rac.encode.sources import from_arrays
from rac.linalg.factors import Factors
from solve import solve

F32 = np.float32
Array = NDArray[np.float32]
CONTEXT = 1024
DIAGONAL = 16  # tokens that the diagonal of all counts as, beside an expert's own


@dataclass(frozen=True)
class Seen:
    """What one expert has seen, beside all of them."""

    rows: int
    own: Array
    """(n, n), the mean over the rows."""
    shared: Array
    """The same over all tokens of the layer."""
    directions: tuple[Array, Array]
    """Eigenvalues of its own and their vectors, in rising order."""

    def toward(self, other: Array) -> Array:
        """Its own, and the other as if it were of as many rows as there are inputs."""
        few = F32(len(self.own))
        return np.asarray((self.own * F32(self.rows) + other * few) / (F32(self.rows) + few))

    @property
    def diagonal(self) -> Array:
        """Its own without what lies off the diagonal."""
        return np.diag(np.diag(self.own))

    @property
    def scaled(self) -> Array:
        """The correlations of all with its own energies."""
        energy = (np.diag(self.own) * F32(self.rows) + np.diag(self.shared) * DIAGONAL) / F32(self.rows + DIAGONAL)
        root = np.sqrt(energy / np.maximum(np.diag(self.shared), 1e-30))
        return np.asarray(self.shared * root[:, None] * root)

    def ranked(self, rank: int) -> Seen:
        """Its own made of the largest `rank` directions, and the diagonal of the rest."""
        value, vector = self.directions
        top = vector[:, -rank:] * np.sqrt(np.maximum(value[-rank:], 0))
        part = top @ top.T
        own = np.asarray(part + np.diag(np.maximum(np.diag(self.own) - np.diag(part), 0)), F32)
        return Seen(self.rows, own, self.shared, self.directions)


def moment(x: Array) -> Array:
    """(n, n), the mean over the rows."""
    return np.asarray(x.T @ x / F32(max(len(x), 1)))


Way = Callable[[Seen], Array]
"""From what an expert has seen to what counts as its second moment."""
SHARED = "one for all"


def ways(ranks: Sequence[int]) -> dict[str, tuple[Way, Callable[[int], float]]]:
    """Names to what they do, and to bytes for each expert of n inputs."""

    def whole(n: int) -> float:
        return 4 * n * n

    def diagonal(n: int) -> float:
        return 4 * n

    out: dict[str, tuple[Way, Callable[[int], float]]] = {
        SHARED: (lambda s: s.shared, lambda n: 0),
        "one for all, own diagonal": (lambda s: s.scaled, diagonal),
        "own diagonal": (lambda s: s.diagonal, diagonal),
        "own": (lambda s: s.own, whole),
        "own, to one for all": (lambda s: s.toward(s.shared), whole),
        "own, to its diagonal": (lambda s: s.toward(s.diagonal), whole),
    }
    for r in ranks:
        size: Callable[[int], float] = lambda n, r=r: 4 * n * (r + 1)  # type: ignore[misc] # noqa: E731
        all_of: Way = lambda s, r=r: s.ranked(r).toward(s.shared)  # type: ignore[misc] # noqa: E731
        alone: Way = lambda s, r=r: s.ranked(r).toward(s.diagonal)  # type: ignore[misc] # noqa: E731
        out[f"own of rank {r}, to one for all"] = all_of, size
        out[f"own of rank {r}, to its diagonal"] = alone, size
    return out


def hidden(folder: str, text: str, tokens: int, layers: Sequence[int], cache: Path) -> list[Array]:
    """(tokens, width) inputs of the feed-forward parts of these layers."""
    names = [cache / f"{Path(text).stem}-{tokens}-{layer}.npy" for layer in layers]
    if not all(name.exists() for name in names):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        model.model.layers = model.model.layers[: max(layers) + 1]
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        ids = tokenizer(Path(text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0, :tokens]
        found: dict[int, list[Array]] = {layer: [] for layer in layers}
        for layer in layers:
            mlp = model.model.layers[layer].mlp
            mlp.register_forward_pre_hook(lambda _, args, at=found[layer]: at.append(args[0][0].numpy().copy()))
        with torch.no_grad():
            for a in range(0, len(ids) - CONTEXT + 1, CONTEXT):
                model.model(ids[None, a : a + CONTEXT])
        for layer, name in zip(layers, names, strict=True):
            np.save(name, np.concatenate(found[layer]))
    return [np.load(name) for name in names]


def near(x: Array, experts: int) -> Array:
    """(width, experts), the negative half square and the centroid of clusters of equal weight, as one product."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    centre = unit[np.random.default_rng(0).choice(len(unit), experts, replace=False)]
    offset = np.zeros(experts, F32)
    for _ in range(60):
        which = (unit @ centre.T + offset).argmax(1)
        count = np.bincount(which, minlength=experts)
        centre = np.stack([unit[which == e].mean(0) if count[e] else centre[e] for e in range(experts)])
        offset = np.asarray(offset - 0.05 * (count / len(unit) * experts - 1), F32)  # as routers are balanced
    return np.concatenate([centre.T, offset[None]])


def routed(x: Array, router: Array, top: int) -> list[NDArray[np.int64]]:
    """Tokens of each expert."""
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    best = np.argsort(-(unit @ router[:-1] + router[-1]), 1)[:, :top]
    return [np.flatnonzero((best == e).any(1)) for e in range(router.shape[1])]


def inner(x: Array, gate: Array, up: Array) -> Array:
    """What the second matrix of a feed-forward part multiplies."""
    g = x @ gate.T
    return np.asarray(g / (1 + np.exp(-g)) * (x @ up.T))


@dataclass(frozen=True)
class Given:
    """A second moment that is known by a name, so that its factor is found once."""

    second: Array
    key: str

    def __call__(self) -> Array:
        """The second moment."""
        return self.second


def lost(weights: Sequence[Array], moments: Sequence[Array], judge: Sequence[Array], bits: float) -> float:
    """tr(E S E^T) over all experts by what judges them, where the packer knows these moments, at `bits`."""
    named = {f"experts.{e}.w.weight": w for e, w in enumerate(weights)}
    groups, factors = ties.find(from_arrays(named).tensors), Factors()
    layers = {name: Layer(Given(s, name), None, factors=factors) for name, s in zip(named, moments, strict=True)}
    recipe = solve(groups, calibrated(groups, layers, (), "default"), Budget(bits=bits), 1)
    total = 0.0
    for group in groups:
        e = int(group.tensor.name.split(".")[1])
        error = (code(group.tensor, recipe).dense.view(F32).reshape(weights[e].shape) - weights[e]).astype(F32)
        total += float(np.einsum("ij,ij->", error @ judge[e], error, dtype=np.float64))
    return total


@dataclass
class Case:
    """A matrix of a layer, a router, and all that its experts see of both texts."""

    name: str
    weights: Sequence[Array]
    given: Sequence[Array]
    held: Sequence[Array]

    @functools.cached_property
    def shared(self) -> Array:
        """(n, n) of all tokens that experts see."""
        return moment(np.concatenate(self.given))

    def seen(self, tokens: int) -> list[Seen]:
        """By each expert, where so many of its tokens are known, from anywhere in the text: as of many experts."""
        out, rng = [], np.random.default_rng(2)
        for x in self.given:
            own = moment(x[rng.permutation(len(x))[:tokens]])
            out.append(Seen(min(tokens, len(x)), own, self.shared, np.linalg.eigh(own)))
        return out


def cases(args: argparse.Namespace) -> list[Case]:
    """Both matrices of each layer with each router."""
    cache = Path(args.cache)
    cache.mkdir(parents=True, exist_ok=True)
    given = hidden(args.model, args.text, args.given, args.layers, cache)
    held = hidden(args.model, args.held, args.held_tokens, args.layers, cache)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    rng, out = np.random.default_rng(1), []
    for layer, x, y in zip(args.layers, given, held, strict=True):
        mlp = model.model.layers[layer].mlp
        gate, up, down = (m.weight.detach().numpy() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        noise = rng.standard_normal((x.shape[1] + 1, args.experts)).astype(F32)
        noise[-1] = 0
        for kind, router, top in (("near", near(x, args.experts), 1), ("random", noise, 2)):
            mine, theirs = ([z[at] for at in routed(z, router, top)] for z in (x, y))
            name = f"layer {layer}, {kind}"
            out.append(Case(f"{name}, gate", [gate[: args.rows]] * args.experts, mine, theirs))
            order = [rng.permutation(len(gate))[: args.inner] for _ in mine]
            weights = [np.ascontiguousarray(down[: args.rows, at]) for at in order]
            a, b = ([inner(z, gate[at], up[at]) for z, at in zip(s, order, strict=True)] for s in (mine, theirs))
            out.append(Case(f"{name}, down", weights, a, b))
    return out


def table(case: Case, args: argparse.Namespace) -> None:
    """Print the losses of one matrix."""
    judge = [moment(x) for x in case.held]
    n = case.given[0].shape[1]
    every = [(args.bits[0], share) for share in args.shares] + [(b, args.shares[1]) for b in args.bits[1:]]
    sizes = f"{min(map(len, case.given))} to {max(map(len, case.given))}"
    print(f"\n{case.name}: {n} inputs, {sizes} tokens of an expert\n")
    heads = [f"{max(1, round(share * n))} tokens, {b:g} bits" for b, share in every]
    print(f"| second moments | bytes | {' | '.join(heads)} |\n| --- | ---: |{' ---: |' * len(heads)}", flush=True)
    seen = {share: case.seen(max(1, round(share * n))) for share in args.shares}
    one = {b: lost(case.weights, [case.shared] * len(judge), judge, b) for b in args.bits}
    for name, (way, size) in ways(args.ranks).items():
        row: list[str] = []
        for b, share in every:
            row.append(f"{lost(case.weights, [way(s) for s in seen[share]], judge, b) / one[b]:.3f}")
        print(f"| {name} | {size(n):,.0f} | {' | '.join(row)} |", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("text", help="what second moments are of")
    parser.add_argument("held", help="what errors are measured on")
    parser.add_argument("--cache", required=True, help="folder for hidden states")
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 22])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rows", type=int, default=64, help="outputs of each matrix that are looked at")
    parser.add_argument("--inner", type=int, default=640, help="neurons that the second matrix is cut down to")
    parser.add_argument("--given", type=int, default=24576, help="tokens of the text")
    parser.add_argument("--held-tokens", type=int, default=8192)
    parser.add_argument("--bits", type=float, nargs="+", default=[3.0, 2.0, 4.0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.125, 0.5, 2.0], help="tokens by inputs")
    parser.add_argument("--only", default="", help="part of the name of a matrix")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    for case in cases(args):
        if args.only in case.name:
            table(case, args)


if __name__ == "__main__":
    main()
