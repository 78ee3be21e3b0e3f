"""The `rac` command."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from rac.cli import terminal
from rac.cli.stopping import Stopped, stopping
from rac.errors import FormatError, MismatchError, OutputError, RacError, UnsupportedError
from rac.registry import VERSION

DAMAGED = (FormatError, MismatchError, UnsupportedError)  # errors of the exit code 1

DESCRIPTION = """\
RAC, the rate-aligned container: model weights in one small, checked, streamable file.

  rac pack model/ -o model.rac        a model folder, .safetensors or .gguf to one file, losslessly
  rac info model.rac                  what is inside, and where the bytes went
  rac ls model.rac                    its tensors, a line each; rac cat model.rac NAME > x.npy
  rac diff a.rac b.safetensors        what differs, tensor by tensor
  rac verify model.rac --against model/
  rac unpack model.rac -o restored/   every bit back
  rac compare model/ a.rac b.gguf --text test.txt   size and error, in one table
  rac analyze model/ --text text.txt --html report.html   what rotation and alignment do to it
  rac load model.rac --bench          how fast it loads; also from a URL
  rac shard model.rac -o shards/ --size 2GB         and rac merge shards/ -o model.rac
  rac push model.rac org/name                       a repository of the Hub, with a model card
  rac generate model.rac "Once upon a time"         the model itself, straight from the file
  rac perplexity model.rac --text test.txt
"""
EPILOG = """\
exit codes:
  0    done
  1    damaged, different from what it should be, or not understood by this version
  2    wrong use (missing, existing or unusable files and values), or not enough space, memory or packages
  130  interrupted; 143: terminated (SIGTERM), 129: hung up, each without anything temporary left
"""


COMMANDS = {
    "pack": ("pack", "add", "pack a model"),
    "unpack": ("archives", "add_unpack", "get the model back"),
    "info": ("info", "add", "show what is inside"),
    "verify": ("archives", "add_verify", "check an archive"),
    "ls": ("tensors", "add_ls", "list tensors"),
    "cat": ("tensors", "add_cat", "write one tensor or file to standard output"),
    "diff": ("tensors", "add_diff", "what differs between two files"),
    "compare": ("compare", "add", "compare files with their original"),
    "analyze": ("analyze", "add", "what rotation and alignment do to the weights of a model"),
    "jobs": ("ranks", "add_jobs", "how far the ranks of a pack are"),
    "load": ("load", "add", "load all tensors and time it"),
    "shard": ("archives", "add_shard", "cut an archive into shards"),
    "merge": ("archives", "add_merge", "join shards"),
    "push": ("push", "add", "put an archive on the Hub"),
    "generate": ("running", "add_generate", "let a packed model write"),
    "perplexity": ("running", "add_perplexity", "how well a packed model predicts a text"),
    "completion": ("completion", "add", "print what makes a shell complete these commands"),
}
"""Module, what adds the arguments, and what the command does."""


class _Parser(argparse.ArgumentParser):
    """Wrong use is one line, with what was probably meant."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong, and end with exit code 2."""
        given = message.rpartition("invalid choice: ")[2].split("'")[1:2]
        if "COMMAND: invalid choice" in message and given:
            message = f"no command {given[0]!r}" + meant(given[0], COMMANDS)
        print(f"{self.prog}: {message} (see `{self.prog} --help`)", file=sys.stderr)
        raise SystemExit(2)


def meant(given: str, known: Iterable[str]) -> str:
    """A question that names what is closest to a word; nothing where nothing is close."""
    close = difflib.get_close_matches(given, known, 1)
    return f"; did you mean {close[0]!r}?" if close else ""


def parser(argv: Sequence[str] = tuple(COMMANDS)) -> argparse.ArgumentParser:
    """The command line. Only commands that `argv` names have arguments: no more is imported than they need."""
    how: Any = {"epilog": EPILOG, "formatter_class": argparse.RawDescriptionHelpFormatter}
    out = _Parser("rac", description=DESCRIPTION, **how)
    said = f"rac-codec {VERSION}"
    out.add_argument("--version", action="version", version=said, help="the version; with --verbose, what runs here")
    commands = out.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module, add, about) in COMMANDS.items():
        p = commands.add_parser(name, help=about, **how)
        if name in argv:
            getattr(importlib.import_module(f"rac.cli.{module}"), add)(p)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors are one line on standard error."""
    signals = stopping() if argv is None else contextlib.nullcontext()  # those of a program that calls this are its own
    argv = sys.argv[1:] if argv is None else argv
    if sys.stdout is None:  # it was closed before
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a console of Windows has no sign for every character of a name
        if isinstance(stream, io.TextIOWrapper) and stream.encoding.lower() not in ("utf-8", "utf8"):
            stream.reconfigure(errors="backslashreplace")
    if not argv:
        parser().print_help(sys.stderr)
        return 2
    if argv[0].startswith("-") and argv[0] not in ("-h", "--help", "--version"):
        print(
            f"rac: {argv[0]!r} stands in front of the command: options go behind it, rac COMMAND ...", file=sys.stderr
        )
        return 2
    if argv[0] == "--version" and set(argv[1:]) & {"-v", "--verbose"}:
        args, unknown = argparse.Namespace(run=_about, quiet=False, verbose=True), list[str]()
    else:
        args, unknown = parser(argv).parse_known_args(argv)
    if unknown:
        options = [o for action in args.parser._actions for o in action.option_strings]
        word = unknown[0].partition("=")[0]
        args.parser.error(f"unknown argument {unknown[0]!r}{meant(word, options) if word[0] == '-' else ''}")
    terminal.set_volume(args)
    try:
        with signals, warnings.catch_warnings():
            warnings.showwarning = _show(warnings.showwarning)
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
        if isinstance(e, Stopped):
            return e.code
        return 130 if isinstance(e, KeyboardInterrupt) else 1 if isinstance(e, DAMAGED) else 2


def _about(_: argparse.Namespace) -> int:
    """Print the version, and what the kernels are that decode here."""
    import platform

    from rac import native
    from rac.native.library import lost

    print(f"rac-codec {VERSION}")
    print(f"kernels   {native.kernel()}" + (f" (RAC_CPU={cpu})" if (cpu := os.environ.get("RAC_CPU")) else ""))
    print(f"here are  {', '.join(native.cpus())}" if native.cpus() else f"but       {lost()}")
    print(f"machine   {platform.machine()}, {platform.platform()}, Python {platform.python_version()}")
    return 0


def _show(usual: Callable[..., None]) -> Callable[..., None]:
    """Shows a warning of this package on one line; others as usual."""

    def show(message: Warning | str, *rest: Any, **more: Any) -> None:
        if not (text := str(message)).startswith("rac: "):
            usual(message, *rest, **more)
        elif terminal.loud():
            print(" ".join(text.split()), file=sys.stderr)

    return show


def _said(e: BaseException) -> str | None:
    """What there is to say of an error, on one line; None for what is a defect of this program."""
    if isinstance(e, KeyboardInterrupt):
        return "terminated" if isinstance(e, Stopped) else "interrupted"
    if isinstance(e, MemoryError):
        return "not enough memory"
    if isinstance(e, OSError) and not isinstance(e, RacError):
        return (e.strerror or str(e)) + (f" [{e.filename}]" if e.filename else "")
    return " ".join(str(e).split()) if isinstance(e, RacError | ValueError | ImportError) else None


def _drop_output() -> None:
    """Send what standard output still holds nowhere: it takes no more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
