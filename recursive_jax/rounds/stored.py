"""Models on disk: `checkpoint/` (Orbax) beside `model.json` (architecture and tokenizer)."""

from __future__ import annotations

from typing import Any

from etils import epath
from jax.sharding import Mesh

from recursive_jax import mesh as meshes
from recursive_jax.config import ModelConfig
from recursive_jax.data.tokenizers import tokenizer_from_json
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model, abstract_params, check_mesh, transformer_architecture
from recursive_jax.rounds import storage
from recursive_jax.train import checkpoint


def write_model(folder: Any, model: Model) -> None:
    """Stores params, architecture and tokenizer. Collective over processes."""
    folder = epath.Path(folder)
    if meshes.is_main():
        config = model.architecture.config
        storage.write_json(folder / "model.json", {
            "architecture": model.architecture.name, "config": None if config is None else config.model_dump(),
            "vocab": model.vocab, "context": model.context, "tokenizer": model.tokenizer.to_json(),
        })
    checkpoint.save(folder / "checkpoint", model.params)


def load_stored_model(folder: Any, like: Model) -> Model:
    """The params in `folder` for the architecture, tokenizer and mesh of `like`."""
    target = abstract_params(like.architecture, like.mesh)
    return like.with_params(checkpoint.load(epath.Path(folder) / "checkpoint", target))


def load_model(path: Any, mesh: Mesh | None = None) -> Model:
    """Opens a stored model on any mesh: the folder of a training, of a round, or a whole run (then the last round's
    model of its first arm). Raises InputError if there is none, or it is damaged, or belongs to user functions."""
    folder = find_model(epath.Path(path))
    described = storage.read_json(folder / "model.json", "the model description")
    if described["config"] is None:
        raise InputError(f"{folder} holds a model of user functions ({described['architecture']}); load it through its own run")
    manifest = folder / "manifest.json"
    if manifest.exists():
        stored = storage.read_json(manifest, "the manifest")
        storage.verify(folder, stored.get("files", {}))
    architecture = transformer_architecture(ModelConfig(**described["config"]))
    mesh = mesh or meshes.make_mesh()
    check_mesh(architecture.config, mesh)
    model = Model(architecture, tokenizer_from_json(described["tokenizer"]), mesh=mesh)
    loaded = load_stored_model(folder, model)
    return loaded.with_params(loaded.params, stored["fingerprint"] if manifest.exists() else "")


def find_model(path: epath.Path) -> epath.Path:
    if not path.exists():
        raise InputError(f"model {path} does not exist")
    if (path / "model.json").exists():
        return path
    found = sorted(path.glob("rounds/*/*/model.json")) or sorted(path.glob("*/model.json"))
    if not found or found[-1].parent.parent.name == "0000":
        arms = sorted(path.glob("*/rounds/*/*/model.json")) + sorted(path.glob("*/replicate-0/rounds/*/*/model.json"))
        if arms:
            first_arm = arms[0].relative_to(path).parts[0]
            found = [f for f in arms if f.relative_to(path).parts[0] == first_arm]
    if not found:
        raise InputError(f"there is no stored model in {path} (no model.json)")
    return found[-1].parent
