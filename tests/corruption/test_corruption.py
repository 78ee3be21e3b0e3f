"""Damage at every place of a small archive; no damage may go unseen, none may lead to a wrong tensor."""

import io
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

import rac
from rac.container.access import BytesAccess
from rac.container.forward import Forward
from support import environment, readers

GOLDEN = readers.GOLDEN
DATA = (GOLDEN / "good" / "base.rac").read_bytes()
ENTRY = readers.manifest()["good"]["base.rac"]
OBJECTS = (GOLDEN / "good" / "products-base.rac").read_bytes()
WITH_OBJECTS = readers.manifest()["good"]["products-base.rac"]
GROUPS = (GOLDEN / "good" / "groups-base.rac").read_bytes()
WITH_GROUPS = readers.manifest()["good"]["groups-base.rac"]
PARTS = 8


def refused(reader: str, data: bytes, entry: dict = ENTRY) -> bool:
    """True where the reader reports an error of its own; otherwise it must have found what was packed."""
    got, content = readers.outcome(reader, data)
    if got:
        return True
    assert not isinstance(content, str)
    assert reader == "rac_verify" or readers.differences(content, entry) == []
    return False


def flipped(bit: int, data: bytes = DATA) -> bytes:
    """The archive with one bit changed."""
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


@pytest.mark.parametrize("part", range(PARTS))
def test_every_bit(part: int) -> None:
    """Every bit by random access, and one of every byte forward: what is read is checked by sums, not bit by bit."""
    unseen = []
    for bit in range(part, 8 * len(DATA), PARTS):
        data = flipped(bit)
        if not refused("rac_random", data) and not refused("rac_verify", data):
            unseen.append(("random access", bit))
        if bit % 8 == bit // 8 % 8 and not refused("rac_forward", data):
            unseen.append(("forward", bit))
    assert unseen == []


@pytest.mark.parametrize(("whole", "entry"), [(OBJECTS, WITH_OBJECTS), (GROUPS, WITH_GROUPS)], ids=["three", "groups"])
def test_bits_of_lossy_stages(whole: bytes, entry: dict) -> None:
    """Tensors of three stages, and what they use; tensors in groups."""
    bits = range(2, 8 * len(whole), 11)
    for reader in ("rac_random", "rac_forward"):
        assert [b for b in bits if not refused(reader, flipped(b, whole), entry)] == []
    for reader in ("rac_verify", "second_forward", "second_random"):
        assert [b for b in bits[::5] if not refused(reader, flipped(b, whole), entry)] == []
    for reader in ("rac_random", "rac_forward", "second_forward", "second_random"):
        assert {readers.outcome(reader, whole[:n])[0] for n in range(0, len(whole), 13)} == {"TruncatedError"}


def test_every_seventh_bit_in_the_second_decoder() -> None:
    bits = range(3, 8 * len(DATA), 7)
    assert [b for b in bits if not refused("second_forward", flipped(b))] == []
    assert [b for b in bits[::5] if not refused("second_random", flipped(b))] == []


def test_reads_of_attachments_and_padding() -> None:
    """What random access reads it checks: no bit of any record escapes it."""
    assert [b for b in range(1, 8 * len(DATA), 16) if not refused("rac_random", flipped(b))] == []


@pytest.mark.parametrize("reader", ["rac_random", "rac_forward", "second_forward", "second_random"])
def test_every_truncation(reader: str) -> None:
    """TruncatedError wherever the end is missing: nothing else is wrong with such an archive."""
    got = {readers.outcome(reader, DATA[:n])[0] for n in range(len(DATA))}
    assert got == {"TruncatedError"}


def test_truncated_file(tmp_path: Path) -> None:
    for n in (0, 1, 31, 32, 100, 700, len(DATA) - 33, len(DATA) - 1):
        (tmp_path / "a.rac").write_bytes(DATA[:n])
        for read in (rac.load_file, rac.verify):
            with pytest.raises(rac.TruncatedError) as e:
                read(tmp_path / "a.rac")
            assert e.value.file == str(tmp_path / "a.rac")


def test_every_byte_deleted_or_doubled() -> None:
    for at in range(0, len(DATA), 5):
        for data in (DATA[:at] + DATA[at + 1 :], DATA[:at] + DATA[at : at + 1] + DATA[at:]):
            for reader in ("rac_random", "rac_forward"):
                assert refused(reader, data), (reader, at)


def test_records_swapped() -> None:
    """Records in another order, the index as it was; pieces of 64 bytes in another order."""
    with rac.RacFile(BytesAccess(DATA)) as f:
        entries = f.archives[0].index.entries
    for a, b in zip(entries, entries[1:], strict=False):
        first, second = DATA[a.at : a.at + a.size], DATA[b.at : b.at + b.size]
        data = DATA[: a.at] + second + first + DATA[b.at + b.size :]
        assert refused("rac_random", data)
        assert refused("rac_forward", data)
    for at in range(0, len(DATA) - 128, 64):
        data = DATA[:at] + DATA[at + 64 : at + 128] + DATA[at : at + 64] + DATA[at + 128 :]
        if data != DATA:
            assert refused("rac_random", data)
            assert refused("rac_forward", data)


def test_forward_yields_only_whole_tensors() -> None:
    """What is yielded before the damage is right, and the damage is reported at its tensor or behind."""
    for at in range(0, len(DATA), 11):
        data = bytearray(DATA)
        data[at] ^= 0x55
        seen = {}
        with pytest.raises(rac.RacError):
            for name, value in rac.iter_tensors(io.BytesIO(bytes(data))):
                seen[name] = value
        for name, value in seen.items():
            stated = ENTRY["tensors"][name]
            assert readers.xxhash.xxh3_128_hexdigest(value.tobytes()) == stated["xxh3_128"]


@pytest.mark.parametrize(
    ("name", "reader", "error", "unit"),
    [
        ("unit-checksum-tile", "rac_random", rac.ChecksumError, "'lanes' unit 2"),
        ("unit-checksum-shared", "rac_forward", rac.ChecksumError, "'lanes' unit 0"),
        ("unit-checksum", "rac_random", rac.ChecksumError, "'raw' unit 0"),
        ("lane-state", "rac_random", rac.ChecksumError, "'lanes' unit 1"),
        ("lane-state", "rac_forward", rac.ChecksumError, "'lanes' unit 1"),
        ("frame-trailing", "rac_forward", rac.FormatError, "'z' unit 0"),
        ("header-checksum", "rac_random", rac.ChecksumError, "header"),
        ("trailer-checksum", "rac_random", rac.ChecksumError, "trailer"),
        ("index-checksum", "rac_forward", rac.ChecksumError, "index"),
        ("attachment-digest", "rac_random", rac.ChecksumError, "'tokens.txt'"),
        ("tensor-no-axis", "rac_random", rac.FormatError, "'raw'"),
        ("record-checksum", "rac_random", rac.ChecksumError, "'raw'"),
    ],
)
def test_errors_say_where(name: str, reader: str, error: type[rac.RacError], unit: str) -> None:
    data = (GOLDEN / "bad" / f"{name}.rac").read_bytes()
    with pytest.raises(error) as e:
        readers.READERS[reader](data)
    assert (e.value._ours or type(e.value)) is error  # where safetensors is imported, a class that is both
    assert e.value.file in ("<bytes>", "<stream>")
    assert e.value.unit == unit
    assert isinstance(e.value.offset, int) and 0 <= e.value.offset < len(data)
    assert unit in str(e.value) and str(e.value.offset) in str(e.value)


def test_offset_of_a_unit() -> None:
    """The offset is that of the unit: a changed byte lies behind it."""
    with rac.RacFile(BytesAccess(DATA)) as f:
        entry = next(e for e in f.archives[0].index.entries if e.name == "raw")
    at = entry.at + entry.size - entry.payload_size - -entry.payload_size % 64
    data = bytearray(DATA)
    data[at] ^= 1
    for reader in ("rac_random", "rac_forward"):
        with pytest.raises(rac.ChecksumError) as e:
            readers.READERS[reader](bytes(data))
        assert e.value.offset == at


class Inside(BytesAccess):
    """Fails where anything outside of the archive is asked for."""

    def read_into(self, at: int, out: memoryview) -> None:
        assert at >= 0 and at + len(out) <= self.size
        super().read_into(at, out)

    def view(self, at: int, size: int) -> memoryview:
        assert at >= 0 and at + size <= self.size
        return super().view(at, size)


def test_reads_stay_inside() -> None:
    for kind in ("bad", "unsupported"):
        for path in (GOLDEN / kind).iterdir():
            try:
                with rac.RacFile(Inside(path.read_bytes()), threads=1) as f:
                    f.load()
                    for name in f.attachments():
                        f.attachment(name)
            except rac.RacError:
                pass


def with_length(at: int, size: int, length: int) -> bytes:
    """The first bytes of the archive with another length and no more behind it than 200 bytes."""
    return DATA[:at] + length.to_bytes(size, "little") + DATA[at + size : at + 200]


def test_false_length_in_a_stream() -> None:
    """A length that the stream does not keep costs no memory."""
    with rac.RacFile(BytesAccess(DATA)) as f:
        first = f.archives[0].index.entries[0]
    cases = {
        "header": with_length(16, 4, 16 << 20),
        "head": with_length(first.at + 8, 4, 64 << 20),
        "payload": with_length(first.at + 16, 8, 1 << 61),
    }
    for what, data in cases.items():
        tracemalloc.start()
        with pytest.raises(rac.FormatError):
            list(rac.iter_tensors(io.BytesIO(data)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4 << 20, what


def test_skipping_a_huge_record_ends() -> None:
    """A record to skip whose payload never comes."""
    data = (GOLDEN / "good" / "ancillary.rac").read_bytes()
    forward = Forward(io.BytesIO(data[:300]))
    with pytest.raises(rac.TruncatedError):
        list(forward.records())


BOMBS = ["attachment-window", "index-window", "index-zeros", "expansion", "expansion-2^59", "tile-limit", "units-huge"]
BOMBS += ["msg-depth-40000", "msg-array32", "msg-map32-huge", "frame-size-huge", "frame-window-max", "index-count"]
CHILD = """
import resource, sys
from support import readers
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (100 << 20), resource.RLIM_INFINITY))
resource.setrlimit(resource.RLIMIT_CPU, (5, 5))
data = open(sys.argv[1], "rb").read()
for reader in ("rac_random", "rac_forward", "rac_verify", "second_forward", "second_random"):
    print(reader, readers.outcome(reader, data)[0])
"""


@pytest.mark.parametrize("name", BOMBS)
def test_bombs(name: str) -> None:
    """5 seconds and 100 MiB are enough for all readers together to refuse each."""
    entry = readers.manifest()["bad"][f"{name}.rac"]
    path = GOLDEN / "bad" / f"{name}.rac"
    done = subprocess.run([sys.executable, "-c", CHILD, str(path)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {line.split(" ")[1] for line in done.stdout.splitlines()} == {entry["error"]}
