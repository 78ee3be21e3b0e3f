"""torch.distributed.checkpoint from an archive: every rank reads and decodes its own part of each tensor."""

from __future__ import annotations

import os
from typing import Any

from rac import frameworks
from rac.decode.archive import RacFile
from rac.errors import MissingDependencyError, SourceError
from rac.registry import RECORD_TENSOR

try:
    import torch
    from torch.distributed.checkpoint import StorageReader, metadata
    from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner
    from torch.futures import Future
except ImportError as e:
    raise MissingDependencyError("rac.runtime.dcp needs `pip install rac-codec[torch]`") from e


class RacStorageReader(StorageReader):  # type: ignore[misc]
    """Reads an archive for `torch.distributed.checkpoint.load`.

        dcp.load(model.state_dict(), storage_reader=RacStorageReader("model.rac"))

    Sharded tensors are read by slices: a rank reads the tiles that its part touches, and no others.

    `checkpoint_id` is a .rac file, one shard of a set, a folder that holds one, or a URL; every rank opens it, and
    decodes by so many `threads`.
    """

    def __init__(self, checkpoint_id: str | os.PathLike[str], threads: int | None = None) -> None:
        super().__init__()
        self._path, self._threads = checkpoint_id, threads

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """True for what may be an archive; torch asks before it chooses a reader by itself."""
        return os.fspath(checkpoint_id).endswith(".rac")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Begin anew, with another archive where one is given."""
        self._path = self._path if checkpoint_id is None else checkpoint_id

    def read_metadata(self, *_: Any, **__: Any) -> metadata.Metadata:
        """Names, shapes and data types, from the index alone; each tensor is one chunk."""
        tensors: dict[str, Any] = {}
        with RacFile(self._path, "pt") as f:
            for e in (e for archive in f.archives for e in archive.index.entries if e.type == RECORD_TENSOR):
                size = torch.Size((*e.shape[:-1], e.shape[-1] // 2) if e.dtype == "F4" else e.shape)
                for name in (e.name, *(a for a, _ in e.aliases)):
                    properties = metadata.TensorProperties(dtype=frameworks.torch_dtype(e.dtype))
                    chunk = metadata.ChunkStorageMetadata(torch.Size([0] * len(size)), size)
                    tensors[name] = metadata.TensorStorageMetadata(properties=properties, size=size, chunks=[chunk])
        return metadata.Metadata(tensors, storage_meta=metadata.StorageMeta(load_id=""))

    def set_up_storage_reader(self, *_: Any, **__: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """As they are: ranks need not share reads."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read and decode what the plan of this rank asks for.

        SourceError where that is something that is not a tensor, or of another size than there is.
        """
        with RacFile(self._path, "pt", threads=self._threads) as f:
            for item in plan.items:
                name = item.storage_index.fqn
                if item.type == LoadItemType.BYTE_IO:
                    raise SourceError("holds tensors only", file=str(self._path), unit=repr(name))
                where = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths, strict=True))
                part = f.get_slice(name)
                found = f.get_tensor(name) if list(item.lengths) == part.get_shape() else part[where]
                target = planner.resolve_tensor(item).detach()
                if target.size() != found.size():
                    what = f"is {list(found.size())}, the plan asks for {list(target.size())}"
                    raise SourceError(what, file=str(self._path), unit=repr(name))
                target.copy_(found)
                planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done
