"""Orbax behind one small file: explicit policies, strict restore with a readable difference, any mesh to any mesh.

Orbax's formats do not find a flipped bit in the weights; the checksums here do: of a committed checkpoint in the
manifest of its folder, of one in flight in its seal."""

from __future__ import annotations

import logging
import shutil
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from recursive_jax import mesh as meshes
from recursive_jax import storage
from recursive_jax.errors import InputError, explain, problems, say

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax narrates; errors it raises too

_SEAL = "seal.json"

_copy = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))


def save(path: str | Path, tree: Any) -> None:
    """Writes a pytree of arrays; the folder appears whole or not at all. Collective over processes."""
    ocp.save(str(epath.Path(path).resolve()), tree, overwrite=True)


def load(path: str | Path, target: Any) -> Any:
    """Restores into `target` (ShapeDtypeStructs with shardings, of any mesh). Strict: every leaf must be there with
    its shape, and nothing else. Raises InputError naming the leaves that differ, or the damaged file."""
    path = epath.Path(path)
    if not path.is_dir():
        raise InputError(f"checkpoint {path} does not exist")
    path = path.resolve()
    try:
        stored = ocp.metadata(str(path)).metadata
    except Exception as error:  # Orbax raises many kinds on a damaged folder
        raise _unreadable(path, error) from None
    _compare(path, stored, target)
    try:
        return ocp.load(str(path), target)
    except Exception as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Any, error: Exception) -> InputError:
    """Limits of the machine are said as such; whatever else Orbax runs into is a damaged checkpoint."""
    told = explain(error)
    first = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return InputError(f"checkpoint {path} cannot be read: {told}" if told else f"checkpoint {path} is damaged: {first}")


def _leaves(tree: Any) -> dict[str, Any]:
    """Leaf path -> leaf, with paths that read alike for dicts, namedtuples (stored as mappings) and lists."""
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [str(getattr(p, "key", getattr(p, "name", getattr(p, "idx", p)))) for p in path]
        found["/".join(parts)] = leaf
    return found


def _compare(path: Any, stored: Any, target: Any) -> None:
    have, want = _leaves(stored), _leaves(target)
    lines = [f"missing: {k} {tuple(want[k].shape)}" for k in want if k not in have]
    lines += [f"not expected: {k} {tuple(have[k].shape)}" for k in have if k not in want]
    lines += [
        f"{k}: stored {tuple(have[k].shape)}, expected {tuple(want[k].shape)}"
        for k in want
        if k in have and tuple(have[k].shape) != tuple(want[k].shape)
    ]
    if lines:
        raise problems(f"checkpoint {path} does not fit the model:", lines)


class Resume:
    """In-flight checkpoints of one training: the newest two whole train states, written in the background.

    Each has a seal, written when all of it is on the disk: the checksums of its files, and `mark`, which names the
    training. What is not sealed or not as its seal says is never read: the one before it is, and that is said. Raises
    InputError where checkpoints of another training lie in the directory."""

    def __init__(self, directory: str | Path, mark: str):
        self._directory, self._mark = epath.Path(directory).resolve(), mark
        self._sealing: threading.Thread | None = None
        self._failed: BaseException | None = None
        meshes.on_main(self._drop_damaged)
        policies = ocp.training.save_decision_policies, ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            str(self._directory),
            save_decision_policy=policies[0].FixedIntervalPolicy(1),  # the loop decides; a save it asks for happens
            preservation_policy=policies[1].LatestN(2),
        )

    def _drop_damaged(self) -> None:
        """Removes checkpoints from the newest back to the first that is whole: what is damaged is of no use."""
        for step in sorted((int(p.name) for p in self._directory.glob("[0-9]*") if p.name.isdigit()), reverse=True):
            folder = self._directory / str(step)
            try:
                seal = storage.read_json(folder / _SEAL, "the seal")
                storage.verify(folder, seal.get("files"), _SEAL)
            except FileNotFoundError:
                say(f"{folder} was not written to its end; the training goes on from before it")
            except storage.Damaged as error:
                say(f"{error.what}; the training goes on from before step {step}")
            else:
                if seal.get("mark") != self._mark:
                    raise InputError(
                        f"{folder} is of another training: delete {self._directory} to train anew, or give another "
                        "directory"
                    )
                return
            shutil.rmtree(folder)

    @property
    def latest(self) -> int | None:
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Copies the state on the device, then writes it in the background: the caller may donate its own."""
        self._sealed()
        if self.latest == step:
            return
        response = self._checkpointer.save_async(step, _copy(state))
        if response is not None:
            self._sealing = threading.Thread(target=self._seal, args=(step, response))
            self._sealing.start()
        if wait:
            self._sealed()

    def _seal(self, step: int, response: Any) -> None:
        """Waits until the checkpoint is written, and says what it is."""
        try:
            response.result()
            if meshes.is_main():
                folder = self._directory / str(step)
                storage.sync_tree(folder)
                storage.write_json(folder / _SEAL, {"mark": self._mark, "files": storage.describe(folder)})
        except BaseException as error:
            self._failed = error

    def _sealed(self) -> None:
        """Waits for the checkpoint in work, and raises what went wrong with it, on every process."""
        if self._sealing is None:
            return
        self._sealing.join()
        self._sealing, failed, self._failed = None, self._failed, None

        def told() -> None:
            if failed is not None:
                raise failed

        meshes.on_main(told)
        told()

    def load(self, step: int, target: Any) -> Any:
        """The state of a step, as `target` says. Raises InputError where it does not fit."""
        try:
            return self._checkpointer.load(step, target)
        except Exception as error:
            raise _unreadable(self._directory / str(step), error) from None

    def close(self) -> None:
        try:
            self._sealed()
        finally:
            self._checkpointer.close()
