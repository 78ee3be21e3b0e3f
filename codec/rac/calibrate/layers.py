"""What the inputs and outputs of a model's linear layers look like on a text.

The second moment E[x x^T] of the inputs of each layer, tokens weighted by how much the loss depends on them there, and
for each output i the sensitivity E[(dL/dy_i)^2], L the cross-entropy against labels drawn from the model's own
predictions (the true Fisher).

A model is run block by block, each over the whole text, what one made of it kept in a file for the next
(calibration_stream): the memory needed is that of one block, however large the model.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rac.calibrate.folder import DamagedError, Folder, fed
from rac.calibrate.text import SEED, Note, self_text_ids, sequences, text_ids
from rac.container.zstd import Digest
from rac.errors import MissingDependencyError, SourceError

_VERSION = 4
"""Version of this code: counts up when it would find something else, so that nothing old is taken from a cache."""
_SMALL = 1 << 31
"""Bytes of weights up to which the model that writes its own text is held in float32."""


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """What calibration found for one weight matrix."""

    moment: NDArray[np.float32] | Callable[[], NDArray[np.float32]]
    """The second moment, or what reads it."""
    sensitivity: NDArray[np.float64] | None
    """(out,) float64, mean of squared gradients, or None where no backward pass was made."""
    transposed: bool = False
    """Whether the weight is stored as (in, out), as GPT-2's are, instead of (out, in)."""
    finite: bool = True
    """False where NaN or infinity was among the inputs or gradients."""
    experts: Sequence[Layer] = ()
    """What was found for each expert of a weight (experts, out, in) or (experts, in, out); otherwise empty."""

    @property
    def second(self) -> NDArray[np.float32]:
        """(in, in), a mean over the text's tokens, which count by the length of their gradient where there is one.

        Layers that share an input share the file. Read when asked for; SourceError where it is damaged.
        """
        return self.moment() if callable(self.moment) else self.moment


class Layers(dict[str, Layer]):
    """Weight names, as they are in the model's files, to what was found; layers that were never run are missing."""

    def __init__(self, layers: Mapping[str, Layer], tokens: int, digest: str) -> None:
        super().__init__(layers)
        self.tokens = tokens
        """Tokens really used."""
        self.digest = digest
        """Digest of model, text, settings and this code: 32 hexadecimal digits, the folder's name in a cache."""


def calibrate(
    path: str | os.PathLike[str],
    text: str | NDArray[np.int64] | None,
    *,
    tokens: int = 40960,
    context: int = 1024,
    fisher: bool = True,
    note: Note | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> Layers:
    """Run the model in a Hugging Face folder `path` over a text, or its token ids (n,); None: over text of its own.

    A causal language model gets a forward and, for the sensitivities (`fisher`), a backward pass; an encoder a forward
    pass only; an encoder-decoder model reads each sequence with its encoder and once more with its decoder, and is run
    as a whole, like other models that are no chain of blocks (`note` then says so): that needs the memory of the model
    in float32 and of one sequence's activations.

    The work folder holds 4 bytes for each token, block and number of the hidden state while it works (2.8 GB for
    SmolLM2 135M and 40,960 tokens), and 4 * in^2 bytes for each layer input when it is done. In a folder `cache` the
    result is kept under its digest: the same call returns at once, one that was interrupted goes on after the last
    finished block. Else it goes with the result.

    Raises:
        MissingDependencyError: torch or transformers are not installed.
        OutputError: The cache cannot be written.
        SourceError: No model or tokenizer there, the text is too short, or a model that is not causal has none.
    """
    if not os.path.isdir(path):
        raise SourceError("calibration needs a Hugging Face model folder", file=os.fspath(path))
    if tokens < 1 or context < 1:
        raise ValueError("tokens and context must be at least 1")
    settings = {"version": _VERSION, "tokens": tokens, "context": context, "fisher": fisher, "seed": SEED}
    digest = _digest(Path(path), text, settings)
    folder = Folder(cache, digest)
    tell = note or (lambda *_: None)
    if folder.state.get("finished"):  # nothing to write: a cache that is read-only serves too
        with contextlib.suppress(DamagedError):
            return _layers(folder, digest)
    with folder.alone(lambda: tell("another process is calibrating the same: waiting for it", 0, 0)):
        for again in (False, True):
            try:
                if not folder.state.get("finished"):
                    _find(os.fspath(path), text, tokens, context, fisher, folder, tell)
                return _layers(folder, digest)
            except DamagedError:
                if again:
                    raise
                tell("a file of the calibration cache is damaged: starting again", 0, 0)
                folder.clear()
    raise AssertionError


def joined(found: Sequence[Mapping[str, Layer]]) -> dict[str, Layer]:
    """What calibrations on several texts come to together: each counts alike, of those that reached a layer."""
    names = dict.fromkeys(name for layers in found for name in layers)
    return {name: _mean([layers[name] for layers in found if name in layers]) for name in names}


def _mean(layers: Sequence[Layer]) -> Layer:
    known = [layer.sensitivity for layer in layers if layer.sensitivity is not None]
    sensitivity = np.mean(known, 0) if known else None
    experts = [_mean(each) for each in zip(*(layer.experts for layer in layers if layer.experts), strict=True)]
    finite = all(layer.finite for layer in layers)
    return Layer(functools.partial(_mean_of_seconds, layers), sensitivity, layers[0].transposed, finite, experts)


def _mean_of_seconds(layers: Sequence[Layer]) -> NDArray[np.float32]:
    total = np.array(layers[0].second)
    for layer in layers[1:]:
        total += layer.second
    total /= np.float32(len(layers))
    return total


def _digest(path: Path, text: str | NDArray[np.int64] | None, settings: dict[str, Any]) -> str:
    """Digest, in hexadecimal, of all that decides about the result: text and tokenizer stand for the tokens."""
    h = Digest()
    about = "own" if text is None else "text" if isinstance(text, str) else "ids"
    h.update(json.dumps({**settings, "text": about}, sort_keys=True).encode())
    if text is not None:
        h.update(text.encode() if isinstance(text, str) else np.ascontiguousarray(text, "<i8").tobytes())
    try:
        for file in sorted(path.iterdir()):
            if file.suffix in (".json", ".safetensors", ".model", ".txt") and file.is_file():
                h.update(f"\0{file.name}\0{file.stat().st_size}\0".encode())
                fed(h, file)
    except OSError as e:
        raise SourceError(f"cannot be read: {e}", file=os.fspath(path)) from e
    return h.value().hex()


def _find(
    path: str, text: str | NDArray[np.int64] | None, tokens: int, context: int, fisher: bool, folder: Folder, note: Note
) -> None:
    """Do what is still to do, and write it into the folder."""
    try:
        import transformers

        from rac.calibrate import passes
        from rac.calibrate.chain import UnfitError
    except ImportError as e:
        why = "calibration needs torch and transformers: pip install rac-codec[calibrate]"
        raise MissingDependencyError(why) from e
    try:
        config: Any = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as e:  # transformers raises whatever a broken file makes of it
        raise SourceError(f"no model that transformers knows: {e}", file=path) from e
    kind, causal = _kind(config)
    context = min(context, getattr(config.get_text_config(), "max_position_embeddings", None) or context)
    if "ids.npy" not in folder:
        if text is not None:
            ids = _ids(path, text, tokens, context, note)
        elif causal:
            # on a CPU attention to a long cache is twice as fast in float32 as in bfloat16; a large model would not fit
            small = sum(f.stat().st_size for f in Path(path).glob("*.safetensors")) <= _SMALL
            writer = _load(kind, path, "float32" if small else "auto")
            ids = self_text_ids(writer, tokens, context, folder, note)
            del writer
        else:
            raise SourceError("only a causal language model can write its own calibration text", file=path)
        folder.put("ids.npy", np.ascontiguousarray(ids, np.int64))
        folder.commit(drop=lambda name: name.startswith("own-"))
    ids = np.array(folder.array("ids.npy"))
    both, model = bool(config.is_encoder_decoder), None
    try:
        if both:
            raise UnfitError("it has an encoder and a decoder")
        model = _load(kind, path, "auto")
        passes.stream(model, causal, ids, fisher and causal, folder, note)
    except UnfitError as e:
        note(f"running the model as a whole: {e}", 0, 0)
        model = None  # its weights are no longer all of one type
        model = _load(kind, path, "float32")
        passes.whole(model, causal, ids, fisher and (causal or both), folder, note)
    _rename(folder.state["layers"], model, Path(path))
    folder.state.update(finished=True, tokens=int(ids.size))
    folder.commit(drop=lambda name: name.startswith(("hidden-", "gradient-")))


def _ids(path: str, text: str | NDArray[np.int64], tokens: int, context: int, note: Note) -> NDArray[np.int64]:
    """The sequences (count, context) of a text."""
    if isinstance(text, str):
        every, most = text_ids(path, text, tokens)
    else:
        every, most = np.asarray(text, np.int64), context
    if len(every) < tokens:
        note(f"the calibration text has {len(every)} tokens, {tokens} were asked for", 0, 0)
    return sequences(every, tokens, min(context, most))


def _kind(config: Any) -> tuple[Any, bool]:
    """The class that the folder's weights are named after, and whether it is a causal language model."""
    import transformers
    from transformers.models.auto import modeling_auto

    causal = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name), name in causal and not config.is_encoder_decoder
    return transformers.AutoModel, False


def _load(kind: Any, path: str, dtype: str) -> Any:
    """The model; weights of the stored type stay mapped files, and are in memory only while they are used."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # there is `note`
    try:
        model = kind.from_pretrained(path, dtype=dtype, local_files_only=True, use_safetensors=True)
    except Exception as e:  # transformers raises whatever a broken file makes of it
        raise SourceError(f"no model that transformers can load: {e}", file=path) from e
    finally:
        if shown:
            logging.enable_progress_bar()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # one expert after the other, so that its inputs can be seen
    return model.eval()


def _rename(layers: dict[str, Any], model: Any, path: Path) -> None:
    """Module names to names of weights, as the files have them: some leave out the prefix of the base model.

    Of fused experts the files may have each by itself, under names of their own.
    """
    from rac.calibrate.experts import Stored, parts
    from rac.calibrate.moments import linears

    modules = linears(model)
    prefix = f"{model.base_model_prefix}."
    stored = Stored(path)
    matrices = []
    fused: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for module in list(layers):
        entry = layers.pop(module)
        found = parts(module)
        if found and found[2] is not None:
            matrices.append((getattr(modules[found[0]], found[1])[found[2]].detach(), entry))
            fused.setdefault(found[:2], []).append(entry)
        elif found:
            entry["experts"] = fused.setdefault(found[:2], [])
            whole = stored.same(getattr(modules[found[0]], found[1]).detach(), layers)
            if whole is not None:
                layers[whole] = entry
        else:
            entry["transposed"] = type(modules[module]).__name__ == "Conv1D"
            name = f"{module}.weight"
            names = (name, name.removeprefix(prefix), prefix + name)
            layers[next((n for n in names if n in stored), name)] = entry
    for w, entry in matrices:
        for name, *rows in stored.find(w, layers):
            if not entry["transposed"]:
                layers[name] = {**entry, "rows": rows}
            elif rows == [0, len(w)]:
                layers[name] = entry


def _layers(folder: Folder, digest: str) -> Layers:
    every = folder.state["layers"].items()
    found = {name: _layer(folder, entry) for name, entry in every if "second" in entry}
    return Layers(found, folder.state["tokens"], digest)


def _layer(folder: Folder, entry: Mapping[str, Any]) -> Layer:
    given = entry.get("sensitivity")
    rows = slice(*entry.get("rows", [None]))  # of the expert's matrix, where the file's is a part of it
    sensitivity = np.array(folder.array(given)[rows]) if given else None
    experts = [_layer(folder, one) for one in entry.get("experts", ())]
    return Layer(_Stored(folder, entry["second"]), sensitivity, entry["transposed"], entry["finite"], experts)


class _Stored:
    """Reads an array of the folder, which it keeps from being removed."""

    def __init__(self, folder: Folder, name: str) -> None:
        self._folder, self._name = folder, name

    def __call__(self) -> NDArray[np.float32]:
        return self._folder.array(self._name)

    def __reduce__(self) -> tuple[Any, ...]:
        """For another process, which reads the same file while this one keeps the folder."""
        self._folder.check(self._name)
        return functools.partial, (_mapped, os.fspath(self._folder.path / self._name))


def _mapped(path: str) -> NDArray[np.float32]:
    """A file that another process has checked."""
    try:
        found: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as e:
        raise SourceError(f"the calibration's file is gone or damaged: {e}", file=path) from e
    return found
