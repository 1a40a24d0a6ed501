"""Orbax behind one small file: explicit policies, strict restore with a readable difference, any mesh to any mesh."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from recursive_jax.errors import InputError, problems

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save at INFO and WARNING

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
        raise InputError(f"checkpoint {path} is damaged: {_first_line(error)}") from None
    _compare(path, stored, target)
    try:
        return ocp.load(str(path), target)
    except Exception as error:
        raise InputError(f"checkpoint {path} is damaged: {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


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
    """In-flight checkpoints of one training: the newest two whole train states, written in the background."""

    def __init__(self, directory: str | Path):
        policies = ocp.training.save_decision_policies, ocp.training.preservation_policies
        self._checkpointer = ocp.training.Checkpointer(
            str(epath.Path(directory).resolve()),
            save_decision_policy=policies[0].FixedIntervalPolicy(1),  # the loop decides; a save it asks for happens
            preservation_policy=policies[1].LatestN(2),
        )
        self._directory = directory

    @property
    def latest(self) -> int | None:
        newest = self._checkpointer.latest
        return None if newest is None else int(newest.step)

    def save(self, step: int, state: Any, wait: bool = False) -> None:
        """Copies the state on the device, then writes it in the background: the caller may donate its own."""
        if self.latest == step:
            return
        response = self._checkpointer.save_async(step, _copy(state))
        if wait and response is not None:
            response.result()

    def load(self, step: int, target: Any) -> Any:
        try:
            return self._checkpointer.load(step, target)
        except Exception as error:
            raise InputError(
                f"checkpoint {self._directory}/{step} is damaged: {_first_line(error)}; "
                "delete that folder to go on from the checkpoint before it"
            ) from None

    def close(self) -> None:
        self._checkpointer.close()
