"""Names of tensors in the files of a transformers model, and of the parameters that transformers makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def renamed(model: Any, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Names of a file to the name of the parameter, and whether it is made of this tensor as it is.

    Parameters are those of the state of `model`; names that are none of it are left out. Where the second is false,
    transformers makes the parameter of several tensors, or of a part of this one.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    known = get_model_conversion_mapping(model)
    renamings = [c for c in known if isinstance(c, WeightRenaming)]
    converters = [c for c in known if isinstance(c, WeightConverter)]
    state, prefix = model.state_dict(), getattr(model, "base_model_prefix", "")
    out = {}
    for name in names:
        key, converter = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:
            key, converter = rename_source_key(name, [], [], prefix, state)
        if key in state:
            out[name] = key, converter is None
    return out
