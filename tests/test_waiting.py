"""No silent minute: what takes long says what it is, on a terminal in one line, in a log in few."""

from __future__ import annotations

import contextlib
import io
import time

import pytest

from recursive_jax import mesh
from recursive_jax.errors import say
from recursive_jax.waiting import Wait, note, rate


class Screen(io.StringIO):
    def __init__(self, live: bool):
        super().__init__()
        self.live = live

    def isatty(self) -> bool:
        return self.live


def on_both(test):
    """The test on a terminal and with a log as standard error (which pytest sets anew between a fixture and a test)."""

    @pytest.mark.parametrize("live", [True, False], ids=["terminal", "log"])
    def run(live):
        with contextlib.redirect_stderr(Screen(live)) as screen:
            test(screen)

    return run


def until(screen, text):
    """Waits for what another thread writes."""
    for _ in range(500):
        if text in screen.getvalue():
            return
        time.sleep(0.01)
    raise AssertionError(f"{text!r} is not in {screen.getvalue()!r}")


@on_both
def test_what_is_short_is_silent(screen):
    with Wait("loading", after=60):
        note("a tensor")
    with Wait("loading", quiet=True, after=0.0):
        time.sleep(0.05)
    assert screen.getvalue() == ""


@on_both
def test_what_is_long_says_what_it_does(screen):
    with Wait("loading", after=0.01, every=0.01) as wait:
        until(screen, "loading ...")
        mesh.TRACES["a program"] += 1
        until(screen, "loading: compiling a program ...")
        say("a notice")
    text = screen.getvalue()
    assert "recursive-jax: a notice\n" in text
    if screen.live:
        assert "\r\x1b[2K" in text.rpartition(" s")[2], "the painted line is taken away"
        assert text.split("recursive-jax: a notice")[0].endswith("\r\x1b[2K"), "and before something else is said"
    else:
        assert "\r" not in text and text.endswith(f"loading: {wait.seconds:.0f} s\n")


@on_both
def test_the_innermost_is_shown(screen):
    with Wait("outer", after=0.01, every=0.01):
        until(screen, "outer ...")
        with Wait("inner", after=0.01, every=0.01):
            until(screen, "inner ...")
            inside = screen.getvalue().rpartition("inner")[0]
            time.sleep(0.05)
            assert "outer" not in screen.getvalue()[len(inside) :]
        written = len(screen.getvalue())
        until_again = time.monotonic() + 5
        while "outer" not in screen.getvalue()[written:] and time.monotonic() < until_again:
            time.sleep(0.01)
        assert "outer" in screen.getvalue()[written:]


def test_rates_have_three_digits_and_are_never_0():
    assert [rate(8, 65), rate(41, 10), rate(12345, 10), rate(5, 0.0)] == ["0.12", "4.1", "1,234", "5,000,000,000"]
