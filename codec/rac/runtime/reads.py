"""Which weights of a model other modules than their own read each time they run, as far as the source code tells.

A weight that is read so would be decoded again at each step for one operation that is not the layer's own; such layers
are dense from the start. Reads of shape, data type and device are none, nor are those under a condition, which a model
mostly does not meet: a weight that is read all the same is decoded then (rac.runtime.weight).
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

_ABOUT = ("dtype", "device", "shape", "size", "ndim", "dim", "numel", "is_floating_point", "stride")
_ONCE = re.compile(
    r"__init__|_init_|init_|_?tie|_?resize|_?set_|_?get_|_?prune|_?load|from_|reset|extra_repr|__|.*remove_weight_norm"
)
"""Methods that do not run at each step, by how their names begin."""
_NO_NAMES = ("module", "m", "layer", "mod", "self", "p", "proj", "new_embeddings", "old_embeddings")


@dataclass(frozen=True, slots=True)
class Read:
    """`self.a.b.weight` in a method: `chain` is (a, b), "*" for what is indexed; `own` whether it begins at `self`."""

    chain: tuple[str, ...]
    own: bool
    where: str


class _Finder(ast.NodeVisitor):
    """Reads of `.weight` in a method that happen whenever it runs."""

    def __init__(self, where: str) -> None:
        self.where, self.found, self.maybe = where, list[Read](), 0

    def visit(self, node: ast.AST) -> None:
        """As of any visitor, and below the parts of a condition nothing is sure to happen."""
        if isinstance(node, ast.If | ast.IfExp):
            self.visit(node.test)
            self._below([*node.body, *node.orelse] if isinstance(node, ast.If) else [node.body, node.orelse])
        elif isinstance(node, ast.Try | ast.While | ast.Lambda):
            self._below(list(ast.iter_child_nodes(node)))
        elif isinstance(node, ast.BoolOp):
            self.visit(node.values[0])
            self._below(list(node.values[1:]))
        else:
            super().visit(node)

    def _below(self, nodes: list[Any]) -> None:
        self.maybe += 1
        for node in nodes:
            self.visit(node)
        self.maybe -= 1

    def visit_Call(self, node: ast.Call) -> None:
        """Questions about a weight read nothing of it."""
        if not (isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr", "getattr", "len", "id")):
            self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """`weight`, or what is asked of it."""
        inner = node.value
        if node.attr in _ABOUT and isinstance(inner, ast.Attribute) and inner.attr == "weight":
            return
        if node.attr != "weight" or not isinstance(node.ctx, ast.Load):
            self.generic_visit(node)
            return
        chain: list[str] = []
        while isinstance(inner, ast.Attribute | ast.Subscript):
            if isinstance(inner, ast.Attribute):
                chain.insert(0, inner.attr)
            elif chain or not isinstance(inner.value, ast.Name):
                chain.insert(0, "*")
            inner = inner.value
        if self.maybe or not isinstance(inner, ast.Name):
            return
        if inner.id == "self":
            if chain:
                self.found.append(Read(tuple(chain), True, self.where))
        elif chain or inner.id not in _NO_NAMES:
            self.found.append(Read(tuple(chain) or (inner.id,), False, self.where))


@functools.cache
def _classes(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module of Python by name; none where there is no source."""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (OSError, TypeError, KeyError, SyntaxError):
        return {}
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


@functools.cache
def _of_class(cls: type) -> tuple[Read, ...]:
    """What the methods of a class, without those that it inherits, read whenever they run."""
    found: list[Read] = []
    body = getattr(_classes(cls.__module__).get(cls.__qualname__), "body", ())
    methods = (f for f in body if isinstance(f, ast.FunctionDef))
    for method in (f for f in methods if not _ONCE.match(f.name)):
        finder = _Finder(f"{cls.__name__}.{method.name}")
        for statement in method.body:
            finder.visit(statement)
        found += finder.found
    return tuple(found)


def _reads(module: nn.Module) -> Iterator[Read]:
    for cls in type(module).__mro__:
        if cls.__module__.split(".")[0] not in ("torch", "builtins", "rac"):
            yield from _of_class(cls)


def read_by_others(model: nn.Module) -> dict[str, str]:
    """Paths of modules with a weight that others read whenever they run, and the methods that do."""
    paths = {path for path, module in model.named_modules() if "weight" in module._parameters}
    out: dict[str, str] = {}
    for path, module in model.named_modules():
        for read in _reads(module):
            for other in _named(path, read, paths):
                out.setdefault(other, read.where)
    return out


def _named(path: str, read: Read, paths: set[str]) -> list[str]:
    """The paths that a read in the module at `path` may mean."""
    if read.own and "*" not in read.chain:
        other = ".".join((path, *read.chain) if path else read.chain)
        return [other] if other in paths else []
    body = r"\.".join("[^.]+" if part == "*" else re.escape(part) for part in read.chain)
    start = re.escape(f"{path}." if path else "") if read.own else r"(?:.*\.)?"
    pattern = re.compile(start + body)
    return [other for other in paths if pattern.fullmatch(other)]
