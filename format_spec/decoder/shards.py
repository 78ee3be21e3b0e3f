"""Sets of archives, container.md section 14."""

import re
from pathlib import Path

from .archive import Archive, decode
from .errors import FormatError, Limits

NAME = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.rac")


def decode_set(path: Path, limits: Limits | None = None) -> list[Archive]:
    """All archives of the set that the file at `path` belongs to, in order; FileNotFoundError where one is missing."""
    named = NAME.fullmatch(path.name)
    if not named or int(named[3]) < 1:
        raise FormatError(f"RAC-SHR-001: {path.name} is not the name of a shard")
    archives, tensors, attachments = [], set[str](), set[str]()
    for k in range(1, int(named[3]) + 1):
        archive = decode(path.with_name(f"{named[1]}-{k:05d}-of-{named[3]}.rac"), limits)
        if archive.header.shard != (k, int(named[3])):
            raise FormatError(f"RAC-SHR-002: the header of shard {k} states {archive.header.shard}")
        if tensors & archive.tensors.keys() or attachments & archive.attachments.keys():
            raise FormatError(f"RAC-SHR-003: a name of shard {k} is in another shard too")
        tensors |= archive.tensors.keys()
        attachments |= archive.attachments.keys()
        archives.append(archive)
    return archives
