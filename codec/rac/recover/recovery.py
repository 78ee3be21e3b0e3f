"""Recovery of one model: the original predicts, quantised matrices take the place of its own, the rest is trained.

Everything lies in a folder of the cache under the digest of all that decides about it, so that an interrupted recovery
goes on, and one that was done is not done again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate.folder import DamagedError, Folder
from rac.calibrate.given import Given
from rac.calibrate.passes import Asked, load_model, model_class
from rac.calibrate.reader import ERRORS, is_causal
from rac.calibrate.text import Note
from rac.container.zstd import digest
from rac.errors import RacError
from rac.machine import memory, room
from rac.recover.lessons import Lessons
from rac.recover.model import Trained, UnfitError, fast
from rac.recover.run import Plan, Recovered, Training
from rac.recover.teacher import NotFiniteError

_TAUGHT, _TRAINED = 3, 10  # versions of what is said here: count up when the original, or training, would find others


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be recovered."""

    path: str | Given  # the folder of the original
    names: Collection[str]  # of all tensors of its files
    matrices: Mapping[str, Callable[[], NDArray[np.float32]]]  # those that were quantised, as a decoder restores them
    rows: Collection[str]  # those of them whose rows may get gains
    lessons: Lessons
    plan: Plan
    device: str = "cpu"


def recover(job: Job, model: str, content: str, cache: str | None, note: Note) -> Recovered:
    """What training finds; UnfitError, whose message says why, where nothing can be trained.

    `model` is a digest of the original, `content` one of its quantised matrices. What the original predicts stays in
    the cache for others. OutputError where the cache cannot be written.
    """
    taught = Folder(cache, f"predictions-{_digest(job, [_TAUGHT, model])}")
    plan = job.plan
    settings = [plan.steps, plan.most, plan.coarse, plan.rate, sorted(job.rows), sorted(plan.types.items())]
    ids = [
        (each.shape, digest(np.ascontiguousarray(each, "<i8").tobytes()))
        for each in (job.lessons.train, job.lessons.held)
    ]
    folder = Folder(cache, f"recovery-{_digest(job, [_TRAINED, model, content, *ids, *settings])}")
    with folder.alone(lambda: note("another process recovers the same: waiting for it", 0, 0)):
        for again in (False, True):
            try:
                if "done" not in folder.state:
                    _keep(folder, _trained(job, folder, taught, note))
                return _kept(folder)
            except DamagedError:
                if again:
                    raise
                folder.clear()
                taught.clear()
    raise AssertionError


def _digest(job: Job, about: list[Any]) -> str:
    """Of what decides about a result: the arithmetic and what else is said."""
    return digest(repr([job.device, fast(job.device), *about]).encode()).hex()


def _trained(job: Job, folder: Folder, taught: Folder, note: Note) -> Recovered:
    path = os.fspath(job.path)
    kind, config = model_class(path)
    if not is_causal(kind, config):
        raise UnfitError(f"{kind.__name__} is no causal language model")
    need = _loads(path)
    try:
        asked = Asked(path, 1, 1, False, job.path if isinstance(job.path, Given) else None, job.device)
        model = Trained(load_model(kind, asked, config, "auto"), job.names, job.device)
        need = _room(model, job.lessons.train[0].size)
        training = Training(model, job.lessons, job.plan, folder, note, taught)
        with taught.alone(lambda: note("another process asks the original the same: waiting for it", 0, 0)):
            training.teach()
        for name, decoded in job.matrices.items():
            model.put(name, decoded())
        model.train(sorted(job.rows), sorted(job.plan.types))
        return training.run()
    except NotFiniteError as e:
        raise UnfitError(str(e)) from e
    except RacError:
        raise
    except (*ERRORS, MemoryError) as e:
        short = isinstance(e, MemoryError) or "memory" in str(e)
        raise UnfitError(f"not enough memory: {need}" if short else f"the model does not train: {e}") from e


def _loads(path: str) -> str:
    """What the model takes, for people; UnfitError where it is more than there is: the system would end the pack."""
    kinds = (Path(path).glob(f"*.{kind}") for kind in ("safetensors", "bin"))  # some folders have both, of the same
    size = max(sum(file.stat().st_size for file in files) for files in kinds)
    if size > memory():
        raise UnfitError(f"the model takes {size / 1e9:.1f} GB of memory, and the machine has {memory() / 1e9:.1f}")
    return f"the model takes about {size / 1e9:.1f} GB"


def _free(device: str) -> int:
    """Bytes that a step may take: what is free on a GPU that says it, else a quarter of the machine's memory."""
    return int(torch.cuda.mem_get_info(device)[0]) if device.startswith("cuda") else room()


def _room(model: Trained, tokens: int) -> str:
    """Keep little on the way forward where memory is short; what a step then takes, for people, or UnfitError."""
    need, free = model.need(tokens), _free(model.device)
    if need > free // 2:
        need = model.checkpoint(tokens)
        if need > free:
            raise UnfitError(f"a step takes {need / 1e9:.1f} GB of memory, and may take {free / 1e9:.1f}")
    return f"a step takes about {need / 1e9:.1f} GB beside the weights"


def _keep(folder: Folder, found: Recovered) -> None:
    """Write what was found, and forget what led to it."""
    layout: list[list[Any]] = []
    for kind, each in (("gains", found.gains), ("vectors", found.vectors)):
        if each:
            folder.put(f"found-{kind}.npy", np.concatenate([*each.values()]))
        layout += [[kind, name, len(x)] for name, x in each.items()]
    about = {"before": found.before, "after": found.after, "steps": found.steps, "why": found.why}
    folder.state.clear()
    folder.state.update(done=about, layout=layout)
    folder.commit(drop=lambda name: not name.startswith("found-"))


def _kept(folder: Folder) -> Recovered:
    out: dict[str, dict[str, Any]] = {"gains": {}, "vectors": {}}
    for kind, each in out.items():
        mine = [(name, n) for of, name, n in folder.state["layout"] if of == kind]
        if mine:
            ends = np.cumsum([n for _, n in mine])[:-1]
            parts = np.split(np.array(folder.array(f"found-{kind}.npy")), ends)
            each.update({name: x for (name, _), x in zip(mine, parts, strict=True)})
    return Recovered(out["gains"], out["vectors"], **folder.state["done"])
