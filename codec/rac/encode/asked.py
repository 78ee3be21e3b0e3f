"""What decides about the bytes of a pack, as `pack` is given it: a value that several machines can agree on."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from rac.encode.allocate.texts import calibration_for
from rac.encode.options import STEPS, Budget, Calibration, Lossy, Made, PackOptions, no_goal


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Arguments of `pack`, by their names there; those that do not decide about bytes are not here."""

    level: str = "default"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    lanes: int | None = None
    shard_size: int | None = None
    bits: float | None = None
    file_bits: float | None = None
    size: int | None = None
    snr: float | None = None
    kl: float | None = None
    calibrate: str | os.PathLike[str] | Sequence[str] | None = None
    calibration: str | os.PathLike[str] | Made | Sequence[Made] | None = None
    tokens: int = 40960
    context: int = 1024
    backward: bool = True
    effort: str = "default"
    keep: Sequence[str] = ()
    align: str = "auto"
    rank: int | None = None
    embeddings: bool = True
    recover: str | int | None = None
    slices: str | None = None
    all_files: bool = False
    pickles: bool = False
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("bits", "file_bits", "snr", "kl"):  # 3 and 3.0 are one request: the file states it
            if isinstance(value := getattr(self, name), int):
                object.__setattr__(self, name, float(value))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Asked:
        """What decides about bytes among arguments by name; a single pattern is one of a list."""
        mine = {f.name: given[f.name] for f in fields(cls) if f.name in given}
        for name in ("include", "exclude", "keep"):
            if name in mine:
                mine[name] = (mine[name],) if isinstance(mine[name], str) else tuple(mine[name])
        return cls(**mine)

    @property
    def lossy(self) -> bool:
        """Whether there is a budget."""
        return any(v is not None for v in (self.bits, self.file_bits, self.size, self.snr, self.kl))

    @property
    def how(self) -> dict[str, Any]:
        """Arguments of `open_source`."""
        return {name: getattr(self, name) for name in ("include", "exclude", "all_files", "pickles")}

    @property
    def changed(self) -> dict[str, Any]:
        """Arguments that are not as they are where nobody gives them, in their order; sequences are lists."""
        every = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {k: list(v) if isinstance(v, tuple) else v for k, (v, usual) in every.items() if v != usual}

    @property
    def _budget(self) -> Budget:
        return Budget(self.bits, self.file_bits, self.size, self.snr, self.kl)

    def options(self, **more: Any) -> PackOptions:
        """The options of a Packer; `more` are others of PackOptions. ValueError for what cannot be."""
        if self.lossy:
            _ = self._budget
        else:
            shaped = {"calibrate": self.calibrate not in (None, "none"), "calibration": self.calibration is not None}
            shaped |= {"effort": self.effort != "default", "keep": len(self.keep) > 0, "align": self.align != "auto"}
            shaped |= {"device": self.device != "cpu"}
            shaped |= {"recover": self.recover is not None}
            no_goal(shaped | {"rank": self.rank is not None, "embeddings": not self.embeddings})
        settings = {"exclude": list(self.exclude), "include": list(self.include)}
        cut: Any = {"lanes": self.lanes, "slices": self.slices, "shard_size": self.shard_size}
        return PackOptions(self.level, settings=settings, **cut, **more)

    def request(self, path: Any, cache: str | None) -> Lossy | None:
        """What is asked of a lossy pack of the source that was opened from `path`; None: it is a lossless one."""
        if not self.lossy:
            return None
        made = Calibration.made_of(self.calibration)
        learned = calibration_for(self.calibrate, path, self.tokens, cache, made)
        learned = replace(learned, context=self.context, backward=self.backward, device=self.device)
        how: Any = {"embeddings": self.embeddings, "recover": self._steps(learned)}
        return Lossy(self._budget, learned, self.effort, tuple(self.keep), self.align, self.rank, **how)

    def _steps(self, learned: Calibration) -> int:
        """Steps of recovery: where the number is left to us none without a text, and none at effort "fast"."""
        if self.recover is None:
            return 0
        if self.recover != "auto":
            return int(self.recover)
        return STEPS if learned.texts and self.effort != "fast" else 0
