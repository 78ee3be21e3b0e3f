"""`rac push`."""

from __future__ import annotations

import argparse
import json
import os
import shlex
from collections.abc import Mapping
from typing import Any

from rac.cli.archives import dense, opened
from rac.cli.terminal import argument, command, say, size, tell
from rac.container import hub
from rac.container.access import FileAccess
from rac.decode.unpack import quantised, weights
from rac.errors import SourceError
from rac.provenance import Provenance

PUSH = """\
Put an archive on the Hub: the file (or all shards of its set) and a model card, in one commit.

The repository is made where it is not there. The card says what made the file, sizes, bits per weight, what was lost,
the digest, the model that it was made of, and how to load it; a README.md that is there already stays, unless --card is
given. Needs `pip install rac-codec[hub]` and a token that may write (`hf auth login`, or HF_TOKEN)."""
CARD = "README.md"
_OPTIONS = ("level", "include", "exclude", "lanes", "slices", "effort", "align", "rank", "recover", "keep")
"""Keys of the provenance that `rac pack` has options for."""
_USUAL = {"level": "default", "effort": "default"}


def add(p: argparse.ArgumentParser) -> None:
    """Add the command."""
    command(p, run, PUSH)
    argument(p, "src IN.rac", "the archive, or one shard of a set")
    argument(p, "repository ORG/NAME", "where to")
    argument(p, "--private", "make the repository private, where it is made")
    argument(p, "--revision BRANCH", "the branch to write to (default: main); made where it is not there")
    argument(p, "--base-model ORG/NAME", "the model that was packed (default: what the archive states)")
    argument(p, "--card", "replace a README.md that is there")
    argument(p, "--dry-run", "print the card, and what would be put where; nothing is asked of the Hub")
    argument(p, "--json", "for programs")


def run(args: argparse.Namespace) -> int:
    """Push, and say where it is."""
    where = hub.address(hub.SCHEME + args.repository.removeprefix(hub.SCHEME))
    if where is None or where.file or where.revision:
        raise ValueError(f"{args.repository!r} is no ORG/NAME")
    with opened(args.src) as archives:
        if not all(isinstance(a.access, FileAccess) for a in archives):
            raise SourceError("is on a server already; push a local file", file=args.src)
        paths = [a.access.name for a in archives]
        entries = [e for a in archives for e in a.index.entries]
        lossy, bits = quantised(entries)
        about: dict[str, Any] = {
            "files": {os.path.basename(p): os.path.getsize(p) for p in paths},
            "dense": dense(archives),
            "weights": sum(weights(e) * (1 + len(e.aliases)) for e in entries),
            "lossy": lossy,
            "lossy_bits": bits,
            "content": [a.index.digest.hex() for a in archives],
            "model": any(e.name == "config.json" for e in entries),
        }
        origin = Provenance.of(archives[0].header, args.src)
        base = args.base_model or (origin.hub[0] if origin.hub else None)
        card = write_card(where.repository, about, origin, base)
    if args.dry_run:
        say(card)
        say(f"would push {', '.join(about['files'])} and {CARD} to {where.repository}")
    else:
        files: dict[str, str | bytes] = {os.path.basename(p): p for p in paths}
        text = {CARD: card.encode()}
        message = f"Upload {next(iter(files))} with rac-codec"
        how: dict[str, Any] = {"revision": args.revision, "private": args.private or None}
        how["beside"] = {} if args.card else text
        place, there = hub.upload(where.repository, {**files, **(text if args.card else {})}, message, **how)
        kept = "" if CARD in there else f"; the {CARD} that is there stays (--card replaces it)"
        say(f"{place}: {', '.join(there)}, {size(sum(about['files'].values()))}{kept}")
        about["commit"] = place
    tell({**about, "card": card})
    return 0


def write_card(repository: str, about: Mapping[str, Any], origin: Provenance, base: str | None) -> str:
    """The model card of an archive: `about` has its files and numbers, `base` is the model that was packed."""
    head = ["---", "tags:", "- rac", "- compressed"]
    if base:
        head += [f"base_model: {base}"] + ["base_model_relation: quantized"] * bool(about["lossy"])
    total, names = sum(about["files"].values()), list(about["files"])
    at = f" at commit `{origin.hub[1]}`" if origin.hub else ""
    of = f" It was made of [{base}](https://huggingface.co/{base}){at}." if base else ""
    lost = "**Lossless**: `rac unpack` gives every bit of the original back."
    if about["lossy"]:
        lost = f"**Lossy**: {about['lossy']} tensors are quantised at {about['lossy_bits']:.4f} bits per weight, all "
        lost += "counted; all others are exact. What it does to your task is for you to measure."
    rows = [
        *([f"| {name} | {n:,} bytes |" for name, n in about["files"].items()] if 1 < len(names) < 10 else []),
        f"| size | {total:,} bytes, {total / max(1, about['dense']):.2%} of {about['dense']:,} |",
        f"| bits per weight | {8 * total / max(1, about['weights']):.3f}, all bytes counted |",
        f"| content digest | `{' '.join(about['content'])}` |",
    ]
    model = f'model = rac.load_model("{repository}")  # transformers; resident="compressed" keeps it small in memory\n'
    load = f"""```python
import rac

{model if about["model"] else ""}tensors = rac.load_file("hf://{repository}/{names[0]}")  # or its tensors, by ranges
```

```
pip install rac-codec[hub,transformers]
rac unpack hf://{repository}/{names[0]} -o model   # the original files
rac verify hf://{repository}/{names[0]}
```"""
    title = repository.split("/")[1]
    more = " and its shards" if len(names) > 1 else ""
    what = f"A model in the RAC format (`rac-codec`), `{names[0]}`{more}.{of}"
    made = f"## What made it\n\n```\n{command_of(origin, base, names[0])}\n```\n\n{stated(origin)}"
    table = "\n".join(["| | |", "| --- | --- |", *rows])
    return "\n".join(head) + f"\n---\n\n# {title}\n\n{what}\n\n{lost}\n\n{table}\n\n## Loading\n\n{load}\n\n{made}\n"


def command_of(origin: Provenance, base: str | None, name: str) -> str:
    """The `rac pack` that makes such a file, as far as its provenance says."""
    known = origin.stated
    words = ["rac", "pack", f"{base}@{origin.hub[1]}" if base and origin.hub else base or "MODEL", "-o", name]
    goal = known.get("goal")
    for key, value in goal.items() if isinstance(goal, dict) else ():
        words += [f"--{str(key).replace('_', '-')}", str(value).removesuffix(".0")]
    if known.get("recipe"):
        for key in ("recipe", "bits", "group"):
            words += [f"--{key}", str(known.get(key))]
    words += _calibration(known.get("calibrate")) if goal else []
    words += ["--no-embeddings"] * (known.get("embeddings") is False)
    for key in _OPTIONS:
        value = known.get(key)
        if value in (None, False, [], _USUAL.get(key)):
            continue
        flag = f"--{key}"
        for one in value if isinstance(value, list) else [value]:
            words += [flag] if one is True else [flag, str(one)]
    return shlex.join(words)


def _calibration(used: Any) -> list[str]:
    """Options that calibrate as a file states: on texts of its own, or on some file that only its maker has."""
    if not isinstance(used, list):
        return ["--calibrate", str(used)] if isinstance(used, str) else []
    words = []
    for one in (one for one in used if isinstance(one, dict)):
        name = one.get("name") or ("self" if one.get("text") == "self" else "")
        words += ["--calibration", "FILE"] if "calibration" in one else ["--calibrate", str(name or "FILE")]
    return words


def stated(origin: Provenance) -> str:
    """What else the archive states of its making, for people."""
    kept = {k: v for k, v in origin.stated.items() if k not in ("sha256", "headers", "links", "folders", "gguf_order")}
    return f"The file states: `{json.dumps(kept, ensure_ascii=False, sort_keys=True, default=str)}`"
