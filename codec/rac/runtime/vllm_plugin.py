"""A loader for vLLM: `--load-format rac`. Dense on load, and every rank decodes its own slices only.

vLLM calls `register` through the entry point "vllm.general_plugins". Weights come from the one archive in the model's
folder, or from the file that `--model-loader-extra-config '{"file": "m.rac"}'` names; configuration and tokenizer come
from the folder, as always. The interface is that of BaseModelLoader in vLLM 0.33.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from rac import frameworks
from rac.decode.archive import RacFile
from rac.decode.slices import Slice
from rac.errors import SourceError, UnsupportedError

FORMAT = "rac"


class LazyTensor(torch.Tensor):
    """A tensor of an archive that is open, which reads and decodes no more of it than is asked: a `Slice` does that.

    Loaders of other programs take named tensors and cut out what their rank needs with `narrow` or an index, often
    after they looked at the shape. Any other operation decodes the whole tensor first. On the CPU, contiguous, without
    a gradient.
    """

    _part: Slice

    @staticmethod
    def __new__(cls, part: Slice) -> LazyTensor:
        """Around what `RacFile.get_slice` gives."""
        out: LazyTensor = torch.Tensor._make_wrapper_subclass(
            cls, part.get_shape(), dtype=frameworks.torch_dtype(part.get_dtype()), device="cpu", requires_grad=False
        )
        out._part = part
        return out

    def narrow(self, dim: int, start: int, length: int) -> torch.Tensor:  # type: ignore[override]
        """`length` elements of dimension `dim` from `start`: these are read."""
        if not -self.ndim <= dim < self.ndim:
            raise IndexError(f"dimension {dim} of a tensor that has {self.ndim}")
        start = int(start)
        start += self.shape[dim] if start < 0 else 0
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise RuntimeError(f"{start} to {start + length} of dimension {dim}, which has {self.shape[dim]}")
        key = [slice(None)] * self.ndim
        key[dim % self.ndim] = slice(start, start + length)
        return self._part[tuple(key)]  # type: ignore[no-any-return]

    def __getitem__(self, key: Any) -> torch.Tensor:
        """The part that integers, slices and an ellipsis select: it is read. Other keys index the whole tensor."""
        keys = key if isinstance(key, tuple) else (key,)
        if all(k is Ellipsis or (isinstance(k, int | slice) and not isinstance(k, bool)) for k in keys):
            return self._part[keys]  # type: ignore[no-any-return]
        return self._part[...][key]  # type: ignore[no-any-return]

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Any other operation works on the whole tensor, read anew; shape and data type are known without."""
        args, kwargs = tree_map_only(cls, lambda lazy: lazy._part[...], (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        """Without reading."""
        return f"LazyTensor(shape={tuple(self.shape)}, dtype={self.dtype})"


def weights(path: str | os.PathLike[str]) -> Iterator[tuple[str, LazyTensor]]:
    """(name, tensor) of an archive, ties included; a tensor can be read as long as the iterator is not exhausted.

    UnsupportedError at a tensor that needs an online transform.
    """
    with RacFile(path, framework="pt") as f:
        for name in f.keys():  # noqa: SIM118 - no mapping
            part = f.get_slice(name)
            if part.online is not None:
                what = "has an online transform, which this loader cannot make vLLM run"
                raise UnsupportedError(what, file=os.fspath(path), unit=repr(name))
            yield name, LazyTensor(part)


def archive_of(model: str, extra: dict[str, Any]) -> str:
    """The archive of a model; SourceError where there is none, or a setting is not known."""
    if unknown := sorted(extra.keys() - {"file"}):
        raise SourceError(f"unknown setting {unknown[0]!r} in model_loader_extra_config; there is 'file'")
    path = str(extra.get("file", model))
    if not os.path.exists(path):
        raise SourceError("no such file or folder; vLLM must be given a local one", file=path)
    return path


def loader() -> type:
    """The class for vLLM; ImportError where vLLM is not installed."""
    from vllm.model_executor.model_loader.base_loader import BaseModelLoader

    class RacModelLoader(BaseModelLoader):  # type: ignore[misc]
        """Loads weights from a .rac file."""

        def _path(self, model_config: Any) -> str:
            return archive_of(model_config.model, self.load_config.model_loader_extra_config or {})

        def download_model(self, model_config: Any) -> None:
            """Nothing to fetch; says early what is wrong with the file."""
            RacFile(self._path(model_config)).close()

        def load_weights(self, model: Any, model_config: Any) -> None:
            """Into a model that is there. SourceError where a parameter got nothing."""
            path = self._path(model_config)
            loaded = model.load_weights(weights(path))
            if loaded is not None and (missing := sorted({n for n, _ in model.named_parameters()} - set(loaded))):
                raise SourceError(f"holds nothing for the parameter {missing[0]!r}", file=path)

    return RacModelLoader


def register() -> None:
    """Make the load format known to vLLM; may be called more than once."""
    from vllm.model_executor import model_loader

    if FORMAT not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        model_loader.register_model_loader(FORMAT)(loader())
