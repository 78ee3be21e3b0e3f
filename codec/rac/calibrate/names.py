"""From the modules of a model to the tensors of its files: what calibration found, under the names that files have.

transformers renames most tensors by rules; what it makes of several tensors, or of a part of one, is found by the
values of rows. What the text did not reach is told with the part of the model that it belongs to.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rac.calibrate.experts import Stored, bits, parts
from rac.calibrate.folder import Folder
from rac.calibrate.moments import linears
from rac.calibrate.tables import entries, taken
from rac.models.linears import is_linear, tables
from rac.models.names import renamed

Entry = dict[str, Any]
Found = list[tuple[Any, Entry]]
EMBEDDINGS, BUFFERS = "embeddings", "buffers"
"""What no product is made with."""
CONVOLUTIONS, OUTSIDE = "convolutions", "products outside of linear layers"
"""What a text's calibration does not look at; `rac.calibrate` does."""
PARTS = (
    ("text projection", r"(^|\.)text_proj"),
    ("projector", r"projector|connector|mm_proj|modality_projection|qformer|language_projection"),
    ("vision tower", r"vision|visual|image|patch|pixel|vit\b"),
    ("audio tower", r"audio|speech|mel_|feature_extractor"),
    ("cross attention", r"encoder_attn|cross_?attn|cross_?attention|cross_?modal|multi_?modal|encdecattention"),
    ("global attention", r"_global\b"),
    ("attention of entities", r"(e2e|e2w|w2e)_query"),
    ("pooler", r"pooler"),
)
"""Parts of models that a text may leave out, and what their names look like."""
_CONVOLUTIONS = ("Conv1d", "Conv2d", "Conv3d", "ConvTranspose", "ParametrizedConv")
_SEES = {"pixel_values": "vision tower", "input_features": "audio tower", "input_values": "audio tower"}


def rename(model: Any, stored: Stored, folder: Folder, tokens: int) -> dict[str, str]:
    """Turn the names of modules in the state of a calibration's `folder` to those of the stored weights.

    Tables, which were seen in `tokens` tokens, get what their two roles come to.

    Returns the names of the float matrices in the files that were not reached, to the part of the model of each.
    """
    layers: dict[str, Entry] = folder.state["layers"]
    seen, modules = entries(model, taken(layers), folder, tokens), linears(model)
    known = renamed(model, stored.names)
    by_key: dict[str, list[str]] = {}
    for name, (key, _) in known.items():
        by_key.setdefault(key, []).append(name)
    loose: Found = []
    fused: dict[tuple[str, str], list[Entry]] = {}
    for module in list(layers):
        entry, found = layers.pop(module), parts(module)
        owner, leaf, number = found or (module, "weight", 0)
        w = getattr(modules[owner], leaf).detach()
        if found and number is not None:
            loose.append((w[number], entry))
            fused.setdefault((owner, leaf), []).append(entry)
            continue
        if found:
            entry["experts"] = fused.setdefault((owner, leaf), [])
        else:
            entry["transposed"] = type(modules[module]).__name__ == "Conv1D"
        names = [n for n in by_key.get(f"{owner}.{leaf}", ()) if stored.shape(n) == tuple(w.shape)]
        if found and not names:
            names = [n for n in (stored.same(w, layers),) if n is not None]
        if names:
            layers |= dict.fromkeys(names, entry)
        elif not found:
            loose.append((w, entry))
    for key, table in seen.items():
        shape = tuple(model.get_parameter(key).shape)
        layers |= {n: table for n in by_key.get(key, ()) if stored.shape(n) == shape}
    layers |= _blocks(loose, stored, layers)
    layers |= _rows(loose, stored, layers, folder)
    reached = {at for name in layers for at in _prefixes(known.get(name, (name, True))[0])}
    left = [name for name in stored.names if name not in layers and _counts(stored, name)]
    return {name: _part(model, known, name, reached) for name in left}


def as_they_are(model: Any, stored: Stored) -> dict[str, str]:
    """The stored weights that are parameters of the model as they are, to the parameter's name."""
    return {name: key for name, (key, whole) in renamed(model, stored.names).items() if whole}


def _prefixes(key: str) -> list[str]:
    """The modules around a parameter, from the outermost inwards, without its own."""
    steps = key.split(".")[:-2]
    return [".".join(steps[: i + 1]) for i in range(len(steps))]


def _blocks(loose: Found, stored: Stored, taken: Mapping[str, Entry]) -> dict[str, Entry]:
    """Entries of the tensors that are rows, one after the other, of these matrices."""
    found: dict[str, Entry] = {}
    for w, entry in loose:
        for name, *rows in stored.find(w, {**taken, **found} if found else taken):
            if not entry["transposed"]:
                found[name] = {**entry, "rows": rows}
            elif rows == [0, len(w)]:
                found[name] = entry
    return found


def _rows(loose: Found, stored: Stored, taken: Mapping[str, Entry], folder: Folder) -> dict[str, Entry]:
    """Entries of the tensors with rows, in any order, of matrices that multiply the same input."""
    left = {n: stored.shape(n) for n in stored.names if n not in taken and _counts(stored, n)}
    left = {n: shape for n, shape in left.items() if len(shape) == 2}
    widths = {shape[1] for shape in left.values()}
    whole = [(w, entry) for w, entry in loose if not entry["transposed"] and w.dim() == 2 and w.shape[1] in widths]
    where: dict[bytes, tuple[int, int]] = {}
    for k, (w, _) in enumerate(whole) if left else ():
        for i, row in enumerate(bits(w)):
            where.setdefault(row.tobytes(), (k, i))
    found: dict[str, Entry] = {}
    for name in left if where else ():
        at = [where.get(row.tobytes()) for row in bits(stored.read(name))]
        if all(at) and (entry := _gathered([w for w in at if w], [e for _, e in whole], folder)):
            if "sensitivity" in entry:
                entry["sensitivity"] = folder.put(f"sensitivity-rows-{len(found):04}.npy", entry["sensitivity"])
            found[name] = entry
    return found


def _gathered(at: Sequence[tuple[int, int]], entries: Sequence[Entry], folder: Folder) -> Entry | None:
    """The entry of a matrix with row `i` of entry `k` for each (k, i); None where these have other inputs."""
    used = sorted({k for k, _ in at})
    if len({entries[k]["second"] for k in used}) != 1:
        return None
    entry = {**entries[used[0]], "finite": all(entries[k]["finite"] for k in used)}
    if all("sensitivity" in entries[k] for k in used):
        each = {k: folder.array(entries[k]["sensitivity"]) for k in used}
        entry["sensitivity"] = np.array([each[k][i] for k, i in at])
    else:
        entry.pop("sensitivity", None)
    entry.pop("outer", None)
    return entry


def _counts(stored: Stored, name: str) -> bool:
    return len(stored.shape(name)) > 1 and stored.floats(name)


def _part(model: Any, known: Mapping[str, tuple[str, bool]], name: str, reached: Collection[str]) -> str:
    """The part of the model that a tensor of its files is in: a name of the above, a module, or "other layers".

    `reached` are the modules that a text runs a layer of.
    """
    key = known.get(name, (name, True))[0]
    owners = list(_owners(model, key))
    if owners and owners[-1] in tables(model):
        return EMBEDDINGS
    if owners and key.rpartition(".")[2] in owners[-1]._buffers:
        return BUFFERS
    # a layer of cross attention is not run without what it attends to, all of it
    across = " ".join(type(m).__name__ for m in owners[1:] if "CrossAttention" in type(m).__name__)
    low = f"{name} {key} {across}".lower()
    if part := next((part for part, pattern in PARTS if re.search(pattern, low)), None):
        return part
    for owner in owners[1:]:
        if hasattr(owner, "config") and (sees := _SEES.get(getattr(owner, "main_input_name", ""))):
            return sees
    return _unlooked(owners, key, low, reached)


def _unlooked(owners: Sequence[Any], key: str, name: str, reached: Collection[str]) -> str:
    """The part of a tensor that no name tells of, by the modules around it."""
    if any(type(m).__name__.startswith(_CONVOLUTIONS) for m in owners):
        return CONVOLUTIONS
    own = owners and key.rpartition(".")[2] in owners[-1]._parameters
    if own and not is_linear(owners[-1]) and "expert" not in name:
        return OUTSIDE
    left = next((at for at in _prefixes(key) if at not in reached), "other layers")
    return re.sub(r"\.\d+(?=\.|$)", ".*", left)


def _owners(model: Any, key: str) -> Iterator[Any]:
    """The modules around a parameter, from the model inwards."""
    yield model
    for step in key.split(".")[:-1]:
        model = getattr(model, step, None)
        if model is None:
            return
        yield model
