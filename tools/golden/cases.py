"""How the bad and the unsupported archives are made: `good.base` with one thing changed, checksums repaired."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from golden.good import archive, base
from golden.model import DROP, Archive, Record
from rac.container import wire

Patch = Callable[[Archive], Archive | bytes | None]
FORMAT, TRUNCATED, CHECKSUM = "FormatError", "TruncatedError", "ChecksumError"
UNSUPPORTED, LIMIT = "UnsupportedError", "LimitError"
CONFIG, RAW, ZSTD, TOKENS, LANES, PAIRS = "config.json", "raw", "zstd", "tokens.txt", "lanes", "pairs"
"""Records of `base`, in order."""


@dataclass(frozen=True)
class Case:
    """One archive that must be refused."""

    error: str
    clause: str
    why: str
    patch: Patch
    seen: str = "all"
    """Readers that must refuse it: "all"; "forward", all but random access; "verify", only those that check digests."""
    random: str = ""
    """The error of random access where it is another one."""
    keep: tuple[str, ...] = ()
    """Records of `base` that are there."""

    def build(self) -> bytes:
        """The bytes."""
        a = base()
        a.records = [r for r in a.records if r.head["name"] in self.keep]
        out = self.patch(a)
        if isinstance(out, bytes):
            return out
        a = out or a
        for r in a.records:
            if r.parts and sum(r.parts) != len(r.body()):
                r.parts = None  # the index must be whole, for its faults come first
        return a.build()


BAD: dict[str, Case] = {}


KEEP: list[tuple[str, ...]] = [(CONFIG, RAW)]


def keep(*names: str) -> None:
    """Records of `base` that the cases that follow have."""
    KEEP[0] = names


def case(name: str, error: str, clause: str, why: str, patch: Patch, on: str = "", **more: str) -> None:
    """Register one; `on` is the only record of `base` that it has, where that is not what `keep` said."""
    if name + ".rac" in BAD:
        raise ValueError(name)
    BAD[name + ".rac"] = Case(error, f"RAC-{clause}", why, patch, keep=(on,) if on else KEEP[0], **more)


def fields(**values: Any) -> Patch:
    """Replace fields of the archive."""

    def patch(a: Archive) -> None:
        for k, v in values.items():
            setattr(a, k, v)

    return patch


def header(**values: Any) -> Patch:
    """Replace keys of the header."""

    def patch(a: Archive) -> None:
        a.header = {k: v for k, v in (a.header | values).items() if v is not DROP}

    return patch


def record(i: str, **values: Any) -> Patch:
    """Replace fields of record `i`."""

    def patch(a: Archive) -> None:
        for k, v in values.items():
            setattr(a[i], k, v)

    return patch


def head(i: str, **values: Any) -> Patch:
    """Replace keys of the head of record `i`."""

    def patch(a: Archive) -> None:
        a[i].head |= values

    return patch


def stage(i: str, **values: Any) -> Patch:
    """Replace keys of the stage map of record `i`."""

    def patch(a: Archive) -> None:
        old = a[i].head["stages"][0]
        a[i].head["stages"] = [{k: v for k, v in (old | values).items() if v is not DROP}]

    return patch


def row(i: str, **values: Any) -> Patch:
    """Replace keys of the index row of record `i`."""
    return record(i, row=values)


def unit(i: str, k: int, change: Callable[[bytes], bytes]) -> Patch:
    """Replace unit `k` of record `i`, its checksum repaired."""

    def patch(a: Archive) -> None:
        a[i].units[k] = change(a[i].units[k])

    return patch


def directory(i: str, change: Callable[[bytes], Any]) -> Patch:
    """Replace the unit directory of record `i`."""

    def patch(a: Archive) -> None:
        a[i].head["units"] = change(wire.directory(a[i].units))

    return patch


def index(change: Callable[[dict[str, Any]], Any]) -> Patch:
    """Change the index map, or replace its bytes."""
    return fields(patch_index=change)


def index_record(**values: Any) -> Patch:
    """Replace fields of the index record; a map for `head` is merged."""

    def change(r: Record) -> None:
        for k, v in values.items():
            setattr(r, k, r.head | v if k == "head" else v)

    return fields(patch_record=change)


def both(*patches: Patch) -> Patch:
    """One after the other."""

    def patch(a: Archive) -> None:
        for p in patches:
            p(a)

    return patch


def cut(size: Callable[[bytes], int]) -> Patch:
    """Only the first bytes."""

    def patch(a: Archive) -> bytes:
        data = a.build()
        return data[: size(data)]

    return patch


def set_bytes(at: int, new: bytes) -> Callable[[bytes], bytes]:
    """Replace bytes; `at` may count from the end."""
    return lambda old: old[: at % len(old)] + new + old[at % len(old) + len(new) :]


def flip(at: int, mask: int = 1) -> Callable[[bytes], bytes]:
    """Flip bits of one byte."""
    return lambda old: set_bytes(at, bytes([old[at] ^ mask]))(old)


def only(*records: Record) -> Patch:
    """An archive of these records in place of the base."""
    return lambda a: archive(*records)


def zeros(n: int) -> bytes:
    """A frame of `n` zeros in blocks of one repeated byte."""
    sizes = [1 << 17] * (n >> 17) + [n & 0x1FFFF] * bool(n & 0x1FFFF)
    out = b"\x28\xb5\x2f\xfd\xa0" + n.to_bytes(4, "little")
    return out + b"".join(
        (s << 3 | 2 | (i == len(sizes) - 1)).to_bytes(3, "little") + b"\0" for i, s in enumerate(sizes)
    )
