"""An archive to the folder that `from_pretrained` understands: `rac pack --format hf`.

The weights are in ordinary safetensors files, so that the Hub, sharding and device maps work as for any model. Those
of layers that can stay compressed are there as records, byte for byte (runtime/record.py); nothing is coded again.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import transformers
from safetensors import SafetensorError
from safetensors.torch import save_file

from rac.container.shards import check
from rac.decode.archive import RacFile
from rac.dequantise import plain
from rac.errors import OutputError, RacError, UnsupportedError
from rac.models.predictions import quiet
from rac.runtime import quantised, residency
from rac.runtime.model import State, model_class, write_attachments
from rac.runtime.quantizer import METHOD, RacConfig

Progress = Callable[[str, int], None]
SHARD = 5 * 10**9
"""Bytes of a safetensors file, as of `save_pretrained`; so much is in memory at once."""
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json")


@dataclass(frozen=True, slots=True)
class Written:
    """What a folder holds."""

    records: int
    """Tensors that are compressed."""
    tensors: int
    size: int
    """Bytes of all its files."""


def write_folder(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    shard: int = SHARD,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Written:
    """Write the model of an archive as a folder for `from_pretrained`, which appears when it is whole.

    `force` replaces it where it exists, this program wrote it, and nothing else is in it. After `shard` bytes another
    safetensors file begins. `progress` is called with the name of a tensor and the bytes written for it.

    RacError where the archive is damaged or no model that transformers knows, or the folder exists or cannot be
    written. What was there before is still there then.
    """
    target = os.path.realpath(os.fspath(out))  # a link stays, and what it names is replaced
    with RacFile(path, framework="pt") as f, quiet(transformers):
        replaceable(target, force, f.attachments())
        part = f"{target}.{secrets.token_hex(4)}.part"
        try:
            os.makedirs(part)
            records, count = _fill(f, part, shard, trust_remote_code, progress or (lambda *_: None))
            size = sum(p.stat().st_size for p in Path(part).rglob("*") if p.is_file())
            _swap(part, target, lambda there: replaceable(there, force, f.attachments()))
        except RacError:
            raise
        except (OSError, SafetensorError) as e:  # the latter has no error number
            raise OutputError(getattr(e, "strerror", None) or str(e), file=target) from e
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return Written(records, count, size)


def replaceable(folder: str, force: bool, names: Iterable[str]) -> None:
    """OutputError unless a folder may be written: nothing is there, or with `force` what `write_folder` wrote alone.

    That are the files of weights, config.json, and attachments with these `names`.
    """
    if not os.path.lexists(folder):
        return
    if not force:
        raise OutputError("exists already; give --force to replace it", file=folder)
    if not os.path.isdir(folder):
        raise OutputError("is no folder", file=folder)
    inside = Path(folder).rglob("*")
    found = [p.relative_to(folder).as_posix() for p in inside if p.is_symlink() or not p.is_dir()]
    if found and not _written(folder):
        raise OutputError("is a folder that rac did not write, and is not replaced; name another one", file=folder)
    own = {*names, "config.json"}
    if others := sorted(n for n in found if n not in own and not _WEIGHTS.fullmatch(n)):
        more = f" and {len(others) - 1} more" if len(others) > 1 else ""
        what = f"holds {others[0]!r}{more}, which rac did not write; move that away, or name another folder"
        raise OutputError(what, file=folder)


def _written(folder: str) -> bool:
    """Whether the configuration in a folder is one that `write_folder` wrote."""
    try:
        stated = json.loads(Path(folder, "config.json").read_text("utf-8"))
        return bool(stated["quantization_config"]["quant_method"] == METHOD)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def _swap(new: str, target: str, check: Callable[[str], None]) -> None:
    """Give a folder its name; the one that has it goes when the new one is in its place, and stays where that fails."""
    if not os.path.lexists(target):
        os.rename(new, target)
        return
    old = new.removesuffix(".part") + ".old"
    os.rename(target, old)
    try:
        check(old)  # once more: nobody puts anything into it any more
        os.rename(new, target)
    finally:
        if os.path.lexists(target):
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(old, target)


def _fill(f: RacFile, folder: str, shard: int, trust: bool, progress: Progress) -> tuple[int, int]:
    """Write everything below the folder; returns the number of records, and of tensors."""
    file = f.archives[0].access.name
    for archive in f.archives:  # records go as they are: what is damaged would go on
        check(archive)
    write_attachments(f, folder)
    config, cls = model_class(folder, file, trust)
    state = State(f)
    with state.blamed(file):
        quantised.settle(state.lazy, config, folder, "compressed", None)
        heads = state.hold(cls, config, file, residency.worth)
    files: list[list[str]] = [[]]
    size = 0
    for name, lazy in state.lazy.items():
        if files[-1] and size + lazy.nbytes > shard:
            files.append([])
            size = 0
        files[-1].append(name)
        size += lazy.nbytes
    where: dict[str, str] = {}
    for i, names in enumerate(files, 1):
        weights = "model.safetensors" if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
        where |= dict.fromkeys(names, weights)
        content = {}
        for name in names:
            lazy = state.lazy[name]
            content[name] = lazy[...].clone() if len(lazy.names) > 1 else lazy[...]
            progress(name, lazy.nbytes)
        if online := sorted(state.online().keys() & set(names)):
            what = "has an online transform and cannot stay compressed; a folder cannot state it"
            raise UnsupportedError(what, file=file, unit=repr(online[0]))
        save_file(content, os.path.join(folder, weights), metadata={"format": "pt"})
        del content
    if len(files) > 1:
        total = sum(lazy.nbytes for lazy in state.lazy.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        Path(folder, "model.safetensors.index.json").write_text(
            json.dumps(index, indent=2, sort_keys=True), "utf-8", newline="\n"
        )
    path = Path(folder, "config.json")
    stated = plain(json.loads(path.read_text("utf-8"))) | {"quantization_config": RacConfig(records=heads).to_dict()}
    path.write_text(json.dumps(stated, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8", newline="\n")
    return len(heads), len(state.lazy)
