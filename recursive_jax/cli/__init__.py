"""recursive-jax: run | recipes | status | report | profile | train | generate | evaluate | lab | import | export |
doctor.

A command is a file here and a line in `COMMANDS`: it has HELP, EXAMPLE, `arguments(parser)` and `run(args) -> exit
code`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from typing import Any

from recursive_jax import __version__, allocator
from recursive_jax.errors import EXIT_BAD_INPUT, RecursiveJaxError

EPILOG = """\
a first run (a few minutes on two CPU cores, no data and no network needed):
  recursive-jax run configs/quickstart.yaml --workdir runs/quickstart
  open runs/quickstart/report.html

change anything by its dotted key; see what it would cost before it starts:
  recursive-jax run configs/quickstart.yaml rounds.count=10 sampling.temperature=0.8 --workdir runs/sharp
  recursive-jax run configs/wikitext.yaml 'data.path=corpus/*.txt' --workdir runs/mine --dry-run

killed? the same command goes on where it stopped. exit codes: 0 done, 1 failed, 2 bad input, 75 stopped, start again.
"""

#: Where each command is; imported lazily in turn, so that `--help` costs nothing.
COMMANDS = {
    "run": "run",
    "recipes": "recipes",
    "train": "train",
    "status": "status",
    "report": "report",
    "profile": "profile",
    "generate": "generate",
    "evaluate": "evaluate",
    "lab": "lab",
    "import": "import_model",
    "export": "export",
    "doctor": "doctor",
}
COMPUTES = ("run", "train", "generate", "evaluate", "lab", "import", "export")  # these want huge pages


def _command(name: str) -> Any:
    return importlib.import_module(f"recursive_jax.cli.{COMMANDS[name]}")


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="recursive-jax",
        epilog=EPILOG,
        formatter_class=raw,
        description="Train models on the output of models, in JAX, and know exactly what each round gained and lost.",
    )
    parser.add_argument("--version", action="version", version=f"recursive-jax {__version__}")
    sub = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        command = _command(name)
        p = sub.add_parser(
            name,
            help=command.HELP,
            description=command.HELP[0].upper() + command.HELP[1:] + ".",
            epilog=f"example:\n  {command.EXAMPLE}",
            formatter_class=raw,
            allow_abbrev=False,
        )
        command.arguments(p)
    return parser


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """key=value words may stand anywhere, before and between the others too; argparse sees what is left. Which options
    take a value, and so the word behind them, the parser itself says."""
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    commands = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices
    command = commands.get(words[0]) if words else None
    options = [] if command is None else command._actions
    takes_value = {name for action in options if action.nargs != 0 for name in action.option_strings}
    overrides, kept = [], []
    for before, word in zip(["", *words], words, strict=False):
        key = word.partition("=")[0]
        bare = "=" in word and not word.startswith("-") and "/" not in key and before not in takes_value
        (overrides if bare else kept).append(word)
    args = parser.parse_args(kept)
    if overrides and not hasattr(args, "overrides"):
        parser.error(f"{args.command} takes no key=value words, got {' '.join(overrides)}")
    if hasattr(args, "overrides"):
        args.overrides = [*args.overrides, *overrides]
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    args = _parse(argv)
    if argv is None and args.command in COMPUTES:
        allocator.restart()
    try:
        return _command(args.command).run(args) or 0
    except RecursiveJaxError as error:
        print(f"recursive-jax: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("recursive-jax: interrupted; what was committed is kept", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        from recursive_jax.storage import explain_disk_error

        text = explain_disk_error(error, getattr(args, "workdir", None) or error.filename)
        if text is None:
            raise
        print(f"recursive-jax: {text}", file=sys.stderr)
        return EXIT_BAD_INPUT
