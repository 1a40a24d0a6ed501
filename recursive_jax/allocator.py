"""Huge pages for the C allocator, which XLA's CPU backend uses for every temporary.

A training step allocates and frees large buffers; with 4 KiB pages the kernel spends a third of the time clearing and
mapping them. glibc (2.35 and newer) can back them with 2 MiB pages, but only when told before the process starts, so
the command line starts itself once more with the setting. Measured in docs/benchmarks.md: 1.3 to 1.4 times the training
throughput on two cores, the same bits. RECURSIVE_JAX_HUGE_PAGES=off leaves everything as it is. From Python, start the
interpreter with the setting: `GLIBC_TUNABLES=$(python -m recursive_jax.allocator) python script.py`.
"""

from __future__ import annotations

import os
import platform
import sys

#: hugetlb=1 asks for transparent huge pages; the other three keep freed memory for the next step.
TUNABLES = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "trim_threshold=17179869184", "mmap_threshold=33554432", "top_pad=67108864")
)


def applies() -> bool:
    """Whether this system's C library takes the setting and nothing set it yet."""
    if not sys.platform.startswith("linux") or os.environ.get("RECURSIVE_JAX_HUGE_PAGES") == "off":
        return False
    library, version = platform.libc_ver()
    numbers = [int(n) for n in version.split(".")[:2] if n.isdigit()]
    return library == "glibc" and numbers >= [2, 35] and "glibc.malloc" not in os.environ.get("GLIBC_TUNABLES", "")


def restart() -> None:
    """Replaces this process by the same command with the setting; same process id, nothing has been imported yet."""
    if applies():
        before = os.environ.get("GLIBC_TUNABLES")
        os.environ["GLIBC_TUNABLES"] = f"{before}:{TUNABLES}" if before else TUNABLES
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


if __name__ == "__main__":
    print(TUNABLES)
