"""An archive to a transformers model and its tokenizer: `rac.load_model`, `rac.load_tokenizer`."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace as replace_field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from rac import frameworks
from rac.container.reader import Archive
from rac.decode import random
from rac.decode.archive import RacFile, of_repository
from rac.decode.unpack import names_of_files, safe_name
from rac.errors import LimitError, MismatchError, RacError, SourceError, UnsupportedError
from rac.linalg.transform import Transform
from rac.machine import parse_size, threads_of
from rac.models.predictions import quiet
from rac.records import Entry
from rac.registry import DTYPES, RECORD_TENSOR
from rac.runtime import memory as limits
from rac.runtime import quantised, record, replace, residency
from rac.runtime.disk import Store
from rac.runtime.held import Head, size_of
from rac.runtime.quantizer import METHOD
from rac.runtime.ranges import TICKET
from rac.scratch import Scratch
from rac.tensor import Tensor

_log = logging.getLogger(__name__)
ERRORS = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError, NotImplementedError)
"""What transformers raises for files that it cannot make a model or a tokenizer of."""
_OF_LOADING = ("dtype", "attn_implementation", "experts_implementation", "quantization_config", "name_or_path")
"""Arguments of `from_pretrained` that are attributes of a configuration, too, and that it sets itself."""


def load_model(
    path: str | os.PathLike[str],
    resident: str = "dense",
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    *,
    memory: int | str | None = None,
    threads: int | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """A transformers model from an archive that was made of a Hugging Face folder.

    Class, configuration and generation configuration are those of the attachments. Every tensor is decoded straight
    to where the model keeps it; tied weights stay tied. Layers whose weight states an online transform apply it to
    their input (rac.runtime.replace).

    Args:
        path: The .rac file, one shard of a set, a folder that holds one, or a repository of the Hub,
            "ORG/NAME[@REVISION]": its archive is downloaded to the Hub's cache. hf:// URLs of files, and others, are
            read by ranges. Or bytes, in memory that may be pinned: they are not copied.
        resident: "dense", or "compressed": linear layers and embeddings keep their weights as the file has them and
            decode them when they run (rac.runtime.layers). "disk": they leave them in the file, which stays open, and
            read them then, too (rac.runtime.disk). "codes": quantised ones are decoded once, to int8 with scales
            (rac.runtime.codes).
        device: Where the model goes; the CPU by default.
        dtype: Data type of the numbers between layers, and of dense weights; that of the configuration by default, and
            for "auto". `torch_dtype`, its earlier name in transformers, is the same.
        memory: Of "disk", which it implies: bytes that weights may take, or a size such as "8GB"; a quarter of the
            machine's memory by default. Keys and values of the tokens, and torch itself, come on top.
        threads: Threads that decode for compressed layers; one per core up to 8 by default.
        trust_remote_code: Run the model code that travels with the file. Without it such a file is refused.
        kwargs: For `from_pretrained` of transformers: device_map, attn_implementation, ...

    Raises:
        RacError: The file is missing or damaged, transformers does not know its model, it needs code of its own, or
            tensors are missing or have other shapes than the configuration says, or `memory` is less than its
            largest layer needs. No model is left behind then.
    """
    how = {"resident": resident, "memory": memory, "device": device, "dtype": dtype, "threads": threads, **kwargs}
    return load_as(lambda config, own: own, path, trust_remote_code=trust_remote_code, **how)


def load_as(
    kind: Callable[[Any, Any], Any],
    path: str | os.PathLike[str],
    *,
    resident: str = "dense",
    memory: int | str | None = None,
    dtype: str | torch.dtype | None = None,
    threads: int | None = None,
    **kwargs: Any,
) -> Any:
    """As `load_model`, of the class that `kind` makes of the configuration and of the class that it names."""
    (way, limit), trust = _residency(resident, memory), kwargs.pop("trust_remote_code", False)
    if (earlier := kwargs.pop("torch_dtype", None)) is not None:
        if dtype is not None:
            raise ValueError("dtype and torch_dtype are the same; give one of them")
        dtype = earlier
    if (device := kwargs.pop("device", None)) is not None:
        if "device_map" in kwargs:
            raise ValueError("device and device_map exclude each other")
        frameworks.check_device(str(device))
        kwargs["device_map"] = {"": device}
    threads = threads_of(threads)
    place = of_repository(path, keep=True) if isinstance(path, str | os.PathLike) else path
    with contextlib.ExitStack() as opened, quiet(transformers):
        f = opened.enter_context(RacFile(place, framework="pt", threads=1))
        folder, name = opened.enter_context(attached(f)), f.archives[0].access.name
        config, own = model_class(folder, name, trust)
        cls = kind(config, own)
        for key in [k for k in kwargs if k not in _OF_LOADING and hasattr(config, k)]:  # as transformers does
            setattr(config, key, kwargs.pop(key))
        kwargs["dtype"] = (dtype if dtype != "auto" else None) or getattr(config, "dtype", None) or dtype_of(f)
        state = State(f, Store(f) if way.filed else None)
        with state.blamed(name):
            quantised.settle(state.lazy, config, folder, way.name, kwargs.get("device_map"))
        if way.holds is not None:
            with state.blamed(name):
                records = state.hold(cls, config, name, way.holds)
            if state.store is not None:  # what was imported until now is not the model's
                state.store.count_anew()
            how = {"quant_method": METHOD, "threads": threads, "records": records, "store": state.store}
            config.quantization_config = how
        model = _loaded(cls, config, state, folder, **kwargs)
        replace.attach(model, state.online(), name)
        if state.store is not None:
            limits.fit(model, state.store, limit)
            replace.bind(model)
            opened.pop_all()  # the file is the store's from now on
        with state.blamed(name):
            said = way.settle(model)
    if said:
        _log.info("%s: %s", name, said)
    model.config.name_or_path = model.name_or_path = name
    return model


def _residency(resident: str, memory: int | str | None) -> tuple[residency.Residency, int | None]:
    """How weights are held, and the bytes for that; ValueError where the two do not go together."""
    if resident not in residency.TABLE:
        raise ValueError(f"resident must be one of {', '.join(residency.TABLE)}, not {resident!r}")
    if memory is None:
        return residency.TABLE[resident], None
    if resident not in ("dense", "disk"):
        raise ValueError(f"memory is for resident='disk', which it implies, and not for {resident!r}")
    return residency.TABLE["disk"], parse_size(memory) if isinstance(memory, str) else memory


def _loaded(cls: Any, config: Any, state: State, folder: str, **kwargs: Any) -> Any:
    """What transformers makes of the configuration and the tensors."""
    with _mapped("cannot load it", state.name), state.blamed(state.name):
        how = {"output_loading_info": True, "ignore_mismatched_sizes": True, **kwargs}
        model, info = cls.from_pretrained(None, config=config, state_dict=state.lazy, **how)
        if Path(folder, "generation_config.json").exists() and model.can_generate():
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    _complete(info, cls.__name__, state.name)
    return model


def load_tokenizer(path: str | os.PathLike[str], *, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """The tokenizer of an archive that was made of a Hugging Face folder; `kwargs` go to `from_pretrained`.

    RacError where the file is missing or damaged, or holds no tokenizer that transformers can load, or it needs code of
    its own, and `trust_remote_code` is not given.
    """
    with RacFile(path) as f, attached(f) as folder, quiet(transformers):
        name = f.archives[0].access.name
        if not names_of_files(f):
            raise SourceError("holds no tokenizer; pack the Hugging Face folder of the model", file=name)
        for part in ("tokenizer_config.json", "config.json"):
            refuse_code(folder, part, name, trust_remote_code)
        with _mapped("knows no tokenizer for it", name):
            return transformers.AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True, **kwargs
            )


@contextlib.contextmanager
def _mapped(what: str, file: str) -> Iterator[None]:
    """What transformers raises inside, as an UnsupportedError that says what it cannot do."""
    try:
        yield
    except RacError:
        raise
    except ERRORS as e:
        raise UnsupportedError(f"transformers {transformers.__version__} {what}: {_said(e)}", file=file) from e


def _said(e: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(e).split()) or type(e).__name__


@contextlib.contextmanager
def attached(f: RacFile) -> Iterator[str]:
    """A temporary folder with the attachments of a file."""
    with Scratch("attached") as scratch:
        folder = str(scratch.path / "files")
        os.mkdir(folder)
        write_attachments(f, folder)
        yield folder


def write_attachments(f: RacFile, folder: str) -> None:
    """Write the attachments below a folder; FormatError for names that lead out of it."""
    for name in names_of_files(f):
        path = Path(folder, *safe_name(name).split("/"))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f.attachment(name))


def refuse_code(folder: str, part: str, file: str, trust: bool) -> dict[str, Any]:
    """The map in a JSON file of the folder, {} where there is none; UnsupportedError where it names code to run."""
    path = Path(folder, part)
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as e:
        raise SourceError(f"{part} is no JSON: {e}", file=file) from e
    if not isinstance(found, dict):
        raise SourceError(f"{part} is no JSON object", file=file)
    if found.get("auto_map") and not trust:
        what = f"{part} names code that came with the model; read it, and give trust_remote_code=True to run it"
        raise UnsupportedError(what, file=file)
    return found


def model_class(folder: str, file: str, trust: bool) -> tuple[Any, Any]:
    """(configuration, class of the model) of the attachments; SourceError where there is no config.json.

    UnsupportedError where transformers does not know the model, or it is code that is not trusted.
    """
    found = refuse_code(folder, "config.json", file, trust)
    if not found:
        raise SourceError("holds no config.json; pack the Hugging Face folder of the model", file=file)
    kinds = found.get("architectures") or []
    if not isinstance(kinds, list) or not kinds or not isinstance(kinds[0], str):
        raise UnsupportedError("config.json names no architecture", file=file)
    kind, auto = kinds[0], found.get("auto_map") or {}
    with _mapped("cannot read its config.json", file):
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=trust, local_files_only=True)
        for reference in auto.values():
            if isinstance(reference, str) and reference.split(".")[-1] == kind:
                return config, get_class_from_dynamic_module(reference, folder, local_files_only=True)
    cls = getattr(transformers, kind, None)
    if cls is None or not hasattr(cls, "from_pretrained"):
        raise UnsupportedError(f"transformers {transformers.__version__} knows no model class {kind!r}", file=file)
    return config, cls


def dtype_of(f: RacFile) -> Any:
    """The floating data type of most of the weights."""
    sizes = Counter[str]()
    for e in (e for archive in f.archives for e in archive.index.entries if e.dtype in ("F64", *replace.FLOATS)):
        sizes[e.dtype] += e.size
    return frameworks.torch_dtype(sizes.most_common(1)[0][0]) if sizes else torch.float32


def _complete(info: dict[str, Any], kind: str, file: str) -> None:
    """MismatchError unless every tensor of the model was there in its shape; a warning about those that it has not."""
    if info["mismatched_keys"]:
        tensor, theirs, ours = min(info["mismatched_keys"], key=lambda row: str(row[0]))
        what = f"is {list(theirs)}, the configuration asks for {list(ours)}{_more(info['mismatched_keys'])}"
        raise MismatchError(what, file=file, unit=repr(tensor))
    if missing := sorted(info["missing_keys"]):
        raise MismatchError(f"holds no tensor {missing[0]!r}, which {kind} needs{_more(missing)}", file=file)
    if unused := sorted(info["unexpected_keys"]):
        warnings.warn(f"rac: {file}: {kind} has no use for tensor {unused[0]!r}{_more(unused)}", stacklevel=3)


def _warn_of_reads(found: replace.Places, names: Mapping[str, Any], file: str) -> None:
    """Say which layers are dense though their records could stay, since others read their weights at each step."""
    mine = {n: p for p in found.read for n in names if f".{n}".endswith(f".{p}.weight")}
    if mine:
        dense = sum(size_of(names[n].shape, names[n].dtype) for n in mine)
        methods = ", ".join(sorted({found.read[path] for path in mine.values()}))
        what = f"{min(mine.values())}{_more(mine)} stay dense ({limits.megabytes(dense)})"
        warnings.warn(f"rac: {file}: {what}: {methods} reads the weight at each step", stacklevel=4)


def _more(names: Any) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


class Lazy:
    """The tensor of one record, read once for all its names; transformers loads it by `[...]`, as from safetensors."""

    def __init__(self, f: RacFile, archive: Archive, entry: Entry, errors: list[RacError]) -> None:
        self._file, self.archive, self.entry, self._errors = f, archive, entry, errors
        self.names = (entry.name, *(name for name, _ in entry.aliases))
        self.shape, self.dtype = tuple(entry.shape), entry.dtype
        self.store: Store | None = None
        """Where the record stays in the file: what its ticket is a ticket of."""
        self.head: Head | None = None
        """Head of the record, where its bytes are given instead of the tensor."""
        self.online: Transform | None = None
        """What the layer does to its input, once the dense tensor was read."""
        self._lock, self._kept = threading.Lock(), None

    @property
    def stored(self) -> int:
        """Bytes of the record."""
        return self.entry.size

    @property
    def nbytes(self) -> int:
        """Bytes of what is loaded."""
        return math.prod(self.get_shape()) * DTYPES[self.get_dtype()].bits // 8

    def get_dtype(self) -> str:
        """Data type, as safetensors names them; of a record that is held, U8."""
        return "U8" if self.head else self.entry.dtype

    def get_shape(self) -> list[int]:
        """Shape; of a record that is held, the number of its bytes."""
        return [self.head.nbytes] if self.head else list(self.entry.shape)

    def _parsed(self) -> Tensor:
        return random.parse(self.archive, self.archive.record(self.entry))

    def online_stated(self) -> bool:
        """Whether the layer does something to its input before this weight."""
        return bool(self.archive.objects) and self._parsed().online is not None

    def worth(self) -> bool:
        """Whether a layer may hold the record."""
        return replace.worth(self.entry)

    @property
    def method(self) -> str:
        """The last stage of its record."""
        return self.entry.method

    def head_of_record(self) -> Head:
        """What must be known of its record."""
        if self.store is not None:
            return Head(TICKET, self.dtype, self.shape)
        needs = self._parsed().needs if self.archive.objects else ()
        size = self.entry.size + sum(self.archive.objects[n].size for n in needs) + record.TAIL
        return Head(size, self.dtype, self.shape)

    def hold(self) -> Head:
        """From now on the record, or its ticket, is what is loaded.

        transformers pads, or cuts, the bias of a tied output layer to the first dimension of what it finds as weight: a
        ticket is no shorter than that of the weight.
        """
        self.head = self.head_of_record()
        if self.store is not None:
            self.head = replace_field(self.head, nbytes=max(TICKET, *self.shape[:1]))
        return self.head

    def collected(self) -> NDArray[np.uint8]:
        """The record, or its ticket; `errors` gets what is wrong with it."""
        try:
            if self.store is not None:
                room = np.zeros(self.head.nbytes if self.head else TICKET, np.uint8)
                room[:TICKET] = self.store.reader.ticket(self.archive, self.entry)
                return room
            return record.collect(self.archive, self.entry)
        except RacError as e:
            self._errors.append(e)
            raise

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The whole tensor; `errors` gets what is wrong with it."""
        with self._lock:
            if self._kept is not None:
                return self._kept[key]
            if self.head:
                found = torch.from_numpy(self.collected())
            else:
                try:
                    stated, found = self._file.read(self.entry.name)
                    self.online = random.transform(self.archive, stated)
                except RacError as e:
                    self._errors.append(e)
                    raise
            if self.entry.aliases:
                self._kept = found
            return found[key]


class Fused:
    """The records of the tensors that a parameter is made of, one after the other, as one tensor."""

    online, names = None, ()

    def __init__(self, parts: Sequence[Any]) -> None:
        """UnsupportedError where they are not of one kind."""
        self._parts = parts
        heads = [part.head_of_record() for part in parts]
        if len({(h.dtype, h.making) for h in heads}) > 1:
            what = "are experts of one layer, of other data types or quantised otherwise; load the model dense"
            raise UnsupportedError(f"{parts[0].names[0]!r} and others {what}")
        size = sum(h.nbytes for h in heads)
        self.head = Head(size, heads[0].dtype, heads[0].shape, len(heads), making=heads[0].making)

    @property
    def nbytes(self) -> int:
        """Bytes of what is loaded."""
        return self.head.nbytes

    def get_dtype(self) -> str:
        """Data type of bytes."""
        return "U8"

    def get_shape(self) -> list[int]:
        """The number of bytes."""
        return [self.head.nbytes]

    def __getitem__(self, key: Any) -> torch.Tensor:
        """All of it."""
        out, at = torch.empty(self.head.nbytes, dtype=torch.uint8), 0
        for part in self._parts:
            found = part.collected()
            out[at : at + len(found)] = torch.from_numpy(found)
            at += len(found)
        return out[key]


class _Copied:
    """A name whose tensor is equal to that of another one, but not tied to it."""

    def __init__(self, of: Lazy) -> None:
        self._of = of

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)

    def __getitem__(self, key: Any) -> torch.Tensor:
        return self._of[key].clone()


class State:
    """The tensors of an archive by name, lazily; the records that are held stay in the file where there is a store."""

    def __init__(self, f: RacFile, store: Store | None = None) -> None:
        self.lazy: dict[str, Any] = {}
        self.name, self.store = f.archives[0].access.name, store
        self._errors: list[RacError] = []
        every = ((archive, e) for archive in f.archives for e in archive.index.entries if e.type == RECORD_TENSOR)
        for archive, entry in every:
            source = Lazy(f, archive, entry, self._errors)
            source.store = store
            names = {entry.name: source} | {name: source if tied else _Copied(source) for name, tied in entry.aliases}
            self.lazy |= {n: t for n, t in names.items() if ".safetensors::" not in n}  # of files beside it

    @contextlib.contextmanager
    def blamed(self, file: str) -> Iterator[None]:
        """What was wrong with the first tensor that could not be loaded, whatever transformers makes of it."""
        try:
            yield
        except RacError as e:
            e.file = e.file or file
            raise
        except torch.OutOfMemoryError as e:
            raise LimitError(f"not enough memory on the device: {_said(e)}", file=file) from e
        except ERRORS:
            if self._errors:
                raise self._errors[0] from None
            raise

    def online(self) -> dict[str, Transform]:
        """What layers do to their inputs, of the dense tensors that were read."""
        return {name: source.online for name, source in self.lazy.items() if source.online}

    def hold(self, cls: Any, config: Any, file: str, holds: Callable[[Any], bool]) -> dict[str, Head]:
        """Give the records of layers that can stay compressed as they are from now on; returns their heads, by name.

        `holds` says of a tensor whether its record is to.

        What transformers makes one parameter of is one tensor, under the name of the parameter.
        """
        if getattr(config, "quantization_config", None) is not None:
            raise UnsupportedError("is quantised by another method already; load it dense", file=file)
        with _mapped("cannot make its model", file), torch.device("meta"):  # without memory for its weights
            model = cls._from_config(config) if hasattr(cls, "_from_config") else cls(config)
        worthy = [n for n, source in self.lazy.items() if holds(source)]
        found = replace.places(model, worthy, {n: source.shape for n, source in self.lazy.items()})
        _warn_of_reads(found, {n: self.lazy[n] for n in worthy}, file)
        heads: dict[str, Head] = {}
        for name, key in found.single.items():
            source = self.lazy[name]
            with_it = {n for n in source.names if n in self.lazy}
            if with_it <= found.single.keys() and (replace.plain(model, key) or not source.online_stated()):
                heads[name] = source.hold()
        for key, names in found.fused.items():
            parts = [self.lazy[n] for n in names]
            if not any(part.online_stated() for part in parts):
                for n in names:
                    del self.lazy[n]
                self.lazy[key] = Fused(parts)
                heads[key] = self.lazy[key].head
        return heads
