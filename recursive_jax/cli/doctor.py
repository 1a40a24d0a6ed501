"""recursive-jax doctor: the machine and the installation."""

from __future__ import annotations

import argparse

from recursive_jax.cli.common import set_up

HELP = "say what this machine offers and whether the installation works"
EXAMPLE = "recursive-jax doctor"


def arguments(p: argparse.ArgumentParser) -> None:
    pass


def run(args: argparse.Namespace) -> int:
    set_up()
    from recursive_jax.rounds.doctor import doctor

    text, healthy = doctor()
    print(text)
    return 0 if healthy else 1
