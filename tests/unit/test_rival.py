"""The quantisers that `tools/rivals.py` measures beside RAC are as good as their papers say, and count every bit."""

from __future__ import annotations

import ctypes
import shutil
import types
from pathlib import Path

import gguf
import numpy as np
import pytest

import rivals
from minilm_bar import nearest
from rac.linalg.triangular import damped
from rival import choice, compiled, gptvq, kinds, llama, qtip, watersic

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
K = (2, 3, 4)
DISTORTION = {2: 0.069, 3: 0.0176, 4: 0.0047}
"""Squared error of the trellis on a Gaussian: QTIP's table 1 has 0.069 for 2 bits; others as measured here."""


@pytest.fixture(scope="module")
def problem():
    """A matrix (96, 96) and a damped second moment far from white."""
    rng = np.random.default_rng(0)
    mixed = rng.standard_normal((96, 96)) * np.exp(0.7 * rng.standard_normal(96))
    return rng.standard_normal((96, 96), np.float32), damped(mixed @ mixed.T / 96, 0.03)


def noise(w, second, out):
    """Output error over output energy."""
    e = (w - out).astype(np.float64)
    return float(((e @ second) * e).sum() / ((w.astype(np.float64) @ second) * w).sum())


@pytest.mark.parametrize("k", K)
def test_every_ring_closes_and_is_as_near_as_the_paper_says(k):
    x = np.random.default_rng(k).standard_normal((12, 256), np.float32)
    scale = np.float32(1 if k == 2 else 1.08)
    states = qtip.rings(x / scale, k)
    before, after = states.astype(np.int64) << k & 0xFFFF, np.roll(states, -1, 1).astype(np.int64)
    assert (before >> k == after >> k).all(), "a state follows the one before it"
    error = float(((qtip.code()[states] * scale - x) ** 2).mean())
    assert DISTORTION[k] * 0.9 < error < DISTORTION[k] * 1.12


@pytest.mark.parametrize("k", K)
def test_the_plain_loop_finds_the_same_rings(k, monkeypatch):
    x = np.random.default_rng(9).standard_normal((2, 40), np.float32)
    x[0, 3] = 30  # far outside of the code
    found = qtip.rings(x, k)
    monkeypatch.setattr(compiled, "FLAGS", (*compiled.FLAGS, "-mno-avx512bw"))
    compiled.library.cache_clear()
    assert np.array_equal(qtip.rings(x, k), found)
    monkeypatch.undo()
    compiled.library.cache_clear()


def test_a_ring_is_the_best_of_those_that_close_alike():
    """Five steps of 4 bits, 12 of the 20 given by where the ring closes: the other 256 rings are all tried."""
    x, values = np.random.default_rng(1).standard_normal((1, 5), np.float32), qtip.code()
    states = qtip.rings(x, 4)[0].astype(np.int64)
    given = [states[0] >> s & 15 for s in (12, 8, 4)]  # the last three of the five
    rings = [[a, b, *given] for a in range(16) for b in range(16)]
    each = np.array([[sum(r[(i - j) % 5] << 4 * j for j in range(4)) for i in range(5)] for r in rings])
    error = ((values[each] - x) ** 2).sum(1)
    mine = float(((values[states] - x[0]) ** 2).sum())
    assert states.tolist() in each.tolist()
    assert mine <= float(error.min()) + 5 * 2.0**-12, "but for the rounding of costs"


def test_blocks_fed_back_leave_what_the_factor_says(problem):
    w, second = problem
    feed, lower = compiled.feeds(second, 16)
    error, left = np.zeros(w.shape), 0.0
    for a in range(80, -1, -16):
        b = a + 16
        target = w[:, a:b] + error[:, b:] @ feed[b:, a:b]
        rounded = np.rint(target)
        error[:, a:b] = w[:, a:b] - rounded
        left += float((((target - rounded) @ lower[a:b, a:b]) ** 2).sum())
    assert left == pytest.approx(float(((error @ second) * error).sum()), rel=1e-4)


@pytest.mark.parametrize("k", [2, 3])
def test_each_is_better_than_the_ones_that_it_should_beat(problem, k):
    w, second = problem
    steps = np.abs(w).max(1, keepdims=True) * 2 / (2**k - 1)
    nearest = (np.rint(w / steps - 0.5) + 0.5) * steps
    found = {m.__name__: m.quantised(w, second, k) for m in (qtip, watersic, gptvq)}
    error = {name: noise(w, second, out) for name, (_, out) in found.items()}
    assert error["rival.gptvq"] < 0.5 * noise(w, second, nearest)
    assert error["rival.qtip"] < error["rival.gptvq"]
    bits = {name: b / w.size for name, (b, _) in found.items()}
    assert bits["rival.qtip"] == pytest.approx(k + (16 + 2 * 96) / w.size)
    assert bits["rival.watersic"] == pytest.approx(k, abs=0.01)
    assert k + 0.1 < bits["rival.gptvq"] < k + 0.13
    sides = gptvq.SIDES[k]
    for name, most in (("rival.gptvq", 4**k * (96 // sides) ** 2), ("rival.watersic", w.size)):
        assert len(np.unique(found[name][1])) <= 2 * most


def test_groups_of_pairs_are_nearly_squares_of_the_same_size():
    assert gptvq.group(576, 1536, 2) == (48, 48)
    assert gptvq.group(640, 2048, 2) == (40, 64), "48 divides neither"
    assert gptvq.group(1024, 640, 3) == (128, 80)
    assert gptvq.group(30, 14, 4) == (30, 14), "smaller than a group"


def test_pairs_by_codebooks_of_rectangles(problem):
    w, second = problem
    bits, out = gptvq.quantised(np.ascontiguousarray(w[:, :80]), second[:80, :80], 2)
    assert gptvq.group(96, 80, 2) == (32, 80)
    assert bits == 2 * 96 * 80 + 3 * (16 * 16 + 16)
    assert noise(w[:, :80], second[:80, :80], out) < 0.2


def test_int4_counts_scales_and_zero_points(problem):
    w, second = problem
    bits, out = nearest(w, second, 32)
    assert bits == 5 * w.size
    assert float(np.abs(w - out).max()) <= float(np.ptp(w)) / 15
    assert all(len(np.unique(out[0, a : a + 32])) <= 16 for a in (0, 32, 64))


SENTENCES = "One two three four five. Six is too short.\n\nA head\n\nSeven eight nine ten ele\u2010\n  ven! {}"


def test_sentences_of_a_text():
    text = SENTENCES.format("What is after it, then?")
    found = ["One two three four five.", "Seven eight nine ten eleven!", "What is after it, then?"]
    assert kinds.sentences(text, 3) == found
    assert kinds.sentences(text, 1) == found[:1]
    with pytest.raises(SystemExit, match="3 sentences, 4 are asked for"):
        kinds.sentences(text, 4)


def test_passages_of_a_text():
    text = " ".join(map(str, range(100)))
    found = kinds.passages(text, 3, 20)
    assert [p.split()[0] for p in found] == ["0", "40", "80"] and all(len(p.split()) == 20 for p in found)
    with pytest.raises(SystemExit, match="100 words, 6 passages of 20"):
        kinds.passages(text, 6, 20)


def test_an_encoder_is_measured_by_what_it_makes_of_sentences(tmp_path):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("support.models")
    models.bert().bert.save_pretrained(tmp_path)
    models.tokenizer().save_pretrained(tmp_path)
    assert kinds.kind_of(tmp_path) is kinds.Sentences
    measure = kinds.Sentences(tmp_path, SENTENCES.format(""), 2)
    same = {"far": pytest.approx(0, abs=1e-12), "lowest": pytest.approx(1)}
    assert measure.original() == same
    name = "encoder.layer.0.output.dense.weight"
    other = {name: np.zeros((models.WIDTH, models.INNER), np.float32), "embeddings.position_ids": np.arange(3)}
    far = measure.of(other, "other")
    assert 0 < far["far"] < 1 - far["lowest"]
    assert measure.of({}, "own") == same, "what was put in is gone"
    with pytest.raises(KeyError):
        measure.of({"unknown": np.zeros(3, np.float32)}, "other")

    from transformers import AutoModel

    model = AutoModel.from_pretrained(tmp_path, dtype="float32").eval()
    cosines = []
    for s in kinds.sentences(SENTENCES.format(""), 2):
        ids = torch.tensor([models.tokenizer()(s).input_ids])
        with torch.no_grad():
            model.load_state_dict(measure._state)
            a = model(ids).last_hidden_state[0].mean(0)
            model.load_state_dict(measure._state | {name: torch.zeros(models.WIDTH, models.INNER)})
            b = model(ids).last_hidden_state[0].mean(0)
        cosines.append(float(torch.cosine_similarity(a, b, dim=0)))
    assert far == {
        "far": pytest.approx(1 - np.mean(cosines), abs=1e-5),
        "lowest": pytest.approx(min(cosines), abs=1e-5),
    }


def test_a_causal_model_is_measured_by_its_predictions(tmp_path):
    models = pytest.importorskip("support.models")
    models.write("llama", tmp_path)
    assert kinds.kind_of(tmp_path) is kinds.Predictions
    measure = kinds.Predictions(tmp_path, models.TEXT, 1024)
    assert measure.original()["kl"] == 0
    table = np.zeros((models.VOCABULARY, models.WIDTH), np.float32)
    found = measure.of({"model.embed_tokens.weight": table}, "other")
    assert found["perplexity"] == pytest.approx(models.VOCABULARY, rel=0.01), "nothing is known"
    assert kinds.Predictions.cells(found, "").count("|") == len(kinds.Predictions.heads)
    assert kinds.Sentences.cells({"far": 0.1, "lowest": 0.5}, " x") == " 0.10000 x | 0.5000 |"


def test_each_false_continuation_follows_the_same_word_elsewhere():
    rng = np.random.default_rng(0)
    words = [f"{w}{i}" if w == "x" else w for i, w in enumerate(rng.choice(["the", "of", "x"], 2000))]
    found = choice.questions(" ".join(words), 20)
    assert found == choice.questions(" ".join(words), 20), "seeded"
    assert len(found) == 20
    assert len({q.true for q in found}) > 1
    for one in found:
        before = one.before.split()
        assert len(before) == choice.BEFORE
        assert len(set(one.choices)) == choice.CHOICES
        starts = [c.split()[0] for c in one.choices]
        assert starts.count(starts[one.true]) == 1, "told apart by the first word"
        text = " ".join(words)
        assert f"{one.before} {one.choices[one.true]}" in text
        assert all(f"{before[-1]} {c}" in text for c in one.choices)
    with pytest.raises(SystemExit, match="too short"):
        choice.questions("a b " * 30, 3)


def test_continuations_of_one_run_are_those_of_runs_of_their_own(tmp_path):
    torch = pytest.importorskip("torch")
    models = pytest.importorskip("support.models")
    models.write("llama", tmp_path)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    before, choices = [5, 9, 2, 7], [[3, 1], [4], [8, 8, 6], [1, 2]]
    for mine, c in zip(choice.losses(model, before, choices), choices, strict=True):
        with torch.no_grad():
            predicted = model(torch.tensor([before + c])).logits[0].log_softmax(-1)
        alone = -sum(float(predicted[len(before) - 1 + i, t]) for i, t in enumerate(c))
        assert mine == pytest.approx(alone, rel=1e-4)


def test_the_likeliest_letter_by_letter_is_chosen(monkeypatch):
    asked = [choice.Question("a", ("bb", "cccc"), 1), choice.Question("a", ("bb", "cccc"), 0)]
    monkeypatch.setattr(choice, "losses", lambda *_: [3.0, 4.0])
    found = choice.answers(None, lambda text, **_: type("Tokens", (), {"input_ids": [len(text)]}), asked)
    assert found.right == (True, False)
    assert found.loss == (1.0, 1.5)
    assert choice.mean(found.loss) == (1.25, pytest.approx(0.25))


def test_what_is_read_begins_as_the_tokenizer_begins_texts(monkeypatch):
    models = pytest.importorskip("support.models")
    read = []
    monkeypatch.setattr(choice, "losses", lambda _, before, choices: read.append((before, choices)) or [1.0, 2.0])
    choice.answers(None, models.tokenizer(begin=True), [choice.Question("a", ("b", "c"), 0)])
    [(before, choices)] = read
    assert before == models.tokenizer()("!a").input_ids
    assert choices == [models.tokenizer()(f" {c}").input_ids for c in "bc"]


@pytest.fixture
def small(tmp_path):
    """A GGUF file of one block: two matrices, a norm and an embedding."""
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), np.float16))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(32, np.float32))
    writer.add_tensor("blk.0.attn_q.weight", np.zeros((32, 32), np.float32))
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("blk.0.ffn_up.weight", gguf.quantize(np.ones((96, 32), np.float32), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_a_gguf_file_has(small):
    found = llama.contents(small)
    assert found.bits == (32 * 32 * 32 + 96 * 32 * 8.5) / (128 * 32)
    assert (found.types, found.table) == ("1 F32, 1 Q8_0", "F16")


class _Llama:
    """Stands in for llama-cpp-python: notes what it is asked to do."""

    LLAMA_FTYPE_MOSTLY_Q2_K = 10

    class llama_model_imatrix_data(ctypes.Structure):  # noqa: N801
        _fields_ = (
            ("name", ctypes.c_char_p),
            ("data", ctypes.POINTER(ctypes.c_float)),
            ("size", ctypes.c_size_t),
        )

    def llama_model_quantize_default_params(self):
        class Params(ctypes.Structure):
            _fields_ = (
                ("nthread", ctypes.c_int32),
                ("ftype", ctypes.c_int),
                ("allow_requantize", ctypes.c_bool),
                ("imatrix", ctypes.POINTER(self.llama_model_imatrix_data)),
            )

        return Params()

    def llama_model_quantize(self, source, target, params):
        how = params._obj
        self.ftype, self.seen = how.ftype, {}
        if how.imatrix:
            for entry in iter(how.imatrix):
                if not entry.name:
                    break
                self.seen[entry.name.decode()] = [entry.data[i] for i in range(entry.size)]
        Path(target.decode()).write_bytes(Path(source.decode()).read_bytes())
        return 1 if "refused" in target.decode() else 0


def test_llama_cpp_gets_the_importance_by_its_own_names(small, tmp_path, monkeypatch):
    library = _Llama()
    monkeypatch.setattr(llama, "library", lambda: library)
    columns = np.arange(32.0)
    llama.make(small, tmp_path / "q.gguf", "Q2_K", {"model.layers.0.self_attn.q_proj.weight": columns})
    assert library.ftype == 10
    assert library.seen == {"blk.0.attn_q.weight": columns.tolist()}
    assert (tmp_path / "q.gguf").exists()
    llama.make(small, tmp_path / "none.gguf", "Q2_K", {})
    assert library.seen == {}
    with pytest.raises(SystemExit, match="no file type Q7"):
        llama.make(small, tmp_path / "q.gguf", "Q7", {})
    with pytest.raises(SystemExit, match="made no Q2_K"):
        llama.make(small, tmp_path / "refused.gguf", "Q2_K", {})
    assert not (tmp_path / "refused.gguf").exists()


def test_packs_of_a_row_are_averaged():
    def pack(bits, kl):
        return types.SimpleNamespace(found={"bits": bits, "bytes": 100, "t": {"kl": kl, "top1": 0.5}})

    found = rivals.mean([pack(3.0, 0.10), pack(2.98, 0.12), types.SimpleNamespace(found={})], ["t"], "kl")
    assert found["packs"] == 2
    assert found["bits"] == pytest.approx(2.99)
    assert found["t"] == {"kl": pytest.approx(0.11), "top1": 0.5, "spread": pytest.approx(0.2)}
    assert rivals.mean([types.SimpleNamespace(found={})], ["t"], "kl") == {}


def test_equal_divergence_lies_on_straight_lines_of_its_logarithm():
    points = [(2.0, 0.4), (3.0, 0.1)]
    assert rivals.equal(points, 0.2) == pytest.approx(2.5)
    assert rivals.equal(points, 0.5) is None


def test_c_that_is_not_there():
    with pytest.raises(FileNotFoundError):
        compiled.library("nothing")
    assert isinstance(compiled.pointer(np.zeros(3)), ctypes.c_void_p)


def test_factors_of_rows_and_columns_are_learned_and_nothing_else(tmp_path):
    models = pytest.importorskip("support.models")
    tuned = pytest.importorskip("rival.tuned")
    own = models.write("llama", tmp_path / "m", models.torch.float32).state_dict()
    text = "".join(chr(97 + (i * i // 7 + i) % 26) + " " * (i % 5 == 0) for i in range(9000))
    ids = np.array(models.tokenizer()(text[:2048]).input_ids).reshape(-1, 256)
    school = tuned.School(tmp_path / "m", text, ids, 16)
    rng = np.random.default_rng(0)
    right = {n: w.numpy() for n, w in own.items() if n.endswith("proj.weight")}
    wrong = {n: w * (1 + 0.3 * rng.standard_normal((len(w), 1), np.float32)) for n, w in right.items()}
    out, said = school.tuned(wrong, tmp_path / "state", tmp_path / "taught")
    before, after = (float(x) for x in said.split(" nats")[0].split(" to "))
    assert after < 0.95 * before
    moved = 0
    for name, w in wrong.items():
        factors = (out[name] / w).astype(np.float64)
        rows, columns = factors[:, 0], factors[0] / factors[0, 0]
        np.testing.assert_allclose(factors, rows[:, None] * columns, rtol=1e-4)
        moved += bool(np.ptp(rows) and np.ptp(columns))
    assert moved == len(wrong)
    again, words = school.tuned(wrong, tmp_path / "state", tmp_path / "taught")
    assert words == said and all(np.array_equal(again[name], w) for name, w in out.items())
    with pytest.raises(tuned.UnfitError, match="embed_tokens"):
        school.tuned({"model.embed_tokens.weight": own["model.embed_tokens.weight"].numpy()}, tmp_path, tmp_path)
    assert tuned.scaled(w, name, {}) is w, "nothing better was found"


def test_factors_are_counted():
    tuned = pytest.importorskip("rival.tuned")
    shapes = [(3, 5), (7, 11)]
    assert tuned.bits("watersic", shapes) == 16 * 10, "its columns have steps already"
    assert tuned.bits("qtip", shapes) == 15 * 26, "instead of signs"
    assert tuned.bits("gptvq", shapes) == 16 * 26
