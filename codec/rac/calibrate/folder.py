"""The folder that a calibration works in: arrays and one state, so that an interrupted one goes on where it was."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.container.zstd import Digest
from rac.errors import MissingDependencyError, OutputError, SourceError
from rac.linalg.saved import load
from rac.scratch import Scratch

_PIECE = 1 << 24


class DamagedError(SourceError):
    """A file of the cache is not what was written."""


def fed(digest: Digest, path: str | os.PathLike[str]) -> Digest:
    """The digest, with the bytes of a file added."""
    with open(path, "rb") as f:
        while piece := f.read(_PIECE):
            digest.update(piece)
    return digest


def fed_model(digest: Digest, folder: Path, files: Iterable[Path] | None = None) -> Digest:
    """The digest, with those `files` in a folder added that decide what its model makes; SourceError where unread."""
    try:
        for file in sorted(folder.iterdir() if files is None else files):
            if file.suffix in (".json", ".safetensors", ".bin", ".model", ".txt") and file.is_file():
                digest.update(f"\0{file.relative_to(folder)}\0{file.stat().st_size}\0".encode())
                fed(digest, file)
    except OSError as e:
        raise SourceError(f"cannot be read: {e}", file=os.fspath(folder)) from e
    return digest


class Folder:
    """.npy files and `state.json`, renamed when written; a file counts once `commit` has named it with its digest."""

    def __init__(self, parent: str | os.PathLike[str] | None, name: str) -> None:
        """Open `parent/name`, made where it is missing; without a parent a folder that goes away with this object."""
        self._scratch: Scratch | None = None
        try:
            if parent is None:
                self._scratch = Scratch("calibration")  # it goes away with this object
                self.path = self._scratch.path
            else:
                self.path = Path(parent) / name
                self.path.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise OutputError(f"no place for the calibration: {e}", file=os.fspath(parent or "")) from e
        self._files: dict[str, list[Any]] = {}
        self.state: dict[str, Any] = {}
        self._checked: set[str] = set()
        self._read()

    def _read(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # damaged is as good as missing
            found = json.loads((self.path / "state.json").read_text(encoding="utf-8"))
            files = {str(k): [int(v[0]), str(v[1])] for k, v in found["files"].items()}
            if all((self.path / k).stat().st_size == v[0] and Path(k).name == k for k, v in files.items()):
                self._files, self.state = files, dict(found["state"])

    @contextlib.contextmanager
    def alone(self, wait: Callable[[], None]) -> Iterator[None]:
        """No other process works in the folder meanwhile; `wait` is called where one does, before waiting for it.

        A temporary folder is removed where the work fails: the error's traceback may keep this object for long.
        """
        try:
            from filelock import FileLock, Timeout
        except ImportError as e:
            raise MissingDependencyError("calibration needs filelock: pip install rac-codec[calibrate]") from e
        lock = FileLock(self.path / "lock")
        try:
            try:
                lock.acquire(timeout=0)
            except Timeout:
                wait()
                lock.acquire()
        except (OSError, NotImplementedError) as e:  # not implemented: on file systems that know no locks
            raise OutputError(f"the calibration cache cannot be written: {e}", file=os.fspath(self.path)) from e
        lost = False
        try:
            self._read()
            yield
        except DamagedError:  # it may be begun anew
            raise
        except BaseException:
            lost = True
            raise
        finally:
            lock.release()
            if lost and self._scratch:
                self._scratch.close()

    def clear(self) -> None:
        """Forget everything."""
        self._files, self.state, self._checked = {}, {}, set()
        self.commit()

    def commit(self, drop: Callable[[str], bool] = lambda _: False) -> None:
        """Write the state, then remove the files that `drop` names and those that no state names."""
        self._files = {k: v for k, v in self._files.items() if not drop(k)}
        with self._renamed("state.json") as f:
            f.write(json.dumps({"state": self.state, "files": self._files}).encode())
        for path in self.path.iterdir():
            if path.name != "state.json" and path.name not in self._files and path.suffix in (".npy", ".part"):
                path.unlink(missing_ok=True)

    @property
    def names(self) -> list[str]:
        """Names of the files that were written."""
        return [*self._files]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    @contextlib.contextmanager
    def sink(self, name: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Iterator[Callable[[Any], None]]:
        """A new array, written from its start piece by piece: yields what appends one piece."""
        head = io.BytesIO()
        described = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(head, described)  # type: ignore[arg-type]
        digest = Digest()
        with self._renamed(name) as f:

            def write(data: bytes | memoryview) -> None:
                f.write(data)
                digest.update(data)

            write(head.getvalue())
            yield lambda piece: write(np.ascontiguousarray(piece, dtype).reshape(-1).view(np.uint8).data)
        self._files[name] = [f.size, digest.value().hex()]
        self._checked.add(name)

    def put(self, name: str, array: NDArray[Any]) -> str:
        """Write a whole array; its name."""
        with self.sink(name, array.shape, array.dtype) as append:
            append(array)
        return name

    def check(self, name: str) -> None:
        """DamagedError unless the file is what was written; read once at most."""
        with contextlib.suppress(OSError, KeyError):
            known = name in self._checked
            if known or fed(Digest(), self.path / name).value().hex() == self._files[name][1]:
                self._checked.add(name)
                return
        raise DamagedError("damaged file in the calibration cache: remove the folder", file=str(self.path / name))

    def array(self, name: str) -> NDArray[Any]:
        """The array, mapped read-only, checked when it is first asked for."""
        self.check(name)
        try:
            return load(self.path / name, "r")
        except (OSError, ValueError, EOFError) as e:
            raise DamagedError(f"damaged file in the calibration cache: {e}", file=str(self.path / name)) from e

    @contextlib.contextmanager
    def _renamed(self, name: str) -> Iterator[_Part]:
        part = _Part(self.path / f"{name}.{os.getpid()}.part")
        try:
            yield part
            part.finish(self.path / name)
        finally:
            part.drop()


class _Part:
    """A file under another name until it is whole: OutputError where it cannot be written, and for nothing else."""

    def __init__(self, path: Path) -> None:
        self._path, self.size = path, 0
        with self._mapped():
            self._file = open(path, "wb")  # noqa: SIM115 - closed by `finish` and `drop`

    @contextlib.contextmanager
    def _mapped(self) -> Iterator[None]:
        try:
            yield
        except OSError as e:
            raise OutputError(f"the calibration cache cannot be written: {e}", file=str(self._path)) from e

    def write(self, data: bytes | memoryview) -> None:
        with self._mapped():
            self.size += self._file.write(data)

    def finish(self, name: Path) -> None:
        with self._mapped():
            self._file.close()
            os.replace(self._path, name)

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()
        self._path.unlink(missing_ok=True)
