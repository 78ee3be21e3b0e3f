"""ANS lanes through constriction, its only door (format_spec/stages/lanes.md, "Lanes")."""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from rac.errors import ChecksumError, FormatError

Segment = tuple[int, int]
"""(steps of this lane, table) of one run of symbols under one table."""


class Models:
    """One constriction model per frequency table; zero frequencies are left out of it and mapped around."""

    def __init__(self, tables: NDArray[np.uint16]) -> None:
        self.symbols = [np.flatnonzero(t).astype(np.int32) for t in tables]
        self.index = np.zeros((len(tables), 256), np.uint8)
        """(T, 256) place of a symbol in the model of a table."""
        for row, s in zip(self.index, self.symbols, strict=True):
            row[s] = np.arange(len(s), dtype=np.uint8)
        self._models: list[Any] = [
            constriction.stream.model.Categorical(t[s].astype(np.float64) / 4096.0, perfect=True)
            for t, s in zip(tables, self.symbols, strict=True)
        ]

    def encode(self, places: NDArray[np.int32], segments: list[Segment]) -> NDArray[np.uint32]:
        """Words of one lane, in decode order; `places` (n,) are its symbols by their place in the model."""
        coder = constriction.stream.stack.AnsCoder()
        end = len(places)
        for steps, table in reversed(segments):
            if steps:
                coder.encode_reverse(places[end - steps : end], self._models[table])
                end -= steps
        words: NDArray[np.uint32] = coder.get_compressed()[::-1]
        return words

    def decode(self, words: NDArray[np.uint32], segments: list[Segment]) -> NDArray[np.uint8]:
        """Symbols of one lane; ChecksumError unless it ends empty, as its encoder began."""
        if len(words) and words[0] == 0:
            raise FormatError("lane starts with a zero word")
        coder = constriction.stream.stack.AnsCoder(np.ascontiguousarray(words[::-1]))
        out = [self.symbols[table][coder.decode(self._models[table], steps)] for steps, table in segments if steps]
        if not coder.is_empty():
            raise ChecksumError("ANS lane does not end in its initial state")
        return np.concatenate(out).astype(np.uint8) if out else np.empty(0, np.uint8)
