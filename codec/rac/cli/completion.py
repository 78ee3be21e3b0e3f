"""`rac completion`: scripts that make a shell complete commands and options."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

from rac.cli.terminal import command

HELP = """\
Print a script that makes a shell complete the commands and options of rac.

  rac completion bash > ~/.local/share/bash-completion/completions/rac
  rac completion zsh > ~/.zfunc/_rac          with ~/.zfunc in fpath before compinit
  rac completion fish > ~/.config/fish/completions/rac.fish"""


def add(p: argparse.ArgumentParser) -> None:
    """Add the command."""
    command(p, run, HELP)
    p.add_argument("shell", choices=tuple(_SHELLS), help="which shell")


def run(args: argparse.Namespace) -> int:
    """Print the script."""
    print(_SHELLS[args.shell](_commands()))
    return 0


Option = tuple[str, tuple[str, ...], str]
"""The words of an option, its choices, the help text."""
Commands = dict[str, tuple[str, list[Option]]]
"""What a command does and its options, by its name."""


def _commands() -> Commands:
    from rac.cli import COMMANDS, parser

    (group,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    out: Commands = {}
    for name, p in group.choices.items():
        options = [
            (" ".join(a.option_strings), tuple(map(str, a.choices or ())), str(a.help or "").replace("%%", "%"))
            for a in p._actions
            if a.option_strings
        ]
        out[name] = COMMANDS[name][2], options
    return out


def _words(options: Iterable[Option]) -> str:
    return " ".join(words for words, _, _ in options)


def _bash(commands: Commands) -> str:
    cases = []
    for name, (_, options) in commands.items():
        for words, choices, _ in options:
            if choices:
                pattern = "|".join(f"{name}:{w}" for w in words.split())
                cases.append(f'    {pattern}) COMPREPLY=($(compgen -W "{" ".join(choices)}" -- "$cur")); return;;')
    lists = [f'    {name}) words="{_words(options)}";;' for name, (_, options) in commands.items()]
    return "\n".join(
        [
            "_rac() {",
            '  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" cmd="${COMP_WORDS[1]}" words',
            "  COMPREPLY=()",
            f'  if [ "$COMP_CWORD" = 1 ]; then COMPREPLY=($(compgen -W "{" ".join(commands)}" -- "$cur")); return; fi',
            '  case "$cmd:$prev" in',
            *cases,
            "  esac",
            '  case "$cmd" in',
            *lists,
            "  esac",
            '  case "$cur" in -*) COMPREPLY=($(compgen -W "$words" -- "$cur"));; esac',
            "}",
            "complete -o default -F _rac rac",
        ]
    )


def _zsh(commands: Commands) -> str:
    return "#compdef rac\nautoload -U +X bashcompinit && bashcompinit\n" + _bash(commands)


def _fish(commands: Commands) -> str:
    out = []
    for name, (about, options) in commands.items():
        out.append(f"complete -c rac -n __fish_use_subcommand -f -a {name} -d {_quoted(about)}")
        for words, choices, text in options:
            flags = " ".join(f"-l {w[2:]}" if w.startswith("--") else f"-s {w[1:]}" for w in words.split())
            values = f" -x -a {_quoted(' '.join(choices))}" if choices else ""
            about = _quoted(" ".join(text.split())[:70])
            out.append(f"complete -c rac -n '__fish_seen_subcommand_from {name}' {flags}{values} -d {about}")
    return "\n".join(out)


def _quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SHELLS = {"bash": _bash, "zsh": _zsh, "fish": _fish}
