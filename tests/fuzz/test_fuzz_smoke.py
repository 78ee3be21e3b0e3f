"""Some cases of the fuzzer with a fixed seed."""

import math

from fuzz import fuzz_reader


def test_fuzz(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert fuzz_reader.run(7, 500, math.inf) == 500
