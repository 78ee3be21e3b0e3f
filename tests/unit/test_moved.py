"""Import paths that were public keep working."""

import importlib
import pickle
import sys

import pytest

from rac.moved import MOVED


@pytest.mark.parametrize("old", MOVED)
def test_an_old_path_is_the_same_module(old):
    found = importlib.import_module(old)
    assert found is sys.modules[MOVED[old]]
    assert found.__spec__.name == found.__name__ == MOVED[old]


def test_below_a_package_that_moved():
    from rac.encode.rotations.cayley import CayleySGD
    from rac.encode.transforms import parts  # noqa: F401

    assert pickle.loads(pickle.dumps(CayleySGD)) is importlib.import_module("rac.methods.rotations.cayley").CayleySGD


def test_no_other_name_is_found():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("rac.encode.nothing")
