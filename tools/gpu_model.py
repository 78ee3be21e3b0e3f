"""GB/s of the GPU decoder on paper: issue, pipes, look-ups, latency and memory of each kernel. Modelled, not measured.

    python tools/gpu_model.py            # every assumption, the check, and the results
    python tools/gpu_model.py --lines 2  # another guess for how many cache lines an L1 serves per cycle

Time of a kernel per weight is the largest of five; the kernels of a batch follow each other, so that times add up:

    issue    instructions per weight / (4 schedulers x 32) cycles of an SM
    pipes    integer instructions per weight / 64, or population counts and the like / 16, whichever is more
    look-up  wavefronts per warp of weights: k cache lines take k / lines cycles; shared memory takes as many as the
             busiest bank has different words (of 64 bits: each half of the warp on its own)
    latency  cycles of the dependent chain of a row / (weights of a row x warps of an SM)
    memory   bytes per weight / (bandwidth / clock) of all SMs

"At worst" is what comes out where nothing of a kernel overlaps: the five are added up.
"""

from __future__ import annotations

import argparse
import functools
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

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
    shared_kb: int
    l1: int = 33
    shared: int = 29
    dram: int = 600
    alu: float = 4.5
    vote: int = 12


DEVICES = (
    Device("A100 40 GB", "sm_80", 108, 1.41, 64, 32, 1555, 164),
    Device("H100 SXM", "sm_90", 132, 1.755, 64, 32, 3350, 228, dram=700),
    Device("RTX 4090", "sm_80", 128, 2.52, 48, 24, 1008, 100, dram=700),
)
"""Clocks in GHz are those that boards hold under load; sm_89 is taken for sm_80."""


@dataclass(frozen=True)
class Kind:
    """What a file holds.

    Weights per symbol, bits per symbol and per weight as stored, lanes and words of a tile, words of a tile of a
    matrix of 4096 x 4096, share of weights that escape, entries of a table, classes of columns.
    """

    name: str
    per: int
    symbol_bits: float
    stored: float
    lanes: int
    tile: int
    layer: int
    escapes: float
    entries: int
    classes: int = 3


KINDS = (
    Kind("lossless BF16", 2, 5.2, 1.325, 32, 1792 * 512, 512 * 512, 0.0007, 256),
    Kind("3 bits", 1, 2.9, 0.38, 32, 1792 * 256, 1024 * 512, 0.00015, 64),
)
"""As `rac pack` makes of matrices of 14336 x 4096, most of an 8B model; stored bytes per weight. The share of weights
that escape is that of SmolLM2."""
CHAIN_ALU = 12
"""Dependent arithmetic of a row of lanes, between its three loads and its vote (read off the SASS)."""
ROUND = 8
"""Rows that the lanes decode before they look for escapes."""
NOTE = {1: 85 + 8 * 25, 2: 85 + 8 * 35}
"""Instructions of a warp for a round in which a symbol escapes, by weights of a symbol: once, and per row (read off the
SASS)."""
RESERVED = 1024
"""Bytes of shared memory that the driver takes per program."""


def lines(total: int, lanes: int = 32) -> float:
    """Expected number of different cache lines that so many lanes touch at random in a table of `total` lines."""
    return total * (1 - (1 - 1 / total) ** lanes)


def wavefronts(words: np.ndarray, banks: int, together: int) -> float:
    """Mean number of cycles that shared memory takes for rows of `words` (n, 32).

    That is the largest number of different words of a bank, for each `together` lanes.
    """
    total = 0
    for part in np.split(words, 32 // together, axis=1):
        load = np.zeros((len(part), banks), int)
        ordered = np.sort(part, axis=1)
        new = np.diff(ordered, axis=1, prepend=-1) != 0
        np.add.at(load, (np.nonzero(new)[0], ordered[new] % banks), 1)
        total += load.max(axis=1)
    return float(np.mean(total))


@functools.cache
def conflicts(per: int, bits: float) -> tuple[float, float]:
    """Wavefronts of (the look-up of a slot, that of an entry): 4000 random rows of symbols of a normal law."""
    rng = np.random.default_rng(0)
    slot = wavefronts(rng.integers(0, 4096, (4000, 32)) // 4, 32, 32)
    deviation = 2 ** (bits / per) / np.sqrt(2 * np.pi * np.e)
    a, b = (np.rint(rng.normal(8 if per == 2 else 32, deviation, (4000, 32))).astype(int) for _ in range(2))
    code = a if per == 1 else a.clip(0, 15) ^ b.clip(0, 15) | b.clip(0, 15) << 4
    return slot, wavefronts(code, 16, 16)


BOUNDS = ("issue", "pipes", "lookup", "latency", "memory")


@dataclass(frozen=True)
class Cost:
    """Cycles of an SM per weight."""

    kernel: str
    issue: float
    pipes: float
    lookup: float
    latency: float
    memory: float

    @property
    def worst(self) -> tuple[str, float]:
        """What bounds it."""
        of = {k: getattr(self, k) for k in BOUNDS}
        name = max(of, key=lambda k: of[k])
        return name, of[name]

    @property
    def sum(self) -> float:
        """All bounds together."""
        return float(sum(getattr(self, k) for k in BOUNDS))


Counts = dict[str, dict[str, float]]


def work(sass: Counts, arch: str, name: str, more: float = 0.0) -> tuple[float, float]:
    """(Issue, pipes) of a kernel, and of so many more instructions per weight, half of them integer."""
    whole, alu, slow = (sass[arch + suffix][name] for suffix in ("", " alu", " slow"))
    return (whole + more) / 128, max((alu + more / 2) / 64, slow / 16)


def noting(k: Kind) -> float:
    """Instructions per weight for the rounds in which a symbol escapes."""
    return NOTE[k.per] * (1 - (1 - k.escapes) ** (ROUND * 32 * k.per)) / (ROUND * k.per)


def costs(d: Device, k: Kind, weights: float, per_cycle: float, sass: Counts) -> list[Cost]:
    """Each kernel for so many weights in one batch."""
    byte = d.sms * d.clock / d.bandwidth  # cycles of an SM per byte, all SMs reading
    tiles = max(1.0, weights / k.tile)
    group = 32 // k.lanes if k.lanes <= 32 else 1
    held = group * (4096 + 8 * k.entries) + RESERVED if k.lanes >= 16 else 0
    fit = d.shared_kb * 1024 // held if held else d.programs
    warps = min(d.programs, d.warps, fit, max(1.0, tiles / group / d.sms))
    busy = min(1.0, tiles / group / d.sms)  # SMs that have a warp at all
    name = f"lanes, {'pairs' if k.per == 2 else 'single'}, {16 if 16 <= k.lanes < 32 else 32}"
    name = name if name in sass[d.arch] else "lanes, single, 32"
    row = 32 * k.per
    new_lines = 32 * k.symbol_bits / 1024
    note = noting(k)
    issue, pipes = work(sass, d.arch, name, note)
    if held:
        look = sum(conflicts(k.per, k.symbol_bits))
        wait = 2 * d.shared
    else:  # the tables are in L1, one per tile of a warp
        look = group * (lines(32, 32 // group) + lines(k.entries // 16, 32 // group)) / per_cycle
        wait = 2 * d.l1
    chain = wait + d.l1 + CHAIN_ALU * d.alu + d.vote + new_lines * d.dram
    found = [
        Cost(
            "lanes",
            issue / busy,
            pipes / busy,
            (look + (group + k.per) / per_cycle) / row / busy,
            chain / row / warps / busy,
            byte * (k.symbol_bits / 8 / k.per + 1),
        )
    ]
    # neighbours of one class are neighbours in memory: a warp reads about one line per class
    if k.per == 2:
        issue, pipes = work(sass, d.arch, "place BF16")
        found.append(
            Cost(
                "place",
                issue,
                pipes,
                (k.classes / 2 + 2 * k.classes + 1 + 1) / per_cycle / 32,
                0,
                byte * (1 + 1 + 2),
            )
        )
    else:
        issue, pipes = work(sass, d.arch, "trellis")
        # of two neighbours and four rows: places and scales, 128 bits wide and so four wavefronts or more, and stores
        rows = (2 * max(4, k.classes) + 4 + 4) / per_cycle / 8
        codes = k.classes / per_cycle
        warps = min(d.programs, d.shared_kb * 1024 // (2048 + RESERVED), max(1.0, weights / (1 << 10) / 64 / d.sms))
        under = (d.l1 + d.dram / 2 + d.shared + 30 * d.alu) / (4 * 64)  # four rows of 64 columns are under way at once
        found.append(
            Cost(
                "trellis",
                issue,
                pipes,
                (rows + codes + conflicts(1, k.symbol_bits)[1]) / 32,
                under / warps,
                byte * 3,
            )
        )
    return found


def speed(d: Device, k: Kind, weights: float, per_cycle: float, sass: Counts, worst: bool = False) -> float:
    """GB/s of dense BF16."""
    cycles = sum(c.sum if worst else c.worst[1] for c in costs(d, k, weights, per_cycle, sass))
    return 2 * d.sms * d.clock / cycles


def cases(k: Kind) -> list[tuple[str, float, Kind]]:
    """What is decoded, weights in a batch, and what the file holds."""
    layer = replace(k, tile=k.layer)
    return [("8B, all at once", 8e9, k), ("8B, ring of 256 MB", 45e6, k), ("4096 x 4096", 4096**2, layer)]


def check(per_cycle: float, sass: Counts) -> None:
    """The published microbenchmark: exponents in Huffman code, one dependent look-up per symbol."""
    print("\n## Against published figures\n")
    print(
        "Huffman decoding of BF16 exponents, third party (design notes, field.md 3(b)): dependent look-ups in tables in"
    )
    print("shared memory, each symbol decoded twice. The model of the lanes, one symbol each, all of a big batch:\n")
    print("| device | published Gsym/s | model | model / published | at worst |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for d, published in ((DEVICES[0], 145), (DEVICES[2], 320)):
        cost = costs(d, KINDS[1], 8e9, per_cycle, sass)[0]
        model, worst = d.sms * d.clock / cost.worst[1], d.sms * d.clock / cost.sum
        print(f"| {d.name} | {published} | {model:.0f} | {model / published:.1f} | {worst:.0f} |")
    d = DEVICES[0]
    v, low = (speed(d, KINDS[0], 8e9, per_cycle, sass, worst) for worst in (False, True))
    print(f"\ndietgpu on an A100, published: 250 to 600 GB/s, whole floats. The model, lossless: {low:.0f} to {v:.0f}.")


def look_ups(d: Device, k: Kind, sass: Counts) -> None:
    """Other ways from a slot to its symbol: estimates, but for the one that is there."""
    print(f"\n## Look-ups, {d.name}, {k.name}\n")
    print("Instructions more than the kernel has, integer ones among them (estimated by hand); wavefronts of a warp;")
    print("cycles of dependent loads and shuffles; bytes of shared memory; the bounds of the lanes in a big batch.\n")
    rng = np.random.default_rng(0)
    slot = rng.integers(0, 4096, (4000, 32))
    two = sum(conflicts(k.per, k.symbol_bits))
    bucket = wavefronts(slot >> 6, 16, 16)
    again = 1 - (1 - 2.5 / 64) ** 32  # of 64 buckets, 2.5 have more than two symbols (SmolLM2 at 3 bits)
    shuffle = d.shared - 6
    kernel = 4096 + 8 * k.entries
    rows: list[tuple[str, float, float, float, float, int]] = [
        ("4096 entries of 4 bytes in L1", 2, 2, lines(128), d.l1, 0),
        ("the same in shared memory", 0, 0, wavefronts(slot, 32, 32), d.shared, 16384),
        ("slot to code to entry in shared memory (the kernel)", 0, 0, two, 2 * d.shared, kernel),
        ("search among 32 symbols, 5 + 2 shuffles, no table", 13, 8, 7, 7 * shuffle + 10 * d.alu, 0),
        (
            "64 buckets of 8 bytes; else the kernel's",
            8,
            7,
            bucket + again * 2,
            (1 + 2 * again) * d.shared,
            kernel + 512,
        ),
    ]
    print("| look-up | instructions | integer | wavefronts | dependent | shared | issue | pipes | look-up | latency |")
    print("| --- |" + " ---: |" * 9)
    for name, more, alu, waves, wait, held in rows:
        whole, ours = (sass[d.arch + suffix]["lanes, single, 32"] for suffix in ("", " alu"))
        warps = min(d.programs, d.warps, d.shared_kb * 1024 // (held + RESERVED))
        chain = wait + d.l1 + CHAIN_ALU * d.alu + d.vote + k.symbol_bits / 32 * d.dram
        bounds = (whole + more) / 128, (ours + alu) / 64, (waves + 2) / 32, chain / 32 / warps
        cells = " | ".join(f"{b:.2f}" for b in bounds)
        print(f"| {name} | {more:+.0f} | {alu:+.0f} | {waves:.1f} | {wait:.0f} | {held} | {cells} |")


def lanes_of(d: Device, k: Kind, weights: float, per_cycle: float, sass: Counts) -> tuple[int, float, float]:
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
    print(f"- cache lines per cycle and L1: {per_cycle}; dependent arithmetic of a row: {CHAIN_ALU}")
    print(f"- instructions of a round of {ROUND} rows with an escape, by weights of a symbol: {NOTE}")
    for k in KINDS:
        slot, entry = conflicts(k.per, k.symbol_bits)
        print(f"- wavefronts of the two look-ups in shared memory, {k.name}: {slot:.2f} and {entry:.2f} (simulated)")
        note = noting(k)
        name = "lanes, pairs, 32" if k.per == 2 else "lanes, single, 32"
        rest = "place BF16" if k.per == 2 else "trellis"
        parts = [table["sm_90"][name], note, table["sm_90"][rest]]
        print(
            f"- instructions per weight on sm_90, {k.name}: lanes {parts[0]:.1f}, noting escapes {note:.1f}, "
            f"{rest} {parts[2]:.1f}: {sum(parts):.1f} in all"
        )
    print(f"- instructions per weight: {RATCHET.name}, of the inner loops; prologues and ragged ends are left out")
    print("- no clock throttling, no PCIe: the stored bytes are on the device\n\n## Whole model and one layer\n")
    print("| device | what | weights in a batch | GB/s dense | at worst | cycles per weight and what bounds them |")
    print("| --- | --- | ---: | ---: | ---: | --- |")
    for d in DEVICES:
        for kind in KINDS:
            for what, weights, k in cases(kind):
                of = costs(d, k, weights, per_cycle, table)
                why = ", ".join(f"{c.kernel} {c.worst[1]:.2f} ({c.worst[0]})" for c in of)
                v = speed(d, k, weights, per_cycle, table)
                low = speed(d, k, weights, per_cycle, table, True)
                print(f"| {d.name} | {k.name}, {what} | {weights:.3g} | {v:.0f} | {low:.0f} | {why} |")
    check(per_cycle, table)
    look_ups(DEVICES[1], KINDS[1], table)
    print("\n## Lanes of a tile\n\nThe fewest that reach nine tenths of the best speed, and what they cost in bytes:\n")
    print("| device | what | lanes | GB/s | bytes |")
    print("| --- | --- | ---: | ---: | ---: |")
    for d in DEVICES:
        for kind in KINDS:
            for what, weights, k in cases(kind):
                n, v, extra = lanes_of(d, k, weights, per_cycle, table)
                print(f"| {d.name} | {k.name}, {what} | {n} | {v:.0f} | {extra:+.2f} % |")
    print("\n## Bar: H100, whole 8B model, at least 400 GB/s, better 800\n")
    for k in KINDS:
        v, low = (speed(DEVICES[1], k, 8e9, per_cycle, table, worst) for worst in (False, True))
        print(f"- {k.name}: {v:.0f} GB/s, {'met' if v >= 400 else 'MISSED'}; {low:.0f} where nothing overlaps")


if __name__ == "__main__":
    main()
