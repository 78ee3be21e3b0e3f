"""The `rac` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rac.cli import analyze, archives, compare, info, load, pack, running
from rac.errors import FormatError, MismatchError, OutputError, RacError, UnsupportedError
from rac.registry import VERSION

DAMAGED = (FormatError, MismatchError, UnsupportedError)
"""Errors of the exit code 1."""

DESCRIPTION = """\
RAC, the rate-aligned container: model weights in one small, checked, streamable file.

  rac pack model/ -o model.rac        a model folder, .safetensors or .gguf to one file, losslessly
  rac info model.rac                  what is inside, and where the bytes went
  rac verify model.rac --against model/
  rac unpack model.rac -o restored/   every bit back
  rac compare model/ a.rac b.gguf --text test.txt   size and error, in one table
  rac analyze model/ --text text.txt --html report.html   what rotation and alignment do to it
  rac load model.rac --bench          how fast it loads; also from a URL
  rac shard model.rac -o shards/ --size 2GB         and rac merge shards/ -o model.rac
  rac generate model.rac "Once upon a time"         the model itself, straight from the file
  rac perplexity model.rac --text test.txt
"""
EPILOG = """\
exit codes:
  0    done
  1    damaged, different from what it should be, or not understood by this version
  2    wrong use (missing, existing or unusable files and values), or not enough space, memory or packages
  130  interrupted
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        "rac", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--version", action="version", version=f"rac-codec {VERSION}")
    commands = out.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (pack.add, archives.add_unpack, info.add, archives.add_verify, compare.add, analyze.add, load.add):
        add(commands)
    for add in (archives.add_shard, running.add_generate, running.add_perplexity):
        add(commands)
    for command in commands.choices.values():
        command.epilog = EPILOG
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors are one line on standard error."""
    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        _drop_output()
        return 0
    except (Exception, KeyboardInterrupt) as e:
        said = _said(e)
        if said is None:
            raise
        stopped = isinstance(e, KeyboardInterrupt) or (isinstance(e, OutputError) and e.offset is not None)
        if stopped and "left" in args:  # while it wrote, or before
            said += args.left(args)
        print(f"rac: {said}", file=sys.stderr)
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
        return 130 if isinstance(e, KeyboardInterrupt) else 1 if isinstance(e, DAMAGED) else 2


def _said(e: BaseException) -> str | None:
    """What there is to say of an error, on one line; None for what is a defect of this program."""
    if isinstance(e, KeyboardInterrupt):
        return "interrupted"
    if isinstance(e, MemoryError):
        return "not enough memory"
    if isinstance(e, OSError) and not isinstance(e, RacError):
        return (e.strerror or str(e)) + (f" [{e.filename}]" if e.filename else "")
    return " ".join(str(e).split()) if isinstance(e, RacError | ValueError | ImportError) else None


def _drop_output() -> None:
    """Send what standard output still holds nowhere: it takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
