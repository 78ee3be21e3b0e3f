"""The `rac` command."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from rac.cli import analyze, compare, generate, info, load, pack, perplexity, shard, unpack, verify
from rac.errors import RacError
from rac.registry import VERSION

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
EPILOG = "Exit codes: 0 done, 1 damaged or different, 2 wrong use (missing, existing, unusable files), 130 interrupted."


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        "rac", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    out.add_argument("--version", action="version", version=f"rac-codec {VERSION}")
    commands = out.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (pack, unpack, info, verify, compare, analyze, load, shard, generate, perplexity):
        module.add(commands)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. Errors are one line on standard error."""
    from rac.errors import FormatError, MismatchError, UnsupportedError

    args = parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("rac: interrupted" + (args.interrupted(args) if "interrupted" in args else ""), file=sys.stderr)
        return 130
    except RacError as e:
        print(f"rac: {e}", file=sys.stderr)
        return 1 if isinstance(e, FormatError | MismatchError | UnsupportedError) else 2
    except ValueError as e:
        print(f"rac: {e}", file=sys.stderr)
        return 2
