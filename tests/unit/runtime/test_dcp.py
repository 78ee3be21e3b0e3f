"""torch.distributed.checkpoint from an archive, with several processes."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

import rac

torch = pytest.importorskip("torch")
pytest.importorskip("torch.distributed.checkpoint")

RANKS = """
import os, sys, warnings
warnings.simplefilter("ignore")
world, path = int(sys.argv[1]), sys.argv[2]
import numpy as np, torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros
from rac.container.access import FileAccess
from rac.runtime.dcp import RacStorageReader
torch.set_num_threads(1)
rank = 0  # the others are forked from it: what takes seconds to import is imported once
children = []
while rank < world - 1 and not (children and children[-1] == 0):
    rank += 1
    children.append(os.fork())
rank = rank if children[-1] == 0 else 0
dist.init_process_group("gloo", init_method=f"file://{path}.store", rank=rank, world_size=world)
read_into, read = FileAccess.read_into, [0]
def counted(self, at, out):
    read[0] += len(out)
    read_into(self, at, out)
FileAccess.read_into = counted
mesh = init_device_mesh("cpu", (world,))
layout = {"rows": Shard(0), "columns": Shard(1), "odd": Shard(0), "whole": Replicate(), "tied": Shard(0)}
shapes = {"rows": (1600, 1200), "columns": (1600, 1200), "odd": (1001, 3), "whole": (50, 60), "tied": (1600, 1200)}
state = {n: zeros(*s, device_mesh=mesh, placements=[layout[n]]) for n, s in shapes.items()}
state["plain"] = torch.zeros(7, dtype=torch.bfloat16)
dcp.load(state, storage_reader=RacStorageReader(path, threads=1))
expected = np.load(path + ".npz")
for n, t in state.items():
    e = torch.from_numpy(expected[n])
    if isinstance(t, DTensor):
        e = distribute_tensor(e, mesh, [layout[n]]).to_local()
        t = t.to_local()
    assert torch.equal(t.float(), e.float()), n
os.write(1, f"equal {read[0]}\\n".encode())
dist.destroy_process_group()
if rank:
    os._exit(0)
sys.exit(any(os.waitpid(pid, 0)[1] for pid in children))
"""


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_read_their_own_parts(tmp_path, world):
    rng = np.random.default_rng(1)
    rows, columns = (rng.standard_normal((1600, 1200)).astype(np.float32) for _ in range(2))
    tensors = {
        "rows": rows,
        "columns": columns,
        "tied": rows,
        "odd": rng.standard_normal((1001, 3)).astype(np.float32),
        "whole": rng.standard_normal((50, 60)).astype(np.float32),
    }
    path = tmp_path / "m.rac"
    rac.save_file(tensors | {"plain": torch.arange(7).to(torch.bfloat16)}, path)
    np.savez(f"{path}.npz", plain=np.arange(7, dtype=np.float32), **tensors)
    command = [sys.executable, "-c", RANKS, str(world), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    read = re.findall(r"^equal (\d+)$", done.stdout, re.M)
    assert len(read) == world
    # two sharded tensors, one of them under two names; tiles are eighths of a side
    assert all(int(n) < 3 * rows.nbytes / world + 400_000 for n in read)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_one_process_and_what_does_not_fit(tmp_path):
    import torch.distributed.checkpoint as dcp

    from rac.runtime.dcp import RacStorageReader

    path = tmp_path / "m.rac"
    rac.save_file({"a": np.arange(12.0).reshape(3, 4)}, path)
    state = {"a": torch.zeros(3, 4, dtype=torch.float64)}
    dcp.load(state, storage_reader=RacStorageReader(path), no_dist=True)
    assert torch.equal(state["a"], torch.arange(12.0, dtype=torch.float64).reshape(3, 4))
    assert RacStorageReader.validate_checkpoint_id(path)
    assert not RacStorageReader.validate_checkpoint_id("folder")
    for wrong in ({"b": torch.zeros(2)}, {"a": torch.zeros(3, 5, dtype=torch.float64)}):
        with pytest.raises(BaseException, match=r"Missing key|Size mismatch"):  # a CheckpointException is no Exception
            dcp.load(wrong, storage_reader=RacStorageReader(path), no_dist=True)
