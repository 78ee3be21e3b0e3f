"""Worked examples of the text, and constriction against plain integers."""

import contextlib
import random

import numpy as np
import xxhash

from . import bits, groups, lanes, online, products, trellis
from .archive import RandomAccess, decode
from .errors import ChecksumError
from .structure import Map
from .tensors import unsort

# container.md section 19, zeros at the ends of its pieces left out: offset -> bytes
EXAMPLE = {
    0x0000: """
        89 52 41 43 0d 0a 1a 0a 00 00 01 00 00 00 00 00 5c 00 00 00 00 00 00 00 d3 e0 0d 9c 0c 4b b2 f4
        83 a8 66 65 61 74 75 72 65 73 90 a8 6d 65 74 61 64 61 74 61 80 aa 70 72 6f 76 65 6e 61 6e 63 65
        84 a5 6c 65 76 65 6c a7 64 65 66 61 75 6c 74 a8 6c 6f 73 73 6c 65 73 73 c3 a6 73 6f 75 72 63 65
        a6 6d 65 6d 6f 72 79 a4 74 6f 6f 6c af 72 61 63 2d 63 6f 64 65 63 20 30 2e 31 2e 30""",
    0x0080: """
        52 52 45 43 01 00 00 00 6a 00 00 00 00 00 00 00 10 00 00 00 00 00 00 00 25 58 b9 ff d6 16 53 b6
        88 a4 61 78 69 73 00 a6 64 69 67 65 73 74 c4 10 e3 b5 5f 57 94 5a 17 cf 5f 42 99 fc 16 1c 9c bb
        a5 64 74 79 70 65 a2 55 38 a4 6e 61 6d 65 a1 61 a5 73 68 61 70 65 91 03 a6 73 74 61 67 65 73 91
        81 a2 69 64 a5 72 61 77 2f 31 a4 74 69 6c 65 92 01 03 a5 75 6e 69 74 73 c4 10 03 00 00 00 00 00
        00 00 bb 9c 1c 16 fc 99 42 5f""",
    0x0140: "00 01 02",
    0x0180: """
        52 52 45 43 04 00 00 00 20 00 00 00 00 00 00 00 a0 00 00 00 00 00 00 00 2b 7d 10 13 92 d7 3d 59
        82 a4 73 69 7a 65 cc 90 a5 75 6e 69 74 73 c4 10 99 00 00 00 00 00 00 00 fe 36 7d 12 e1 23 57 7e
        28 b5 2f fd 20 90 81 04 00 82 a6 64 69 67 65 73 74 c4 10 db 53 d0 01 f7 9f 24 62 ea c0 11 d0 38
        be 35 ba a7 72 65 63 6f 72 64 73 91 8c a7 61 6c 69 61 73 65 73 90 a2 61 74 cc 80 a5 63 68 65 63
        6b c4 08 25 58 b9 ff d6 16 53 b6 a5 64 74 79 70 65 a2 55 38 a5 66 6c 61 67 73 00 a4 68 65 61 64
        6a a6 6d 65 74 68 6f 64 a5 72 61 77 2f 31 a4 6e 61 6d 65 a1 61 a5 70 61 72 74 73 96 00 00 00 00
        03 0d a7 70 61 79 6c 6f 61 64 10 a5 73 68 61 70 65 91 03 a4 74 79 70 65 01""",
    0x0280: "80 01 00 00 00 00 00 00 00 01 00 00 00 00 00 00 6f 05 26 8a 1c fd 30 44 89 45 4e 44 0d 0a 1a 0a",
}


def example() -> bytes:
    """The archive of container.md section 19."""
    data = bytearray(672)
    for at, text in EXAMPLE.items():
        piece = bytes.fromhex(text)
        data[at : at + len(piece)] = piece
    return bytes(data)


def self_test() -> None:
    """Raise AssertionError where an example of the text does not come out."""
    # registry.md, "Checksums"
    assert xxhash.xxh3_64_hexdigest(b"") == "2d06800538d394c2"
    assert xxhash.xxh3_64_hexdigest(b"abc") == "78af5f94892f3950"
    assert xxhash.xxh3_128_hexdigest(b"") == "99aa06d3014798d86001c324468d497f"
    assert xxhash.xxh3_128_hexdigest(b"abc") == "06b05ab6733a618578af5f94892f3950"
    # container.md section 19
    archive = decode(example())
    assert archive.tensors == {"a": ("U8", (3,), b"\x00\x01\x02")}
    with RandomAccess(example()) as reader:
        assert reader.tensor("a") == archive.tensors["a"]
    # stages/zstd.md
    assert unsort(bytes.fromhex("0204060801030507"), 2, 2).tolist() == [[0x102, 0x304], [0x506, 0x708]]
    # stages/lanes.md section 13
    example_lane()
    example_words()
    example_tile()
    # stages/trellis.md section 8
    example_trellis()
    # stages/bits.md section 5, stages/groups.md section 6
    example_groups()
    # stages/lowrank.md and stages/basis.md section 6
    example_products()
    # stages/online.md sections 7 and 8
    example_online()
    # constriction against plain integers
    generator = random.Random(1)
    for _ in range(50):
        random_lane(generator)


def both(words: list[int], todo: list[tuple[int, int]], tables: list[list[int]]) -> list[list[int]]:
    """Decode a lane in both ways; ChecksumError must come from both or none."""
    none = np.zeros(1, np.int64)
    shared = lanes.Shared(np.array(tables), none, none, none.reshape(1, 1))
    outcomes: list[list[list[int]] | None] = []
    for run in range(2):
        try:
            if run:
                outcomes.append(lanes.decode_lane_integers(words, [(tables[t], n) for t, n in todo]))
            else:
                arrays = lanes.decode_lane(np.array(words, np.uint32), todo, shared)
                outcomes.append([array.tolist() for array in arrays])
        except ChecksumError:
            outcomes.append(None)
    assert outcomes[0] == outcomes[1]
    if outcomes[0] is None:
        raise ChecksumError("RAC-LAN-024")
    return outcomes[0]


def example_lane() -> None:
    """Section 13.1."""
    words = [0x00B5C28F, 0xF00000D5, 0x0272C000]
    assert both(words, [(0, 10)], [[4, 3692, 400]]) == [[0, 2, 0, 0, 1, 0, 0, 0, 0, 1]]


def example_words() -> None:
    """Section 13.4."""
    words = np.array([1, 0x11C0, 0x28F5, 0xC2F50000, 0x31000000, 0], np.uint32)
    none = np.zeros(1, np.int64)
    shared = lanes.Shared(np.array([[4, 3692, 400]]), none, none, none.reshape(1, 1))
    own = lanes.words_of_lanes(words, np.array([3, 3]), [(0, 17)], shared)
    assert [o.tolist() for o in own] == [[1, 0x11C0, 0x31000000], [0x28F5, 0xC2F50000, 0]]
    even, odd = (
        [array.tolist() for array in lanes.decode_lane(o, [(0, n)], shared)] for o, n in zip(own, (9, 8), strict=True)
    )
    assert (even, odd) == ([[0, 0, 1, 0, 0, 2, 0, 0, 0]], [[2, 0, 0, 0, 0, 0, 0, 1]])


def example_tile() -> None:
    """Sections 13.2 and 13.3."""
    ends = "01000001"
    tail = "02" + "00" * 15 + "399103" + "00" * 13
    cases = [
        (
            1,
            "0010030020400403800500406078081203ff",
            "01000000 01000100 0000000000000000 000080ac 00006003 0000000000000000",
        ),
        (
            2,
            "0078a3f1f8fc208fc7e3f1f8fc7e3f0821e87a1e803f308a1142284708a114228470 8a114228470430430430",
            "01000000 01000100 0000000000000000 00308570 00f0fb08 0000000000000000",
        ),
    ]
    for per, tables, start in cases:
        section = bytes.fromhex(tables)
        stage: Map = {
            "id": "lanes/1",
            "lanes": 2,
            "packed": 0,
            "per": per,
            "zero": 0,
            "sign": 0,
            "shift": 2,
            "runs": [0, 3],
            "escapes": [10],
            "tables": 2,
            "order": -2,
            "rows": 2,
            "cols": 1,
            "sizes": [len(section), 2, 0],
        }
        p = lanes.parameters(stage, 1)
        shared = lanes.shared_unit(section + bytes.fromhex(ends), p, 2, 5)
        if per == 1:
            assert shared.tables.tolist() == [[1024, 1024, 1536, 512], [2560, 1024, 511, 1]]
        unit = bytes.fromhex(start + tail)
        tile, _ = lanes.decode_tile(unit, p, shared, shared.row_classes, shared.col_classes)
        assert tile.tolist() == [[0, 1, 6, 3, 8], [9, 6, 11, 48, 1]]


def example_trellis() -> None:
    """stages/trellis.md section 8."""
    stage: Map = {
        "id": "trellis/1",
        "states": 4,
        "zero": 10,
        "low": 9,
        "scale": 0x3F000000,
        "sizes": [3, 4, 2, 10],
    }
    p = trellis.parameters(stage, "BF16")
    unit = trellis.trellis_unit(bytes.fromhex("0008f8 00000400 0080 03000000 00000000 803f"), p, 4, 2)
    assert unit.magnitudes[9:12].tolist() == [-1.5, 0.625, 2.375]
    assert (unit.row_scales.tolist(), unit.col_scales.tolist()) == ([1, 1, 2, 1], [0.5, 0])
    words = np.array([[10, 10], [11, 10], [9, 10], [10, 10]], np.uint8)
    tile = trellis.decode_tile(words, p, unit, slice(0, 4), slice(0, 2))
    assert tile.astype("<u2").tobytes().hex() == "a03e0000983f0000c03f0000803f0000"


def example_groups() -> None:
    """stages/bits.md section 5 and stages/groups.md section 6."""
    words = bits.decode_tile(bytes.fromhex("392d09" + "00" * 13 + "b202" + "00" * 14), bits.Parameters(3), 2, 5)
    assert words.tolist() == [[1, 6, 3, 0, 5], [7, 2, 4, 1, 6]]
    stage: Map = {"id": "groups/1", "bits": 3, "group": 3, "zero": 0, "exponent": -1, "sizes": [4, 4, 4]}
    p = groups.parameters(stage, "BF16", 5)
    unit = groups.groups_unit(bytes.fromhex("3840343e 00000001 04030400"), p, 2, 5)
    assert unit.scales.tolist() == [[0.25, 1], [0.125, 0.75048828125]]
    tile = groups.decode_tile(words, p, unit, slice(0, 2), slice(0, 5))
    assert tile.astype("<u2").tobytes().hex() == "40bf003f80be40c00040c03e80be0000403f9040"


def example_products() -> None:
    """stages/lowrank.md and stages/basis.md, section 6."""
    stage: Map = {"id": "trellis/1", "states": 1, "zero": 10, "low": 0, "scale": 0x3F800000, "sizes": [0, 0, 0, 0]}
    p = trellis.parameters(stage, "F32")
    unit = trellis.trellis_unit(b"", p, 2, 2)
    for words, objects, dtype, expected in (
        ("0b0a090c", [[2**-24, 2**-24, 0.5, -3], [1, 0.25, 1, 1.5]], "F32", "0000803f0000e033000060c0000018c0"),
        ("0b080d0a", [[0.75, 0.5, 0.5, 2**-11]], "BF16", "80be003f1040c03f"),
    ):
        tile = np.frombuffer(bytes.fromhex(words), np.uint8).reshape(2, 2)
        v = trellis.decode_tile(tile, p, unit, slice(0, 2), slice(0, 2)).view(np.float32)
        matrices = [np.array(o, np.float32).reshape(2, 2) for o in objects]
        name = "lowrank/1" if len(objects) == 2 else "basis/1"
        assert products.decode({"id": name}, v, matrices, dtype).tobytes().hex() == expected


def random_lane(generator: random.Random) -> None:
    """Encode by stages/lanes.md section 14, decode in both ways; then with a word changed."""
    tables = []
    for _ in range(generator.randint(1, 3)):
        cuts = [generator.randint(0, 4096) for _ in range(generator.randint(1, 255))]
        cuts = sorted([*cuts, generator.randint(1, 4095)])
        table = [b - a for a, b in zip([0, *cuts], [*cuts, 4096], strict=True)]
        tables.append(table + [0] * (257 - len(table)))
    todo = [(generator.randrange(len(tables)), generator.randint(0, 60)) for _ in range(3)]
    plain = [generator.choices(range(257), tables[t], k=n) for t, n in todo]
    x, words = 0, []
    for (t, _), symbols in reversed(list(zip(todo, plain, strict=True))):
        for s in reversed(symbols):
            big_f, big_g = tables[t][s] << 12, sum(tables[t][:s]) << 12
            if x >= big_f << 40:
                words.append(x % 2**32)
                x >>= 32
            x = (x // big_f << 24) + x % big_f + big_g
    while x:
        words.append(x % 2**32)
        x >>= 32
    words.reverse()
    assert both(words, todo, tables) == plain
    if words:
        words[generator.randrange(len(words))] ^= 1 << generator.randrange(31)
        if words[0]:
            with contextlib.suppress(ChecksumError):
                both(words, todo, tables)


# stages/online.md section 8: order or seed -> XXH3-128
ORDERS = {
    8: "a8b39e8db43a80c8acc62dfa5534ba4a",
    12: "7275ab9f810730d48f6772c722933acc",
    20: "8dbe55d29e224fedcfcb8549e212a904",
    28: "b791d118842b84d3aefcbdb50b072130",
    36: "9e837f22e8d08fabe0a652e97cfe8ca8",
    60: "d3e1fe7775f0e7e394df7c3f4e9dfb22",
    148: "9f3ed9f86f47afe61493d26db62d9f40",
    172: "a9ac9ddfbee098800b697a5aeae4ecef",
    576: "a9723c8e0a55aaffc55a96cc4dcb189f",
    1536: "6dc4c35c1c9e939c0dbd6a2f7d533049",
}
SEEDS = {
    0: "26effe88c97911f49b5c86437877ef1f",
    1: "cceb54fe09aea5fd59bc8b7550483972",
    1 << 62: "b568e9a358bca0ff0d128f60e015448a",
}


def example_online() -> None:
    """Sections 7 and 8."""
    t = online.transform(online.Online(4, 4, 1, 1, None), {})
    w = np.array([[1.0, 2, 3, 4], [0, 4, 0, 0]])
    assert (w @ t).tolist() == [[-5, -1, -2, 0], [-2, -2, 2, -2]]
    for order, digest in ORDERS.items():
        made = online.integers(order)
        assert (made @ made.T == order * np.eye(order)).all()
        assert xxhash.xxh3_128_hexdigest(made.astype(np.int8).tobytes()) == digest
    for seed, digest in SEEDS.items():
        assert xxhash.xxh3_128_hexdigest(np.array(online.signs(seed, 100), np.int8).tobytes()) == digest
    for order in (6, 9, 43):
        m = online.matrix(order)
        assert abs(m @ m.T - np.eye(order)).max() < 1e-12
