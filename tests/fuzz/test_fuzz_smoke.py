"""A few seconds of the fuzzer with a fixed seed."""

from fuzz import fuzz_reader


def test_fuzz(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz_reader.run(4, 7) > 50
