"""A model as a chain of blocks: found by watching it run, run one block at a time.

The blocks are the children of the ModuleList whose children run once each, in order, each on what the one before
returned. What comes before them (embeddings) is run by stopping the model at the first block, what comes after them
by giving the last block's output back in its place: both are the model's own code.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rac.calibrate.moments import linears
from rac.calibrate.place import Held, Place
from rac.calibrate.reader import feed
from rac.linalg.device import is_short

TAIL = 8  # positions at the end of a sequence whose hidden states are compared
_CLOSE = 1e-3


class UnfitError(Exception):
    """The model cannot be run block by block; says why."""


class _Stop(Exception):
    pass


@contextlib.contextmanager
def _patched(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextlib.contextmanager
def single(*modules: Any) -> Iterator[None]:
    """The modules' parameters and buffers in float32 for a while, in a copy that is dropped afterwards."""
    held = []
    try:
        for module in modules:
            for p in (*module.parameters(), *module.buffers()):
                if p.is_floating_point() and p.dtype != torch.float32:
                    held.append((p, p.data))
                    p.data = p.data.float()
        yield
    finally:
        for p, data in held:
            p.data = data


def close(a: Any, b: Any) -> bool:
    """Equal but for rounding, NaN where the other is NaN."""
    if a.shape != b.shape:
        return False
    scale = b[torch.isfinite(b)].abs().max().item() if torch.isfinite(b).any() else 0.0
    return bool(torch.allclose(a, b, rtol=_CLOSE, atol=_CLOSE * scale, equal_nan=True))


def _moved(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The hidden state among a block's arguments."""
    return args[0] if args else kwargs.get("hidden_states")


def _first(out: Any) -> Any:
    return out[0] if isinstance(out, tuple | list) else out


def _alike(a: Any, b: Any) -> bool:
    """Whether the tensors among two calls' arguments are equal but for rounding."""
    if isinstance(a, torch.Tensor):
        exact = not a.is_floating_point()
        return isinstance(b, torch.Tensor) and (torch.equal(a, b) if exact else close(a.float(), b.float()))
    if isinstance(a, dict) and isinstance(b, dict):
        return all(_alike(a[k], b.get(k)) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_alike, a, b))
    return True


class Chain:
    """A language model or an encoder as blocks in a row, all around them in float32; UnfitError where it is none."""

    def __init__(self, model: Any, causal: bool, ids: NDArray[np.int64], place: Place | None = None) -> None:
        """`ids` is a sequence (1, context) of the text; blocks compute at the place, one after the other."""
        self.model, self.place = model, place or Place()
        self._feed = functools.partial(feed, model, causal)
        self._head = model.get_output_embeddings() if causal else None
        lists: dict[str, list[Any]] = {}
        for name, module in model.named_modules():
            inner = any(name.startswith(f"{outer}.") for outer in lists)
            if isinstance(module, torch.nn.ModuleList) and len(module) > 1 and not inner:
                lists[name] = list(module)
        self._lighten(lists)
        tokens = torch.from_numpy(ids)
        # arguments are taken from another text than the one that is compared: what depends on the text shows
        name, log = self._watch(lists, tokens.flip(1))
        self.names = [f"{name}.{i}" for i in range(len(lists[name]))]
        self.blocks = lists[name]
        self._sort_linears(log)
        self._reference(tokens)

    def _lighten(self, lists: dict[str, list[Any]]) -> None:
        stay = {id(p) for blocks in lists.values() for b in blocks for p in b.parameters()}
        tables = [m for m in self.model.modules() if isinstance(m, torch.nn.Embedding)]
        stay |= {id(p) for m in (*tables, *([self._head] if self._head else [])) for p in m.parameters()}
        for p in self.model.parameters():
            p.requires_grad_(False)
            if p.is_floating_point() and id(p) not in stay:
                p.data = p.data.float()
        for table in tables:
            table.register_forward_hook(lambda _, __, out: out.float() if isinstance(out, torch.Tensor) else out)

    def _watch(self, lists: dict[str, list[Any]], tokens: Any) -> tuple[str, list[tuple[str, int]]]:
        """The list that is a chain, and in which order linear layers and blocks ran. Keeps the blocks' arguments."""
        log: list[tuple[str, int]] = []
        calls: dict[str, list[tuple[int, tuple[Any, ...], dict[str, Any], Any]]] = {name: [] for name in lists}

        def after(_: Any, args: Any, kwargs: Any, out: Any, name: str, i: int) -> None:
            calls[name].append((i, args, kwargs, out))
            log.append((name, i))

        with contextlib.ExitStack() as stack:
            for name, blocks in lists.items():
                for i, b in enumerate(blocks):
                    hook = functools.partial(after, name=name, i=i)
                    stack.enter_context(b.register_forward_hook(hook, with_kwargs=True))
            for name, m in linears(self.model).items():
                stack.enter_context(m.register_forward_hook(lambda *_, name=name: log.append((name, -1))))
            self._whole(tokens, [b for blocks in lists.values() for b in blocks])
        chains = [name for name in lists if self._chained(calls[name], lists[name], tokens.shape[1])]
        if not chains:
            raise UnfitError("no chain of blocks found")
        best = max(chains, key=lambda k: sum(p.numel() for b in lists[k] for p in b.parameters()))
        self._calls = [
            (bool(args), args[1:], {k: v for k, v in kwargs.items() if args or k != "hidden_states"})
            for _, args, kwargs, _ in calls[best]
        ]
        self._rest = [out[1:] if isinstance(out, tuple | list) else None for _, _, _, out in calls[best]]
        self.inner = tuple(_moved(*calls[best][0][1:3]).shape[2:])  # shape of the hidden state of one position
        return best, log

    @staticmethod
    def _chained(calls: list[Any], blocks: list[Any], context: int) -> bool:
        if [c[0] for c in calls] != list(range(len(blocks))):
            return False
        before = _moved(calls[0][1], calls[0][2])
        shape = getattr(before, "shape", None)
        for _, args, kwargs, out in calls:
            if _moved(args, kwargs) is not before:
                return False
            before = _first(out)
            if not isinstance(before, torch.Tensor) or before.shape != shape:
                return False
        return shape is not None and len(shape) >= 3 and shape[:2] == (1, context)

    def _sort_linears(self, log: list[tuple[str, int]]) -> None:
        """Which linear layers run in which block, before the blocks and after them."""
        every = linears(self.model)
        prefix = self.names[0].rpartition(".")[0]
        self.inside = [{k: m for k, m in every.items() if k.startswith(f"{n}.")} for n in self.names]
        mine = {k for block in self.inside for k in block}
        self.before: dict[str, Any] = {}
        self.after: dict[str, Any] = {}
        seen, started = -1, False
        for name, i in log:
            if i >= 0:
                seen = i if name == prefix else seen
            elif name in mine:
                started = True
            elif started and seen < len(self.blocks) - 1:
                raise UnfitError(f"{name} runs between the blocks")
            else:
                (self.after if started else self.before)[name] = every[name]

    def _whole(self, tokens: Any, blocks: list[Any]) -> Any:
        """The model's own run, blocks in float32 while they run, logits of the last positions only."""

        def forward(block: Any, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            held = Held(Place())
            with held.use(held.brought([block])):
                return run(*args, **kwargs)

        with contextlib.ExitStack() as stack, torch.no_grad():
            for block in blocks:
                stack.enter_context(_patched(block, functools.partial(forward, block, block.forward)))
            if self._head is not None:
                head = self._head.forward
                stack.enter_context(single(self._head))
                stack.enter_context(_patched(self._head, lambda h: head(h[:, -TAIL:])))
            return self.model(**self._feed(tokens))

    def _reference(self, tokens: Any) -> None:
        """What each block and the model itself make of the end of `tokens`, when the model runs as a whole."""
        self._ends: list[Any] = []

        def hook(_: Any, args: Any, kwargs: Any, out: Any, i: int) -> None:
            self._ends.append(_first(out)[0, -TAIL:].clone())
            mine = (args[1:], {k: v for k, v in kwargs.items() if args or k != "hidden_states"})
            if not _alike(mine, self._calls[i][1:]):  # of the text that arguments were taken from
                raise UnfitError(f"{self.names[i]} is given more of the text than its hidden state")

        with contextlib.ExitStack() as stack:
            for i, b in enumerate(self.blocks):
                stack.enter_context(b.register_forward_hook(functools.partial(hook, i=i), with_kwargs=True))
            out = self._whole(tokens, self.blocks)
        if self._head is not None:
            self._ends.append(out.logits[0].float())

    def start(self, tokens: Any) -> Any:
        """What the first block is given for `tokens` (n, context): (n, context, width) float32."""
        found: list[Any] = []

        def stop(*args: Any, **kwargs: Any) -> Any:
            found.append(_moved(args, kwargs))
            raise _Stop

        with _patched(self.blocks[0], stop), contextlib.suppress(_Stop):
            self.model(**self._feed(tokens))
        return found[0].float()

    def run(self, i: int, hidden: Any) -> Any:
        """Block `i` of hidden states (n, context, width), whose weights the caller has brought to the place."""
        by_place, args, kwargs = self._calls[i]
        args, kwargs = self.place.kept((args, kwargs))
        given = {**kwargs} if by_place else {**kwargs, "hidden_states": hidden}
        return _first(self.blocks[i](*((hidden,) if by_place else ()), *args, **given))

    def brought(self, i: int) -> list[tuple[Any, Any]]:
        """The weights of block `i` at the place."""
        return Held(self.place).brought([self.blocks[i]])

    def use(self, brought: list[tuple[Any, Any]]) -> contextlib.AbstractContextManager[None]:
        """Compute with what was brought."""
        return Held(self.place).use(brought)

    def end(self, tokens: Any, hidden: Any) -> Any:
        """The model's output where the blocks have made `hidden` (n, positions, width) of `tokens` (n, positions)."""
        with contextlib.ExitStack() as stack:
            for block, rest in zip(self.blocks, self._rest, strict=True):
                value = hidden if rest is None else (hidden, *rest)
                stack.enter_context(_patched(block, lambda *_, value=value, **__: value))
            try:
                return self.model(**self._feed(tokens))
            except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as e:
                if is_short(e):
                    raise
                raise UnfitError(f"what comes behind its blocks does not run alone: {e}") from e

    def head(self) -> contextlib.AbstractContextManager[None]:
        """What comes behind the blocks, in float32: the output embedding; on a device all but the blocks."""
        if not self.place.away:
            return single(self._head) if self._head is not None else contextlib.nullcontext()
        inside = {id(p) for b in self.blocks for p in (*b.parameters(), *b.buffers())}
        return self.use(Held(self.place).brought([self.model], inside))

    def head_size(self) -> int:
        """Weights of the output embedding."""
        return sum(p.numel() for p in self._head.parameters()) if self._head is not None else 0

    def batch(self, tokens: Any) -> int:
        """How many of the sequences `tokens` (n, context) a block takes at once: all, or one."""
        if len(tokens) > 1:
            errors = contextlib.suppress(RuntimeError, ValueError, IndexError)
            with torch.no_grad(), self.use(self.brought(0)), errors:
                hidden = self.place.to(self.start(tokens))
                if close(self.run(0, hidden)[-1:], self.run(0, hidden[-1:])):
                    return len(tokens)
        return 1

    def same_end(self, out: Any) -> None:
        """UnfitError unless the output of a language model ends as that of the chain's text did."""
        if self._head is not None:
            self.same(len(self.blocks), out.logits[0, -TAIL:].detach().float().cpu())

    def same(self, i: int, end: Any) -> None:
        """UnfitError unless block `i`, or what comes behind the last, has made `end` (TAIL, n) of the chain's text."""
        if i < len(self._ends) and not close(end, self._ends[i]):
            alone = f"{self.names[i]} alone is not what it is within the model" if i < len(self.names) else ""
            raise UnfitError(alone or "the model's output does not come from its last block alone")
