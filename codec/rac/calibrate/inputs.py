"""What `--calibrate` may name beside a text: pictures, sounds, pairs of a picture and a text, prompts of a pipeline.

This finds out which, and keeps what was found; models are run by `rac.calibrate.media` and `rac.calibrate.pipeline`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rac.calibrate.builtin import AUTO
from rac.calibrate.file import load
from rac.calibrate.folder import fed, fed_model
from rac.calibrate.layers import Layers
from rac.calibrate.text import Note
from rac.container.zstd import Digest
from rac.errors import MissingDependencyError, OutputError, SourceError

IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
AUDIO = (".wav",)
MOST = 256  # inputs that are used
_VERSION = 1  # counts up when the code would find something else
_PIPELINE = "model_index.json"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a model is run on that is no text. `items` are files; of pairs (file, text); of prompts texts."""

    kind: str
    items: tuple[Any, ...]
    name: str
    backward: bool = True  # whether sensitivities are wanted

    @property
    def digest(self) -> str:
        """Recognises the same inputs: 32 hexadecimal digits."""
        h = Digest()
        for item in self.items:
            file, text = item if isinstance(item, tuple) else (item, "") if self.kind != "prompts" else ("", item)
            h.update(f"\0{text}\0".encode())
            if file:
                fed(h, file)
        return h.value().hex()


def inputs_of(folder: str | os.PathLike[str], name: str) -> Inputs | None:
    """What `name` holds for the model in `folder`; None: a text. SourceError where it holds nothing of use."""
    pipeline = os.path.exists(os.path.join(folder, _PIPELINE))
    if not pipeline and name in ("self", AUTO):
        return None
    if pipeline and (name in ("self", AUTO) or os.path.isdir(name)):
        raise SourceError("a pipeline is calibrated on a text file of prompts, one a line", file=name)
    try:
        if os.path.isdir(name):
            return _folder(name)
        if name.endswith(".jsonl"):
            return _pairs(name)
        if pipeline:
            with open(name, encoding="utf-8") as f:
                prompts = tuple(line.strip() for line in f if line.strip())
            if not prompts:
                raise SourceError("holds no prompt: one a line", file=name)
            return Inputs("prompts", prompts, name)
    except (OSError, UnicodeDecodeError) as e:
        raise SourceError(f"cannot be read: {e}", file=name) from e
    return None


def _folder(name: str) -> Inputs:
    files = sorted(os.path.join(root, f) for root, _, found in os.walk(name) for f in found)
    for kind, endings in (("images", IMAGES), ("audio", AUDIO)):
        if mine := tuple(f for f in files if f.lower().endswith(endings)):
            return Inputs(kind, mine, name)
    raise SourceError(f"no pictures ({', '.join(IMAGES)}) and no sounds ({', '.join(AUDIO)}) there", file=name)


def _pairs(name: str) -> Inputs | None:
    """Lines {"image": file, "text": ...}, files relative to this one; None where the first names no image."""
    items: list[tuple[str, str]] = []
    beside = os.path.dirname(name)
    with open(name, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
            except ValueError as e:
                raise SourceError(f"line {number} is no JSON: {e}", file=name) from e
            found = entry if isinstance(entry, dict) else {}
            if not items and "image" not in found:
                return None
            image, text = found.get("image"), found.get("text")
            if not isinstance(image, str) or not isinstance(text, str):
                raise SourceError(f'line {number} is no {{"image": file, "text": text}}', file=name)
            if not os.path.isfile(path := os.path.join(beside, image)):
                raise SourceError(f"line {number} names {image!r}, which is not there", file=name)
            items.append((path, text))
    return Inputs("pairs", tuple(items), name) if items else None


def calibrate(folder: str | os.PathLike[str], inputs: Inputs, note: Note, cache: str | None = None) -> list[Layers]:
    """What the model in `folder`, or each component of a pipeline, makes of the inputs; kept in a folder `cache`.

    A model is run as a whole. Names are those of its parameters: `rac.encode.allocate.made` brings them to the files.
    SourceError where there is no model that takes such inputs, MissingDependencyError where a package is.
    """
    if len(inputs.items) > MOST:
        note(f"{inputs.name}: the first {MOST} of {len(inputs.items)} are used", 0, 0)
        inputs = replace(inputs, items=inputs.items[:MOST])
    kept = None if cache is None else Path(cache) / f"{_digest(Path(folder), inputs)}.calibration"
    if kept and (found := _kept(kept)):
        return found
    try:
        if inputs.kind == "prompts":
            from rac.calibrate.pipeline import components

            found = components(os.fspath(folder), inputs, note)
        else:
            from rac.calibrate.media import model_on

            found = [model_on(folder, inputs, note)]
    except ImportError as e:
        if isinstance(e, MissingDependencyError):
            raise
        extra = "diffusers" if inputs.kind == "prompts" else "media"
        raise MissingDependencyError(f"calibration on {inputs.kind}: pip install rac-codec[{extra}] ({e})") from e
    if kept:
        _keep(kept, found)
    return found


def _digest(folder: Path, inputs: Inputs) -> str:
    """Digest of all that decides about the result."""
    h = Digest()
    h.update(json.dumps([_VERSION, inputs.kind, inputs.digest, inputs.backward]).encode())
    return fed_model(h, folder, folder.rglob("*")).value().hex()


def _kept(path: Path) -> list[Layers] | None:
    """What an earlier call has kept: a file for each component."""
    try:
        files = sorted(path.parent.glob(f"{path.stem}-*-of-*{path.suffix}"))
        whole = bool(files) and files[0].stem.endswith(f"-of-{len(files):02}")
        return [load(file) for file in files] if whole else None
    except SourceError:
        return None  # damaged: made anew


def _keep(path: Path, found: Sequence[Layers]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise OutputError(f"the calibration cache cannot be written: {e}", file=os.fspath(path.parent)) from e
    for i, layers in enumerate(found):
        layers.save(path.with_name(f"{path.stem}-{i:02}-of-{len(found):02}{path.suffix}"))
