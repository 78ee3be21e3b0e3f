"""Bad sets of two archives, each of which is whole by itself (container.md section 14)."""

from collections.abc import Callable
from dataclasses import dataclass

from golden.good import archive, attachment, tensor
from golden.model import Archive, Record

NAMES = ("m-00001-of-00002.rac", "m-00002-of-00002.rac")


@dataclass(frozen=True)
class Set:
    """Two archives that are no set."""

    clause: str
    why: str
    make: Callable[[], tuple[Archive, Archive]]
    error: str = "FormatError"


def _set(second: Archive) -> Callable[[], tuple[Archive, Archive]]:
    first = archive(_tensor("first", [["alias", True]]), attachment("config.json", b"{}"), shard=[1, 2])
    return lambda: (first, second)


def _tensor(name: str, aliases: list[list[object]]) -> Record:
    return tensor(name, "U8", [1], [len(aliases)], more={"aliases": aliases})


SECOND = _tensor("second", [])
SETS = {
    "alone": Set("RAC-SHR-002", "The second archive states no shard.", _set(archive(SECOND))),
    "number": Set("RAC-SHR-002", "The second archive is shard 1 of 2.", _set(archive(SECOND, shard=[1, 2]))),
    "count": Set("RAC-SHR-002", "The second archive is shard 2 of 3.", _set(archive(SECOND, shard=[2, 3]))),
    "name": Set("RAC-SHR-003", "Two tensors of one name.", _set(archive(_tensor("first", []), shard=[2, 2]))),
    "alias": Set(
        "RAC-SHR-003",
        "An alias is the alias of the other archive.",
        _set(archive(_tensor("second", [["alias", False]]), shard=[2, 2])),
    ),
    "attachment": Set(
        "RAC-SHR-003",
        "Two attachments of one name and content.",
        _set(archive(SECOND, attachment("config.json", b"{}"), shard=[2, 2])),
    ),
}
