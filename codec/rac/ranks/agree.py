"""Whether machines run a model alike: what they add up has the same bits where they do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from rac.container.zstd import Digest
from rac.errors import OutputError
from rac.ranks.lease import parsed
from rac.ranks.store import Store


def agree(store: Store, key: str, more: Mapping[str, Any]) -> None:
    """OutputError where another rank would compute other sums: they depend on machine and threads of torch."""
    here = {"threads of torch (OMP_NUM_THREADS)": torch.get_num_threads()}
    here |= {"kernels of torch (instruction set)": torch.backends.cpu.get_cpu_capability()}
    here |= {"sums of torch (BLAS, processor)": sums(), **more}
    store.create(f"{key}-machine.json", json.dumps(here).encode())
    there = parsed(store.get(f"{key}-machine.json")) or here
    for name, value in here.items():
        if there.get(name) != value:
            what = f"calibrates with other {name}: {there.get(name)} there, {value} here"
            raise OutputError(what, file=store.where)


def sums() -> str:
    """What tells machines apart that add up in another order: a digest of products and of what attention makes of them.

    The name of a processor does not: a BLAS chooses its kernels by maker and model, often the same ones for many.
    """
    digest, of = Digest(), torch.Generator().manual_seed(0)
    for rows, n in ((7, 60), (65, 130), (256, 515)):
        x, w = torch.randn(rows, n, generator=of), torch.randn(n, n, generator=of)
        y = torch.nn.functional.silu(x @ w)
        z = torch.nn.functional.scaled_dot_product_attention(x[None, None], y[None, None], y[None, None])
        for found in (y, z, y.mT @ x, y.softmax(-1), y.pow(2).mean(-1)):
            digest.update(found.contiguous().numpy().tobytes())
    return digest.value().hex()[:12]
