"""recursive-jax: run | recipes | status | report | profile | train | generate | evaluate | lab | import | export |
doctor.

A command is a file here and a line in `COMMANDS`: it has HELP, EXAMPLE, `arguments(parser)` and `run(args) -> exit
code`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from typing import Any

from recursive_jax import __version__, allocator
from recursive_jax.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, RecursiveJaxError, explain, say_once

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
    if not words:
        parser.print_help()
        raise SystemExit(0)
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


_INTERRUPTED = "recursive-jax: interrupted; what was committed is kept"


def _stop_at_once(number: int, frame: Any) -> None:
    """Ctrl-C before a run is opened, or where nothing is kept: an exception could get lost in the middle of an import,
    or be taken for that module's own."""
    show_cursor = b"\x1b[?25h" if sys.stderr.isatty() else b""
    os.write(2, show_cursor + f"\n{_INTERRUPTED}\n".encode())
    os._exit(EXIT_INTERRUPTED)


def _quiet_background() -> None:
    """What background threads of other libraries run into on a full disk or at a limit is one line: the main thread is
    told of it, and says what to do."""
    thread, unraisable = threading.excepthook, sys.unraisablehook
    troubled = threading.Event()

    def in_thread(args: Any) -> None:
        text = explain(args.exc_value) if args.exc_value is not None else None
        if text is not None:
            troubled.set()
            say_once(f"in the background: {text}")
        elif not troubled.is_set():
            thread(args)

    threading.excepthook = in_thread
    sys.unraisablehook = lambda args: None if troubled.is_set() else unraisable(args)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    if argv is None and threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as `&` in a script asks for
            signal.signal(signal.SIGINT, _stop_at_once)
        _quiet_background()
    args = None
    try:
        args = _parse(argv)
        if argv is None and args.command in COMPUTES:
            allocator.restart()
        return _command(args.command).run(args) or 0
    except RecursiveJaxError as error:
        print(f"recursive-jax: {error}", file=sys.stderr)
        return _left(error.exit_code) if argv is None and error.__cause__ is not None else error.exit_code
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except (OSError, RuntimeError, ValueError, MemoryError) as error:
        text = explain(error, getattr(args, "workdir", None))
        if text is None:
            raise
        print(f"recursive-jax: {text}", file=sys.stderr)
        return _left(EXIT_BAD_INPUT) if argv is None else EXIT_BAD_INPUT


def _left(code: int) -> int:
    """Ends the process after an error of the machine: with no disk or no descriptors left, what other libraries do at
    the end of the interpreter fails once more, loudly."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
