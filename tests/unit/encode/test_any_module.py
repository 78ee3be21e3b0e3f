"""Calibration of any module: what its products are given, one file of it, and the tensors that it is brought to."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from torch import nn  # noqa: E402

import calibrate_bar  # noqa: E402
import module_matrix  # noqa: E402
import rac  # noqa: E402
from rac.calibrate import sums  # noqa: E402
from rac.calibrate.file import load  # noqa: E402
from rac.calibrate.layers import calibrate  # noqa: E402
from rac.cli import main  # noqa: E402
from rac.encode import ties  # noqa: E402
from rac.encode.allocate.made import matched  # noqa: E402
from rac.encode.sources import from_arrays  # noqa: E402
from rac.errors import MissingDependencyError, OutputError, SourceError  # noqa: E402
from support.models import write  # noqa: E402


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def groups(module, prefix="", **more):
    named = {prefix + n: p.detach().numpy() for n, p in module.named_parameters()}
    return ties.find(from_arrays(named | more).tensors)


def close(a, b):
    b = b.detach().numpy() if isinstance(b, torch.Tensor) else b
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-4 * float(np.abs(b).max()))


@pytest.mark.parametrize(
    "how",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (3, 2), "stride": 2, "dilation": (1, 2), "padding": (0, 1)},
        {"kernel_size": 3, "padding": "same", "padding_mode": "reflect"},
        {"kernel_size": 4, "padding": "valid"},
    ],
)
def test_a_convolution_is_a_product_with_patches(how):
    conv, x = nn.Conv2d(5, 8, **how), seeded(2, 5, 9, 8)
    found = rac.calibrate(conv, [x], loss=None)["weight"]
    given = nn.functional.pad(x, (1, 1, 1, 1), mode="reflect") if "padding_mode" in how else x
    padding = 0 if "padding_mode" in how or how["padding"] == "valid" else how["padding"]
    parts = {k: how[k] for k in ("stride", "dilation") if k in how}
    patches = nn.functional.unfold(given, how["kernel_size"], padding=padding, **parts)
    close(found.second, torch.einsum("ncl,ndl->cd", patches, patches))
    assert found.sensitivity is None
    assert not found.transposed


def test_a_grouped_convolution_has_the_patches_of_all_groups():
    x = seeded(2, 8, 6)
    found = rac.calibrate(nn.Conv1d(8, 4, 3, groups=2), [x], loss=None)["weight"]
    patches = x.unfold(2, 3, 1).movedim(1, 2).reshape(-1, 2, 12).flatten(0, 1)
    close(found.second, patches.T @ patches / 2)  # a mean over groups, as many as there are positions


def test_a_wide_kernel_is_held_as_a_product(monkeypatch):
    x = torch.cumsum(seeded(2, 6, 20, 20), -1)
    conv = nn.Conv2d(6, 4, 3)
    full = rac.calibrate(conv, [x])["weight"]
    monkeypatch.setattr(sums, "WIDE", 8)
    found = rac.calibrate(conv, [x])["weight"]
    assert found.moment.channels.shape == (6, 6)
    assert found.moment.places.shape == (9, 9)
    assert np.trace(found.second) == pytest.approx(np.trace(full.second), rel=1e-3)
    assert np.corrcoef(found.second.ravel(), full.second.ravel())[0, 1] > 0.9


def test_a_transposed_convolution_is_stored_in_out():
    x = seeded(3, 16, 5)
    found = rac.calibrate(nn.ConvTranspose1d(16, 8, 4, stride=2), [x])["weight"]
    assert found.transposed
    rows = x.movedim(1, 2).reshape(-1, 16)
    close(found.second, rows.T @ rows)
    assert found.sensitivity.shape == (32,)
    assert np.ptp(found.sensitivity.reshape(8, 4), 1).max() == 0


def test_sensitivities_are_squared_changes_of_the_output():
    first, second = nn.Linear(12, 10), nn.Linear(10, 40)
    with torch.no_grad():
        second.weight *= torch.logspace(-1, 1, 10)
    found = rac.calibrate(nn.Sequential(first, second), [seeded(200, 12, seed=i) for i in range(4)])
    expected = second.weight.square().sum(0).detach().numpy()
    ratio = found["0.weight"].sensitivity / expected
    assert ratio.max() / ratio.min() < 1.6  # sampled by random projections
    assert found["1.weight"].sensitivity.max() / found["1.weight"].sensitivity.min() < 1.6
    assert found.tokens == 4


def test_loss_of_labels_and_of_ones_own():
    body, x = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 5)), seeded(64, 8)
    module = nn.ModuleDict({"body": body})

    def forward(m, batch):
        return {"logits": m["body"](batch["x"]), "other": batch["x"]}

    labels = rac.calibrate(module, [{"x": x}], forward=forward, loss="labels")["body.1.weight"]
    chances = body(x).softmax(-1)
    fisher = (chances * (1 - chances)).mean(0)
    np.testing.assert_allclose(labels.sensitivity, fisher.detach().numpy(), rtol=0.6)
    own = rac.calibrate(module, [{"x": x}], forward=forward, loss=lambda out, _: out["logits"][:, 2].sum())
    assert np.flatnonzero(own["body.1.weight"].sensitivity).tolist() == [2]
    with pytest.raises(ValueError, match="loss must be one of output, labels"):
        rac.calibrate(module, [], loss="squares")


class Mixed(nn.Module):
    """Attention whose products are inside a function, experts as slices, and a parameter multiplied by hand."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.experts = nn.Parameter(seeded(3, 96, 64) / 5)
        self.all = nn.Parameter(seeded(3, 96, 64) / 5)
        self.by_hand = nn.Parameter(seeded(64, 20))

    def forward(self, x, memory=None):
        memory = x if memory is None else memory
        x = x + self.attention(x, memory, memory, need_weights=False)[0]
        x = torch.stack([nn.functional.linear(x[:, e].clone(), self.experts[e]) for e in range(3)])
        return torch.bmm(x, self.all) @ self.by_hand


def test_products_are_found_whatever_the_layers_are():
    module = Mixed().eval()
    found = rac.calibrate(module, [seeded(5, 3, 64)])
    assert found["attention.in_proj_weight"].sensitivity.shape == (192,)
    assert found["attention.out_proj.weight"].second.shape == (64, 64)
    assert [len(e.second) for e in found["experts"].experts] == [64] * 3
    assert [len(e.second) for e in found["all"].experts] == [96] * 3
    assert found["all"].transposed and not found["experts"].transposed
    assert found["by_hand"].transposed and found["by_hand"].second.shape == (64, 64)
    assert all(layer.finite for layer in found.values())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("equation", "shape"),
    [
        ("bti,ihd->bhtd", (12, 4, 6)),
        ("bti,hdi->bthd", (4, 6, 12)),
        ("hi,bti->bth", (24, 12)),
        ("ih,bti->tbh", (12, 24)),
    ],
)
def test_einsum(equation, shape):
    class Contracting(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(seeded(*shape))

        def forward(self, x):
            return torch.einsum(equation, *((self.w, x) if equation[0] in "hi" else (x, self.w)))

    x, module = seeded(2, 5, 12), Contracting()
    turned = shape[0] == 12
    plain = nn.Linear(12, 24, bias=False)
    with torch.no_grad():
        plain.weight.copy_(module.w.reshape(12, 24).T if turned else module.w.reshape(24, 12))
    loss = lambda out, _: out.pow(3).sum()  # noqa: E731
    found, same = rac.calibrate(module, [x], loss=loss)["w"], rac.calibrate(plain, [x], loss=loss)["weight"]
    assert found.transposed == turned
    close(found.second, same.second)
    np.testing.assert_allclose(found.sensitivity, same.sensitivity, rtol=1e-4)


def test_rows_with_other_inputs_have_their_own_moments():
    x, memory = seeded(5, 3, 64), seeded(5, 7, 64, seed=1) * 3
    found = rac.calibrate(Mixed(), [(x, memory)], loss=None)["attention.in_proj_weight"]
    query, key, value = found.experts
    rows = x.reshape(-1, 64)
    close(query.second, rows.T @ rows)
    close(key.second, memory.reshape(-1, 64).T @ memory.reshape(-1, 64))
    assert value.second is key.second or np.array_equal(value.second, key.second)


def test_inputs_that_are_overwritten_are_not_taken_for_what_they_were():
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.one(x) * 2
            z = self.two(y)
            y.zero_()
            return z

    module = Overwriting()
    found = rac.calibrate(module, [seeded(50, 8), seeded(50, 8)])
    assert np.linalg.eigvalsh(found["two.weight"].second)[0] > 0


def test_without_a_backward_pass_all_count_alike():
    class Rounding(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(x).argmax(-1)

    with pytest.warns(UserWarning, match="no backward pass .no floating-point output"):
        found = rac.calibrate(Rounding(), [seeded(6, 8), seeded(6, 8, seed=1)])
    x = torch.cat([seeded(6, 8), seeded(6, 8, seed=1)])
    close(found["layer.weight"].second, x.T @ x / 2)
    assert found["layer.weight"].sensitivity is None


def test_a_module_is_left_as_it_was():
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.ReLU(inplace=True), nn.Linear(8, 4)).train()
    module[0].weight.requires_grad_(False)
    rac.calibrate(module, iter([seeded(4, 8)]))
    assert module.training and not module[0].weight.requires_grad and module[3].weight.requires_grad
    assert all(p.grad is None for p in module.parameters())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own modules
def test_a_compiled_module_runs_as_it_is_written():
    module = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    x = seeded(6, 8)
    found = rac.calibrate(module, [x])
    assert list(found) == ["_orig_mod.0.weight", "_orig_mod.2.weight"]


def test_batches_that_do_not_fit_or_reach_are_said():
    module = nn.ModuleDict({"a": nn.Linear(128, 128), "b": nn.Linear(128, 128)})
    with pytest.raises(SourceError, match="no batch"):
        rac.calibrate(module, [])
    with pytest.raises(SourceError, match="does not run on batch 1: RuntimeError: mat1 and mat2"):
        rac.calibrate(module["a"], [seeded(2, 128), seeded(2, 127)])
    with pytest.raises(SourceError, match="weights are not there .weight, bias.: load the module whole"):
        rac.calibrate(nn.Linear(128, 128, device="meta"), [seeded(2, 128)])
    with pytest.raises(SourceError, match="reach none of the weights of ModuleDict .a.weight, b.weight"):
        rac.calibrate(module, [seeded(2, 128)], forward=lambda m, x: x)
    with pytest.warns(UserWarning, match="do not reach 1 of 2 weights: b.weight"):
        rac.calibrate(module, [seeded(2, 128)], forward=lambda m, x: m["a"](x))


def test_one_file_of_it(tmp_path):
    module, path = Mixed(), tmp_path / "a.calibration"
    conv = nn.Conv2d(600, 4, 3)
    found = rac.calibrate(module, [seeded(5, 3, 64)])
    wide = rac.calibrate(conv, [seeded(1, 600, 4, 4)])
    for layers in (found, wide):
        layers.save(path)
        again = load(path)
        assert list(again) == list(layers)
        assert (again.tokens, again.digest) == (layers.tokens, layers.digest)
        for name, layer in layers.items():
            other = again[name]
            assert np.array_equal(layer.second, other.second)
            assert np.array_equal(layer.sensitivity, other.sensitivity)
            assert np.array_equal(layer.sketch, other.sketch)
            assert (layer.transposed, len(layer.experts)) == (other.transposed, len(other.experts))
            assert all(np.array_equal(a.second, b.second) for a, b in zip(layer.experts, other.experts, strict=True))
    assert [p.name for p in tmp_path.iterdir()] == ["a.calibration"]
    with pytest.raises(OutputError):
        found.save(tmp_path / "nowhere" / "a")


def everything(layers):
    for layer in layers.values():
        layer.second.sum()


def test_damage_is_said(tmp_path):
    path = tmp_path / "a.calibration"
    rac.calibrate(nn.Linear(16, 16), [seeded(4, 16)]).save(path)
    whole = path.read_bytes()
    everything(load(path))
    for at in [*range(0, len(whole), 37), len(whole) - 5]:
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        with contextlib.suppress(SourceError):  # some bytes are of no account
            everything(load(path))
    for at in range(0, len(whole), 211):
        path.write_bytes(whole[:at])
        with pytest.raises(SourceError):
            load(path)
    data = whole.index(b"NUMPY") + 200
    path.write_bytes(whole[:data] + b"x" + whole[data + 1 :])
    with pytest.raises(SourceError, match="not what was written"):
        everything(load(path))
    for text, why in ((b"{}", "no calibration file"), (b"PK\x03\x04", "no calibration file")):
        path.write_bytes(text)
        with pytest.raises(SourceError, match=why):
            load(path)
    with pytest.raises(SourceError, match="cannot be read"):
        load(tmp_path / "nothing")


def test_tensors_of_other_names_are_found_by_their_values():
    module = nn.ModuleDict({"qkv": nn.Linear(64, 96), "out": nn.Linear(32, 64)})
    found = rac.calibrate(module, [seeded(9, 64)], forward=lambda m, x: m["out"](m["qkv"](x)[:, :32]))
    w = module["qkv"].weight.detach()
    halves = {"x.q": w[:32].numpy(), "x.k": w[32:64].to(torch.bfloat16), "x.o": module["out"].weight.detach().half()}
    there = matched(ties.find(from_arrays(halves | {"alien": seeded(64, 64).numpy()}).tensors), found)
    assert sorted(there) == ["x.k", "x.o", "x.q"]
    assert np.array_equal(there["x.k"].sensitivity, found["qkv.weight"].sensitivity[32:64])
    assert np.array_equal(there["x.k"].second, found["qkv.weight"].second)
    assert sorted(matched(groups(module, "unet.model."), found)) == ["unet.model.out.weight", "unet.model.qkv.weight"]


def test_a_tensor_of_several_layers_is_made_of_them():
    module = nn.ModuleDict({"q": nn.Linear(64, 96), "k": nn.Linear(64, 32), "far": nn.Linear(64, 64)})
    found = rac.calibrate(module, [seeded(9, 64)], forward=lambda m, x: (m["q"](x), m["k"](x), m["far"](2 * x)))
    w = {name: m.weight.detach() for name, m in module.items()}
    files = {
        "qk": torch.cat([w["q"], w["k"]]).half(),
        "kf": torch.cat([w["k"], w["far"]]),
        "q0": torch.cat([w["q"]] * 2),
    }
    there = matched(ties.find(from_arrays(files).tensors), found)
    both = np.concatenate([found["q.weight"].sensitivity, found["k.weight"].sensitivity])
    assert np.array_equal(there["qk"].sensitivity, both)
    assert np.array_equal(there["qk"].second, found["q.weight"].second)
    assert [len(e.sensitivity) for e in there["kf"].experts] == [32, 32, 32]
    assert np.array_equal(there["kf"].experts[2].second, found["far.weight"].second)
    assert len(there["q0"].sensitivity) == 192
    alone = {"q": w["q"], "else": torch.cat([w["q"], seeded(32, 64)])}
    assert [*matched(ties.find(from_arrays(alone).tensors), found)] == ["q"]


def test_experts_of_one_parameter_are_found_one_by_one():
    module = Mixed()
    found = rac.calibrate(module, [seeded(5, 3, 64)])
    arrays = {f"mlp.{e}.up": module.experts[e, :48].detach().numpy() for e in range(3)}
    arrays |= {f"mlp.{e}.down": module.all[e].detach().numpy() for e in range(3)}
    there = matched(ties.find(from_arrays(arrays).tensors), found)
    assert np.array_equal(there["mlp.1.up"].second, found["experts"].experts[1].second)
    assert len(there["mlp.1.up"].sensitivity) == 48
    assert there["mlp.2.down"].transposed


def test_a_calibration_of_another_model_is_refused(tmp_path):
    ours, found = nn.Linear(128, 128), rac.calibrate(nn.Linear(128, 128), [seeded(9, 128)])
    with pytest.raises(SourceError, match="another model: 'weight' has other values there"):
        matched(groups(ours), found, "f")
    with pytest.raises(SourceError, match="another model: 'weight' has 128 rows there, 192 here"):
        matched(groups(nn.Linear(128, 192)), found)
    with pytest.raises(SourceError, match=r"no tensor has a name or the values .* such as 'weight'"):
        matched(groups(nn.ModuleDict({"a": ours})), found)
    few = {f"token{i}": seeded(1, 1, 128, seed=i).numpy() for i in range(60)}  # rows that are near others by chance
    with pytest.raises(SourceError, match="no tensor has a name or the values"):
        matched(ties.find(from_arrays(few | {"a.weight": ours.weight.detach().numpy()}).tensors), found)
    renamed = rac.calibrate(nn.Linear(128, 128), [seeded(9, 128)], names={"": "a."})
    assert [*matched(groups(nn.ModuleDict({"a": ours})), renamed)] == ["a.weight"]  # the caller says so
    with pytest.raises(SourceError, match="has 128 rows there, 192 here"):
        matched(groups(nn.ModuleDict({"a": nn.Linear(128, 192)})), renamed)


def test_what_a_text_shows_is_what_its_batches_show(tmp_path):
    """Second moments as block by block, but for a factor: a mean over tokens there, a sum over a batch here."""
    write("llama", tmp_path, torch.float32)
    ids = np.random.default_rng(0).integers(0, 250, 96)
    text = calibrate(tmp_path, ids, tokens=96, context=32, fisher=False)
    assert text.pop("model.embed_tokens.weight").sensitivity is not None  # which batches of any module do not tell
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    batches = [{"input_ids": torch.from_numpy(row)[None]} for row in ids.reshape(3, 32)]
    found = rac.calibrate(model, batches, loss=None)
    assert {n.removeprefix("model.") for n in found} == {n.removeprefix("model.") for n in text}
    for name, layer in text.items():
        close(found[name].second / 32, layer.second)
    labels = rac.calibrate(model, batches, loss="labels")
    assert all(layer.sensitivity is not None for layer in labels.values())
    assert "lm_head.weight" not in labels and "model.embed_tokens.weight" not in labels


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "t5", "segformer", "xlnet"])
def test_architectures(kind, tmp_path):
    """All of them: `python tools/module_matrix.py`."""
    assert module_matrix.reached(*module_matrix.made(kind, tmp_path), tmp_path) == ""


def test_without_torch(monkeypatch):
    monkeypatch.delitem(sys.modules, "rac.calibrate.module")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependencyError, match=r"rac-codec\[calibrate\]"):
        rac.calibrate(None, [])


def test_the_command(tmp_path, capsys):
    from safetensors.torch import save_file

    module = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128))
    source, file, out = tmp_path / "m.safetensors", tmp_path / "m.calibration", tmp_path / "m.rac"
    save_file(module.state_dict(), source)
    found = rac.calibrate(module[0], [seeded(99, 128)])
    found.save(file)
    assert main(["pack", str(source), "-o", str(out), "--bits", "3", "--calibration", str(file)]) == 0
    said = capsys.readouterr().err
    assert (
        "calibration does not reach: the rest: 1 tensors, which are quantised from the weights alone: 2.weight" in said
    )
    with rac.open(out) as f:
        assert f.archives[0].header["provenance"]["calibrate"] == [{"calibration": found.digest, "tokens": 1}]
    rac.pack(source, tmp_path / "p.rac", bits=3, calibration=found, include=["0.*"])
    os.truncate(file, 300)
    for given in (["--calibration", str(file)], ["--calibration", str(source)]):
        assert main(["pack", str(source), "-o", str(out), "--bits", "3", "--force", *given]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["pack", str(source), "-o", str(out), "--force", "--calibration", str(file)]) == 2
    assert "for lossy packing" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["vit", "unet"])
def test_the_bar_in_small(kind, tmp_path):
    """The whole of it: `python tools/calibrate_bar.py`."""
    if kind == "unet":
        pytest.importorskip("diffusers")
    transformers.logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert calibrate_bar.measure(kind, calibrate_bar.SMALL, tmp_path)["ratio"] < calibrate_bar.MOST
