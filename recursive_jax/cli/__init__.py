"""recursive-jax: run | recipes | status | report | profile | train | generate | evaluate | serve | plan | lab |
import | export | export-data | doctor.

A command is a file here and a line in `COMMANDS`: it has HELP, EXAMPLE, `arguments(parser)` and `run(args) -> exit
code`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from typing import Any

from recursive_jax import __version__, allocator, hosts
from recursive_jax.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    InputError,
    Preempted,
    RecursiveJaxError,
    explain,
)

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
    "serve": "serve",
    "plan": "plan",
    "lab": "lab",
    "import": "import_model",
    "export": "export",
    "export-data": "export_data",
    "doctor": "doctor",
}
COMPUTES = ("run", "train", "generate", "evaluate", "serve", "lab", "import", "export")  # these want huge pages


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
    command = commands.get(words[0])
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


class _Background:
    """What threads of other libraries run into on a full disk or at a limit, held back until the command ends: the main
    thread is told of it too, and says in one line what to do. Of a command that ends otherwise it is printed."""

    def __init__(self) -> None:
        self.held: list[tuple[Any, Any]] = []
        thread, unraisable = threading.excepthook, sys.unraisablehook
        threading.excepthook = lambda args: self.held.append((thread, args))
        sys.unraisablehook = lambda args: self.held.append((unraisable, args))
        logging.getLogger("asyncio").setLevel(logging.CRITICAL)
        warnings.filterwarnings("ignore", message=".*was never awaited")

    def show(self) -> None:
        for hook, args in self.held:
            if explain(args.exc_value) is None:
                hook(args)
        self.held.clear()


def _limits() -> None:
    """Raises InputError for limits under which the libraries below abort the process without a word."""
    try:
        import resource
    except ImportError:
        return  # not a Unix
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error of the write instead of the end of the process
    files, memory = resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_AS)[0]
    if 0 <= files < FILES:
        raise InputError(f"too many files would be open: this process may open {files}, {FILES} are needed (ulimit -n)")
    if 0 <= memory < MEMORY:
        raise InputError(
            f"this process may address {memory / 2**30:.1f} GiB of memory, {MEMORY / 2**30:.0f} GiB are needed "
            "(ulimit -v)"
        )


FILES = 64  # open at once
MEMORY = 4 * 2**30  # of addresses, most of which are never used


def _say(text: str) -> None:
    """A message, if it is of a length that can be read."""
    lines = text.splitlines()
    shown = [line if len(line) <= 2000 else f"{line[:2000]} ..." for line in lines[:60]]
    more = [f"... and {len(lines) - 60:,} lines more"] if len(lines) > 60 else []
    print("\n".join([f"recursive-jax: {shown[0] if shown else ''}", *shown[1:], *more]), file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    code = EXIT_FAILED
    try:
        code = _main(argv)
        return code
    except Exception:
        if hosts.watched():
            hosts.settle()  # where it is another process's end that broke a collective, the watch says so
            traceback.print_exc()
            hosts.fail(code)
        raise
    finally:
        if code not in (0, EXIT_PREEMPTED):
            hosts.fail(code)


def _main(argv: Sequence[str] | None) -> int:
    background = None
    if argv is None and threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as `&` in a script asks for
            signal.signal(signal.SIGINT, _stop_at_once)
        background = _Background()
    args = None
    try:
        args = _parse(argv)
        if argv is None and args.command in COMPUTES:
            _limits()
            allocator.restart()
        code = _command(args.command).run(args) or 0
        hosts.leave()
        return code
    except RecursiveJaxError as error:
        if isinstance(error, Preempted):  # all of a job's processes stop together
            hosts.leave()
        _say(str(error))
        return _left(error.exit_code) if argv is None and error.__cause__ is not None else error.exit_code
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        return 0
    except Exception as error:
        text = explain(error, getattr(args, "workdir", None) or getattr(args, "out", None)) or _of_jax(error)
        if text is None:
            raise
        _say(text)
        return _left(EXIT_BAD_INPUT) if argv is None else EXIT_BAD_INPUT
    finally:
        if background is not None:
            background.show()


def _of_jax(error: Exception) -> str | None:
    """A setting of JAX, given by a variable, that JAX refuses."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.replace("\\", "/").endswith("jax/_src/config.py"):
            return f"a JAX_... variable of the environment has a value that JAX refuses: {error}"
        trace = trace.tb_next
    return None


def _left(code: int) -> int:
    """Ends the process after an error of the machine: with no disk or no descriptors left, what other libraries do at
    the end of the interpreter fails once more, loudly."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
