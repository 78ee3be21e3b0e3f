"""The golden files through every reader, and the clauses of the specification against the golden files."""

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rac
from support import environment, readers

MANIFEST = readers.manifest()
GOOD = sorted(MANIFEST["good"])
REFUSED = sorted((kind, name) for kind in ("bad", "unsupported") for name in MANIFEST[kind])

ELSEWHERE = {
    "RAC-DIG-001": "conformance/test_golden.py::test_writer_makes_the_example",
    "RAC-FWD-001": "corruption/test_corruption.py::test_every_bit",
    "RAC-ONL-010": "unit/runtime/test_online.py::test_the_model_that_was_packed",
    "RAC-PRV-001": "unit/test_provenance.py::test_reading_does_not_depend_on_it",
    "RAC-PRV-002": "unit/test_provenance.py::test_malformed",
    "RAC-PRV-003": "unit/test_provenance.py::test_other_keys_decide_nothing",
    "RAC-RAR-001": "corruption/test_corruption.py::test_every_bit",
    "RAC-SEC-002": "conformance/test_golden.py::test_in_another_process",
    "RAC-SEC-003": "corruption/test_corruption.py::test_false_length_in_a_stream",
    "RAC-SEC-005": "corruption/test_corruption.py::test_every_bit",
    "RAC-SEC-006": "conformance/test_golden.py::test_in_another_process",
    "RAC-SEC-007": "fuzz/test_fuzz_smoke.py::test_fuzz",
    "RAC-SEC-008": "conformance/test_golden.py::test_limits",
    "RAC-SHR-001": "conformance/test_golden.py::test_shards",
    "RAC-VER-001": "conformance/test_golden.py::test_writer_makes_the_example",
}
"""Clauses that no single archive can show, and the test that does."""

NOT_TESTED = {
    "RAC-SEC-001": "nothing is executed: ruff refuses pickle (S301, TID), a review the rest",
    "RAC-SEC-004": "paths of attachments: unpack has its own tests",
    "RAC-ZST-008": "a writer's frames: libzstd makes them",
    "RAC-SEC-009": "a writer that stays within the limits: property tests of pack",
}


@pytest.mark.parametrize("name", GOOD)
@pytest.mark.parametrize("reader", sorted(readers.READERS.keys() - {"rac_verify"}))
def test_good(reader: str, name: str) -> None:
    data = (readers.GOLDEN / "good" / name).read_bytes()
    assert readers.differences(readers.READERS[reader](data), MANIFEST["good"][name]) == []


@pytest.mark.parametrize("name", GOOD)
def test_good_verify(name: str) -> None:
    """A shard is verified with its set."""
    entries = [e for n, e in MANIFEST["good"].items() if n == name or (name[:3], n[:3]) == ("set", "set")]
    done = rac.verify(readers.GOLDEN / "good" / name)
    assert done.tensors == sum(len(e["tensors"]) for e in entries)
    assert done.attachments == sum(len(e["attachments"]) for e in entries)
    assert done.digest.hex() in [e["digest"] for e in entries]


@pytest.mark.parametrize(("kind", "name"), REFUSED)
def test_refused(kind: str, name: str) -> None:
    data = (readers.GOLDEN / kind / name).read_bytes()
    assert readers.wrong_refusals(MANIFEST[kind][name], data) == []


@pytest.mark.parametrize("native", [True, False])
def test_in_another_process(native: bool) -> None:
    """With the C kernel under a limit of memory; and in numba and numpy."""
    env = {k: v for k, v in environment().items() if k != "RAC_NO_NATIVE"} | ({} if native else {"RAC_NO_NATIVE": "1"})
    args = [sys.executable, "-m", "support.readers", *(["--limit"] if native else [])]
    done = subprocess.run(args, env=env, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    assert done.stdout.startswith("kernel: C") == native


@pytest.mark.parametrize("name", [n for n in GOOD if "online" in n])
def test_online_transforms(name: str) -> None:
    """Both programs fold the same weights, which T has turned; the map is the one that the archive states."""
    from rac.container.access import BytesAccess

    data = (readers.GOLDEN / "good" / name).read_bytes()
    second, seen = readers.decoder.decode(data), 0
    with rac.RacFile(BytesAccess(data)) as f:
        for tensor, stated in MANIFEST["good"][name]["tensors"].items():
            found = f.online(tensor)
            assert (found is not None) == ("online" in stated) == (tensor in second.online)
            if found is None:
                continue
            seen += 1
            assert found.online.to_head() == stated["online"]
            w = f.get_tensor(tensor).astype(np.float64)
            folded, theirs = found.fold(w), second.folded(tensor)
            assert np.abs(folded - theirs).max() <= 1e-12 * max(1.0, np.abs(theirs).max())
            assert np.abs(found.absorb(folded) - w).max() <= 1e-5 * max(1.0, np.abs(w).max())
            x = np.random.default_rng(1).standard_normal((3, w.shape[1]))
            assert np.allclose(found.apply(x) @ w.T, x @ theirs.T, rtol=0, atol=1e-9 * max(1.0, np.abs(theirs).max()))
    assert seen


def test_regenerates() -> None:
    done = subprocess.run(
        [sys.executable, str(readers.ROOT / "tools" / "make_golden.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_second_decoder_is_independent() -> None:
    code = "import sys, decoder; sys.exit(any(m == 'rac' or m.startswith('rac.') for m in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=readers.ROOT / "format_spec").returncode == 0


def test_second_decoder_self_test() -> None:
    done = subprocess.run([sys.executable, "-m", "decoder", "--self-test"], cwd=readers.ROOT / "format_spec")
    assert done.returncode == 0


def test_every_clause() -> None:
    """Every clause is shown by a golden file, by a test that is there, or owned up to."""
    pages = [*(readers.ROOT / "format_spec").glob("*.md"), *(readers.ROOT / "format_spec" / "stages").glob("*.md")]
    clauses = {c for p in pages for c in re.findall(r"\[(RAC-[A-Z]{3}-\d{3})\]", p.read_text())}
    shown = {MANIFEST[kind][name]["clause"] for kind, name in REFUSED}
    shown |= {entry["clause"] for entry in MANIFEST["sets"].values()}
    shown |= {c for name in GOOD for c in MANIFEST["good"][name]["clauses"]}
    assert shown <= clauses
    assert clauses - shown == ELSEWHERE.keys() | NOT_TESTED.keys()
    for where in ELSEWHERE.values():
        file, test = where.split("::")
        assert f"def {test}(" in (readers.ROOT / "tests" / file).read_text()


def test_every_error_class() -> None:
    classes = {"FormatError", "TruncatedError", "ChecksumError", "UnsupportedError", "LimitError"}
    assert {MANIFEST[kind][name]["error"] for kind, name in REFUSED} == classes


def test_writer_makes_the_example(tmp_path: Path) -> None:
    """container.md section 19 is what the writer makes: version, digests and all."""
    rac.save_file({"a": np.arange(3, dtype=np.uint8)}, tmp_path / "a.rac")
    assert (tmp_path / "a.rac").read_bytes() == (readers.GOLDEN / "good" / "example.rac").read_bytes()


def _set(folder: Path, first: str = "set-00001-of-00002", second: str = "set-00002-of-00002") -> Path:
    for k, name in enumerate((first, second), 1):
        shutil.copy(readers.GOLDEN / "good" / f"{name}.rac", folder / f"m-{k:05d}-of-00002.rac")
    return folder / "m-00001-of-00002.rac"


def test_shards(tmp_path: Path) -> None:
    path = _set(tmp_path)
    for start in (path, tmp_path / "m-00002-of-00002.rac", tmp_path):
        tensors = rac.load_file(start)
        assert sorted(tensors) == ["first", "second", "third"]
        assert tensors["second"] is tensors["third"]
    assert rac.verify(path).tensors == 3
    path.rename(tmp_path / "other.rac")
    with pytest.raises(rac.RacError):
        rac.load_file(tmp_path / "other.rac")


def test_shards_in_the_second_decoder(tmp_path: Path) -> None:
    first, second = readers.decoder.decode_set(_set(tmp_path))
    assert [*first.tensors, *second.tensors] == ["first", "second", "third"]


@pytest.mark.parametrize("name", sorted(MANIFEST["sets"]))
def test_bad_set(name: str) -> None:
    """Each archive is whole; together, opened by the first, they are refused."""
    entry, folder = MANIFEST["sets"][name], readers.GOLDEN / "sets" / name
    paths = [folder / n for n in entry["sha256"]]
    for path in paths:
        readers.decoder.decode(path)
    for read in (rac.load_file, rac.verify):
        with pytest.raises(rac.RacError) as caught:
            read(paths[0])
        assert type(caught.value).__name__ == entry["error"]
    with pytest.raises(readers.DecoderError) as refused:
        readers.decoder.decode_set(paths[0])
    assert type(refused.value).__name__ == entry["error"]


def test_shard_missing(tmp_path: Path) -> None:
    path = _set(tmp_path)
    (tmp_path / "m-00002-of-00002.rac").unlink()
    with pytest.raises(rac.RacError):
        rac.load_file(path)


@pytest.mark.parametrize("limit", ["header", "head", "index", "tile", "attachment", "objects", "rank"])
def test_limits(limit: str) -> None:
    """Each limit can be lowered, and an excess is a LimitError of both programs."""
    from rac.container.access import BytesAccess
    from rac.records import Limits

    name = "products-base" if limit == "objects" else "base"
    data = (readers.GOLDEN / "good" / f"{name}.rac").read_bytes()

    def read(value: int) -> None:
        with rac.RacFile(BytesAccess(data), limits=Limits(**{limit: value})) as f:
            f.load()
            for n in f.attachments():
                f.attachment(n)

    read(1 << 16)
    with pytest.raises(rac.LimitError):
        read(1)
    with pytest.raises(rac.LimitError):
        list(rac.iter_tensors(io.BytesIO(data), limits=Limits(**{limit: 1})))
    with pytest.raises(readers.decoder.LimitError):
        readers.decoder.decode(data, readers.decoder.Limits(**{limit: 1}))


def test_walkthrough() -> None:
    """The dump of walkthrough.md is that of the file; what it leaves out is zero."""
    data = bytearray((readers.GOLDEN / "good" / "example-walk.rac").read_bytes())
    page = (readers.GOLDEN.parent / "walkthrough.md").read_text()
    lines = re.findall(r"^    ([0-9a-f]{4})  ((?:(?:[0-9a-f]{2}|  )(?: |$)){1,16})", page, re.MULTILINE)
    for at, text in lines:
        for i in range(0, len(text), 3):
            if value := text[i : i + 3].strip():
                assert data[int(at, 16) + i // 3] == int(value, 16), at
                data[int(at, 16) + i // 3] = 0
    assert len(lines) > 80
    assert not any(data)
