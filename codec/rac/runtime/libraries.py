"""What functions of other libraries do that are given an archive where they know files of their own.

`from_pretrained("m.rac")` of transformers' models, auto classes, tokenizers and configurations, and so `AutoPeftModel`
of an adapter for an archive; `load_checkpoint_and_dispatch(model, "m.rac")` of accelerate; `dcp.load(state,
checkpoint_id="m.rac")` of torch. None of them has a place where formats are registered, so that their functions are put
into others here, which look at the name first. With any other name they do what they did.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import transformers
from transformers.models.auto import modeling_auto
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from rac.decode.archive import RacFile
from rac.errors import UnsupportedError
from rac.runtime import model as own

_HUB = (
    *(
        "cache_dir",
        "force_download",
        "local_files_only",
        "token",
        "revision",
        "subfolder",
        "use_safetensors",
        "variant",
    ),
    *("weights_only", "ignore_mismatched_sizes", "low_cpu_mem_usage", "use_auth_token", "_from_auto", "_commit_hash"),
    *("config", "output_loading_info", "code_revision"),
)
"""Arguments about where and in which files models lie: an archive says so itself."""


def is_archive(path: Any) -> bool:
    """Whether a name is that of an archive: it ends in .rac, and is no folder."""
    return isinstance(path, str | os.PathLike) and os.fspath(path).endswith(".rac") and not os.path.isdir(path)


def install() -> None:
    """Let the functions of other libraries know archives; once, however often it is called."""
    _class_method(transformers.PreTrainedModel, "from_pretrained", _model)
    for cls in (_BaseAutoModelClass, *vars(modeling_auto).values()):  # each has a copy of the method
        if isinstance(cls, type) and issubclass(cls, _BaseAutoModelClass) and "from_pretrained" in vars(cls):
            _class_method(cls, "from_pretrained", _model_of_task)
    _class_method(transformers.AutoTokenizer, "from_pretrained", _tokenizer)
    _class_method(transformers.PreTrainedConfig, "get_config_dict", _config)
    _function("transformers.utils.hub", "cached_files", _files)
    _function("torch.distributed.checkpoint.state_dict_loader", "_storage_setup", _storage)
    _function("accelerate.utils.modeling", "load_state_dict", _state_dict)


def _marked(function: Any, theirs: Any) -> Any:
    out: Any = functools.wraps(theirs)(lambda *args, **kwargs: function(*args, **kwargs))
    out._rac = True
    return out


def _function(module: str, name: str, instead: Any) -> None:
    try:
        where = importlib.import_module(module)
    except ImportError:  # nobody can call it then
        return
    theirs = getattr(where, name, None)
    if theirs is not None and not hasattr(theirs, "_rac"):
        setattr(where, name, _marked(functools.partial(instead, theirs), theirs))


def _class_method(cls: Any, name: str, instead: Any) -> None:
    theirs = getattr(cls, name).__func__
    if hasattr(theirs, "_rac"):
        return

    def method(kind: Any, path: Any = None, *args: Any, **kwargs: Any) -> Any:
        return instead(kind, path, **kwargs) if is_archive(path) else theirs(kind, path, *args, **kwargs)

    setattr(cls, name, classmethod(_marked(method, theirs)))


def _model(cls: Any, path: Any, **kwargs: Any) -> Any:
    """A model of this class."""
    return own.load_as(lambda config, named: cls, path, **_without(kwargs))


def _model_of_task(cls: Any, path: Any, **kwargs: Any) -> Any:
    """A model of the class that an auto class has for the configuration."""

    def kind(config: Any, named: Any) -> Any:
        known = cls._model_mapping.get(type(config), None)
        classes = known if isinstance(known, tuple | list) else (known,)
        if named in classes or (known is None and config.__class__.__module__.startswith("transformers_modules")):
            return named
        if known is None:
            raise UnsupportedError(f"{cls.__name__} has no class for a {named.__name__}", file=str(path))
        return classes[0]

    return own.load_as(kind, path, **_without(kwargs))


def _without(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in kwargs.items() if k not in _HUB}


def _tokenizer(_: Any, path: Any, trust_remote_code: bool = False, **kwargs: Any) -> Any:
    """The tokenizer in an archive."""
    left = {k: v for k, v in kwargs.items() if k not in _HUB}
    return own.load_tokenizer(path, trust_remote_code=bool(trust_remote_code), **left)


def _config(_: Any, path: Any, **kwargs: Any) -> Any:
    """The map in the config.json of an archive, and the arguments that are left."""
    with RacFile(path) as f, own.attached(f) as folder:
        name = f.archives[0].access.name
        found = own.refuse_code(folder, "config.json", name, False)
        if not found:
            raise UnsupportedError("holds no config.json; pack the Hugging Face folder of the model", file=name)
        return found, {k: v for k, v in kwargs.items() if k not in _HUB}


def _files(theirs: Any, path_or_repo_id: Any, filenames: Any, **kwargs: Any) -> Any:
    """No adapter lies beside the model in an archive: pipelines look for one."""
    if is_archive(path_or_repo_id) and list(filenames) == ["adapter_config.json"]:
        return None
    return theirs(path_or_repo_id, filenames, **kwargs)


def _storage(theirs: Any, storage: Any, checkpoint_id: Any, reader: bool = False) -> Any:
    """The reader of an archive where none is given, and the name is that of one."""
    if reader and not storage and checkpoint_id and is_archive(checkpoint_id):
        from rac.runtime.dcp import RacStorageReader

        return RacStorageReader(checkpoint_id)
    return theirs(storage, checkpoint_id, reader=reader)


def _state_dict(theirs: Any, checkpoint_file: Any, device_map: Any = None) -> Any:
    """The tensors of an archive by name, dense."""
    if not is_archive(checkpoint_file):
        return theirs(checkpoint_file, device_map=device_map)
    with RacFile(checkpoint_file, framework="pt") as f:
        return f.load()
