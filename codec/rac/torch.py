"""`safetensors.torch`, for `.rac` files: the same names, arguments and results, with torch tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from rac import frameworks
from rac.decode import archive
from rac.decode.handle import SafeOpen
from rac.encode import pack
from rac.errors import StateDictError, UnstorableError

Path = str | os.PathLike[str]
_TIES = "rac.save_file stores them as one"


def shared(state: Mapping[str, Any]) -> list[list[str]]:
    """Names of tensors with common memory; each tensor is in one list, alone where it shares nothing.

    Names in a list are sorted, lists are in the order of their first tensors.

    What counts is the range of memory from the first to the last element: every other row of a matrix shares memory
    with the rows in between. Tensors without memory (empty ones, those of the meta device) are in no list.
    """
    ranges = sorted((*_range(t), name) for name, t in state.items() if t.numel() and t.device.type != "meta")
    out: list[list[str]] = []
    where, end = "", 0
    for device, start, stop, name in ranges:
        if out and device == where and start < end:
            out[-1].append(name)
            end = max(end, stop)
        else:
            out.append([name])
            where, end = device, stop
    place = {name: i for i, name in enumerate(state)}
    return [sorted(names) for names in sorted(out, key=lambda names: min(place[n] for n in names))]


def _range(t: Any) -> tuple[str, int, int]:
    """Device of a tensor, and where its memory begins and ends."""
    last = sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True))
    return str(t.device), t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def kept(state: Mapping[str, Any], preferred: Mapping[str, Any] | None = None) -> dict[str, list[str]]:
    """For each list of names with common memory, the one that stands for all, and the others.

    That is the first one with the memory of all of them; among these, of the `preferred` ones if any.
    StateDictError where no tensor covers the others.
    """
    out = {}
    for names in shared(state):
        ranges = {name: _range(state[name])[1:] for name in names}
        whole = (min(a for a, _ in ranges.values()), max(b for _, b in ranges.values()))
        size = 0 if len(names) == 1 else whole[1] - whole[0]  # a tensor alone may have holes
        covering = [n for n in names if ranges[n] == whole and state[n].numel() * state[n].element_size() >= size]
        if not covering:
            raise StateDictError(f"{_some(names)} share memory, and none of them holds all of it; {_TIES}")
        first = next((n for n in covering if n in (preferred or {})), covering[0])
        out[first] = [n for n in names if n != first]
    return out


def _tensors(state: Mapping[str, Any]) -> dict[str, Any]:
    """What is a tensor of a state; modules may add values of other kinds."""
    kind = frameworks.torch_module().Tensor
    return {name: t for name, t in state.items() if isinstance(t, kind)}


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 5 else ""
    return ", ".join(map(repr, names[: 4 if more else 5])) + more


def _checked(tensors: Any) -> Mapping[str, Any]:
    """`tensors`, wide types first, then by name, as safetensors sorts them; or an error where that refuses them."""
    torch = frameworks.torch_module()
    if not isinstance(tensors, Mapping):
        raise UnstorableError(f"a dict of names to torch tensors is needed, not a {type(tensors).__name__}")
    for name, t in tensors.items():
        if not isinstance(t, torch.Tensor):
            raise UnstorableError(f"{name!r} is a {type(t).__name__}, not a torch tensor")
        if t.layout != torch.strided:
            raise UnstorableError(f"{name!r} is sparse ({t.layout}); .to_dense() makes a tensor that can be saved")
        if t.device.type == "meta":
            raise StateDictError(f"{name!r}: Cannot copy out of meta tensor, which has no data; load the model first")
    for names in shared(tensors):
        if len(names) > 1:
            raise StateDictError(f"{_some(names)} share memory; save_model keeps one of them, and {_TIES}")
    for name, t in tensors.items():
        if not t.is_contiguous():
            raise UnstorableError(f"{name!r} is not contiguous; save .contiguous() of it, or use rac.save_file")
    return dict(sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])))


def save_file(tensors: Mapping[str, Any], filename: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors to a file, losslessly, in place of one that is there.

    UnstorableError (a ValueError) for what is no tensor, sparse or not contiguous, StateDictError (a RuntimeError)
    for tensors with common memory, which `rac.save_file` stores, and for those of the meta device.
    """
    pack.save_file(_checked(tensors), filename, metadata)


def save(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes of a file of these tensors; as `save_file`."""
    return pack.save(_checked(tensors), metadata)


def load_file(filename: Path, device: Any = "cpu", *, backend: str = "mmap") -> dict[str, Any]:
    """All tensors of a file by name, in its order, on a device; RacError where it is missing or damaged."""
    with SafeOpen(filename, "pt", device, backend=backend) as f:
        return f.get_tensors()


def load(data: bytes) -> dict[str, Any]:
    """All tensors of a file that is in memory."""
    return archive.load(data, framework="pt")


def save_model(
    model: Any, filename: Path, metadata: Mapping[str, str] | None = None, force_contiguous: bool = True
) -> None:
    """Write the state of a `torch.nn.Module`; of tensors with common memory one is written.

    The metadata say for each of the others by which it is represented. UnstorableError where a tensor is not
    contiguous and `force_contiguous` is false.
    """
    state = model.state_dict()
    stated = dict(metadata or {})
    tensors = _tensors(state)
    for name, others in kept(tensors).items():
        for other in others:
            stated.setdefault(other, name)
            del state[other]
    if force_contiguous:
        state = {name: t.contiguous() if name in tensors else t for name, t in state.items()}
    try:
        save_file(state, filename, stated)
    except UnstorableError as e:
        if force_contiguous:
            raise
        raise UnstorableError(f"{e.message}; or use save_model(..., force_contiguous=True)") from e


def load_model(
    model: Any, filename: Path, strict: bool = True, device: Any = "cpu", *, backend: str = "mmap"
) -> tuple[set[str], list[str]]:
    """Load a file into a `torch.nn.Module`; returns the names that are missing in it, and those that nothing took.

    Tensors of the model with common memory need one of their names in the file; a second one is unexpected, unless the
    file has the two tied. StateDictError (a RuntimeError) where `strict` and anything is missing or unexpected.
    """
    state = load_file(filename, device, backend=backend)
    groups = kept(_tensors(model.state_dict()), preferred=state)
    result = model.load_state_dict(state, strict=False)
    missing, unexpected = set(result.missing_keys), list(result.unexpected_keys)
    for name, others in groups.items():
        unexpected += [n for n in others if n not in missing and state[n] is not state.get(name)]
        missing.difference_update(others)
    if strict and (missing or unexpected):
        lines = [f"Error(s) in loading state_dict for {type(model).__name__}:"]
        for what, names in (("Missing", missing), ("Unexpected", unexpected)):
            if names:
                lines.append(f"{what} key(s) in state_dict: " + ", ".join(f'"{n}"' for n in sorted(names)))
        raise StateDictError("\n    ".join(lines), file=os.fspath(filename))
    return missing, unexpected
