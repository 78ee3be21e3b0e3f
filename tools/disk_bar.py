"""The bars of running a mixture of experts that does not fit into memory: tokens per second, bytes read, memory.

    python tools/disk_bar.py FOLDER                       the model of 3 GB in BF16, packed at 3 bits and measured
    python tools/disk_bar.py FOLDER --scale 0.03          a small one, with --memory in proportion

FOLDER gets what is made: `moe-SCALE/`, a folder of transformers (64 experts in each of 8 layers, 16 of them used for a
token, random weights, a layer in each shard), and `moe-SCALE.rac` (3 bits, from the weights alone). What is there
already is used again; packing the large one takes many minutes. Every model runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads of torch that wait leave the processors to the decoder
EXPERTS, LAYERS, ACTIVE = 64, 8, 16
WIDTH, INNER, VOCABULARY = 1024, 960, 4096
"""Of scale 1."""


def config_of(scale: float) -> Any:
    """The configuration of a Qwen3-MoE with `scale` times the weights."""
    import transformers

    width = max(64, round(WIDTH * scale**0.5 / 64) * 64)
    inner = max(64, round(INNER * scale**0.5 / 32) * 32)
    given = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": inner,
        "moe_intermediate_size": inner,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": max(1, width // 64),
        "num_key_value_heads": max(1, width // 256),
        "head_dim": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": ACTIVE,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "architectures": ["Qwen3MoeForCausalLM"],
        "dtype": "bfloat16",
    }
    return transformers.AutoConfig.for_model("qwen3_moe", **given)


def names_of(config: Any) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Names and shapes of the tensors of each shard, as files of the Hub have them: each expert by itself."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    experts = config.num_experts
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, p in model.named_parameters():
        shard = name.split(".")[2] if ".layers." in name else "ends"
        mine, shape = shards.setdefault(shard, []), tuple(p.shape)
        if name.endswith("experts.gate_up_proj"):
            parts = [("gate_proj", (shape[1] // 2, shape[2])), ("up_proj", (shape[1] // 2, shape[2]))]
        elif name.endswith("experts.down_proj"):
            parts = [("down_proj", shape[1:])]
        else:
            mine.append((name, shape))
            continue
        stem = name.rpartition(".")[0]
        mine += [(f"{stem}.{e}.{part}.weight", s) for e in range(experts) for part, s in parts]
    return list(shards.values())


def make(folder: Path, scale: float) -> None:
    """Write the model, one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    config = config_of(scale)
    folder.mkdir(parents=True)
    shards, total = names_of(config), 0
    where: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        torch.manual_seed(i)
        file, tensors = f"model-{i:05d}-of-{len(shards):05d}.safetensors", {}
        for name, shape in names:
            if len(shape) == 1:
                tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
                continue
            rows = torch.exp(0.3 * torch.randn(shape[0], 1))  # rows of real layers differ about so much
            wide = 1.0 if "gate.weight" in name else 0.6  # a router that chooses sharply
            tensors[name] = (torch.randn(shape) * rows * (wide * shape[1] ** -0.5)).to(torch.bfloat16)
        total += sum(t.nbytes for t in tensors.values())
        where |= dict.fromkeys(tensors, file)
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    config.save_pretrained(folder)
    print(f"{folder}: {total:,} bytes", flush=True)


def prepare(root: Path, scale: float) -> Path:
    """The packed model; made where it is not there yet."""
    import rac

    folder, packed = root / f"moe-{scale:g}", root / f"moe-{scale:g}.rac"
    if not (folder / "config.json").exists():
        make(folder, scale)
    if not packed.exists():
        rac.pack(folder, packed, bits=3, calibrate="none", effort="fast", resume=True)
    print(f"{packed}: {packed.stat().st_size:,} bytes", flush=True)
    return packed


def main() -> int:
    """Print the rows; 1 where one misses its bar."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the model is made")
    parser.add_argument("--scale", type=float, default=1.0, help="weights, as a part of 1.5 thousand million")
    parser.add_argument("--make", action="store_true", help="make the model and pack it, and no more")
    args = parser.parse_args()
    prepare(args.folder, args.scale)
    return 0 if args.make else 1


if __name__ == "__main__":
    sys.exit(main())
