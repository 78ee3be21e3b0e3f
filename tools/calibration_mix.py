"""Build the mix of texts that `--calibrate auto` uses: tools/mix/KIND/*.txt to codec/rac/calibrate/texts/mix.txt.zst.

Every piece is cut into passages of whole paragraphs. Those of the pieces of a kind are dealt out evenly, and so are
those of all kinds: any part of the mix holds all kinds in nearly the proportions of the whole. What each piece is, and
under which licence: codec/rac/calibrate/texts/README.md.

  python tools/calibration_mix.py            # write it
  python tools/calibration_mix.py --check    # say whether the file there is what these pieces make
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rac.calibrate.builtin import FILE, whole
from rac.container.output import write_whole
from rac.container.zstd import compress

PIECES = Path(__file__).parent / "mix"
PASSAGE = 2500  # bytes of a passage, at least: a few hundred tokens
GOLDEN = 0.6180339887498949  # multiples of it, modulo 1, spread the beginnings of the pieces


def passages(text: str) -> list[str]:
    """Whole paragraphs together until there are enough bytes; a short rest goes with the last."""
    out: list[str] = []
    held = ""

    def long(text: str) -> int:
        return len(text.encode())

    for paragraph in text.strip().split("\n\n"):
        held += paragraph.rstrip() + "\n\n"
        if long(held) >= PASSAGE:
            out.append(held)
            held = ""
    if held and out and long(held) < PASSAGE // 2:
        out[-1] += held
    elif held:
        out.append(held)
    return out


def dealt(hands: Sequence[Sequence[str]]) -> list[str]:
    """All passages of several lists, each list in its order and spread evenly over the whole."""
    every = []
    for i, hand in enumerate(hands, 1):
        start = i * GOLDEN % 1
        every += [((k + start) / len(hand), i, passage) for k, passage in enumerate(hand)]
    return [passage for *_, passage in sorted(every)]


def build() -> str:
    """The mix."""
    kinds = sorted(path for path in PIECES.iterdir() if path.is_dir())
    pieces = [[passages(path.read_text(encoding="utf-8")) for path in sorted(kind.glob("*.txt"))] for kind in kinds]
    return "".join(dealt([dealt(kind) for kind in pieces]))


def main() -> int:
    """Write the file, or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        same = whole() == build()
        print("the mix is what its pieces make" if same else "the mix is not what its pieces make: build it again")
        return not same
    text = build()
    frame = compress(text.encode(), level=19)
    target = Path(__file__).parent.parent / "codec" / "rac" / "calibrate" / "texts" / FILE
    write_whole(str(target), frame)
    print(f"{target.name}: {len(text):,} characters, {len(frame):,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
