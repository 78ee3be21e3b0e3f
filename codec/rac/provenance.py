"""What a header says of the making of its archive: the keys that decide anything, typed, and the writer of them all.

Which program may act on which key, and what it does where one is malformed: format_spec/container.md, "Provenance".
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from rac.errors import FormatError
from rac.registry import VERSION

T = TypeVar("T")
MOST_PIECES = 1 << 20
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")  # namespace and name
COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
SHA256 = re.compile(r"[0-9a-f]{64}")


def _texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 64


@dataclass(frozen=True, slots=True)
class Provenance:
    """The provenance of one archive. A property raises FormatError where the key that it acts on is malformed."""

    stated: Mapping[str, Any] = field(default_factory=dict)  # all keys; what no property reads decides nothing
    file: str | None = None  # the file, for messages

    @classmethod
    def of(cls, header: Mapping[str, Any], file: Any = None) -> Provenance:
        """The provenance that a checked header states."""
        return cls(header.get("provenance", {}), None if file is None else str(file))

    def _typed(self, key: str, good: Callable[[Any], bool], usual: T) -> T:
        value: T = self.stated.get(key, usual)
        if key in self.stated and not good(value):
            raise FormatError(f"provenance: {key!r} is malformed", file=self.file, unit="header")
        return value

    @property
    def source(self) -> str:
        """Kind of what was packed: "hf", "gguf", "safetensors", "memory" or another; empty where it is not stated."""
        return self._typed("source", lambda value: isinstance(value, str), "")

    @property
    def include(self) -> tuple[str, ...]:
        """Patterns of the tensors that were taken; none: all."""
        return tuple(self._typed("include", _texts, ()))

    @property
    def exclude(self) -> tuple[str, ...]:
        """Patterns of the tensors that were left out."""
        return tuple(self._typed("exclude", _texts, ()))

    @property
    def whole(self) -> bool:
        """Whether no pattern has left out tensors of the source."""
        return not self.include and not self.exclude

    def gguf_order(self, names: Collection[str]) -> list[str]:
        """The tensors `names` in the order of the GGUF file that was packed; as they are where none is stated."""

        def good(value: Any) -> bool:
            return _texts(value) and sorted(value) == sorted(names)

        return list(self._typed("gguf_order", good, names))

    @property
    def headers(self) -> tuple[str, ...]:
        """Safetensors files whose first bytes are an attachment (`header_name`); others follow from the rest."""
        return tuple(self._typed("headers", _texts, ()))

    @property
    def frames(self) -> tuple[str, ...]:
        """Files of other kinds whose bytes around the tensors are an attachment (`frame_name`)."""
        return tuple(self._typed("frames", _texts, ()))

    @property
    def links(self) -> dict[str, str]:
        """Symbolic links of the folder that was packed, and their targets, which are relative."""
        return dict(self._typed("links", lambda v: isinstance(v, dict) and _texts([*v.values()]), {}))

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders with nothing in them."""
        return tuple(self._typed("folders", _texts, ()))

    @property
    def pieces(self) -> dict[str, int]:
        """Files that are stored in several attachments (`piece_name`), and how many these are."""

        def good(value: Any) -> bool:
            return isinstance(value, dict) and all(_count(n) and 0 < n <= MOST_PIECES for n in value.values())

        return dict(self._typed("pieces", good, {}))

    @property
    def hub(self) -> tuple[str, str] | None:
        """Repository of the Hub that was packed, and its commit; None where it was another source."""

        def good(value: Any) -> bool:
            texts = isinstance(value, dict) and _texts([*value.values()]) and value.keys() >= {"repository", "revision"}
            return texts and bool(REPOSITORY.fullmatch(value["repository"]) and COMMIT.fullmatch(value["revision"]))

        found: dict[str, str] = self._typed("hub", good, {})
        return (found["repository"], found["revision"]) if found else None

    @property
    def sha256(self) -> dict[str, str]:
        """SHA-256 of files of the source, in hexadecimal, by name; "" is the file where it was named itself."""

        def good(value: Any) -> bool:
            return isinstance(value, dict) and all(isinstance(v, str) and SHA256.fullmatch(v) for v in value.values())

        return dict(self._typed("sha256", good, {}))

    @property
    def dequantised(self) -> tuple[str, ...]:
        """What the weights of the source are stored as, for people; none: the tensors are those that it stores."""
        return tuple(self._typed("dequantised", _texts, ()))

    @property
    def keys(self) -> int | None:
        """Seed of the rotation of queries and keys that a quantised cache is to have; None: there is none."""
        none: int | None = None
        return self._typed("keys", _count, none)

    @property
    def transformed(self) -> bool:
        """Whether the weights are those of a transformed model, and so in other coordinates than the original's."""
        return bool(self._typed("transforms", _texts, ()))

    @property
    def online(self) -> int:
        """Number of tensors whose layers need an online transform."""
        return self._typed("online", _count, 0)

    def scale(self, about: Mapping[str, Any], level: str) -> float | None:
        """The scale that an interrupted lossy pack of this request and level has found; None where it was another."""
        if {k: self.stated.get(k) for k in about} != dict(about) or self.stated.get("level") != level:
            return None

        def good(value: Any) -> bool:
            try:
                return isinstance(value, str) and abs(float(value)) < 1000
            except ValueError:
                return False

        found = self._typed("bits_scale", good, None)
        return None if found is None else float(found)


def header_name(file: str) -> str:
    """Name of the attachment that holds the bytes in front of the tensors of a safetensors file; "": the only file."""
    return f"{file or 'safetensors'}.header"


def piece_name(file: str, i: int) -> str:
    """Name of the attachment with piece `i` of a file: no file has it, as it lies below a file."""
    return f"{file}/{i:05d}"


def frame_name(file: str) -> str:
    """Name of the attachment that holds the size of a file, and its bytes around the tensors."""
    return f"{file}.frame"


def state(
    source: str,
    level: str,
    *,
    cut: tuple[int | None, str | None] = (None, None),
    settings: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    online: int = 0,
    tree: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The provenance that a pack writes: kind of the source, level of the tensors that stay lossless.

    `cut` are lanes of a tile and kind of slices, where they were asked for. `settings` are what else the caller states:
    patterns, transforms, and so on; left out where all of it is empty. `about` is what a quantiser states of itself;
    None: all is lossless. `online` counts tensors with online transforms; `tree` has what else the files of the source
    are made of: `headers`, `frames`, `links`, `folders`, `dequantised`, and as `gguf_order` the names of all tensors of
    a GGUF file, where the order of its records is another.
    """
    lanes, slices = cut
    known = {"lanes": lanes, "slices": slices, "online": online or None}
    known |= {k: v or None for k, v in (tree or {}).items()}
    out = {"level": level, "lossless": about is None, "source": source, "tool": f"rac-codec {VERSION}"}
    more = settings if settings and any(settings.values()) else {}
    return {**out, **more, **(about or {}), **{k: v for k, v in known.items() if v is not None}}
