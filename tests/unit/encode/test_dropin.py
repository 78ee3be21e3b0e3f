"""`rac.torch` and `rac.numpy`: what programs written for safetensors' modules of these names expect."""

from __future__ import annotations

import numpy as np
import pytest

import rac
import rac.numpy

torch = pytest.importorskip("torch")
import rac.torch  # noqa: E402


class Tied(torch.nn.Module):
    """Two layers that are one."""

    def __init__(self, tied=True):
        super().__init__()
        self.a = torch.nn.Linear(4, 3)
        self.b = self.a if tied else torch.nn.Linear(4, 3)


def test_arrays_there_and_back(tmp_path):
    arrays = {"b": np.arange(6.0).reshape(2, 3)[:, ::2], "a": np.array(True), "big": np.arange(3, dtype=">i4")}
    path = tmp_path / "m.rac"
    rac.numpy.save_file(arrays, path, {"k": "v"})
    data = rac.numpy.save(arrays, metadata={"k": "v"})
    assert data == path.read_bytes()
    assert data == rac.numpy.save(dict(reversed(arrays.items())), {"k": "v"})  # in any order
    for got in (rac.numpy.load_file(path), rac.numpy.load_file(str(path), backend="pread"), rac.numpy.load(data)):
        assert got.keys() == arrays.keys()
        assert all((got[n] == arrays[n]).all() and got[n].shape == arrays[n].shape for n in arrays)
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_there_and_back(tmp_path):
    whole = torch.arange(100.0).reshape(10, 10)
    tensors = {"rest": whole[1:], "first": whole[:1], "none": torch.zeros(2, 0), "nought": torch.zeros(2, 0)}
    path = tmp_path / "m.rac"
    rac.torch.save_file(tensors, path, metadata={"k": "v"})  # apart in one memory: nothing is shared
    for got in (
        rac.torch.load_file(path),
        rac.torch.load_file(str(path), device=torch.device("cpu"), backend="pread"),
        rac.torch.load(rac.torch.save(tensors)),
    ):
        assert got.keys() == tensors.keys()
        assert all(torch.equal(got[n], tensors[n]) for n in tensors)


def test_what_is_no_array_is_refused(tmp_path):
    for save, no in ((rac.numpy.save_file, torch.zeros(2)), (rac.torch.save_file, np.zeros(2))):
        for value in ({"a": no}, {"a": {"some": "thing"}}, "notadict", [("a", 1)]):
            with pytest.raises(ValueError, match="not a") as e:
                save(value, tmp_path / "m.rac")
            assert isinstance(e.value, rac.RacError)
    assert not list(tmp_path.iterdir())


def test_tensors_that_are_refused(tmp_path):
    w = torch.arange(6.0).reshape(2, 3)
    for error, match, tensors in (
        (RuntimeError, "share memory; save_model", {"w": w, "v": w}),
        (RuntimeError, "share memory", {"w": w, "v": w[:1]}),
        (RuntimeError, "share memory", {"even": w.view(-1)[::2], "odd": w.view(-1)[1::2]}),
        (RuntimeError, "meta tensor", {"w": torch.zeros(2, device="meta")}),
        (ValueError, "to_dense", {"w": torch.sparse_coo_tensor(size=(2, 3), check_invariants=True)}),
        (ValueError, "contiguous", {"w": w.t()}),
    ):
        for save in (lambda t: rac.torch.save_file(t, tmp_path / "m.rac"), rac.torch.save):
            with pytest.raises(error, match=match) as e:
                save(tensors)
            assert isinstance(e.value, rac.RacError)
    assert not list(tmp_path.iterdir())


def test_who_shares_memory():
    a = torch.zeros(4)
    assert rac.torch.shared({"b": a[:2], "c": a[2:]}) == [["b"], ["c"]]
    assert rac.torch.shared({"c": a[1:], "b": a[:2]}) == [["b", "c"]]
    long = {"all": a, "first": a[:1], "last": a[3:], "other": torch.zeros(4), "meta": torch.zeros(4, device="meta")}
    assert rac.torch.shared(long) == [["all", "first", "last"], ["other"]]
    assert rac.torch.kept(long) == {"all": ["first", "last"], "other": []}
    turned = torch.zeros(3, 4).t()
    assert rac.torch.kept({"v": turned, "w": turned}, preferred={"w": None}) == {"w": ["v"]}
    with pytest.raises(rac.RacError, match="none of them holds all of it"):
        rac.torch.kept({"b": a[:3], "c": a[1:]})


def test_a_model_with_shared_tensors(tmp_path):
    model, path = Tied(), tmp_path / "m.rac"
    with pytest.raises(RuntimeError, match="share memory"):
        rac.torch.save_file(model.state_dict(), path)
    stated = {"b.bias": "mine"}
    rac.torch.save_model(model, path, stated)
    assert stated == {"b.bias": "mine"}
    with rac.safe_open(path, "pt") as f:
        assert f.keys() == ["a.bias", "a.weight"]
        assert f.metadata() == {"b.bias": "mine", "b.weight": "a.weight"}
    other = Tied()
    assert rac.torch.load_model(other, path, device="cpu") == (set(), [])
    assert torch.equal(other.b.weight, model.a.weight)


def test_names_that_differ(tmp_path):
    path = tmp_path / "m.rac"
    rac.torch.save_model(Tied(), path)
    apart = Tied(tied=False)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "b.bias", "b.weight"') as e:
        rac.torch.load_model(apart, path)
    assert isinstance(e.value, rac.RacError)
    assert rac.torch.load_model(apart, path, strict=False) == ({"b.bias", "b.weight"}, [])
    rac.torch.save_model(apart, path)
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "b.bias", "b.weight"'):
        rac.torch.load_model(Tied(), path)
    state = {name.replace("a.", "b."): t for name, t in Tied().state_dict().items() if name.startswith("a.")}
    rac.torch.save_file(state, path)  # the other of two names
    model = Tied()
    rac.torch.load_model(model, path)
    assert torch.equal(model.a.weight, state["b.weight"])


def test_a_file_with_ties_fits_a_model_with_ties(tmp_path):
    """`rac.save_file` stores both names of a tensor, which is once in the file."""
    model, other = Tied(), Tied()
    rac.save_file(model.state_dict(), tmp_path / "m.rac")
    assert rac.torch.load_model(other, tmp_path / "m.rac") == (set(), [])
    assert torch.equal(other.a.weight, model.a.weight)


def test_a_model_with_a_turned_weight(tmp_path):
    model, other = Tied(), Tied()
    for m in (model, other):
        m.a.weight = torch.nn.Parameter(torch.randn(4, 3).t())
    with pytest.raises(ValueError, match="force_contiguous=True"):
        rac.torch.save_model(model, tmp_path / "m.rac", force_contiguous=False)
    rac.torch.save_model(model, tmp_path / "m.rac")
    rac.torch.load_model(other, tmp_path / "m.rac")
    assert torch.equal(other.b.weight, model.a.weight)


def test_a_module_with_a_state_of_its_own(tmp_path):
    class Odd(Tied):
        def get_extra_state(self):
            return {"seed": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(ValueError, match="_extra_state"):
        rac.torch.save_model(Odd(), tmp_path / "m.rac")
    rac.torch.save_model(Tied(), tmp_path / "m.rac")
    assert rac.torch.load_model(Odd(), tmp_path / "m.rac", strict=False) == ({"_extra_state"}, [])


def test_the_modules_are_there_without_an_import_of_their_own():
    assert rac.__getattr__("torch") is rac.torch and rac.__getattr__("numpy") is rac.numpy
    assert not {"torch", "numpy"} & set(rac.__all__)  # `from rac import *` must not hide the real ones
