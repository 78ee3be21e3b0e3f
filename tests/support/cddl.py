"""Whether a value has a type of CDDL (RFC 8610), as far as format_spec/maps.cddl goes; libraries lack some of it."""

import re
from typing import Any

TOKEN = re.compile(r'\s+|;[^\n]*|("[^"]*"|-?\d+|\.\.|\.[a-z]+|=>|[A-Za-z][\w-]*|[][{}()=/:,?*])')
PLAIN = {"tstr": str, "bstr": bytes, "int": int, "bool": bool, "null": type(None)}
Node = tuple[Any, ...]


class Schema:
    """The rules of a CDDL text."""

    def __init__(self, text: str) -> None:
        self.todo = [t for t in TOKEN.findall(text) if t]
        if TOKEN.sub("", text):
            raise ValueError(f"not understood: {TOKEN.sub('', text)!r}")
        self.rules: dict[str, Node] = {}
        while self.todo:
            name = self.todo.pop(0)
            self.take("=")
            self.rules[name] = self.choice()

    def take(self, token: str) -> bool:
        """The next token, which must be this one."""
        if self.todo.pop(0) != token:
            raise ValueError(f"{token!r} is missing before {self.todo[:9]}")
        return True

    def next_is(self, *tokens: str) -> bool:
        """Whether one of these comes next; it is taken."""
        return bool(self.todo) and self.todo[0] in tokens and self.take(self.todo[0])

    def choice(self) -> Node:
        """type / type / ..."""
        found = [self.type()]
        while self.next_is("/"):
            found.append(self.type())
        return found[0] if len(found) == 1 else ("choice", found)

    def type(self) -> Node:
        """One type, with its range or control."""
        token = self.todo.pop(0)
        if token in "[{(":
            return (token, self.group({"[": "]", "{": "}", "(": ")"}[token]))
        if self.next_is(".."):
            return ("range", int(token), int(self.todo.pop(0)))
        if self.todo and self.todo[0] in (".size", ".regexp"):
            return (self.todo.pop(0), token, self.todo.pop(0).strip('"'))
        if token[0] in '"-0123456789':
            return ("is", token.strip('"') if token[0] == '"' else int(token))
        return ("name", token)

    def group(self, end: str) -> list[tuple[str, Node | None, Node]]:
        """(how often, key or None, type) of each entry."""
        out = []
        while not self.next_is(end):
            often = self.todo.pop(0) if self.todo[0] in "?*" else ""
            first, key = self.choice(), None
            if self.next_is(":", "=>"):
                key = ("is", first[1]) if first[0] == "name" and first[1] not in self.keys else first
                first = self.choice()
            out.append((often, key, first))
            self.next_is(",")
        return out

    keys = ("tstr", "private-key")
    """Types that stand for any key; other names before a colon are the keys themselves."""

    def entries(self, group: list[tuple[str, Node | None, Node]]) -> list[tuple[str, Node | None, Node]]:
        """A group with the groups that it names written out."""
        out = []
        for often, key, node in group:
            rule = self.rules.get(node[1]) if node[0] == "name" and key is None else None
            out += self.entries(rule[1]) if rule and rule[0] == "(" else [(often, key, node)]
        return out

    def fits(self, node: Node, value: Any) -> bool:
        """Whether the value has the type."""
        kind, *more = node
        if kind == "choice":
            return any(self.fits(n, value) for n in more[0])
        if kind == "name":
            return type(value) is PLAIN[more[0]] if more[0] in PLAIN else self.fits(self.rules[more[0]], value)
        if kind == "is":
            return type(value) is type(more[0]) and value == more[0]
        if kind == "range":
            return type(value) is int and more[0] <= value <= more[1]
        if kind == ".size":
            return type(value) is PLAIN[more[0]] and len(value) == int(more[1])
        if kind == ".regexp":
            return isinstance(value, str) and re.fullmatch(more[1], value, re.DOTALL) is not None
        entries = self.entries(more[0])
        return self.fits_array(entries, value) if kind == "[" else self.fits_map(entries, value)

    def fits_array(self, entries: list[tuple[str, Node | None, Node]], value: Any) -> bool:
        """Either one entry any number of times, or each once."""
        if not isinstance(value, list):
            return False
        if entries and entries[0][0] == "*":
            return all(self.fits(entries[0][2], v) for v in value)
        return len(value) == len(entries) and all(self.fits(e[2], v) for e, v in zip(entries, value, strict=True))

    def fits_map(self, entries: list[tuple[str, Node | None, Node]], value: Any) -> bool:
        """Keys by name first, then by type."""
        if not isinstance(value, dict):
            return False
        named = {key[1]: (often, node) for often, key, node in entries if key and key[0] == "is"}
        typed = [(key, node) for _, key, node in entries if key and key[0] != "is"]
        if any(often == "" and name not in value for name, (often, _) in named.items()):
            return False
        return all(
            self.fits(named[k][1], v) if k in named else any(self.fits(t, k) and self.fits(n, v) for t, n in typed)
            for k, v in value.items()
        )
