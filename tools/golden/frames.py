"""Compressed blocks of Zstandard by hand (RFC 8878, section 3.1.1.3): whole ones, and ones that lenient decoders take.

Each bad frame breaks one of the checks that container.md section 4 lists; libzstd refuses all of them.
"""

from typing import Any

from golden.cases import FORMAT, case, only
from golden.good import archive, frame, good, tensor
from golden.model import Archive, Record

WINDOW = 0
"""The descriptor of a window of 1 KiB, for blocks of more bytes than they yield."""
CODED = "01101001"
"""Literals 0 and 1, each its own code of one bit."""


def stream(bits: str) -> bytes:
    """Bits in the order of writing, the end mark in front of them as the last bit that is not 0."""
    value = int("1" + bits, 2)
    return value.to_bytes(-(-value.bit_length() // 8), "little")


def literals(data: bytes) -> bytes:
    """Fewer than 32 literals as they are."""
    return bytes([len(data) << 3]) + data


def huffman(body: bytes, weights: bytes = b"\x80\x10", kind: int = 2) -> bytes:
    """Eight literals of one stream; `weights`: 0 and 1 have a bit each; kind 3: without weights."""
    data = (weights if kind == 2 else b"") + body
    return (kind | 8 << 4 | len(data) << 14).to_bytes(3, "little") + data


def sequence(body: bytes, codes: tuple[int, ...] = (4, 2, 1), modes: int = 0b01010100) -> bytes:
    """One sequence of one-symbol tables: literals, offset, match. `body`: the extra bits of the offset."""
    return bytes([1, modes, *codes]) + body


SIX = literals(b"abcdef")
HUFFMAN = huffman(stream(CODED)) + b"\0"
"""Eight bytes."""
SEQUENCE = SIX + sequence(stream("11"))
"""`abcd`, four bytes from 4 bytes before, `ef`."""


LITERALS, TEXT = bytes(int(b) for b in CODED), b"abcdabcdef"
Blocks = list[tuple[int, bytes]]


def made(name: str, data: bytes, blocks: Blocks, checksum: bytes = b"") -> Record:
    """A tensor of U8 whose frame is these blocks."""
    r = tensor(name, "U8", [len(data)], list(data), "zstd/1")
    r.units = [frame(data, blocks, WINDOW, checksum != b"") + checksum]
    return r


@good("zstd-blocks", "Compressed blocks by hand: coded literals, a table used again, a sequence, a window of 1 KiB.")
def _() -> Archive:
    return archive(
        made("literals", LITERALS, [(2, HUFFMAN)]),
        made("again", LITERALS * 2, [(2, HUFFMAN), (2, huffman(stream(CODED), kind=3) + b"\0")]),
        made("sequence", TEXT, [(2, SEQUENCE)]),
        made("mixed", TEXT + b"x" + LITERALS + TEXT, [(2, SEQUENCE), (0, b"x"), (2, HUFFMAN), (2, SEQUENCE)]),
    )


def bad(name: str, why: str, data: bytes, *blocks: tuple[int, bytes]) -> None:
    """Register one; `data` is what a decoder without the check yields, where it yields anything."""
    case(f"frame-{name}", FORMAT, "ZST-006", why, only(made("z", data, list(blocks))))


def coded(name: str, why: str, body: bytes, data: bytes = LITERALS, **more: Any) -> None:
    """One of coded literals alone."""
    bad(f"literals-{name}", why, data, (2, huffman(body, **more) + b"\0"))


def matched(name: str, why: str, body: bytes, data: bytes = TEXT) -> None:
    """One of six literals and a sequence."""
    bad(f"sequence-{name}", why, data, (2, SIX + body))


SHORT = b"\0\1\1\0\1\0\0\0"
coded("bits", "A bit of the literals is left.", stream(CODED + "1"))
coded("byte", "A byte of the literals is left.", b"\x55" + stream(CODED))
coded("short", "The literals end a bit too early.", stream(CODED[:-1]), SHORT)
coded("mark", "The stream of the literals has no end mark.", b"\1\0")
coded("weights", "Weights of literals that leave no power of two.", stream(CODED), weights=b"\x82\x31\x10")
coded("table", "Literals of the table before, and there is none.", stream(CODED), kind=3)
matched("bits", "A bit of the sequences is left.", sequence(stream("111")))
matched("byte", "A byte of the sequences is left.", sequence(b"\0" + stream("11")))
matched("short", "The sequences end a bit too early.", sequence(stream("1")), b"abcdbcdbef")
matched("mark", "The stream of the sequences has no end mark.", sequence(b"\3\0"))
matched("reserved", "The reserved bits of the modes are not 0.", sequence(stream("11"), modes=0x55))
matched("repeat", "Tables of the block before, and there is none.", sequence(b"\7", (), 0xFC))
matched("far", "A match begins in front of the content.", sequence(stream("111"), (4, 3, 1)), b"abcd\0\0\0\0ef")
matched("code", "A literal length code of 36.", sequence(stream("11"), (36, 2, 1)))
matched("table", "A table whose probabilities do not sum to its size.", sequence(b"\7", (255, 255, 2, 1), 0x94))
bad("sequence-none", "A byte behind a block without sequences.", b"abcdef", (2, SIX + b"\0\0"))
ZERO = sequence(stream("1"), (0, 1, 1))
bad("sequence-zero", "A match of distance 0.", b"x" * 5 + b"abcdef", (0, b"x"), (2, SIX + ZERO))
case(
    "frame-checksum",
    FORMAT,
    "ZST-007",
    "The checksum of the frame is another.",
    only(made("z", TEXT, [(0, TEXT)], TEXT[:4])),
)
