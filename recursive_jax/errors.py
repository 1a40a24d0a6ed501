"""The errors a user meets, and the exit code each one carries (docs/guide.md)."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from recursive_jax.waiting import clear_line

EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130  # Ctrl-C
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


def say(text: str) -> None:
    """A notice on stderr: something that is as it should not be, and what was done about it."""
    clear_line()
    print(f"recursive-jax: {text}", file=sys.stderr, flush=True)


def say_once(text: str) -> None:
    """The same once for each process: an old key, files of a folder that are not read."""
    if text not in _said:
        _said.add(text)
        say(text)


# ---- errors of the machine, in words

_SYSTEM = {
    errno.ENOSPC: "no space is left on the device",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission is denied",
    errno.EPERM: "the operation is not permitted",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "a folder stands where a file should be",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENOENT: "the place cannot be created, or the file is gone",
    errno.ENOTEMPTY: "the folder is not empty",
    errno.EFBIG: "the file would be larger than allowed (ulimit -f)",
    errno.ENAMETOOLONG: "the name is too long for the file system",
    errno.ELOOP: "the links go in a circle",
    errno.EIO: "the disk reports an input/output error",
    errno.ESTALE: "the network file system lost the file",
    errno.EBUSY: "the file is in use",
    errno.EMFILE: "too many files are open in this process (raise `ulimit -n`)",
    errno.ENFILE: "too many files are open on this machine",
    errno.EAGAIN: "no more threads or processes may be started (raise `ulimit -u`)",
    errno.ENOMEM: "the machine has no memory left",
}
#: Errors of other libraries that come without a number: (pattern of the text, the number).
_TOLD = (
    (r"can't start new thread|pthread_create|Resource temporarily unavailable", errno.EAGAIN),
    (r"[Nn]o space left on device", errno.ENOSPC),
    (r"[Tt]oo many open files", errno.EMFILE),
    (r"[Ff]ile too large", errno.EFBIG),
    (r"[Ff]ile name too long", errno.ENAMETOOLONG),
    (r"[Rr]ead-only file system", errno.EROFS),
    (r"[Dd]isk quota exceeded", errno.EDQUOT),
    (r"Input/output error", errno.EIO),
)
_BACKEND = re.compile(
    r"Unable to initialize backend '(\w+)'|[Uu]nknown backend:? '?(\w+)|no platforms that are instances of (\w+)"
)


def explain(error: BaseException, folder: Any = None) -> str | None:
    """One message for an error of the machine: its disk, its limits, its memory, its devices; None for another kind.
    folder: where committed results lie."""
    text = str(error)
    if isinstance(error, (RuntimeError, ValueError)) and (found := _BACKEND.search(text)):
        name = next(g for g in found.groups() if g)
        extra = f", or install it: pip install 'recursive-jax[{name}]'" if name in ("cuda", "tpu") else ""
        return (
            f"the platform {name!r} cannot be used on this machine: {text.strip().splitlines()[0][:300]}. Leave "
            f"JAX_PLATFORMS out{extra}"
        )
    kept = f" What was committed under {folder} is kept: " if folder and os.path.exists(f"{folder}/run.json") else " "
    mend = "mend this and give the same command again, or give another place"
    remedy = kept + (mend if kept.strip() else mend.capitalize()) if folder else ""
    number = _number(error)
    if number is not None:
        place = getattr(error, "filename", None) or folder or _path_in(text)
        return (f"cannot use {place}: " if place else "") + f"{_SYSTEM[number]}.{remedy}".rstrip()
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED: Out of memory" in text or "Out of memory" in text[:200]:
        return (
            "there is not enough memory on the device or the machine. Lower train.batch or sampling.batch, raise "
            f"train.gradient_accumulation, set model.remat, or use more devices (mesh.*).{kept}".rstrip(": ")
        )
    return None


def _path_in(text: str) -> str | None:
    """A path that an error of another library names."""
    found = re.search(r"(?:^|[\s\"'])(/[^\s\"':,]+/[^\s\"':,]*)", text)
    return found[1] if found else None


def _number(error: BaseException) -> int | None:
    """The system's number of an error, also where a library wraps it in words."""
    if isinstance(error, OSError):
        return error.errno if error.errno in _SYSTEM else None
    said = re.search(r"[Oo][Ss] error (\d+)", str(error))
    if said and int(said[1]) in _SYSTEM:
        return int(said[1])
    if not isinstance(error, (RuntimeError, ValueError)):
        return None
    return next((n for pattern, n in _TOLD if re.search(pattern, str(error))), None)


@contextlib.contextmanager
def machine_errors(folder: Any) -> Iterator[None]:
    """Turns errors of the machine into one message; what was committed in `folder` stays."""
    try:
        yield
    except Exception as error:
        text = None if isinstance(error, RecursiveJaxError) else explain(error, folder)
        if text is None:
            raise
        raise InputError(text) from error
