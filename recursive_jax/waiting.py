"""What is going on, said on stderr where it takes more than two seconds: one line that counts the seconds on a
terminal; elsewhere a line when it begins to take long, some while it does, and one when it is over.

    with Wait("loading smollm2"):
        ...
        note("tensor 120 of 272")       # from anywhere inside
"""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

AFTER = 2.0  # seconds without a word
EVERY = 15.0  # seconds between lines where they cannot be painted over
_open: list[Wait] = []  # the innermost is shown


class Wait:
    """A context. what: the work in a few words. quiet: say nothing. after, every: seconds before the first line, and
    between lines that are not painted over."""

    def __init__(self, what: str, quiet: bool = False, after: float = AFTER, every: float = EVERY):
        self.what, self.quiet, self.after, self.every = what, quiet, after, every
        self._note, self._said, self._painted = "", 0, False
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Wait:
        self._begin = time.perf_counter()
        _open.append(self)
        if not self.quiet:
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def close(self) -> None:
        """Ends it, before the end of the context too: something else is being said now."""
        if self in _open:
            _open.remove(self)
        if self._thread is None:
            return
        self._over.set()
        self._thread.join()
        self._thread = None
        self.clear()
        if self._said and not sys.stderr.isatty():
            print(f"{self.what}: {self.seconds:.0f} s", file=sys.stderr, flush=True)

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._begin

    def clear(self) -> None:
        """Takes the painted line away."""
        if self._painted:
            sys.stderr.write("\r\x1b[2K")
            sys.stderr.flush()
            self._painted = False

    def _watch(self) -> None:
        if self._over.wait(self.after):
            return
        live = sys.stderr.isatty()
        while True:
            if _open and _open[-1] is self:
                what = f"{self.what}: {self._note}" if self._note else self.what
                if live:
                    sys.stderr.write(f"\r\x1b[2K{what} ... {self.seconds:.0f} s")
                    self._painted = True
                else:
                    sys.stderr.write(f"{what} ...\n" if not self._said else f"{what} ... {self.seconds:.0f} s\n")
                sys.stderr.flush()
                self._said += 1
            if self._over.wait(0.25 if live else self.every):
                return


def note(text: str) -> None:
    """What the innermost wait is about just now."""
    if _open:
        _open[-1]._note = text


def clear_line() -> None:
    """Before something else is printed on stderr."""
    if _open:
        _open[-1].clear()


def rate(count: float, seconds: float) -> str:
    """Units per second in three digits: 0.12, 4.1, 1,234."""
    per_second = count / max(seconds, 1e-9)
    return f"{per_second:,.0f}" if per_second >= 10 else f"{per_second:.2g}"
