"""What tools/bench_lossless.py says about its bars, and the file that tools/shaped.py makes for one of them."""

import json

import numpy as np

import lossless_bars
import shaped


def test_bars_of_a_model_are_met_or_missed():
    speeds = {"rac-default@avx2": 65, "rac-fast": 130, "rac-default": 89, "zipnn": 100, "openzl": 140, "zstd-3": 900}
    lines = [
        *lossless_bars.verdicts("demo/minilm-bf16.safetensors", dict.fromkeys(speeds), 2, lambda r, w: speeds.get(r))
    ]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in lines if "unpack" in line]
    assert {(c[1], c[2], c[-1]) for c in cells} == {
        ("unpack rac-default@avx2", "zipnn", "met"),
        ("unpack rac-default", "zipnn", "MISSED"),
        ("unpack rac-fast", "zipnn", "aim met"),
        ("unpack rac-fast", "openzl", "MISSED"),
    }


def test_other_files_have_no_bars():
    rows = {"rac-default": None, "zipnn": None}
    assert not [*lossless_bars.verdicts("minilm-f32.safetensors", rows, 1, lambda r, w: 1.0)]


def test_shaped_matrices_take_after_the_small_ones(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    real = rng.standard_normal((256, 512)).astype(np.float32) * np.exp(rng.standard_normal((256, 1))).astype(np.float32)
    words = (real.view(np.uint32) >> 16).astype("<u2").tobytes()
    head = {"blk.0.attn_q.weight": {"dtype": "BF16", "shape": [256, 512], "data_offsets": [0, len(words)]}}
    text = json.dumps(head).encode()
    source = tmp_path / "small.safetensors"
    source.write_bytes(len(text).to_bytes(8, "little") + text + words)
    monkeypatch.setattr(shaped, "SHAPES", {"attn_q": (1024, 512), "ffn_up": (512, 512)})
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for out in (a, b):
        shaped.write(shaped.Real(source), out, shaped.plan(3 << 20))
    assert a.read_bytes() == b.read_bytes()
    made = shaped.matrices(a)
    assert {n: w.shape for n, w in made.items()} == {
        "blk.0.attn_q.weight": (1024, 512),
        "blk.0.ffn_up.weight": (512, 512),
        "blk.1.attn_q.weight": (1024, 512),
        "blk.1.ffn_up.weight": (512, 512),
    }
    q = made["blk.0.attn_q.weight"]
    ours, theirs = np.log(np.abs(q)[q != 0]), np.log(np.abs(real))
    assert abs(ours.mean() - theirs.mean()) < 0.2 and abs(ours.std() - theirs.std()) < 0.2
