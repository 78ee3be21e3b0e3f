"""What ranks have found together: arrays in the work folder, each of which a rank brings here when it asks for it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from rac.calibrate.folder import DamagedError, Folder
from rac.errors import OutputError, RacError, SourceError
from rac.ranks.store import Disk, Store, Told, fetched

Row = list[Any]


class SpoiledError(OutputError):
    """A file that ranks have made together is not what was written."""


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """OutputError for what this rank alone has met: with a SourceError it might go on without what all others have."""
    try:
        yield
    except DamagedError as e:
        raise SpoiledError("is not what was written: a calibration that ranks share", file=e.file) from e
    except SourceError as e:
        raise OutputError(e.message, file=e.file) from e


class Held(Folder):
    """A local folder, some of whose files are in the work folder until they are asked for."""

    def __init__(self, store: Store) -> None:
        super().__init__(None, "")
        self._store, self._far = store, dict[str, str]()

    def know(self, row: Row) -> None:
        """A file of the work folder: (name here, size, digest, name there)."""
        name, size, digest, far = row
        self._files[name], self._far[name] = [size, digest], far

    def told(self, folder: str) -> Row:
        """All that another rank needs to know; arrays that are only here are written to a folder of the work folder."""
        for name in self.names:
            if name not in self._far and name != "ids.npy":
                self.know(uploaded(self._store, self, name, f"{folder}/{name}"))
        files = [[name, *self._files[name], far] for name, far in self._far.items() if name in self._files]
        return ["held", self.state, files]

    @classmethod
    def of(cls, store: Store, row: Row) -> Held:
        """What another rank has told."""
        held, (_, held.state, files) = cls(store), row
        for file in files:
            held.know(file)
        return held

    def check(self, name: str) -> None:
        """DamagedError unless the file is what was written; it is brought here."""
        path = self.path / name
        if name in self._far and not path.exists():
            path.unlink(missing_ok=True)  # a link to what is gone
            there = fetched(self._store, self._far[name], str(self.path))
            with contextlib.suppress(FileExistsError):
                (os.symlink if isinstance(self._store, Disk) else os.rename)(there, path)
        super().check(name)

    def spoiled(self) -> list[str]:
        """Names in the work folder of files that are not what was written."""
        out = []
        for name, far in self._far.items():
            self._checked.discard(name)
            (self.path / name).unlink(missing_ok=True)
            try:
                self.check(name)
            except RacError:
                out.append(far)
        return out


@contextlib.contextmanager
def written(store: Store, name: str) -> Iterator[Told]:
    """A stream to a file of the work folder."""
    with store.writing(name) as f:
        yield Told(f)


def uploaded(store: Store, folder: Folder, name: str, far: str) -> Row:
    """Write a file of a folder to the work folder: the row by which others know it."""
    data = np.array(folder.array(name))
    with written(store, far) as f:
        np.lib.format.write_array(f, data, allow_pickle=False)  # type: ignore[arg-type]
    return [name, f.size, f.digest.value().hex(), far]
