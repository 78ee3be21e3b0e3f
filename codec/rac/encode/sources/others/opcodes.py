"""A pickle read as data: what it would call is written down, and nothing is called, made or imported."""

from __future__ import annotations

import pickletools
from dataclasses import dataclass, field
from typing import Any

from rac.errors import SourceError

_PUSHED: tuple[str, ...] = (
    "BININT",
    "BININT1",
    "BININT2",
    "LONG1",
    "LONG4",
    "BINFLOAT",
    "SHORT_BINUNICODE",
    "BINUNICODE",
    "BINUNICODE8",
)
_PUSHED += ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "SHORT_BINSTRING", "BINSTRING")
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_GROUPS = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(slots=True)
class Made:
    """What a class or a function is called with, and the state that the result is given."""

    kind: str
    args: tuple[Any, ...] = ()
    state: Any = None

    def get(self, name: str) -> Any:
        """A field of the state; None where there is none of that name."""
        return self.state.get(name) if isinstance(self.state, Pairs) else None


@dataclass(slots=True)
class Pairs:
    """A dict: its keys may be of any kind."""

    items: list[tuple[Any, Any]] = field(default_factory=list)

    def get(self, name: str) -> Any:
        """The last value of a key that is a text."""
        return next((v for k, v in reversed(self.items) if isinstance(k, str) and k == name), None)


def parse(data: bytes, path: str) -> Any:
    """The value of a pickle: texts, numbers, lists, tuples, `Pairs`, `Made`; SourceError where it is damaged or odd."""
    try:
        return _Machine().run(data)
    except Exception as e:  # of opcodes that are not known, or on a stack that is not theirs
        raise SourceError(f"damaged or unsupported pickle: {e or type(e).__name__}", file=path) from e


class _Machine:
    """The stack that the opcodes of a pickle work on."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        """What is on the stack at the end."""
        for code, arg, _ in pickletools.genops(data):
            name = code.name
            if name == "STOP":
                return self.stack.pop()
            if name in _PUSHED:
                self.stack.append(arg)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name not in ("PROTO", "FRAME"):
                getattr(self, "do_" + name.lower())(*([] if arg is None else [arg]))
        raise ValueError("it has no end")

    def _marked(self) -> list[Any]:
        at = self.marks.pop()
        found, self.stack[at:] = self.stack[at:], []
        return found

    def _last(self, n: int) -> list[Any]:
        if n > len(self.stack):
            raise IndexError("its stack is empty")
        found = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return found

    def do_mark(self) -> None:
        self.marks.append(len(self.stack))

    def do_empty_dict(self) -> None:
        self.stack.append(Pairs())

    def do_empty_list(self) -> None:
        self.stack.append([])

    def do_empty_tuple(self) -> None:
        self.stack.append(())

    def do_tuple(self) -> None:
        self.stack.append(tuple(self._marked()))

    def do_tuple1(self) -> None:
        self.stack.append(tuple(self._last(1)))

    def do_tuple2(self) -> None:
        self.stack.append(tuple(self._last(2)))

    def do_tuple3(self) -> None:
        self.stack.append(tuple(self._last(3)))

    def do_append(self) -> None:
        self.stack[-2].append(self.stack.pop())

    def do_appends(self) -> None:
        items = self._marked()
        self.stack[-1].extend(items)

    def do_setitem(self) -> None:
        key, value = self._last(2)
        self.stack[-1].items.append((key, value))

    def do_setitems(self) -> None:
        items = self._marked()
        self.stack[-1].items.extend(zip(items[::2], items[1::2], strict=True))

    def do_memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def do_binput(self, i: int) -> None:
        self.memo[i] = self.stack[-1]

    do_long_binput = do_binput

    def do_binget(self, i: int) -> None:
        self.stack.append(self.memo[i])

    do_long_binget = do_binget

    def do_global(self, name: str) -> None:
        self.stack.append(Made(name.replace(" ", ".")))

    def do_stack_global(self) -> None:
        module, name = self._last(2)
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError("a name is no text")
        self.stack.append(Made(f"{module}.{name}"))

    def do_reduce(self) -> None:
        kind, args = self._last(2)
        self.stack.append(Made(kind.kind, tuple(args)))

    do_newobj = do_reduce

    def do_build(self) -> None:
        state = self.stack.pop()
        self.stack[-1].state = state

    def do_binpersid(self) -> None:
        self.stack.append(Made("persistent", tuple(self.stack.pop())))
