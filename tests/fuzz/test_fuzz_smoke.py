"""A few seconds of the fuzzer with a fixed seed."""

import importlib.util
from pathlib import Path


def test_fuzz(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("fuzz_reader", Path(__file__).with_name("fuzz_reader.py"))
    fuzz = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fuzz)
    monkeypatch.chdir(tmp_path)
    assert fuzz.run(4, 7) > 50
