"""Whole packs and single tiles under every set of kernels: the same bytes, and no byte beside what they were given."""

from __future__ import annotations

import functools
import io

import ml_dtypes
import numpy as np
import pytest

import rac
from rac import native
from rac import tensor as tn
from rac.container.access import BytesAccess
from rac.container.reader import Archive
from rac.cpu.work import Place, Work
from rac.decode import random as ld
from rac.decoder import Decoder
from rac.encode.align import recipe
from rac.native import product
from support import kernels, tiles
from support.fence import fenced

BF16 = np.dtype(ml_dtypes.bfloat16)


@functools.cache
def matrix(dtype: str, rows: int, cols: int):
    """Normal numbers of several scales, some zeros and an infinity."""
    rng = np.random.default_rng(rows)
    scale = np.exp2(rng.integers(-3, 3, (rows, 1))) * np.exp2(rng.integers(-3, 3, cols))
    out = rng.standard_normal((rows, cols)) * scale
    out.flat[::97] = 0
    return (out * 3 + 128).clip(0, 255).astype("u1") if dtype == "u1" else out.astype(np.dtype(dtype))


def packed(array, **options):
    """An archive; small matrices are quantised too."""
    out = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(recipe, "SMALLEST", 1)
        rac.pack({"a": array}, out, **options)
    return out.getvalue()


LOSSY = {"5 bits": {"bits": 5}}  # 3 bits take a minute in the emulator


@functools.cache
def expected(how):
    with native.using("generic"):
        return packed(matrix("f4", 48, 64), **LOSSY[how])


@pytest.mark.parametrize("how", LOSSY)
@pytest.mark.parametrize("cpu", kernels.CPUS)
def test_a_lossy_pack_has_the_same_bytes(cpu, how):
    with kernels.using(cpu):
        assert packed(matrix("f4", 48, 64), **LOSSY[how]) == expected(how)


FILES = [
    *[(dtype, {"level": level}) for dtype in ("u1", "f2", BF16, "f4", "f8") for level in ("fast", "default", "max")],
    *[(BF16, {"level": "default", "lanes": lanes}) for lanes in (1, 2, 3, 8, 16, 32)],
    *[(dtype, {"bits": 3}) for dtype in (BF16, "f4", "f2")],
]


@functools.cache
def opened():
    """Of each of FILES the tensor, the units in front of its tiles, the tiles, and what all of them are."""
    out = []
    with pytest.MonkeyPatch.context() as patch:
        tiles.cut(patch)
        for dtype, options in FILES:
            archive = packed(matrix(dtype, 67, 131), **options)
            a = Archive(BytesAccess(archive))
            t = tn.parse(a.record(a.index.entries[0]), a.limits)
            (units,) = ld.read_units(a, t, [(0, len(t.units))])
            with native.using("generic"):
                loaded = rac.load(archive)["a"]
            whole = loaded.view(f"u{loaded.itemsize}")
            out.append((t, [u.tobytes() for u in units[: t.first]], units[t.first :], whole))
    assert any(len(units) > 5 for *_, units, _ in out)
    return out


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("cpu", kernels.CPUS)
def test_tiles_between_fences(cpu, before):
    """Units are read and words are written to the byte, tile by tile and many in one call."""
    for t, front, units, whole in opened():
        with kernels.using(cpu):
            decoder, work, found = Decoder(t, front), Work(), []
            for k, unit in enumerate(units):
                box = t.grid.box(k)
                words = fenced(np.zeros((box.r1 - box.r0, box.c1 - box.c0), whole.dtype), before)
                work.add(decoder, range(k, k + 1), fenced(unit, before), Place(words, box.r0, box.c0))
                found.append((box, words))
                if k % 2:
                    work.run()
                    work = Work()
            work.run()
        for box, words in found:
            assert (words == whole[box.r0 : box.r1, box.c0 : box.c1]).all()


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("cpu", kernels.CPUS)
def test_words_between_fences(cpu, before):
    """What the encoder does to words, symbols and matrices."""
    rng = np.random.default_rng(0)
    fence = functools.partial(fenced, before=before)
    for n in (1, 7, 64, 333, 9001):
        for word in (1, 2, 4, 8):
            data = fence(np.frombuffer(rng.bytes(word * n), f"<u{word}"))
            shift = max(0, 8 * word - 17)
            lut = fence(rng.integers(0, 256, 65536).astype(np.uint8))
            found = []
            for kind in (cpu, None):
                with kernels.using(kind):
                    hist = fence(np.zeros(65536, np.uint32))
                    native.scan(data, (1 << (8 * word - 1)) - 1, shift, hist)
                    symbols = native.symbols(data.reshape(1, -1), 0, 1, shift, lut)
                found.append((hist.tobytes(), symbols.tobytes()))
            assert found[0] == found[1]
        sym = fence(rng.integers(0, 16, n).astype(np.uint8))
        freq = np.full((1, 16), 256, np.uint16)
        model = native.symbol_model(freq, np.arange(256, dtype=np.uint8)[None])
        segments = np.array([[n, 0]], np.int64)
        with kernels.using(cpu):
            words, counts = native.encode_lanes(sym, 8, segments, fence(model))
        with kernels.using("generic"):
            same, numbers = native.encode_lanes(sym, 8, segments, model)
        assert words.tobytes() == same.tobytes() and counts.tobytes() == numbers.tobytes()
    for h, w, n in ((1, 1, 1), (5, 65, 37), (7, 130, 9)):
        t, a, b = (rng.standard_normal(shape, np.float32) for shape in ((h, w), (h, n), (n, w)))
        ours = fence(t)
        with kernels.using(cpu):
            product.add(ours, fence(a), fence(b))
        with kernels.using(None):
            product.add(t, a, b)
        assert (ours == t).all()
