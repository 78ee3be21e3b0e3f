"""GB/s of the GPU decoder on paper: issue, table look-ups, latency and memory of each kernel. Modelled, not measured.

    python tools/gpu_model.py            # every assumption, the check, and the results
    python tools/gpu_model.py --lines 2  # another guess for how many cache lines an L1 serves per cycle

Time of a kernel per weight is the largest of four; the kernels of a batch follow each other, so that times add up:

    issue    instructions per weight / (schedulers x 32) cycles of an SM
    look-up  L1 wavefronts per weight: a warp that reads k cache lines takes k / lines per cycle
    latency  cycles of the dependent chain of a row / (weights of a row x warps of an SM)
    memory   bytes per weight / (bandwidth / clock) of all SMs
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

RATCHET = Path(__file__).parents[1] / "tests" / "unit" / "decode" / "sass.json"


@dataclass(frozen=True)
class Device:
    """A GPU: data sheets for the first line; published microbenchmarks, rounded, for the latencies (cycles)."""

    name: str
    arch: str
    sms: int
    clock: float
    warps: int
    programs: int
    bandwidth: float
    l1: int = 33
    dram: int = 600
    alu: float = 4.5
    vote: int = 12


DEVICES = (
    Device("A100 40 GB", "sm_80", 108, 1.41, 64, 32, 1555),
    Device("H100 SXM", "sm_90", 132, 1.755, 64, 32, 3350, dram=700),
    Device("RTX 4090", "sm_80", 128, 2.52, 48, 24, 1008, dram=700),
)
"""Clocks in GHz are those that boards hold under load; sm_89 is taken for sm_80."""


@dataclass(frozen=True)
class Kind:
    """What a file holds: weights per symbol, bits per symbol and per weight as stored, lanes and words of a tile."""

    name: str
    per: int
    symbol_bits: float
    stored: float
    lanes: int
    tile: int
    classes: int = 3


KINDS = (
    Kind("lossless BF16", 2, 5.2, 1.325, 32, 1792 * 512),
    Kind("3 bits", 1, 2.9, 0.38, 32, 1 << 18),
)
"""As `rac pack` makes of matrices of 14336 x 4096, most of an 8B model; stored bytes per weight."""
LAYER = 512 * 512
"""Words of a tile of a matrix of 4096 x 4096, of either kind."""
ESCAPES = 0.0007
"""Share of the weights that escape, as in SmolLM2."""
ENTRIES = 3
"""Cache lines of the look-up of the trellis that the codes of a warp touch: 40 or so codes are frequent."""
CHAIN_ALU = 17
"""Dependent arithmetic of a row of lanes, between its two loads and its vote (read off the SASS)."""


def lines(total: int, lanes: int = 32) -> float:
    """Expected number of different cache lines that so many lanes touch at random in a table of `total` lines."""
    return total * (1 - (1 - 1 / total) ** lanes)


@dataclass(frozen=True)
class Cost:
    """Cycles of an SM per weight."""

    kernel: str
    issue: float
    lookup: float
    latency: float
    memory: float

    @property
    def worst(self) -> tuple[str, float]:
        """What bounds it."""
        of = {k: getattr(self, k) for k in ("issue", "lookup", "latency", "memory")}
        name = max(of, key=lambda k: of[k])
        return name, of[name]


def costs(d: Device, k: Kind, weights: float, per_cycle: float, sass: dict[str, float]) -> list[Cost]:
    """Each kernel for so many weights in one batch."""
    byte = d.sms * d.clock / d.bandwidth  # cycles of an SM per byte, all SMs reading
    tiles = max(1.0, weights / k.tile)
    group = 32 // k.lanes if k.lanes <= 32 else 1
    warps = min(d.programs, d.warps, max(1.0, tiles / group / d.sms))
    busy = min(1.0, tiles / group / d.sms)  # SMs that have a warp at all
    name = f"lanes, {'pairs' if k.per == 2 else 'single'}, {16 if k.lanes <= 16 else 32}"
    row = 32 * k.per
    new_lines = 32 * k.symbol_bits / 1024
    chain = 2 * d.l1 + CHAIN_ALU * d.alu + d.vote + new_lines * d.dram
    found = [
        Cost(
            "lanes",
            sass[name if name in sass else "lanes, single, 32"] / 128 / busy,
            (group * lines(128, 32 // group) + group + k.per) / per_cycle / row / busy,
            chain / row / warps / busy,
            byte * (k.symbol_bits / 8 / k.per + 1),
        )
    ]
    # a round of 512 symbols costs all of the loop where one of them escapes, a fifth of it elsewhere
    share = 1 - (1 - ESCAPES) ** 512
    scan = sass["escapes"] * (0.2 + 0.8 * share)
    found.append(Cost("escapes", scan / 128, 4 / per_cycle / 512, d.dram / 512 / warps / busy, byte))
    # neighbours of one class are neighbours in memory: a warp reads about one line per class
    rows = k.classes / 2
    if k.per == 2:
        found.append(
            Cost(
                "place",
                sass["place BF16"] / 128,
                (rows + 2 * k.classes + 1 + 1) / per_cycle / 32,
                0,
                byte * (1 + 1 + 2),
            )
        )
    else:
        warps = min(d.programs, max(1.0, weights / (1 << 10) / 64 / d.sms))
        wait = (2 * d.l1 + d.dram / 2 + 30 * d.alu) / (4 * 64)  # four rows of 64 columns are under way at once
        found.append(
            Cost(
                "trellis",
                sass["trellis"] / 128,
                (rows + k.classes + ENTRIES + 1) / per_cycle / 32,
                wait / warps,
                byte * 3,
            )
        )
    return found


def speed(d: Device, k: Kind, weights: float, per_cycle: float, sass: dict[str, float]) -> float:
    """GB/s of dense BF16."""
    cycles = sum(c.worst[1] for c in costs(d, k, weights, per_cycle, sass))
    return 2 * d.sms * d.clock / cycles


def cases(k: Kind) -> list[tuple[str, float, Kind]]:
    """What is decoded, weights in a batch, and what the file holds."""
    layer = replace(k, tile=LAYER)
    return [("8B, all at once", 8e9, k), ("8B, ring of 256 MB", 45e6, k), ("4096 x 4096", 4096**2, layer)]


def check(per_cycle: float) -> None:
    """The published microbenchmark: exponents in Huffman code, one dependent look-up per symbol."""
    print("\n## Against published figures\n")
    print(
        "Huffman decoding of BF16 exponents, third party (design notes, field.md 3(b)): the same dependent look-up per"
    )
    print("symbol. The model's look-up bound alone, one symbol each, 32 lanes:\n")
    print("| device | published Gsym/s | model | error |")
    print("| --- | ---: | ---: | ---: |")
    for d, published in ((DEVICES[0], 145), (DEVICES[2], 320)):
        model = d.sms * d.clock * 32 * per_cycle / (lines(128) + 2)
        print(f"| {d.name} | {published} | {model:.0f} | {100 * (model / published - 1):+.0f} % |")
    print("\ndietgpu, published 250 to 600 GB/s on an A100 (both ways, whole floats): between the bounds below.")


def lanes_of(d: Device, k: Kind, weights: float, per_cycle: float, sass: dict[str, float]) -> tuple[int, float, float]:
    """(Lanes per tile, GB/s, extra bytes in percent) that are as fast as nine tenths of the best."""
    choices = []
    for lanes in (8, 16, 32, 64, 128, 256):
        # a tile of more than 32 lanes is modelled as one of 32 lanes that is so much smaller
        tile = k.tile // max(1, lanes // 32)
        v = speed(d, replace(k, lanes=min(lanes, 32), tile=tile), weights, per_cycle, sass)
        extra = 6 * (lanes - k.lanes) / (k.stored * k.tile)  # two bytes of directory, four of a state
        choices.append((lanes, v, 100 * extra))
    best = max(v for _, v, _ in choices)
    return next(c for c in choices if c[1] >= 0.9 * best)


def main() -> None:
    """Print everything."""
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--lines", type=float, default=1.0, help="cache lines that an L1 serves per cycle")
    per_cycle = args.parse_args().lines
    table = json.loads(RATCHET.read_text())
    print("# GPU decoding, modelled\n\n## Inputs\n")
    for d in DEVICES:
        print(f"- {d}")
    for k in KINDS:
        print(f"- {k}")
    print(
        f"- cache lines per cycle and L1: {per_cycle}; escapes: {ESCAPES}; dependent arithmetic of a row: {CHAIN_ALU}"
    )
    print(f"- instructions per weight: {RATCHET.name}, of the inner loops; prologues and ragged ends are left out")
    print("- a table of 4096 entries lies in 128 cache lines, all in L1: true while the warps of an SM use few tables")
    print("- no clock throttling, no PCIe: the stored bytes are on the device\n\n## Whole model and one layer\n")
    print("| device | what | weights in a batch | GB/s dense | cycles per weight and what bounds them |")
    print("| --- | --- | ---: | ---: | --- |")
    for d in DEVICES:
        for kind in KINDS:
            for what, weights, k in cases(kind):
                of = costs(d, k, weights, per_cycle, table[d.arch])
                parts = ", ".join(f"{c.kernel} {c.worst[1]:.2f} ({c.worst[0]})" for c in of)
                v = speed(d, k, weights, per_cycle, table[d.arch])
                print(f"| {d.name} | {k.name}, {what} | {weights:.3g} | {v:.0f} | {parts} |")
    check(per_cycle)
    print("\n## Lanes of a tile\n\nThe fewest that reach nine tenths of the best speed, and what they cost in bytes:\n")
    print("| device | what | lanes | GB/s | bytes |")
    print("| --- | --- | ---: | ---: | ---: |")
    for d in DEVICES:
        for kind in KINDS:
            for what, weights, k in cases(kind):
                n, v, extra = lanes_of(d, k, weights, per_cycle, table[d.arch])
                print(f"| {d.name} | {k.name}, {what} | {n} | {v:.0f} | {extra:+.2f} % |")
    print("\n## Bar: H100, whole 8B model, at least 400 GB/s, better 800\n")
    for k in KINDS:
        v = speed(DEVICES[1], k, 8e9, per_cycle, table["sm_90"])
        enough = next(n / 20 for n in range(1, 200) if speed(DEVICES[1], k, 8e9, n / 20, table["sm_90"]) >= 400)
        print(f"- {k.name}: {v:.0f} GB/s, {'met' if v >= 400 else 'MISSED'}; 400 needs {enough:.2f} lines per cycle")


if __name__ == "__main__":
    main()
