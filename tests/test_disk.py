"""A disk that fails at the n-th call, for every n of a small run: it is full, an fsync fails, a write is torn and the
process dies. What comes of it is one message or a kill; started again on a whole disk, the run ends with the same
bits."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from orbax.checkpoint import v1 as ocp

from recursive_jax.errors import InputError
from recursive_jax.rounds import journal
from tests.small_run import SmallRun


class Killed(BaseException):
    """The process is gone: no handler may write anything afterwards."""


class _File:
    """An open file whose writes are counted."""

    def __init__(self, file: Any, disk: Disk):
        self._file, self._disk = file, disk

    def write(self, data: Any) -> int:
        torn = lambda: (self._file.write(data[: len(data) // 2]), self._file.flush())
        self._disk.call("write", torn)
        return self._file.write(data)

    def __enter__(self):
        self._file.__enter__()
        return self

    def __exit__(self, *error):
        return self._file.__exit__(*error)

    def __iter__(self):
        return iter(self._file)

    def __getattr__(self, name):
        return getattr(self._file, name)


class Disk:
    """Counts what changes files below a folder, and fails at the n-th call. fault: `full`, `fsync` (only those are
    counted) or `torn` (half of a write is on the disk, and the process is killed)."""

    def __init__(self, folder: Path, at: int | None, fault: str):
        self.folder, self.at, self.fault, self.calls, self.dead = str(folder), at, fault, 0, False

    def call(self, kind: str, half: Any = lambda: None) -> None:
        if self.dead:
            raise Killed
        if self.fault == "fsync" and kind != "fsync":
            return
        self.calls += 1
        if self.calls != self.at:
            return
        if self.fault == "torn":
            half()
            self.dead = True
            raise Killed
        number = errno.EIO if self.fault == "fsync" else errno.ENOSPC
        raise OSError(number, os.strerror(number), self.folder)

    def mine(self, path: Any) -> bool:
        return isinstance(path, str | os.PathLike) and os.fspath(path).startswith(self.folder)

    def install(self, patch: pytest.MonkeyPatch) -> None:
        opened, replace, fsync, parquet = builtins.open, os.replace, os.fsync, pq.write_table
        save, save_async = ocp.save, ocp.training.Checkpointer.save_async

        def open_(path, mode="r", *args, **more):
            file = opened(path, mode, *args, **more)
            return _File(file, self) if self.mine(path) and set(mode) & set("wax+") else file

        def replace_(source, target):
            if self.mine(target):
                self.call("replace")
            replace(source, target)

        def fsync_(handle):
            self.call("fsync")
            fsync(handle)

        def parquet_(table, where, **more):
            torn = lambda: (parquet(table, where, **more), os.truncate(where, os.path.getsize(where) // 2))
            if self.mine(where):
                self.call("parquet", torn)
            parquet(table, where, **more)

        def orbax(function):
            def wrapped(*args, **more):
                self.call("orbax")
                return function(*args, **more)

            return wrapped

        patch.setattr(builtins, "open", open_)
        patch.setattr(io, "open", open_)
        patch.setattr(os, "replace", replace_)
        patch.setattr(os, "fsync", fsync_)
        patch.setattr(pq, "write_table", parquet_)
        patch.setattr(ocp, "save", orbax(save))
        patch.setattr(ocp.training.Checkpointer, "save_async", orbax(save_async))


@pytest.fixture(scope="module")
def small(tokenizer, mesh):
    return SmallRun(tokenizer, mesh, steps=3, rows=5, student=False)


@pytest.fixture(scope="module")
def wanted(small, tmp_path_factory):
    return small(tmp_path_factory.mktemp("whole") / "run")


def attempt(small, folder: Path, at: int | None, fault: str) -> tuple[Disk, dict | None]:
    """One run on a disk that fails at the n-th call: (the disk, its results or None)."""
    disk = Disk(folder, at, fault)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "EVERY", -1.0)
        disk.install(patch)
        try:
            return disk, small(folder / "run")
        except InputError as error:
            assert fault != "torn" and ("no space is left" in str(error) or "input/output error" in str(error)), error
        except Killed:
            assert fault == "torn"
    return disk, None


FAULTS = ("full", "fsync", "torn")


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_every_failing_call_is_survived(small, wanted, tmp_path, fault):
    """Each call fails in one of the three ways, with RECURSIVE_JAX_THOROUGH=1 in all of them."""
    healthy, found = attempt(small, tmp_path / "healthy", None, fault)
    assert found == wanted and healthy.calls > 20
    first, step = (1, 1) if os.environ.get("RECURSIVE_JAX_THOROUGH") else (1 + FAULTS.index(fault), 2 * len(FAULTS))
    for at in range(first, healthy.calls + 1, step):
        folder = tmp_path / str(at)
        folder.mkdir()
        disk, found = attempt(small, folder, at, fault)
        assert disk.calls >= at and (found is None or found == wanted), at
        with contextlib.redirect_stderr(io.StringIO()):
            assert small(folder / "run") == wanted, f"{fault} at call {at} of {healthy.calls}"
        shutil.rmtree(folder)
