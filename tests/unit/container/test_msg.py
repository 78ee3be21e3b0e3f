"""Canonical msgpack: one encoding for one value."""

from __future__ import annotations

import pytest

from rac.container import msg
from rac.errors import FormatError

VALUES = {
    "": None,
    "a": [True, False, 0, 127, 128, 255, 256, 65535, 65536, 1 << 32, (1 << 64) - 1],
    "b": [-1, -32, -33, -128, -129, -32768, -32769, -(1 << 31), -(1 << 31) - 1, -(1 << 63)],
    "c": ["", "x" * 31, "x" * 32, "y" * 255, "z" * 256, "ä" * 40000],
    "d": [b"", b"1" * 255, b"2" * 256, b"3" * 70000],
    "e": [[], list(range(15)), list(range(16)), [0] * 70000],
    "f": {},
    "g": {f"{i:03}": i for i in range(16)},
    "größe": {"x": {"y": {}}},
    "\U0001f600": 1,
}


def test_round_trip():
    data = msg.pack(VALUES)
    assert msg.unpack(data) == VALUES
    assert msg.pack(dict(reversed(VALUES.items()))) == data
    assert msg.pack({"a": (1, 2)}) == msg.pack({"a": [1, 2]}) == b"\x81\xa1a\x92\x01\x02"


def test_keys_are_in_the_order_of_their_bytes():
    # U+FF5E comes before U+1F600 in UTF-8, and after it in UTF-16
    assert msg.pack({"\U0001f600": 1, "～": 2, "z": 3, "": 4}) == bytes.fromhex(
        "84 a0 04 a1 7a 03 a3 ef bd 9e 02 a4 f0 9f 98 80 01"
    )


NESTED = b"\x81\xa1a" * 7 + b"\x80"
BAD = {
    "nothing": b"",
    "no map": b"\x90",
    "a number": b"\x05",
    "two values": b"\x80\x80",
    "cut off": b"\x81\xa1a",
    "long integer": b"\x81\xa1a\xcc\x05",
    "long u16": b"\x81\xa1a\xcd\x00\x80",
    "long u32": b"\x81\xa1a\xce\x00\x00\xff\xff",
    "long u64": b"\x81\xa1a\xcf" + bytes(7) + b"\x01",
    "signed form of a positive number": b"\x81\xa1a\xd0\x05",
    "long negative": b"\x81\xa1a\xd0\xff",
    "long text": b"\x81\xd9\x01a\x05",
    "long binary": b"\x81\xa1a\xc5\x00\x01x",
    "long array": b"\x81\xa1a\xdc\x00\x01\x05",
    "long map": b"\xde\x00\x01\xa1a\x05",
    "float": b"\x81\xa1a\xca\x00\x00\x00\x00",
    "double": b"\x81\xa1a\xcb" + bytes(8),
    "never used": b"\x81\xa1a\xc1",
    "extension": b"\x81\xa1a\xd4\x01\x00",
    "timestamp": b"\x81\xa1a\xd6\xff\x00\x00\x00\x00",
    "key no text": b"\x81\x01\x05",
    "key binary": b"\x81\xc4\x01a\x05",
    "keys not in order": b"\x82\xa1b\x01\xa1a\x02",
    "key twice": b"\x82\xa1a\x01\xa1a\x02",
    "inner keys not in order": b"\x81\xa1x\x91\x82\xa1b\x01\xa1a\x02",
    "not UTF-8": b"\x81\xa1a\xa1\xff",
    "surrogate": b"\x81\xa1a\xa3\xed\xa0\x80",
    "overlong": b"\x81\xa1a\xa2\xc0\x80",
    "too deep": b"\x81\xa1a" + NESTED,
    "empty array too deep": b"\x81\xa1a" * 8 + b"\x90",
    "text longer than all": b"\x81\xa1a\xdb\xff\xff\xff\xff",
    "binary longer than all": b"\x81\xa1a\xc6\xff\xff\xff\xff",
    "array longer than all": b"\x81\xa1a\xdd\xff\xff\xff\xff",
    "map longer than all": b"\x81\xa1a\xdf\xff\xff\xff\xff",
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("long", [False, True])
def test_refused(what, long):
    data = BAD[what]
    if long:  # the same inside a map of several KiB, which is scanned first
        head = b"\x82\xa1_\xc5\x20\x00" + bytes(8192) + b"\xa1z"
        assert msg.unpack(head + b"\x01") == {"_": bytes(8192), "z": 1}
        data = {"nothing": head, "two values": head + b"\x80\x80"}.get(what, head + (data or b""))
        if what in ("no map", "a number", "empty array too deep", "too deep"):
            data = head + {"too deep": NESTED, "empty array too deep": b"\x91" * 7 + b"\x90"}.get(what, b"\xc1")
    with pytest.raises(FormatError):
        msg.unpack(data)


def test_depth():
    assert msg.unpack(NESTED)
    assert msg.unpack(b"\x81\xa1a" * 2 + b"\x80", depth=3)
    with pytest.raises(FormatError):
        msg.unpack(b"\x81\xa1a" * 2 + b"\x80", depth=2)
    for n in (100, 100_000):
        with pytest.raises(FormatError):
            msg.unpack(b"\x81\xa1a" + b"\x91" * n)
        with pytest.raises(FormatError):
            msg.unpack(b"\x81\xa1a" * n + b"\x05")


def test_every_cut_is_refused():
    data = msg.pack({k: v for k, v in VALUES.items() if k not in "cde"} | {"c": ["x" * 32], "d": b"12"})
    for size in range(len(data)):
        with pytest.raises(FormatError):
            msg.unpack(data[:size])
