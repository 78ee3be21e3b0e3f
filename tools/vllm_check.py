"""The loader for vLLM with vLLM's own parallel layers on the CPU: equal weights, and the bytes that each rank reads.

    python tools/vllm_check.py model.rac --ranks 2        # of a Llama-like model; where vLLM is installed

No engine is started and no GPU is needed: the layers of one block, and the embedding, are made for each of some gloo
processes and filled through `load_format="rac"`.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
from typing import Any

LAYER = "model.layers.0."
NAMES = {
    "q": LAYER + "self_attn.o_proj.weight",
    "down": LAYER + "mlp.down_proj.weight",
    "gate": LAYER + "mlp.gate_proj.weight",
    "up": LAYER + "mlp.up_proj.weight",
    "embed": "model.embed_tokens.weight",
}


def layers(shapes: dict[str, tuple[int, ...]]) -> Any:
    """Two layers that are cut by columns, one cut by rows of two merged matrices, an embedding cut by rows."""
    import torch
    from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    class Block(torch.nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.o = RowParallelLinear(*shapes["q"][::-1], bias=False)
            self.down = RowParallelLinear(*shapes["down"][::-1], bias=False)
            self.both = MergedColumnParallelLinear(shapes["gate"][1], [shapes["gate"][0]] * 2, bias=False)
            self.embed = VocabParallelEmbedding(*shapes["embed"])

        def load_weights(self, weights: Any) -> set[str]:
            places: dict[str, tuple[str, tuple[int, ...]]] = {
                NAMES["q"]: ("o", ()),
                NAMES["down"]: ("down", ()),
                NAMES["gate"]: ("both", (0,)),
                NAMES["up"]: ("both", (1,)),
                NAMES["embed"]: ("embed", ()),
            }
            done = set()
            for name, tensor in weights:
                if name in places:
                    module, part = places[name]
                    weight = getattr(self, module).weight
                    weight.weight_loader(weight, tensor, *part)
                    done.add(module + ".weight")
            return done

    return Block()


def rank(number: int, ranks: int, port: int, path: str) -> None:
    """One process."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(number))
    import torch
    from vllm import platforms
    from vllm.config import DeviceConfig, VllmConfig, set_current_vllm_config
    from vllm.config.load import LoadConfig
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.platforms.cpu import CpuPlatform

    import rac
    from rac.container.access import FileAccess
    from rac.runtime import vllm_plugin

    platforms._current_platform = CpuPlatform()  # a build for CUDA finds no device here
    vllm_plugin.register()
    with set_current_vllm_config(VllmConfig(device_config=DeviceConfig(device="cpu"))):
        init_distributed_environment(ranks, number, "env://", number, "gloo")
        initialize_model_parallel(ranks)
        with rac.open(path, framework="pt") as f:
            whole = {key: f.get_tensor(name) for key, name in NAMES.items()}
            sizes = {e.name: e.size for e in f.archives[0].index.entries}
        torch.set_default_dtype(whole["q"].dtype)
        block = layers({key: tuple(w.shape) for key, w in whole.items()})
        count, read = [0], FileAccess.read_into

        def counted(self: FileAccess, at: int, out: memoryview) -> None:
            count[0] += len(out)
            read(self, at, out)

        FileAccess.read_into = counted  # type: ignore[method-assign]
        config: Any = argparse.Namespace(model=path)
        loader = get_model_loader(LoadConfig(load_format="rac"))
        loader.download_model(config)
        loader.load_weights(block, config)
        by_row = [w.chunk(ranks)[number] for w in (whole["gate"], whole["up"], whole["embed"])]
        same = (
            torch.equal(block.o.weight, whole["q"].chunk(ranks, 1)[number])
            and torch.equal(block.down.weight, whole["down"].chunk(ranks, 1)[number])
            and torch.equal(block.both.weight, torch.cat(by_row[:2]))
            and torch.equal(block.embed.weight, by_row[2])
        )
        total = sum(sizes[name] for name in NAMES.values())
        print(f"rank {number}: {'equal' if same else 'DIFFERENT'}, {count[0]:,} bytes read of {total:,}", flush=True)
        if not same:
            raise SystemExit(1)


def main() -> int:
    """Start the processes."""
    import torch.multiprocessing as mp

    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("file")
    p.add_argument("--ranks", type=int, default=2)
    args = p.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(rank, (args.ranks, port, os.path.abspath(args.file)), args.ranks)
    return 0


if __name__ == "__main__":
    sys.exit(main())
