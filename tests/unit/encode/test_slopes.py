"""What errors of tables cost beside those of layers, measured on text that was not calibrated on."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from rac.calibrate import passes, slopes, tables  # noqa: E402
from rac.calibrate.chain import UnfitError  # noqa: E402
from rac.calibrate.file import load  # noqa: E402
from rac.calibrate.folder import Folder  # noqa: E402
from rac.calibrate.layers import Layer, calibrate, joined  # noqa: E402
from rac.encode.align import recipe  # noqa: E402
from rac.errors import SourceError  # noqa: E402
from support import models  # noqa: E402

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
KEPT = {"tokens": 320, "context": 64}


def words(low, high, count, seed=0):
    return np.random.default_rng(seed).integers(low, high, count)


def made(path, tied=False):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        vocab_size=160,
        initializer_range=0.2,
        tie_word_embeddings=tied,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def measured(monkeypatch):
    """The slopes of the last calibration, as they were measured."""
    held = []
    put = slopes.Slopes.put

    def kept(self, each):
        held.append((self, [list(row) for row in each]))
        put(self, each)

    monkeypatch.setattr(slopes.Slopes, "put", kept)
    return held


@pytest.mark.parametrize("tied", [False, True])
def test_each_table_has_its_own(tmp_path, measured, tied):
    found = calibrate(made(tmp_path, tied), words(3, 90, 320 + 5 * 64), **KEPT)
    names = {EMBEDDING} if tied else {EMBEDDING, HEAD}
    assert {name for name, layer in found.items() if layer.slope is not None} == names
    ((of, each),) = measured
    assert len(of.ids) == len(each) == 5
    for k, table in enumerate(of.tables, 1):
        expected = math.exp(np.mean([math.log(row[k] / row[0]) for row in each]))
        assert found[EMBEDDING if table.read else HEAD].slope == pytest.approx(expected)


@pytest.mark.parametrize("tied", [False, True])
def test_errors_cost_what_they_are_foretold_to(tmp_path, monkeypatch, measured, tied):
    """Small ones, on text of the calibration's own kind."""
    monkeypatch.setattr(slopes, "FORETOLD", 1e-4)
    folder = made(tmp_path, tied)
    calibrate(folder, words(3, 90, 320 + 8 * 64), **KEPT)
    ((of, each),) = measured
    for errors in (*of.layers.values(), *(table.errors for table in of.tables)):
        e, second = errors().double().numpy(), np.array(errors.folder.array(errors.entry["second"]))
        cost = np.array(errors.folder.array(errors.entry["sensitivity"]))
        assert 0.5 * ((e @ second * e).sum(1) @ cost) == pytest.approx(errors.nats, rel=0.25)
    assert sum(errors.nats for errors in of.layers.values()) == pytest.approx(slopes.FORETOLD)
    assert np.all(np.abs(np.log(np.mean(each, 0) / 64 / slopes.FORETOLD)) < math.log(2))
    parameters = dict(of.chain.model.named_parameters())
    stored = transformers.LlamaForCausalLM.from_pretrained(folder).state_dict()
    assert all(p.equal(stored[name]) for name, p in parameters.items())  # errors are gone


def test_rows_that_only_other_text_reads_cost_more(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "EVIDENCE", 100)  # else it outweighs a text as short as this
    folder = made(tmp_path)
    own, other = words(3, 40, 320 + 320), words(50, 90, 320)
    alike = calibrate(folder, own, **KEPT)
    foreign = calibrate(folder, np.concatenate([own[:320], other]), **KEPT)
    assert foreign[EMBEDDING].slope > 3 * alike[EMBEDDING].slope
    assert np.array_equal(foreign[EMBEDDING].sensitivity, alike[EMBEDDING].sensitivity)


def test_nothing_is_measured_without_other_text_gradients_or_blocks(tmp_path, monkeypatch):
    folder, ids = made(tmp_path), words(3, 90, 640)
    assert calibrate(folder, ids[:320], **KEPT)[EMBEDDING].slope is None
    assert calibrate(folder, ids, fisher=False, **KEPT)[EMBEDDING].slope is None

    def unfit(*_):
        raise UnfitError("asked for")

    monkeypatch.setattr(passes, "_chained", unfit)
    assert calibrate(folder, ids, **KEPT)[EMBEDDING].slope is None


def test_where_memory_is_short_nothing_is_measured(tmp_path, monkeypatch):
    def short(*_):
        raise MemoryError

    monkeypatch.setattr(slopes.Errors, "__call__", short)
    said = []
    found = calibrate(made(tmp_path), words(3, 90, 640), note=lambda *a: said.append(a), **KEPT)
    assert found[EMBEDDING].slope is None
    assert found[EMBEDDING].sensitivity is not None
    assert said[-1] == ("what errors of tables cost is not measured: there is too little memory", 0, 0)


def test_of_a_text_most_is_what_follows_and_some_is_of_the_mix(tmp_path, monkeypatch):
    monkeypatch.setattr(slopes, "SHORT", 16)
    models.write("llama", tmp_path)
    models.tokenizer(begin=True).save_pretrained(tmp_path)
    first, *ids = models.tokenizer(begin=True)(models.TEXT).input_ids
    used = np.zeros((4, 16), np.int64)
    found = slopes.held_out(str(tmp_path), models.TEXT, used)
    own = slopes.WINDOWS - slopes.WINDOWS // slopes.FOREIGN
    assert found.shape == (slopes.WINDOWS, 16)
    assert np.all(found[:, 0] == first)
    assert found[:own, 1:].reshape(-1).tolist() == ids[4 * 15 : (4 + own) * 15]
    mix = slopes.held_out(str(tmp_path), None, used)
    assert np.array_equal(mix[: slopes.WINDOWS - own], found[own:])
    (tmp_path / "tokenizer.json").unlink()
    assert len(slopes.held_out(str(tmp_path), None, used)) == 0


def test_of_short_sequences_there_are_more(tmp_path):
    ids = words(3, 90, 20_000)
    assert slopes.held_out(str(tmp_path), ids, np.zeros((4, 256), np.int64)).shape == (8, 256)
    assert slopes.held_out(str(tmp_path), ids, np.zeros((4, 64), np.int64)).shape == (32, 64)


def test_a_table_gets_half_the_logarithm_in_bits():
    needs, seen = {"t": (1.0, 640), "l": (0.5, 64)}, Layer(np.eye(8, dtype=np.float32), np.ones(8))

    def bits(slope):
        layers = {"t": replace(seen, slope=slope), "l": seen}
        return recipe._shared(needs, {"t"}, layers, recipe.Sample())["t"]

    assert bits(16.0) == pytest.approx(0.5 + 2)
    assert bits(0.25) == pytest.approx(0.5 - 1)
    assert bits(None) == pytest.approx(0.5 + recipe.MORE)


def test_slopes_are_kept_joined_and_saved(tmp_path):
    folder, cache = made(tmp_path / "m"), tmp_path / "cache"
    found = calibrate(folder, words(3, 90, 640), cache=cache, **KEPT)
    slope = found[EMBEDDING].slope
    again = calibrate(folder, words(3, 90, 640), cache=cache, **KEPT)
    assert again[EMBEDDING].slope == slope
    twice = {EMBEDDING: replace(found[EMBEDDING], slope=4 * slope)}
    unknown = {EMBEDDING: replace(found[EMBEDDING], slope=None)}
    assert joined([found, twice, unknown])[EMBEDDING].slope == pytest.approx(2 * slope)
    assert joined([unknown])[EMBEDDING].slope is None
    found.save(tmp_path / "one.calibration")
    assert load(tmp_path / "one.calibration")[EMBEDDING].slope == slope
    for bad in (0.0, -1.0, math.inf, math.nan):
        found[EMBEDDING] = replace(found[EMBEDDING], slope=bad)
        found.save(tmp_path / "bad.calibration")
        with pytest.raises(SourceError, match="damaged calibration"):
            load(tmp_path / "bad.calibration")


def test_wide_matrices_get_errors_block_by_block(monkeypatch):
    monkeypatch.setattr(slopes, "WIDEST", 8)
    folder, x = Folder(None, ""), np.random.default_rng(0).standard_normal((64, 20))
    second = folder.put("second.npy", (x.T @ x / 64).astype(np.float32))
    sensitivity = folder.put("sensitivity.npy", np.ones(4000))
    entry = {"second": second, "sensitivity": sensitivity, "transposed": True, "finite": True}
    errors = slopes.Errors(entry, folder, 3, 4000, 0.5)
    e = errors().double().numpy()
    assert e.shape == (20, 4000)
    assert np.array_equal(e, errors().double().numpy())
    assert 0.5 * float((e.T @ (x.T @ x / 64) * e.T).sum()) == pytest.approx(0.5, rel=0.05)
