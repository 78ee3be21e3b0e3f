"""The passes of a calibration: block by block with files in between, or the model as a whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from rac.calibrate import whole
from rac.calibrate.chain import TAIL, Chain, UnfitError
from rac.calibrate.endings import Ending, ending
from rac.calibrate.experts import Stored
from rac.calibrate.folder import Folder
from rac.calibrate.given import Given
from rac.calibrate.moments import Collector, Sums
from rac.calibrate.names import as_they_are, rename
from rac.calibrate.place import Place, place_of
from rac.calibrate.pooling import pooling
from rac.calibrate.reader import Reader, is_causal
from rac.calibrate.reader import find as find_reader
from rac.calibrate.slopes import Slopes, held_out
from rac.calibrate.tables import Tables, embeddings, output_layer
from rac.calibrate.text import Note, Tokens, self_text_ids, sequences, text_ids
from rac.calibrate.whole import leaves
from rac.calibrate.wide import Wide
from rac.errors import LimitError, SourceError
from rac.linalg.device import is_short
from rac.models.predictions import positions, quiet

_SMALL = 1 << 31  # bytes of weights up to which the model that writes its own text is held in float32
_ROWS = 2048  # tokens that a block takes at once: the symmetric product of the inputs is the better the longer they are


@dataclass(frozen=True, slots=True)
class Asked:
    """What `calibrate` was asked for."""

    path: str
    tokens: int
    context: int
    fisher: bool
    given: Given | None = None  # the weights, where they are not those in the files
    device: str = "cpu"  # where blocks are run
    outer: bool = False


def find(
    asked: Asked, text: str | NDArray[np.int64] | None, folder: Folder, note: Note, steps: Steps | None = None
) -> None:
    """Do what is still to do, and write it into the folder; with `steps` by these, or UnfitError."""
    path, context = asked.path, asked.context
    kind, config = model_class(path)
    causal = is_causal(kind, config)
    with contextlib.suppress(ValueError):  # one that has several: what runs is found by running it
        context = positions(config.get_text_config(), context)
    if text is None and "ids.npy" not in folder:
        _own_text(kind, config, asked, context if causal else 0, folder, note)
    model = load_model(kind, asked, config, "auto", note)
    if "ids.npy" in folder:
        name = folder.state.get("reader", "")
        part = model.get_submodule(name)
        reader = Reader(part, name, is_causal(type(part), part.config), context)
    else:
        assert text is not None  # noqa: S101 - else the ids are there
        reader = find_reader(model, causal, min(context, asked.tokens), path)
        if isinstance(text, str):
            every = text_ids(path, text, asked.tokens)
        else:
            every = Tokens(np.asarray(text, np.int64), context, ([], []))
        beside = every.beside(reader.causal)
        ids = sequences(every.ids, asked.tokens, min(reader.context, every.longest), *beside)
        folder.put("ids.npy", ids)
        if len(every.ids) + len(ids) * sum(map(len, beside)) < asked.tokens:
            note(f"the calibration text has {len(every.ids)} tokens, {asked.tokens} were asked for", 0, 0)
        folder.state["reader"] = reader.name
        folder.commit()
    ids, stored = np.array(folder.array("ids.npy")), Stored(Path(path) if asked.given is None else asked.given.parts)
    with contextlib.closing(place_of(asked.device)) as place:
        done = _run(asked, reader, ids, place, folder, note, steps)
        if reader.name:
            folder.state["layers"] = {f"{reader.name}.{name}": entry for name, entry in folder.state["layers"].items()}
        missing = rename(model, stored, folder, int(ids.size))
        if done is not None and done.fisher:
            names = {name: key.removeprefix(f"{reader.name}.") for name, key in as_they_are(model, stored).items()}
            other = held_out(path, text, ids, reader.causal)
            slopes = Slopes.of(done.chain, done.ending, names, folder, other)
            if slopes.able:
                each = done.each("slopes", slopes.parts, slopes.part)
                if not each:
                    note("what errors of tables cost is not measured: there is too little memory", 0, 0)
                slopes.put(each)
    folder.state.update(finished=True, tokens=int(ids.size), missing=missing)
    folder.commit(drop=lambda name: name.startswith(("hidden-", "gradient-")))


def _run(
    asked: Asked, reader: Reader, ids: NDArray[np.int64], place: Place, folder: Folder, note: Note, steps: Steps | None
) -> Passes | None:
    """Do the steps of the blocks; None where the model was run as a whole."""
    end = ending(reader.model, reader.causal, ids.shape[1], pooling(asked.path))
    with Wide():
        try:
            if getattr(reader.model.config, "is_encoder_decoder", False):
                raise UnfitError("it has an encoder and a decoder")
            chain = _chained(reader.model, reader.causal, ids, place)
            done = (steps or Passes)(chain, end, ids, asked.fisher, folder, note)
            done.outer = asked.outer
            done.go()
            return done
        except LimitError as e:
            e.file = e.file or asked.path
            raise
        except UnfitError as e:
            if steps is not None:
                raise
            where = "" if asked.device == "cpu" else ", on the CPU"
            note(f"running the model as a whole{where}: {e}", 0, 0)
            whole.calibrate(reader, ids, end if asked.fisher else None, folder, note, asked.path, asked.outer)
            return None


def own_text(asked: Asked, folder: Folder, note: Note) -> None:
    """Let the model write its tokens, into the folder."""
    kind, config = model_class(asked.path)
    context = asked.context
    with contextlib.suppress(ValueError):
        context = positions(config.get_text_config(), context)
    _own_text(kind, config, asked, context if is_causal(kind, config) else 0, folder, note)


def _own_text(kind: Any, config: Any, asked: Asked, context: int, folder: Folder, note: Note) -> None:
    """Let the model write its tokens, in sequences of `context` (0: it cannot write)."""
    if not context:
        raise SourceError("only a causal language model can write its own calibration text", file=asked.path)
    # on a CPU attention to a long cache is twice as fast in float32 as in bfloat16; a large model would not fit
    small = sum(f.stat().st_size for f in Path(asked.path).glob("*.safetensors")) <= _SMALL
    writer = load_model(kind, asked, config, "float32" if small else "auto")
    ids = self_text_ids(writer, asked.tokens, context, folder, note)
    folder.put("ids.npy", np.ascontiguousarray(ids, np.int64))
    folder.commit(drop=lambda name: name.startswith("own-"))


def model_class(path: str) -> tuple[Any, Any]:
    """The class that the folder's weights are named after, and its configuration."""
    try:
        config: Any = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as e:  # transformers raises whatever a broken file makes of it
        if "trust_remote_code" in str(e):
            what = "the model needs code of its own, which is not run here; rac.calibrate takes a model that you loaded"
            raise SourceError(f"{what}, `--calibrate none` works", file=path) from e
        raise SourceError(f"no model that transformers knows: {e}", file=path) from e
    found = next((name for name in config.architectures or () if hasattr(transformers, name)), "AutoModel")
    return getattr(transformers, found), config


def load_model(kind: Any, asked: Asked, config: Any, dtype: str, note: Note = lambda *_: None) -> Any:
    """The model; weights of the stored type stay mapped files, and are in memory only while they are used.

    What the files lack is drawn by transformers, of which `note` tells: what pools, mostly, and is not used.
    """
    lacks: Iterable[str] = ()
    try:
        with quiet(transformers):  # there is `note`
            if asked.given is not None:
                model = asked.given.load(kind, config, dtype)
            else:
                how: dict[str, Any] = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
                model, info = kind.from_pretrained(asked.path, dtype=dtype, **how)
                lacks = info["missing_keys"]
    except Exception as e:  # transformers raises whatever a broken file makes of it
        raise SourceError(f"no model that transformers can load: {e}", file=asked.path) from e
    if names := sorted(lacks):
        some = ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")
        note(f"calibrating with {len(names)} parameters that the files lack, drawn at random: {some}", 0, 0)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # one expert after the other, so that its inputs can be seen
    return model.eval()


def _chained(model: Any, causal: bool, ids: NDArray[np.int64], place: Place) -> Chain:
    """The model as a chain of blocks, which compute at a place; UnfitError where it is none."""
    try:
        return Chain(model, causal, ids[:1], place)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as e:
        if is_short(e):
            raise
        raise UnfitError(f"its blocks cannot be told apart ({e})") from e


class Passes:
    """Calibrates in numbered steps: what comes before the blocks, each block, what comes after them, and back.

    What is found is in the folder's state, one commit for each finished step. Hidden states are kept as float32, not
    bfloat16: a block run again in the backward pass, or after an interruption, then gives the very numbers that the
    whole model would.
    """

    def __init__(
        self, chain: Chain, end: Ending, ids: NDArray[np.int64], fisher: bool, folder: Folder, note: Note
    ) -> None:
        self.chain, self.ending, self.fisher, self.folder, self.note = chain, end, fisher, folder, note
        self.outer = False
        """Whether second moments of gradients at outputs are kept too."""
        self.place, self._coming = chain.place, dict[int, Any]()  # the weights of the next block, on their way
        self._ahead = True
        self.ids = torch.from_numpy(ids)
        self.batch = chain.batch(self.ids[: max(1, _ROWS // ids.shape[1])])
        self.looked_up = embeddings(chain.model)
        n = len(chain.blocks)
        size = sum(p.numel() for p in chain.blocks[0].parameters())
        head = chain.head_size() if fisher else 0
        # steps, the files that they read, and what one sequence of them costs: about multiplications for each weight
        self.steps: list[tuple[Callable[[int], None], int, int, set[str]]] = [(self._start, 0, 1, set())]
        self.steps += [(self._forward, i, 2 if fisher else 3, {_file("hidden", i)}) for i in range(n)]
        if fisher or chain.after:
            self.steps.append((self._end, n, 1 + 4 * head // size, {_file("hidden", n)}))
        if fisher:
            back = reversed(range(n))
            self.steps += [(self._backward, i, 5, {_file("hidden", i), _file("gradient", i + 1)}) for i in back]
            if chain.before or self.looked_up:
                self.steps.append((self._back, 0, 1, {_file("gradient", 0)}))
        self.of = len(ids) * sum(cost for _, _, cost, _ in self.steps)
        self.only: tuple[int, int] | None = None
        """The sequences that a step is for; None: all."""
        self.done = self.cost = 0

    def go(self) -> None:
        """Do the steps that are not done yet."""
        state = self.folder.state
        if state.setdefault("steps", 0) == 0:
            state["layers"] = {}
        for number, (step, i, cost, _) in enumerate(self.steps):
            self.cost = cost
            if number < state["steps"]:
                self._tell(len(self.ids))
                continue
            self._do(step, i)
            state["steps"] = number + 1
            self.folder.commit(drop=self._unneeded)

    def each(self, key: str, count: int, work: Callable[[int], list[list[float]]]) -> list[list[float]]:
        """Rows of numbers that work in so many parts gives, on another text."""
        found = list[list[float]]()
        for i in range(count):
            self.note(f"measuring {key}", i, count)
            found += work(i)
        return found

    def _do(self, step: Callable[[int], None], i: int) -> None:
        """A step; where memory is short without the weights of the next block beside it. LimitError where it stays so.

        What it finds is the same.
        """
        said, done = "", self.done
        for ahead in dict.fromkeys((self._ahead, False)):
            self._ahead, self.done = ahead, done
            try:
                return step(i)
            except (RuntimeError, MemoryError) as e:
                if not is_short(e):
                    raise
                said = str(e).strip().partition("\n")[0]
            wait(self._coming.values())
            self._coming.clear()  # behind the handler, which holds on to all that the step had
            self.place.clear()
        raise LimitError(f"{self._needed(i)} do not fit in the memory of {self.place.device}: {said}")

    def _needed(self, i: int) -> str:
        """What a step on block `i` has in memory beside what it keeps of its tokens."""
        if i >= len(self.chain.blocks):
            return "what comes behind the blocks, and logits"
        block = self.chain.blocks[i]
        weights = sum(p.numel() * p.element_size() for p in block.parameters())
        inputs = [m.weight.shape for m in self.chain.inside[i].values() if isinstance(m, torch.nn.Linear)]
        sums = sum(4 * shape[-1] ** 2 for shape in inputs)
        tokens = self.batch * self.ids.shape[1]
        held = f"{weights / 1e6:,.0f} MB of weights and up to {sums / 1e6:,.0f} MB of second moments"
        return f"{self.chain.names[i]}, {held}, and {tokens:,} tokens at once (a shorter context has fewer)"

    def _tell(self, sequences: int) -> None:
        self.done += sequences * self.cost
        self.note("calibrating", self.done, self.of)

    def _unneeded(self, name: str) -> bool:
        """Hidden states and gradients that no later step reads."""
        left = (read for *_, reads in self.steps[self.folder.state["steps"] :] for read in reads)
        return name.startswith(("hidden-", "gradient-")) and name not in left

    def _read(self, kind: str, i: int, start: int, end: int) -> Any:
        # a copy: a mapping that stays open would count as memory in use
        return torch.from_numpy(np.array(self.folder.array(_file(kind, i))[start:end]))

    def _sink(self, kind: str, i: int) -> contextlib.AbstractContextManager[Callable[[Any], None]]:
        return self.folder.sink(_file(kind, i), (*self.ids.shape, *self.chain.inner))

    def units(self, size: int) -> list[tuple[int, int]]:
        """The sequences [a, b) that are taken at once, and whose sums are added to those before."""
        return [(a, min(a + size, len(self.ids))) for a in range(0, len(self.ids), size)]

    def _batches(self, found: Collector, sums: Sums, size: int = 0) -> Iterator[tuple[int, int]]:
        """Sequences to work on; what they add to the sums is taken when the next are asked for."""
        for a, b in self.units(size or self.batch) if self.only is None else [self.only]:
            yield a, b
            sums.add(found.take())
            self._tell(b - a)

    def _inputs(self, found: Collector, sums: Sums, *files: tuple[str, int]) -> Iterator[tuple[int, list[Any]]]:
        """The same as (first sequence, what the files hold of a batch, at the place), the next one read ahead."""
        spans = self.units(self.batch) if self.only is None else [self.only]
        read = self.place.ahead(lambda span: self.place.to([self._read(*f, *span) for f in files]), spans)
        for (a, b), held in zip(spans, read, strict=True):
            yield a, held
            sums.add(found.take())
            self._tell(b - a)

    def _block(self, i: int, then: int) -> contextlib.AbstractContextManager[None]:
        """Compute with block `i`; that of number `then`, if it follows, is brought to the place meanwhile."""
        coming = self._coming.pop(i, None)
        brought = self.chain.brought(i) if coming is None else coming.result()
        self._coming.clear()
        follows = self._ahead and self.only is None and 0 <= then < len(self.chain.blocks)
        if follows and (soon := self.place.soon(lambda: self.chain.brought(then))):
            self._coming[then] = soon
        return self.chain.use(brought)

    def _save(self, sums: Sums, tag: str, outputs: bool) -> None:
        sums.save(self.folder, tag, self.ids.numel(), outputs)

    def _start(self, _: int) -> None:
        inputs, sums = Collector({} if self.fisher else self.chain.before, outputs=False), Sums()
        tables = Tables(inputs, {} if self.fisher else self.looked_up, {})
        with self._sink("hidden", 0) as append, inputs, tables, torch.no_grad():
            for a, b in self._batches(inputs, sums):
                append(self.chain.start(self.ids[a:b]).numpy())
        self._save(sums, "first", outputs=False)

    def _forward(self, i: int) -> None:
        inputs, sums = self._seeing({} if self.fisher else self.chain.inside[i], outputs=False), Sums()
        with self._sink("hidden", i + 1) as append, inputs, self._block(i, i + 1), torch.no_grad():
            for a, (hidden,) in self._inputs(inputs, sums, ("hidden", i)):
                try:
                    out = self.place.numbers(self.chain.run(i, hidden))
                except (RuntimeError, ValueError, TypeError, IndexError) as e:
                    if is_short(e):
                        raise
                    raise UnfitError(f"{self.chain.names[i]} does not run alone ({e})") from e
                if a == 0:
                    self.chain.same(i, torch.from_numpy(out[0, -TAIL:]))
                append(out)
        self._save(sums, f"{i:04}", outputs=False)

    def _seeing(self, modules: dict[str, Any], outputs: bool) -> Collector:
        return Collector(modules, outputs=outputs, outer=self.outer, place=self.place)

    def _end(self, n: int) -> None:
        """The gradient of the last hidden state, of as many positions at a time as the ending says."""
        sink = self._sink("gradient", n) if self.fisher else contextlib.nullcontext()
        context = self.ids.shape[1]
        chunk = self.ending.at_once or context
        found, sums = self._seeing(self.chain.after, outputs=self.fisher), Sums()
        tables = Tables(found, {}, output_layer(self.chain.model) if self.fisher else {}, self.place)
        with sink as append, found, tables, self.chain.head(), torch.set_grad_enabled(self.fisher):
            for s, _ in self._batches(found, sums, size=1):
                hidden, ids = self.place.to((self._read("hidden", n, s, s + 1), self.ids[s : s + 1]))
                gradient = torch.empty(1, context, *self.chain.inner)
                for a in range(0, context, chunk):
                    part = hidden[:, a : a + chunk].detach().requires_grad_(self.fisher)
                    out = self.chain.end(ids[:, a : a + chunk], part)
                    if self.fisher:
                        self.ending.backward(out, s, a, tables)
                        found.settle()
                        gradient[:, a : a + chunk] = part.grad
                if s == 0:
                    self.chain.same_end(out)
                if append is not None:
                    append(gradient.numpy())
        self._save(sums, "last", outputs=self.fisher)

    def _backward(self, i: int) -> None:
        outputs, sums = self._seeing(self.chain.inside[i], outputs=True), Sums()
        with self._sink("gradient", i) as append, outputs, self._block(i, i - 1):
            for _, (hidden, gradient) in self._inputs(outputs, sums, ("hidden", i), ("gradient", i + 1)):
                self.chain.run(i, hidden.requires_grad_(True)).backward(gradient)
                append(self.place.numbers(hidden.grad))
        self._save(sums, f"{i:04}", outputs=True)

    def _back(self, _: int) -> None:
        outputs, sums = Collector(self.chain.before, outputs=True), Sums()
        with outputs, leaves(self.chain.model), Tables(outputs, self.looked_up, {}):
            for a, b in self._batches(outputs, sums, size=1):  # else all would share the gradients of positions
                self.chain.start(self.ids[a:b]).backward(self._read("gradient", 0, a, b))
        self._save(sums, "first", outputs=True)


def _file(kind: str, i: int) -> str:
    return f"{kind}-{i:04}.npy"


Steps = Callable[[Chain, Ending, NDArray[np.int64], bool, Folder, Note], Passes]
"""What makes the steps of a chain: Passes, or what shares them."""
