"""Names of tensors in the files of a transformers model, and of the parameters that transformers makes of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class Names:
    """Names in the files of a model as transformers loads them into it."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        known = get_model_conversion_mapping(model)
        self._rename = rename_source_key
        self._renamings = [c for c in known if isinstance(c, WeightRenaming)]
        self._converters = [c for c in known if isinstance(c, WeightConverter)]
        self.state, self._prefix = model.state_dict(), getattr(model, "base_model_prefix", "")

    def key(self, name: str) -> tuple[str, Any, str]:
        """The parameter, the WeightConverter that makes it of this and other tensors, and the pattern of the name.

        "" and None: there is no pattern, nothing is converted. What is no parameter is not in `state`.
        """
        key, pattern = self._rename(name, self._renamings, self._converters, self._prefix, self.state)
        if key not in self.state and name in self.state:
            key, pattern = self._rename(name, [], [], self._prefix, self.state)
        converter = next((c for c in self._converters if pattern in c.source_patterns), None) if pattern else None
        return key, converter, pattern or ""


def renamed(model: Any, names: Iterable[str]) -> dict[str, tuple[str, bool]]:
    """Names of a file to the name of the parameter, and whether it is made of this tensor as it is.

    Parameters are those of the state of `model`; names that are none of it are left out. Where the second is false,
    transformers makes the parameter of several tensors, or of a part of this one.
    """
    known = Names(model)
    found = ((name, *known.key(name)) for name in names)
    return {name: (key, not pattern) for name, key, _, pattern in found if key in known.state}
