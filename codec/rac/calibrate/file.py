"""A calibration as one file: a zip archive, not compressed, of .npy arrays and `calibration.json`, which names them.

Arrays are mapped where they lie, and checked against the digest that the description has when they are first read.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.layers import Kron, Layer, Layers, Low
from rac.container.access import guarded
from rac.container.output import PART, destination
from rac.container.zstd import Digest
from rac.errors import OutputError, SourceError

ABOUT = "calibration.json"
_FORMAT, _VERSION = "rac-calibration", 1
_LOCAL = 30  # bytes of a member's head in front of its name
_ALIGN = 64
_PIECE = 1 << 24
_MOST = 1 << 28  # bytes of the description
_WIDEST = 1 << 15  # inputs of a convolution whose second moment is made of two


def save(layers: Layers, path: str | os.PathLike[str]) -> None:
    """Write `layers` to one file, under its name when it is whole. OutputError where it cannot be written."""
    name = destination(path, force=True)
    with guarded(OutputError, name):
        try:
            with zipfile.ZipFile(name + PART, "w") as archive:
                put = _Writer(archive)
                described = {key: put.layer(layer) for key, layer in layers.items()}
                about = {"format": _FORMAT, "version": _VERSION, "tokens": layers.tokens, "digest": layers.digest}
                text = json.dumps({**about, "layers": described, "files": put.files})
                archive.writestr(ABOUT, text)
            os.replace(name + PART, name)
        finally:
            with contextlib.suppress(OSError):
                os.unlink(name + PART)


class _Writer:
    """Puts arrays into an archive, equal ones once."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.files: dict[str, str] = {}

    def layer(self, layer: Layer) -> dict[str, Any]:
        """The description of a layer, with the names of its arrays."""
        out: dict[str, Any] = {"transposed": layer.transposed, "finite": layer.finite}
        if isinstance(layer.moment, Kron):
            out |= {"channels": self._array(layer.moment.channels), "places": self._array(layer.moment.places)}
        elif isinstance(low := layer.moment, Low):
            out |= {"low": self._array(low.read()), "share": low.share}
            out |= {} if low.shared is None else {"shared": self._array(low.common())}
        else:
            out["second"] = self._array(np.asarray(layer.second, np.float32))
        if layer.sensitivity is not None:
            out["sensitivity"] = self._array(np.asarray(layer.sensitivity, np.float64))
        if layer.sketch is not None:
            out["sketch"] = self._array(np.asarray(layer.sketch, np.float32))
        if (outer := layer.outer) is not None:
            out["outer"] = self._array(np.asarray(outer, np.float32))
        if layer.slope is not None:
            out["slope"] = layer.slope
        if layer.experts:
            out["experts"] = [self.layer(one) for one in layer.experts]
        return out

    def _array(self, array: NDArray[Any]) -> str:
        head = io.BytesIO()
        array = np.ascontiguousarray(array)
        np.lib.format.write_array_header_1_0(head, np.lib.format.header_data_from_array_1_0(array))
        h = Digest()
        h.update(head.getvalue())
        h.update(data := array.reshape(-1).view(np.uint8).data)
        name = f"{h.value().hex()}.npy"
        if name not in self.files:
            info = zipfile.ZipInfo(name)
            at = self._archive.start_dir + _LOCAL + len(name) + 4  # where data would begin behind an empty extra field
            info.extra = b"\x00\x00" + (room := -at % _ALIGN).to_bytes(2, "little") + bytes(room)
            with self._archive.open(info, "w") as f:
                f.write(head.getvalue())
                f.write(data)
            self.files[name] = name.removesuffix(".npy")
        return name


def load(path: str | os.PathLike[str]) -> Layers:
    """A calibration that `save` has written, its arrays mapped; SourceError where it is none, or damaged."""
    name = os.fspath(path)
    try:
        with zipfile.ZipFile(name) as archive:
            if (size := archive.getinfo(ABOUT).file_size) > min(_MOST, os.path.getsize(name)):
                raise SourceError(f"damaged calibration: a description of {size} bytes", file=name)
            about = json.loads(archive.read(ABOUT))
            held = _Reader(name, archive)
    except (zipfile.BadZipFile, KeyError, NotImplementedError, RuntimeError, EOFError) as e:
        why = "no calibration file, or damaged: rac.calibrate(...).save(FILE) makes one"
        raise SourceError(why, file=name) from e
    except OSError as e:
        raise SourceError(f"the calibration cannot be read: {e.strerror or e}", file=name) from e
    except ValueError as e:
        raise SourceError(f"damaged calibration: {e}", file=name) from e
    if not isinstance(about, dict) or about.get("format") != _FORMAT:
        raise SourceError("no calibration file: rac.calibrate(...).save(FILE) makes one", file=name)
    if about.get("version") != _VERSION:
        raise SourceError(
            f"a calibration of version {about.get('version')!r}, which this program does not read", file=name
        )
    try:
        layers = {str(key): held.layer(entry) for key, entry in about["layers"].items()}
        return Layers(layers, int(about["tokens"]), str(about["digest"]))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as e:
        raise SourceError(f"damaged calibration: its description does not hold together ({e})", file=name) from e


@dataclass(frozen=True, slots=True)
class _Mapped:
    """An array of the file, read when it is called; the digest of its bytes is in its name."""

    path: str
    name: str
    offset: int
    size: int
    dimensions: int = 2  # of a square, or 1
    square: bool = True

    @property
    def key(self) -> str:
        """The digest."""
        return self.name

    def __call__(self) -> NDArray[Any]:
        try:
            at, shape, dtype = _checked(self, os.stat(self.path).st_mtime_ns)
            return np.memmap(self.path, dtype, "r", at, shape) if math.prod(shape) else np.zeros(shape, dtype)
        except (OSError, ValueError, EOFError) as e:
            raise SourceError(f"damaged calibration: {self.name} is not what was written", file=self.path) from e


@lru_cache(1 << 14)
def _checked(one: _Mapped, _: int) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Where the numbers of an array lie, and what they are; ValueError unless they are what was written."""
    with open(one.path, "rb") as f:
        f.seek(one.offset)
        h, left = Digest(), one.size
        while left and (piece := f.read(min(left, _PIECE))):
            h.update(piece)
            left -= len(piece)
        if left or f"{h.value().hex()}.npy" != one.name:
            raise ValueError("another digest")
        f.seek(one.offset)
        np.lib.format.read_magic(f)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(f)
        at = f.tell()
    if fortran or dtype.kind != "f" or len(shape) != one.dimensions or (one.square and shape[0] != shape[-1]):
        raise ValueError("another kind of array")
    if at + math.prod(shape) * dtype.itemsize != one.offset + one.size:
        raise ValueError("another size")
    return at, shape, dtype


@dataclass(frozen=True, slots=True)
class _MappedKron:
    channels: _Mapped
    places: _Mapped

    def __call__(self) -> NDArray[np.float32]:
        found = Kron(self.channels(), self.places())
        if len(found.channels) * len(found.places) > _WIDEST:
            why = f"damaged calibration: a kernel of {len(found.channels) * len(found.places)} inputs"
            raise SourceError(why, file=self.channels.path)
        return found()


class _Reader:
    """Finds the arrays of an archive."""

    def __init__(self, path: str, archive: zipfile.ZipFile) -> None:
        self._path, end = path, os.path.getsize(path)
        self._at: dict[str, tuple[int, int]] = {}
        with open(path, "rb") as f:
            for info in archive.infolist():
                f.seek(info.header_offset)
                head = f.read(_LOCAL)
                at = info.header_offset + _LOCAL + int.from_bytes(head[26:28], "little")
                at += int.from_bytes(head[28:30], "little")
                if info.compress_type == zipfile.ZIP_STORED and at + info.file_size <= end:
                    self._at[info.filename] = at, info.file_size

    def _mapped(self, name: Any) -> _Mapped:
        return _Mapped(self._path, name, *self._at[name])

    def layer(self, entry: Mapping[str, Any]) -> Layer:
        """What an entry of the description says; KeyError, TypeError or ValueError where it says nothing."""
        moment: Any
        if "second" in entry:
            moment = self._mapped(entry["second"])
        elif "low" in entry:
            part = replace(self._mapped(entry["low"]), square=False)
            moment = Low(part, self._mapped(entry["shared"]) if "shared" in entry else None, float(entry["share"]))
        else:
            moment = _MappedKron(self._mapped(entry["channels"]), self._mapped(entry["places"]))
        sensitivity, rows = (self._vector(entry.get(key)) for key in ("sensitivity", "sketch"))
        experts = [self.layer(one) for one in entry.get("experts", ())]
        if experts and rows is not None and (len(rows) % len(experts) or not len(rows)):
            raise ValueError(f"{len(experts)} experts of {len(rows)} rows")
        slope = None if entry.get("slope") is None else float(entry["slope"])
        if slope is not None and not 0 < slope < math.inf:
            raise ValueError(f"a slope of {slope}")
        outputs = self._mapped(entry["outer"]) if entry.get("outer") is not None else None
        how = bool(entry["transposed"]), bool(entry["finite"]), experts, rows, slope
        return Layer(moment, sensitivity, *how, outputs=outputs)

    def _vector(self, name: Any) -> Any:
        if name is None:
            return None
        return np.array(replace(self._mapped(name), dimensions=1)())
