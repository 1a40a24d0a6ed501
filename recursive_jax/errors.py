"""The errors a user meets, and the exit code each one carries (docs/guide.md)."""

from __future__ import annotations

import sys

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_PREEMPTED = 75  # EX_TEMPFAIL: a scheduler may start the same command again


class RecursiveJaxError(Exception):
    """Base class. Its text is the whole message a user sees: what is wrong, where, and the remedy."""

    exit_code = EXIT_FAILED


class InputError(RecursiveJaxError):
    """Something the user gave cannot be used: config, file, folder, model. Nothing was lost."""

    exit_code = EXIT_BAD_INPUT


class TrainingDiverged(RecursiveJaxError):
    """The loss or the gradient norm stopped being finite."""


class Preempted(RecursiveJaxError):
    """SIGTERM arrived; the work so far is saved and the same command goes on from it."""

    exit_code = EXIT_PREEMPTED


def problems(title: str, lines: list[str]) -> InputError:
    """One message for all problems found at once, so that a user mends them in one go."""
    return InputError(title + "\n" + "\n".join(f"  - {line}" for line in lines))


_said: set[str] = set()


def say_once(text: str) -> None:
    """A notice on stderr, once for each process: an old key, files of a folder that are not read."""
    if text not in _said:
        _said.add(text)
        print(f"recursive-jax: {text}", file=sys.stderr)
