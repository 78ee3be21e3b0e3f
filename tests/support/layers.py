"""Compressed layers by themselves, of archives that are in memory."""

from __future__ import annotations

import pytest
import torch

from rac.container.access import BytesAccess
from rac.container.reader import Archive
from rac.encode.pack import pack
from rac.runtime import RacLinear, Workspace
from rac.runtime import record as rc
from rac.runtime.layers import Head


def archive_of(tmp_path, tensors, **how):
    """An archive of torch tensors, in one read."""
    st = pytest.importorskip("safetensors.torch")
    st.save_file(tensors, tmp_path / "x.safetensors")
    pack(tmp_path / "x.safetensors", tmp_path / "x.rac", force=True, **how)
    return Archive(BytesAccess((tmp_path / "x.rac").read_bytes()))


def stored(archive, name):
    """(bytes of the record, its head)."""
    entry = next(e for e in archive.index.entries if e.name == name and e.type == 1)
    data = rc.collect(archive, entry)
    return data, Head(len(data), entry.dtype, entry.shape)


def linear(archive, name, workspace=None, transposed=False, bias=None):
    data, head = stored(archive, name)
    layer = RacLinear(head, workspace or Workspace(), bias, transposed, dtype=torch.float32)
    layer.weight.data.copy_(torch.from_numpy(data))
    return layer
