"""Mutates golden archives and reads them with both programs: nothing but their own errors may leave.

    python tests/fuzz/fuzz_reader.py --seconds 300 --seed 1

Half of the mutations are repaired (checksums of the unit and of the record head are made right again), so that decoding
is reached; the index still notices. Whatever one program reads whole, the other must read too, to the same bytes. A
case that fails is written to the working directory.
"""

import argparse
import random
import struct
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import readers  # noqa: E402
import xxhash  # noqa: E402

from rac.container.reader import Archive  # noqa: E402


def repaired(data: bytearray, rng: random.Random) -> None:
    """Change bytes of one record's payload or head, and make its checksums right."""
    archive = Archive(readers.BytesAccess(bytes(data)))
    if not archive.index.entries:
        return
    entry = rng.choice(archive.index.entries)
    head = entry.at + 32
    payload = entry.at + entry.size - (-(-entry.payload_size // 64) * 64)
    units = archive.record(entry).head.get("units", b"")
    if len(units) >= 16 and rng.random() < 0.7:
        k, at = rng.randrange(len(units) // 16), payload
        for i in range(k):
            size = struct.unpack_from("<Q", units, 16 * i)[0]
            at += size + -size % 16
        size, old = struct.unpack_from("<QQ", units, 16 * k)
        for _ in range(rng.choice((1, 1, 2, 8)) if size else 0):
            place = rng.randrange(min(size, rng.choice((16, 64, size))))
            data[at + place] = rng.choice((0, 1, 255, rng.randrange(256)))
        new = xxhash.xxh3_64_intdigest(bytes(data[at : at + size]))
        where = data.find(struct.pack("<QQ", size, old), head, head + entry.head_size)
        data[where + 8 : where + 16] = struct.pack("<Q", new)
    else:
        for _ in range(rng.choice((1, 1, 2, 4))):
            data[head + rng.randrange(entry.head_size)] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
    check = xxhash.xxh3_64_intdigest(bytes(data[entry.at : entry.at + 24]) + bytes(data[head : head + entry.head_size]))
    data[entry.at + 24 : entry.at + 32] = struct.pack("<Q", check)


def broken(data: bytearray, rng: random.Random) -> None:
    """Change, cut, double or insert bytes anywhere."""
    for _ in range(rng.choice((1, 1, 2, 5))):
        at = rng.randrange(len(data))
        what = rng.randrange(4)
        if what == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif what == 1:
            del data[at : at + rng.choice((1, 16, 64, len(data)))]
        elif what == 2:
            data[at:at] = rng.randbytes(rng.choice((1, 16, 64)))
        else:
            data[at : at + 8] = rng.choice((b"\xff" * 8, bytes(8), (1 << 62).to_bytes(8, "little")))
        if not data:
            data += b"\x89"


def read(name: str, data: bytes) -> tuple[str, object]:
    """What one program makes of the bytes: ("read", tensors) or ("refused", class)."""
    try:
        content = readers.READERS[name](data)
    except readers.ERRORS as e:
        return "refused", type(e).__name__
    return "read", {n: readers.plain(v)[2] for n, v in content.get("tensors", {}).items()}


def run(seconds: float, seed: int) -> int:
    """Number of archives tried; raises AssertionError with the case saved."""
    good = sorted((readers.GOLDEN / "good").glob("*.rac"))
    corpus = [p.read_bytes() for p in good if p.stat().st_size < 20_000]
    rng, tried, stop = random.Random(seed), 0, time.monotonic() + seconds
    while time.monotonic() < stop:
        data = bytearray(rng.choice(corpus))
        (repaired if rng.random() < 0.5 else broken)(data, rng)
        tried += 1
        try:
            ours, theirs = read("rac_forward", bytes(data)), read("second_forward", bytes(data))
            read("rac_random", bytes(data))
            read("rac_reference", bytes(data))
            if theirs[0] == "read":
                assert ours == theirs, f"seed {seed}, case {tried}: {ours[0]} against {theirs[0]}"
        except BaseException:
            Path(f"fuzz-{seed}-{tried}.rac").write_bytes(data)
            raise
    return tried


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    print(run(args.seconds, args.seed), "archives, nothing found")
