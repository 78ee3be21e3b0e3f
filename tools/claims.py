"""Figures for docs/rotation-vs-alignment.md out of reports of `rac analyze --json`.

rac analyze demo/smollm2-hf --text valid.txt --json smollm2.json
python tools/claims.py smollm2.json minilm.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from typing import Any

import numpy as np

FIGURES = (
    "bits",
    "kurtosis",
    "kurtosis_rows",
    "outlier",
    "effective_rank",
    "stable_rank",
    "top10",
    "gini",
    "output_top10",
    "output_gini",
    "entropy",
    "entropy_columns",
    "estimate",
)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("reports", nargs="+")
    for path in p.parse_args().reports:
        with open(path, encoding="utf-8") as f:
            show(json.load(f))


def show(report: dict[str, Any]) -> None:
    """All figures of one model."""
    tensors = [t for t in report["tensors"] if t["bases"]]
    ids = [b["id"] for b in report["bases"]]
    print(f"# {report['about']['model']}: {len(tensors)} matrices, {report['about']['seconds']['all']} s")
    print("mean (median) over matrices; bits and estimate by weights")
    for key in ids:
        have = [t["bases"][key] for t in tensors if key in t["bases"]]
        cells = [f"{f} {report['model'][key][f]:.3f} ({statistics.median(b[f] for b in have):.3f})" for f in FIGURES]
        print(f"{key:18} {len(have)}  " + ", ".join(cells))
    print("kurtosis within 3 +- 0.3:", {k: (g["kurtosis"], g["kurtosis_rows"]) for k, g in report["gaussian"].items()})
    for key in ids:
        far = [t for t in tensors if key in t["bases"] and abs(t["bases"][key]["kurtosis_rows"] - 3) > 0.3]
        if len(far) <= 12:
            print(f"  rows not so in {key}:", [(t["name"], t["bases"][key]["kurtosis_rows"]) for t in far])
    print("rotation lowers, of all: ", end="")
    for f in ("kurtosis", "outlier", "bits", "effective_rank"):
        print(f, sum(t["bases"]["hadamard"][f] < t["bases"]["original"][f] for t in tensors), end="; ")
    change = [t["bases"]["hadamard"]["effective_rank"] / t["bases"]["original"]["effective_rank"] for t in tensors]
    print(f"\neffective rank after / before Hadamard: {min(change):.4f} to {max(change):.4f}", end="; ")
    plain = [c for c, t in zip(change, tensors, strict=True) if not t["gain"]]
    print(f"where no gain was fused: {min(plain):.6f} to {max(plain):.6f} of {len(plain)}")
    for c in report["counts"]:
        print(
            f"{c['aligned']} < {c['rotated']}: {c['fewer']} of {c['matrices']}, "
            f"layers {c['blocks_fewer']} of {c['blocks']}"
        )
        if 0 < len(c["not"]) <= 40:
            print("  not:", dict(sorted(c["not"].items(), key=lambda x: -x[1])[:8]))
    print("bits by role:")
    roles: dict[str, list[dict[str, Any]]] = {}
    for t in tensors:
        roles.setdefault(t["role"], []).append(t)
    for role, ones in roles.items():
        n = [math.prod(t["shape"]) for t in ones]
        shown = {
            key: round(sum(t["bases"][key]["bits"] * w for t, w in zip(ones, n, strict=True)) / sum(n), 3)
            for key in ids
            if all(key in t["bases"] for t in ones)
        }
        print(f"  {role:32} {len(ones)} {shown}")
    for a, b in (("entropy_columns", "bits"), ("gini", "bits"), ("top10", "bits"), ("output_gini", "bits")):
        for key in ("pca", "triangular"):
            pairs = [
                (t["bases"][key][a] - t["bases"]["original"][a], t["bases"][key][b] - t["bases"]["original"][b])
                for t in tensors
                if key in t["bases"]
            ]
            if len(pairs) > 2:
                one, two = np.argsort(np.argsort(np.array(pairs), 0), 0).T.tolist()
                r = statistics.correlation(one, two)
                print(f"rank correlation over matrices, {key} against original: change of {a}, of {b}: {r:.2f}")
    error = [abs(t["bases"][k]["estimate"] - t["bases"][k]["bits"]) for t in tensors for k in t["bases"]]
    print(f"estimate against bits: mean distance {statistics.mean(error):.3f}, largest {max(error):.3f}")


if __name__ == "__main__":
    main()
