"""A model of transformers on pictures, sounds or pairs, which its own processor makes into what it takes."""

from __future__ import annotations

import inspect
import os
import wave
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from rac.calibrate.given import Given
from rac.calibrate.inputs import Inputs
from rac.calibrate.layers import Layers
from rac.calibrate.module import gather, labelled, projected
from rac.calibrate.passes import Asked, load_model, model_class
from rac.calibrate.text import SEED, Note
from rac.errors import MissingDependencyError, SourceError
from rac.models.predictions import quiet

BATCH = 8  # pictures or sounds at once; pairs go one by one, since their texts differ in length
SECONDS = 30  # of a sound
_SMALL = 1 << 31  # bytes of weights up to which the model is run in float32
_WRITTEN = 32  # tokens that a decoder is given, which it writes itself
_FEATURES = {"images": "get_image_features", "audio": "get_audio_features"}
Batch = dict[str, Any]


def model_on(folder: str | os.PathLike[str], inputs: Inputs, note: Note) -> Layers:
    """What the model in a folder makes of inputs, by the names of its parameters; SourceError where it cannot."""
    path = os.fspath(folder)
    given = folder if isinstance(folder, Given) else None
    kind, config = model_class(path)
    with quiet(transformers):
        process = _PROCESSES[inputs.kind](path)
        size = sum(e.stat().st_size for e in os.scandir(path) if e.name.endswith(".safetensors"))
        model = load_model(kind, Asked(path, 0, 0, True, given), config, "float32" if size <= _SMALL else "auto")
        run = _Run(model, inputs.kind)
        loss, tell = run.loss if inputs.backward else None, _counted(note, run, inputs)
        layers, remarks = gather(model, run.batches(process, inputs), forward=run.forward, loss=loss, note=tell)
    for remark in remarks:
        if remark.startswith("no backward"):  # what is not reached is said of the tensors
            note(remark, 0, 0)
    return layers


def _counted(note: Note, run: _Run, inputs: Inputs) -> Note:
    return lambda what, done, _: note(what, min(done * run.size, len(inputs.items)), len(inputs.items))


class _Run:
    """How a model takes a kind of inputs."""

    def __init__(self, model: Any, kind: str) -> None:
        self._model, self._kind = model, kind
        self._takes = inspect.signature(model.forward).parameters
        self.size = 1 if kind == "pairs" else BATCH
        generator = torch.Generator().manual_seed(SEED)
        self._output, self._labels = projected(generator), labelled(generator)
        self._random = torch.Generator().manual_seed(SEED)

    def loss(self, out: Any, batch: Any) -> Any:
        """Of a model that writes, by its predictions; of another by all its outputs."""
        writes = "logits" in out if isinstance(out, Mapping) else False
        if isinstance(out, Mapping) and "last_hidden_state" in out:  # a pooler may be one that the files do not hold
            out = {k: v for k, v in out.items() if k != "pooler_output"}
        return (self._labels if writes and self._model.can_generate() else self._output)(out, batch)

    def batches(self, process: Process, inputs: Inputs) -> Iterator[Batch]:
        """What the processor makes of the inputs."""
        for a in range(0, len(inputs.items), self.size):
            some = inputs.items[a : a + self.size]
            try:
                made = process(list(some))
            except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, OSError) as e:
                first = some[0][0] if isinstance(some[0], tuple) else some[0]
                raise SourceError(
                    f"the model's processor cannot take it: {' '.join(str(e).split())}", file=first
                ) from e
            batch = {k: v.to(self._model.dtype) if torch.is_floating_point(v) else v for k, v in made.items()}
            if self._model.config.is_encoder_decoder and "decoder_input_ids" in self._takes:
                batch["decoder_input_ids"] = self._written(batch)
            yield batch

    def forward(self, model: Any, batch: Batch) -> Any:
        """A model that reads pictures or sounds first of all is run, of one that reads text too the part that does."""
        features = _FEATURES.get(self._kind)
        main = model.main_input_name
        if features and main not in batch and hasattr(model, features):
            of = getattr(model, features)
            takes = inspect.signature(of).parameters
            return of(**{k: v for k, v in batch.items() if k in takes})
        every = any(p.kind is p.VAR_KEYWORD for p in self._takes.values())
        more = {"use_cache": False} if "use_cache" in self._takes else {}
        return model(**{k: v for k, v in batch.items() if every or k in self._takes}, **more)

    def _written(self, batch: Batch) -> Any:
        """Token ids that the model writes of the batch; random ones where it has nothing to write with."""
        config = self._model.config.get_text_config(decoder=True)
        if self._model.can_generate():
            how = {"max_new_tokens": _WRITTEN, "min_new_tokens": _WRITTEN // 2, "do_sample": False}
            try:
                with torch.no_grad():
                    return self._model.generate(**batch, **how)[:, : _WRITTEN + 1]
            except (
                ValueError,
                TypeError,
                RuntimeError,
                LookupError,
                AttributeError,
            ):  # needs settings that are missing
                pass
        rows = len(next(iter(batch.values())))
        return torch.randint(config.vocab_size, (rows, _WRITTEN), generator=self._random)


Process = Callable[[list[Any]], Any]
"""Called with some of the inputs; returns tensors by name."""


def _loaded(kind: Any, path: str) -> Any:
    try:
        return kind.from_pretrained(path, local_files_only=True)
    except ImportError as e:
        raise MissingDependencyError(f"the model's processor needs a package: {' '.join(str(e).split())}") from e
    except Exception as e:  # transformers raises whatever a missing or broken file makes of it
        what = " ".join(str(e).split())[:200]
        raise SourceError(
            f"no processor there that transformers can load ({what}); `rac.calibrate` takes any batches", file=path
        ) from e


def _image(path: str) -> Any:
    try:
        from PIL import Image
    except ImportError as e:
        raise MissingDependencyError("pictures need pillow: pip install rac-codec[media]") from e
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise SourceError(f"no picture that pillow can read: {e}", file=path) from e


def _images(path: str) -> Process:
    processor = _loaded(transformers.AutoImageProcessor, path)
    return lambda files: processor(images=[_image(f) for f in files], return_tensors="pt")


def _sounds(path: str) -> Process:
    extractor = _loaded(transformers.AutoFeatureExtractor, path)
    rate = int(getattr(extractor, "sampling_rate", 16000))
    padded = {} if type(extractor).__name__ == "WhisperFeatureExtractor" else {"padding": True}

    def process(files: list[Any]) -> Any:
        return extractor([sound(f, rate) for f in files], sampling_rate=rate, return_tensors="pt", **padded)

    return process


def sound(path: str, rate: int) -> NDArray[np.float32]:
    """The first seconds of a wav file, its channels' mean, at `rate` samples a second; SourceError where it is none."""
    try:
        with wave.open(path, "rb") as f:
            width, channels, own = f.getsampwidth(), f.getnchannels(), f.getframerate()
            data = np.frombuffer(f.readframes(min(f.getnframes(), SECONDS * own)), np.uint8)
    except (wave.Error, EOFError, OSError) as e:
        raise SourceError(f"no wav file of integers: {e}", file=path) from e
    data = data[: len(data) // (width * channels) * width * channels]
    if not len(data) or own < 1:
        raise SourceError("holds no sound", file=path)
    if width == 1:
        x: NDArray[np.float32] = data.astype(np.float32) / np.float32(128) - np.float32(1)
    else:  # the bytes of a number at the top of four
        whole = np.zeros((len(data) // width, 4), np.uint8)
        whole[:, 4 - width :] = data.reshape(-1, width)
        x = whole.view("<i4")[:, 0].astype(np.float32) / np.float32(1 << 31)
    mean: NDArray[np.float32] = x.reshape(-1, channels).mean(1)
    if own == rate:
        return mean
    at = np.arange(max(1, int(len(mean) * rate / own))) * (own / rate)
    return np.asarray(np.interp(at, np.arange(len(mean)), mean), np.float32)


def _pairs(path: str) -> Process:
    processor = _loaded(transformers.AutoProcessor, path)
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise SourceError("its processor does not take pictures with text", file=path)

    def process(pairs: list[Any]) -> Any:
        texts = [_prompt(processor, text) for _, text in pairs]
        how: dict[str, Any] = {"return_tensors": "pt", "padding": True, "truncation": True}
        if _placeholder(processor):
            del how["truncation"]  # it would cut pictures
        return processor(text=texts, images=[_image(file) for file, _ in pairs], **how)

    return process


def _placeholder(processor: Any) -> str:
    """What stands for a picture in a text; empty for a model whose texts do not hold them."""
    found = getattr(processor, "image_token", None)
    return found if isinstance(found, str) else ""


def _prompt(processor: Any, text: str) -> str:
    token = _placeholder(processor)
    if not token or token in text:
        return text
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": text}]
        return str(processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False))
    return f"{token}\n{text}"


_PROCESSES = {"images": _images, "audio": _sounds, "pairs": _pairs}
