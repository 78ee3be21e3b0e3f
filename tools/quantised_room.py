"""Why a pack of a model that another tool has quantised has another KL than one of its original: three measurements.

python tools/quantised_room.py TEST.txt [--source FOLDER] [--scheme mxfp4] [--noise 26,22] [--tokens N]
                               [--train TRAIN.txt] [--packs ORIGINAL.rac VERSION.rac]

White noise, so many decibels below each row of every linear weight, three seeds: the KL that it costs the original and
the version, each from itself. With `--packs`, archives of the original and of the version (tools/quantised_models.py):
the SNR of their weights, and what the error of each pack costs each of the two models. For MXFP4 also the least rate of
its weights for an error (Blahut and Arimoto), where the scales of its blocks are known, beside that of a Gaussian; and
with `--train`, a text, by how many decibels feeding errors back to columns that are coded later lowers the error that a
layer sees, and what is left of the difference where that is done, since the fed errors take weights off their grid.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

import quantised_models
import rac
from rac.calibrate.layers import calibrate
from rac.encode.sources import open_source
from rac.frameworks import to_framework

Weights = dict[str, torch.Tensor]
WINDOW, SEEDS = 512, 3


def weights(folder: Path) -> Weights:
    """All tensors of a folder, codes as what they stand for."""
    found = open_source(folder, dequantise=True).tensors
    return {t.name: to_framework(t.read(0, t.nbytes), t.dtype, t.shape, "pt").float() for t in found}


class Model:
    """A model whose weights are exchanged, and texts."""

    def __init__(self, source: Path, text: str, tokens: int) -> None:
        load: Any = transformers.AutoModelForCausalLM.from_pretrained
        self._model = load(source, dtype=torch.float32).eval()
        count = tokens // WINDOW
        found = transformers.AutoTokenizer.from_pretrained(source)(text[: 8 * tokens]).input_ids
        self._ids = torch.tensor(found[: count * WINDOW]).reshape(count, WINDOW)
        named = self._model.named_parameters()
        self.linear = [n for n, p in named if p.dim() == 2 and "embed" not in n and "lm_head" not in n]

    def run(self, of: Callable[[str], torch.Tensor]) -> list[torch.Tensor]:
        """Logarithms of probabilities, with these weights of linear layers."""
        with torch.no_grad():
            for name in self.linear:
                self._model.get_parameter(name).copy_(of(name))
            return [torch.log_softmax(self._model(row[None]).logits[0], -1) for row in self._ids]


def divergence(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """Mean KL of the second from the first, nats."""
    return float(torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(a, b, strict=True)]).mean())


def noise(model: Model, w: Weights, decibels: float) -> list[float]:
    """KL for each seed."""
    base, out = model.run(w.__getitem__), []
    for seed in range(SEEDS):

        def noisy(name: str, g: Any = torch.Generator().manual_seed(seed)) -> torch.Tensor:  # noqa: B008
            rms = w[name].pow(2).mean(1, keepdim=True).sqrt()
            return w[name] + 10 ** (-decibels / 20) * rms * torch.randn(w[name].shape, generator=g)

        out.append(divergence(base, model.run(noisy)))
    return out


def exchanged(model: Model, both: list[Weights], packs: list[str]) -> None:
    """Print the SNR of the packs' weights, and what the error of each costs each model."""
    errors = []
    for w, pack in zip(both, packs, strict=True):
        got = rac.load_file(pack, framework="pt")
        errors.append({n: got[n].float() - w[n] for n in model.linear})
        energy, error = (sum(float(t[n].pow(2).sum()) for n in model.linear) for t in (w, errors[-1]))
        print(f"{pack}: SNR of weights {10 * np.log10(energy / error):.2f} dB, energy {energy:.0f}", flush=True)
    for of, w in zip(("original", "version"), both, strict=True):
        base = model.run(w.__getitem__)
        kls = [divergence(base, model.run({n: w[n] + e[n] for n in e}.__getitem__)) for e in errors]
        print(f"{of}: KL {kls[0]:.4f} with the error of the original's pack, {kls[1]:.4f} with the other's", flush=True)


def kinds(folder: Path, values: Any, every: int = 15) -> dict[float, Any]:
    """Counts of each value in MXFP4 blocks, by size (log2, beside the rms of their rows), of each fifteenth matrix."""
    half = quantised_models.FP4.numpy().astype(float)
    found: dict[float, Any] = {}
    stored = {t.name: t for t in open_source(folder).tensors}
    for name in [n for n in stored if n.endswith("weight_packed")][::every]:
        t, s = stored[name], stored[name.replace("_packed", "_scale")]
        raw = t.read(0, t.nbytes).reshape(t.shape)
        x = np.concatenate([half, -half])[np.stack([raw & 15, raw >> 4], 2).reshape(len(raw), -1)]
        scale = np.repeat(np.exp2(s.read(0, s.nbytes).reshape(s.shape).astype(float) - 127), 32, 1)
        rms = np.sqrt(((x * scale) ** 2).mean(1, keepdims=True))
        kind = np.round(4 * np.log2(scale / rms)) / 4  # scales of blocks beside the rms of their row
        for k in np.unique(kind):
            found[k] = found.get(k, 0) + (x[kind == k][:, None] == values).sum(0)
    return found


def rates(folder: Path, gain: float) -> None:
    """Print rate and SNR of MXFP4 weights for a few slopes; `gain` is that of feedback in decibels, 0 for none."""
    half = quantised_models.FP4.numpy().astype(float)
    values = np.concatenate([half, -half[1:]])
    found = kinds(folder, values)
    total = sum(c.sum() for c in found.values())
    energy = sum((c * values**2).sum() * 4.0**k for k, c in found.items()) / total
    rest = [(c[c > 0], c.sum()) for c in found.values()]
    entropy = sum(-(c * np.log2(c / n)).sum() for c, n in rest) / total
    print(f"codes, scales of blocks known: {entropy:.3f} bits")
    for slope in (10, 18, 26, 32, 40):

        def point(fed: float, slope: float = slope) -> tuple[float, float]:
            rate = error = 0.0
            for k, c in found.items():
                bits, d = least(*smeared(c, values, fed / 4.0**k), slope * 4.0**k)
                rate, error = rate + c.sum() / total * bits, error + c.sum() / total * d * 4.0**k
            return rate, error

        rate, error = point(0)
        print(f"rate {rate:.3f} bits: SNR {10 * np.log10(energy / error):.2f} dB", end="")
        print(f", of a Gaussian {20 * np.log10(2) * rate:.2f} dB", flush=True)
        fed = 10 ** (gain / 10) - 1  # the variance of what is fed back, of that of the error
        if not gain:
            continue
        for _ in range(4):
            rate, error = point(error * fed)
        print(f"  errors fed back: rate {rate:.3f} bits: SNR {10 * np.log10(energy / error):.2f} dB", end="")
        print(f", of a Gaussian {10 * np.log10(4**rate - fed):.2f} dB", flush=True)


def feedback(source: Path, text: str, tokens: int, damp: float = 0.03) -> float:
    """Ratio of the diagonal of the layers' second moments to their eigenvalues (geometric means), in decibels; a mean.

    That is the gain of feedback at high rate (Chee et al., QuIP, section 3).
    """
    found = []
    for layer in list(calibrate(source, text, tokens=tokens).values())[::9]:
        h = layer.second.astype(np.float64)
        h += damp * np.diag(h).mean() * np.eye(len(h))
        found.append(10 / np.log(10) * (np.log(np.diag(h)).mean() - np.linalg.slogdet(h)[1] / len(h)))
    print(
        f"feedback: {np.mean(found):.2f} dB, mean of {len(found)} matrices ({min(found):.2f} to {max(found):.2f})",
        flush=True,
    )
    return float(np.mean(found))


def smeared(counts: Any, values: Any, variance: float) -> tuple[Any, Any]:
    """(probabilities, values) of a weight with these counts to which a Gaussian number of this variance is added."""
    if not variance:
        return counts / counts.sum(), values
    most = 7 + np.ceil(5 * np.sqrt(variance))
    fine = np.arange(-most, most + 0.01, 0.125)
    near = np.exp(-((fine[:, None] - values) ** 2) / (2 * variance))
    p = (near / near.sum(0)) @ (counts / counts.sum())
    return p, fine


def least(p: Any, x: Any, slope: float, rounds: int = 150) -> tuple[float, float]:
    """(rate in bits, squared error) of a source of values `x` where the rate-distortion curve has this slope."""
    p, x = p[p > 0], x[p > 0]
    y = np.arange(min(-7, x.min()), max(7, x.max()) + 0.01, 0.125)
    d = (x[:, None] - y[None]) ** 2
    a = np.exp(-slope * (d - d.min(1, keepdims=True)))
    q = np.full(len(y), 1 / len(y))
    for _ in range(rounds):
        q = q * ((p / np.maximum(a @ q, 1e-300)) @ a)
    joint = a * q / np.maximum(a @ q, 1e-300)[:, None]
    rate = (p[:, None] * joint * np.log2(np.maximum(joint, 1e-300) / np.maximum(q, 1e-300))).sum()
    return float(rate), float((p[:, None] * joint * d).sum())


def main() -> int:
    """Print all of it."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("test")
    p.add_argument("--source", default="demo/smollm2-hf")
    p.add_argument("--scheme", default="mxfp4")
    p.add_argument("--noise", default="26,22")
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--packs", nargs=2)
    p.add_argument("--train")
    p.add_argument("--train-tokens", type=int, default=4096)
    args = p.parse_args()
    source = Path(args.source)
    with tempfile.TemporaryDirectory(prefix="rac-quantised-") as scratch:
        folder = quantised_models.make(args.scheme, source, Path(scratch, "version"))
        if args.scheme == "mxfp4":
            train = args.train and Path(args.train).read_text("utf-8")
            rates(folder, feedback(source, train, args.train_tokens) if train else 0)
        both = [weights(source), weights(folder)]
        model = Model(source, Path(args.test).read_text("utf-8"), args.tokens)
        if args.packs:
            exchanged(model, both, args.packs)
        for decibels in map(float, args.noise.split(",")):
            one, other = (noise(model, w, decibels) for w in both)
            print(f"noise of {decibels:g} dB: KL {np.mean(one):.4f} of the original, {np.mean(other):.4f}", end="")
            print(f" of the version: {np.mean(np.divide(other, one)):.3f} times", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
