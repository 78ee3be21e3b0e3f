"""Recovery: what is trained beside the integers, on tiny models; what is left out, and resumed to the same bytes."""

import copy
import math

import numpy as np
import pytest

import rac
from rac.calibrate.builtin import learned
from rac.calibrate.folder import Folder
from rac.calibrate.text import sequences
from rac.encode.asked import Asked
from rac.encode.pack import pack
from rac.encode.verify import verify
from rac.errors import MismatchError
from rac.ranks.packing import check

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from rac.cli import main
from rac.cli.info import report
from rac.recover import lessons as texts
from rac.recover import model as models_of
from rac.recover import recovery, run, teacher
from rac.recover.lessons import Lessons, Text, TooLittleError, lessons
from rac.recover.model import Trained, UnfitError
from rac.recover.run import Plan, Training
from support import models  # needs transformers

TEXT = "".join(chr(97 + (i * i // 7 + i) % 26) + " " * (i % 5 == 0) for i in range(4200))
STEPS = 12
TOKENS = 256


def silent(*_):
    pass


def matrices(model):
    return [n for n in model.state_dict() if n.endswith(("proj.weight", "c_fc.weight", "c_attn.weight"))]


def vectors(model):
    return {n: "F32" for n, p in model.named_parameters() if p.dim() == 1}


class Made:
    """A tiny model with rough matrices, and what its original predicts."""

    def __init__(self, kind="llama", steps=STEPS, folder=None, note=silent, most=10**6, rough=0.3, dtype=torch.float32):
        torch.manual_seed(0)
        self.original = models.KINDS[kind]().eval()
        self.names = matrices(self.original)
        self.trained = Trained(copy.deepcopy(self.original), self.original.state_dict(), dtype=dtype)
        ids = np.random.default_rng(0).integers(0, 256, (8, 2, 32))
        self.plan = Plan(steps, most, vectors(self.original))
        self.training = Training(self.trained, Lessons(ids[:6], ids[6:]), self.plan, folder or Folder(None, "x"), note)
        self.training.teach()
        made = torch.Generator().manual_seed(1)
        for name in self.names:
            w = self.original.get_parameter(name).data
            self.original.get_parameter(name).data = w * (1 + rough * torch.randn(w.shape, generator=made))
            self.trained.put(name, self.original.get_parameter(name).data.numpy())
        self.trained.train(self.names, self.plan.types)

    def gradient(self):
        self.training._loss(self.training.lessons.train[0]).backward()
        return self.trained.gradient()


@pytest.mark.parametrize("kind", ["llama", "llama-untied", "gpt2", "gemma"])
def test_the_gradient_is_that_of_the_model_itself(kind):
    m = Made(kind)
    mine, state = m.gradient(), dict(m.original.named_parameters())
    leaves = {p.name: torch.ones(len(state[p.name]), requires_grad=True) for p in m.trained.parts if p.gains}
    leaves |= {p.name: state[p.name].data.clone().requires_grad_() for p in m.trained.parts if not p.gains}
    given = {n: state[n].data * x[:, None] if n in m.names else x for n, x in leaves.items()}
    ids = torch.from_numpy(m.training.lessons.train[0])
    out = torch.func.functional_call(m.original, given, (ids,)).logits.reshape(-1, models.VOCABULARY)
    index, log, weight = teacher.lesson(
        m.training.folder, m.training.lessons.train[0], "cpu"
    )  # all tokens are among the likeliest here
    (weight * (log - out.log_softmax(-1).gather(-1, index))).sum(-1).mean().backward()
    assert {p.name for p in m.trained.parts if p.gains} == set(m.names)
    torch.testing.assert_close(mine, torch.cat([leaves[p.name].grad for p in m.trained.parts]), rtol=1e-3, atol=1e-6)


def test_blocks_that_are_run_again_have_the_same_gradient():
    plain, again = Made(), Made()
    assert again.trained.checkpoint(64) < plain.trained.need(64)
    assert torch.equal(plain.gradient(), again.gradient())


def test_a_step_in_bfloat16_has_nearly_the_same_gradient():
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.scaled_dot_product_attention:
                seen.append(args[0].dtype)
            return func(*args, **kwargs or {})

    exact = Made().gradient()
    with Watch():
        m = Made(dtype=torch.bfloat16)
        assert set(seen) == {torch.float32}  # what is taught is exact
        seen.clear()
        m.trained.checkpoint(64)
        found = m.gradient()
    assert seen == [torch.bfloat16] * 2  # torch fails where what is run again has another
    assert torch.nn.functional.cosine_similarity(found, exact, 0) > 0.99


def test_the_divergence_is_right_in_the_mean(monkeypatch):
    monkeypatch.setattr(teacher, "MOST", 6)
    monkeypatch.setattr(teacher, "DRAWN", 4)
    made = torch.Generator().manual_seed(0)
    p, logits = torch.randn(1, 40, generator=made), torch.randn(1, 40, generator=made)
    want = (p.softmax(-1) * (p.log_softmax(-1) - logits.log_softmax(-1))).sum()
    folder, n = Folder(None, "x"), 3000
    ids = np.zeros((1, 1, n), np.int64)
    teacher.teach(lambda _: p.expand(n, 40)[None], ids, folder, silent)
    taught = teacher.lesson(folder, ids[0], "cpu")
    torch.testing.assert_close(taught[2].sum(-1), torch.ones(n), rtol=1e-3, atol=1e-3)
    own = logits.expand(n, 40).clone().requires_grad_()
    found = teacher.divergence(own, taught)
    torch.testing.assert_close(found, want, rtol=0.02, atol=0)
    found.backward()
    torch.testing.assert_close(own.grad.sum(0), (logits.softmax(-1) - p.softmax(-1))[0], rtol=0.05, atol=2e-3)
    index, log, weight = (x[:5] for x in taught)
    few = torch.randn(5, 40, generator=made).double().requires_grad_()
    weight = (weight / weight.sum(-1, keepdim=True)).double()
    assert torch.autograd.gradcheck(lambda x: teacher.divergence(x, (index, log.double(), weight)), few)


def test_training_lowers_the_divergence_within_the_bytes_that_it_has():
    found = Made(steps=24).training.run()
    assert found.after < 0.98 * found.before
    assert found.steps and not found.why
    assert all(k.dtype == np.int8 and (k % 4 == 0).all() for k in found.gains.values())
    most = run.size_of(found.gains) // 2
    less = Made(steps=24, most=most).training.run()
    assert run.size_of(less.gains) <= most
    assert less.after < less.before == found.before


def test_a_training_that_was_stopped_goes_on_to_the_same_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "KEPT", 3)
    whole = Made().training.run()

    def stop(what, done, of):
        if (what, done) == ("recovery", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Made(folder=Folder(tmp_path, "x"), note=stop).training.run()
    told = []
    rest = Made(folder=Folder(tmp_path, "x"), note=lambda *what: told.append(what)).training.run()
    assert [done for what, done, _ in told if what == "recovery"] == [*range(4, STEPS + 1)]
    assert (rest.before, rest.after, rest.steps) == (whole.before, whole.after, whole.steps)
    for mine, theirs in ((rest.gains, whole.gains), (rest.vectors, whole.vectors)):
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_what_is_found_is_the_mean_of_what_steps_have_come_to():
    walk = []
    m = Made(note=lambda what, *_: walk.append(m.trained.theta.clone()) if what == "recovery" else None)
    found = m.training.run()
    assert found.steps > run.LOOKS
    weights = np.array([math.prod(t + j for j in range(run.LATE)) for t in range(1, found.steps + 1)], np.float64)
    mean = sum(w * x.double().numpy() for w, x in zip(weights / weights.sum(), walk, strict=False))
    last = walk[found.steps - 1].numpy()
    for part in (p for p in m.trained.parts if not p.gains):
        assert np.abs(found.vectors[part.name] - mean[part.at]).max() < 2e-6
        assert np.abs(found.vectors[part.name] - last[part.at]).max() > 1e-5  # or it could be either


@pytest.mark.parametrize("rate", [30.0, 1e30])
def test_steps_that_diverge_change_nothing(rate):
    m = Made()
    m.training.plan = Plan(STEPS, 10**6, m.plan.types, rate=rate)
    found = m.training.run()
    assert "diverged" in found.why
    assert (found.steps, dict(found.gains), dict(found.vectors)) == (0, {}, {})
    assert found.after == found.before


@pytest.mark.parametrize("odd", [(0,), (0, 1, 2), (3, 5, 6)])
def test_a_few_hard_lessons_stop_nothing(monkeypatch, odd):
    """Another language costs several times what the rest does, in the first step as in any other."""
    m = Made()
    real, made = m.training._loss, []

    def loss(_, ids):
        if (ids == m.training.lessons.held).all((1, 2)).any():
            return real(ids)
        made.append(real(ids) * (30 if len(made) in odd else 1))
        return made[-1]

    monkeypatch.setattr(Training, "_loss", loss)
    found = m.training.run()
    assert max(x.item() for x in made) > run.WORSE * found.before
    assert (len(made), found.why) == (STEPS, "")


def test_lessons_are_of_all_texts_alike_and_begin_behind_the_calibration(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "TOKENS", 64)
    monkeypatch.setattr(texts, "CONTEXT", 32)
    models.tokenizer().save_pretrained(tmp_path)
    ids = np.array(models.tokenizer()(TEXT).input_ids)
    own = np.arange(1024).reshape(8, 128)
    found = lessons(tmp_path, [Text(ids[:512].reshape(4, 128), TEXT), Text(own)], 12)
    assert found.train.shape == (12, 2, 32)
    assert found.held.shape == (4 + 2, 2, 32)  # an eighth of the short one
    assert np.array_equal(found.held[:4].reshape(-1), ids[512 : 512 + 4 * 64])
    assert np.array_equal(found.train[0].reshape(-1), ids[512 + 4 * 64 : 512 + 5 * 64])
    assert np.array_equal(found.train[1].reshape(-1), own.reshape(-1)[128:192])
    with pytest.raises(TooLittleError, match="1 pieces"):
        lessons(tmp_path, [Text(own[:1, :64])], 12)


def test_lessons_begin_with_what_the_tokenizer_puts_in_front(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "TOKENS", 64)
    models.tokenizer(begin=True).save_pretrained(tmp_path)
    first, *ids = models.tokenizer(begin=True)(TEXT).input_ids
    seen = sequences(np.array(ids[:310]), 320, 32, [first])
    assert seen.shape == (10, 32)
    found = lessons(tmp_path, [Text(seen, TEXT)], 6, TEXT)
    assert np.all(np.concatenate([found.train, found.held])[:, :, 0] == first)
    rest = lambda some: some[:, 1:].reshape(-1).tolist()  # noqa: E731
    assert rest(found.held[0]) == ids[310 : 310 + 62]  # behind what the calibration took
    assert rest(found.held[-1]) == ids[:62]


def test_one_lesson_of_four_is_of_a_general_text(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "TOKENS", 64)
    models.tokenizer().save_pretrained(tmp_path)
    own, general = np.full((32, 32), 3), TEXT[::-1]
    ids = np.array(models.tokenizer()(general).input_ids)
    mine = lambda some: [bool((one == 3).all()) for one in some]  # noqa: E731
    found = lessons(tmp_path, [Text(own)], 12, general)
    assert found.train.shape == (12, 2, 32)
    assert mine(found.train).count(False) == 3
    assert mine(found.held) == [True, True, False]
    assert np.array_equal(found.held[-1].reshape(-1), ids[:64])
    assert np.array_equal(found.train[1].reshape(-1), ids[64:128])
    short = lessons(tmp_path, [Text(own[:16])], 64, general)  # what there is of it decides, not the steps
    assert (mine(short.train).count(True), mine(short.train).count(False)) == (7, 2)


def test_the_built_in_mix_is_that_text_where_people_name_their_own(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(texts, "lessons", lambda *what: asked.append(what[-1]) or lessons(*what))
    pack(folder / "llama", tmp_path / "m.rac", recover=2, **how(folder))
    pack(folder / "llama", tmp_path / "a.rac", recover=2, **how(folder) | {"calibrate": ["auto"]})
    assert asked == [learned(), None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model with a tokenizer, a text and a cache."""
    path = tmp_path_factory.mktemp("recover")
    for kind in ("llama", "bert"):
        models.write(kind, path / kind)
    (path / "text.txt").write_text(TEXT)
    (path / "short.txt").write_text(TEXT[:300])
    pack(path / "llama", path / "plain.rac", **how(path))
    return path


def how(path, text="text.txt"):
    given = {"bits": 3.0, "effort": "fast", "calibrate": str(path / text), "tokens": 256, "cache": str(path / "cache")}
    return given | {"embeddings": False}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Steps of few tokens."""
    monkeypatch.setattr(texts, "TOKENS", TOKENS)
    monkeypatch.setattr(run, "RATE", 8e-3)


def recovered(path, out, kind="llama", text="text.txt", **more):
    """What is said of a pack with recovery, and what its provenance says."""
    said = []
    note = lambda what, done, of: said.append(what) if of == 0 else None  # noqa: E731
    pack(path / kind, out, note=note, **{"recover": STEPS} | how(path, text) | more)
    with rac.open(out) as f:
        return " / ".join(said), f.archives[0].header["provenance"]


def bytes_of_gains(path):
    every = [t["quantised"]["streams"]["gains"] for t in report(str(path))["tensors"] if "quantised" in t]
    assert every
    return sum(every)


def numbers(path):
    return {name: np.asarray(w).tobytes() for name, w in rac.load_file(path).items()}


def test_a_pack_with_recovery(folder, tmp_path):
    out = tmp_path / "m.rac"
    said, stated = recovered(folder, out)
    assert "nats on text that was held out" in said
    before, after = map(float, stated["recovered"]["kl"].split(" to "))
    assert after < before
    assert stated["recover"] == STEPS
    found = verify(out, folder / "llama")
    assert (found.lossy, found.tuned) == (verify(folder / "plain.rac").lossy, 5)
    assert bytes_of_gains(out) > 0
    assert out.stat().st_size < (folder / "plain.rac").stat().st_size * 1.02
    plain, tuned = numbers(folder / "plain.rac"), numbers(out)
    assert {n for n in plain if plain[n] != tuned[n]} > {"model.norm.weight", "model.layers.0.mlp.up_proj.weight"}
    with pytest.raises(MismatchError, match=r"model\.norm"):  # the digest of what the norm was is in its record
        st = pytest.importorskip("safetensors.torch")
        other = tmp_path / "other"
        models.write("llama", other)
        state = st.load_file(other / "model.safetensors")
        state["model.norm.weight"] *= 2
        st.save_file(state, other / "model.safetensors", {"format": "pt"})
        verify(out, other)


def test_the_original_is_asked_once_whatever_the_calibration_keeps(folder, tmp_path, monkeypatch):
    asked = []
    some = teacher._some
    monkeypatch.setattr(teacher, "_some", lambda *what: asked.append(what) or some(*what))
    for effort in ("fast", "max"):  # the one keeps second moments of outputs too
        before = len(asked)
        more = {"effort": effort, "cache": str(tmp_path / "cache"), "force": True}
        _, stated = recovered(folder, tmp_path / "m.rac", **more)
        assert "left out" not in stated["recovered"]
        assert (len(asked) > before) == (effort == "fast")
    assert len(list((tmp_path / "cache").glob("predictions-*"))) == 1


def test_embeddings_that_are_quantised_too_get_no_gains(folder, tmp_path):
    out = tmp_path / "m.rac"
    _, stated = recovered(folder, out, embeddings=True)
    assert "left out" not in stated["recovered"]
    found = {t["name"]: t["quantised"]["streams"]["gains"] for t in report(str(out))["tensors"] if "quantised" in t}
    assert found.pop("model.embed_tokens.weight") == 0
    assert sum(found.values()) > 0


@pytest.mark.parametrize("at", ["recovery", "writing"])
def test_a_pack_that_was_stopped_resumes_to_the_same_bytes(folder, tmp_path, monkeypatch, at):
    monkeypatch.setattr(run, "KEPT", 3)
    given = how(folder) | {"cache": str(tmp_path / "cache"), "recover": STEPS}
    out, other = tmp_path / "m.rac", tmp_path / "other.rac"

    def stop(*what):
        if what[:2] == ("recovery", 5) or (at == "writing" and what[0].endswith("1.mlp.up_proj.weight")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(folder / "llama", out, **given, **({"note": stop} if at == "recovery" else {"progress": stop}))
    assert not out.exists()
    pack(folder / "llama", out, resume=True, **given)
    pack(folder / "llama", other, **given | {"cache": None})
    assert out.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("short", "pieces of 256 tokens to learn from"),
        ("bert", "no causal language model"),
        ("memory", "a step takes 0.0 GB of memory, and may take 0.0"),
        ("gpu", "a step takes 0.0 GB of memory, and may take 0.0"),
        ("large", "the model takes 0.0 GB of memory, and the machine has 0.0"),
        ("load", "not enough memory: the model takes about 0.0 GB"),
        ("full", "not enough memory: a step takes about"),
        ("backward", "the model does not train: no backward"),
        ("nan", "the original predicts NaN or infinity"),
    ],
)
def test_where_nothing_can_be_trained_the_file_is_that_without(folder, tmp_path, monkeypatch, what, said):
    def fails(error):
        def backward(*_):
            raise error

        return backward

    if what == "memory":
        monkeypatch.setattr(recovery, "room", lambda: 1000)
    elif what == "gpu":
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
        monkeypatch.setattr(recovery, "_free", lambda _, own=recovery._free: own("cuda:0"))
    elif what == "large":
        monkeypatch.setattr(recovery, "memory", lambda: 1000)
    elif what == "load":
        monkeypatch.setattr(recovery, "load_model", fails(MemoryError()))
    elif what == "full":
        monkeypatch.setattr(run.Training, "_step", fails(RuntimeError("DefaultCPUAllocator: can't allocate memory")))
    elif what == "backward":
        monkeypatch.setattr(run.Training, "_step", fails(NotImplementedError("no backward")))
    elif what == "nan":
        monkeypatch.setattr(models_of.Trained, "logits", lambda self, ids: torch.full((*ids.shape, 256), torch.nan))
    kind, text = "bert" if what == "bert" else "llama", "short.txt" if what == "short" else "text.txt"
    out, more = tmp_path / "m.rac", {"cache": str(tmp_path / "cache")} if what == "nan" else {}
    told, stated = recovered(folder, out, kind, text, recover=STEPS + 1, **more)
    assert "recovery is left out: " in told
    assert said in told
    assert said in stated["recovered"]["left out"]
    assert verify(out, folder / kind).tuned == 0
    assert bytes_of_gains(out) == 0


def test_what_does_not_go_together(folder, tmp_path, capsys):
    with pytest.raises(ValueError, match="learns from a text"):
        pack(folder / "llama", tmp_path / "m.rac", bits=3.0, calibrate="none", recover=9)
    with pytest.raises(ValueError, match="recover: for a lossy pack"):
        pack(folder / "llama", tmp_path / "m.rac", recover=9)
    with pytest.raises(ValueError, match="many ranks pack without it"):
        check(Asked(bits=3.0, recover="auto"))
    assert Asked(bits=3.0, calibrate="none", recover="auto").request(str(folder / "llama"), None).recover == 0
    assert Asked(bits=3.0, calibrate="auto", recover="auto").request(str(folder / "llama"), None).recover == 240
    fast = Asked(bits=3.0, calibrate="auto", recover="auto", effort="fast")
    assert fast.request(str(folder / "llama"), None).recover == 0
    with pytest.raises(SystemExit):
        main(["pack", str(folder / "llama"), "--bits", "3", "--recover", "some"])
    assert "must be auto or a number of steps" in capsys.readouterr().err
    with pytest.raises(UnfitError, match="no parameter"):
        Made().trained.put("other", np.zeros((2, 2), np.float32))
