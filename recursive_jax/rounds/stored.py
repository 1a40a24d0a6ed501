"""Models on disk: `checkpoint/` (Orbax) beside `model.json` (architecture and tokenizer)."""

from __future__ import annotations

from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from recursive_jax import mesh as meshes
from recursive_jax.config import LoraConfig, ModelConfig
from recursive_jax.data.tokenizers import tokenizer_from_json
from recursive_jax.errors import InputError
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model, abstract_params, check_mesh, transformer_architecture
from recursive_jax.rounds import storage
from recursive_jax.rounds.exchange import foreign_path, import_model
from recursive_jax.train import checkpoint


def write_model(folder: Any, model: Model) -> None:
    """Stores params, architecture and tokenizer; of an adapted model the adapter, with the name of its base.
    Collective over processes."""
    folder = epath.Path(folder)
    config, lora = model.architecture.config, model.architecture.lora
    described = {
        "architecture": model.architecture.name,
        "config": None if config is None else config.model_dump(),
        "vocab": model.vocab,
        "context": model.context,
        "tokenizer": model.tokenizer.to_json(),
    }
    if lora is not None:
        described |= {
            "lora": lora.model_dump(),
            "base": {"source": model.source, "fingerprint": model.base_fingerprint},
        }
    meshes.on_main(lambda: storage.write_json(folder / "model.json", described))
    checkpoint.save(folder / "checkpoint", model.params if lora is None else model.params["lora"])


def load_stored_model(folder: Any, like: Model) -> Model:
    """The params in `folder` for the architecture, tokenizer and mesh of `like`; an adapter goes onto the base that
    `like` holds."""
    path = epath.Path(folder) / "checkpoint"
    if like.architecture.lora is None:
        return like.with_params(checkpoint.load(path, abstract_params(like.architecture, like.mesh)))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like.params["lora"])
    return like.with_params({**like.params, "lora": checkpoint.load(path, target)})


def load_model(path: Any, mesh: Mesh | None = None, dtype: str = "float32") -> Model:
    """Opens a model on any mesh. path: the folder of a training, of a round, or a whole run (then the last round's
    model of its first arm); a Hugging Face folder; a GGUF file; or `smollm2` and `minilm`, where their packages are
    installed. dtype: of the params of an imported model.

    Raises InputError if there is none, or it is damaged, does not fit together, or belongs to user functions.
    """
    foreign = foreign_path(path)
    if foreign is not None:
        return import_model(foreign, mesh, dtype)
    folder = find_model(epath.Path(path))
    described = storage.read_json(folder / "model.json", "the model description")
    if described["config"] is None:
        raise InputError(
            f"{folder} holds a model of user functions ({described['architecture']}); load it through its own run"
        )
    manifest = folder / "manifest.json"
    if manifest.exists():
        stored = storage.read_json(manifest, "the manifest")
        storage.verify(folder, stored.get("files", {}))
    architecture = transformer_architecture(ModelConfig(**described["config"]))
    mesh = mesh or meshes.make_mesh()
    check_mesh(architecture.config, mesh)
    model = Model(architecture, tokenizer_from_json(described["tokenizer"]), mesh=mesh, source=str(folder.resolve()))
    if described.get("lora"):
        model = _adapted_base(described, model, folder)
    loaded = load_stored_model(folder, model)
    if manifest.exists():
        return loaded.with_params(loaded.params, stored["fingerprint"])
    imported = folder / "source.json"  # what `import` leaves
    mark = storage.read_json(imported, "the origin")["fingerprint"] if imported.exists() else ""
    return loaded.with_params(loaded.params, mark)


def _adapted_base(described: dict[str, Any], model: Model, folder: epath.Path) -> Model:
    """The base of a stored adapter with a fresh adapter on it. Raises InputError if the base is gone or another."""
    base = described["base"]
    try:
        found = load_model(base["source"], model.mesh)
    except InputError as error:
        raise InputError(f"{folder} is an adapter of {base['source']}, which cannot be loaded: {error}") from None
    if found.fingerprint != base["fingerprint"]:
        raise InputError(f"{folder} is an adapter of {base['source']}, but other weights lie there now")
    return adapted_model(found, LoraConfig(**described["lora"]))


def find_model(path: epath.Path) -> epath.Path:
    """The folder of the model that `path` means: itself, or the last round's of the first chain in a run or round."""
    if not path.exists():
        raise InputError(f"model {path} does not exist")
    if (path / "model.json").exists():
        return path
    if (path / "run.json").exists():
        from recursive_jax.rounds.lineage import manifests

        trained = [m for m in manifests(path) if m["verb"] == "train"]
        chain = [(m["arm"], m["replicate"]) for m in trained if m["round"] > 0][:1]
        found = [m for m in trained if not chain or (m["arm"], m["replicate"]) == chain[0]]
        if found:
            return path / found[-1]["path"]
    inside = sorted(path.glob("*/model.json")) or sorted(path.glob("rounds/*/*/model.json"))
    if not inside:
        raise InputError(f"there is no stored model in {path} (no model.json)")
    return inside[-1].parent


def model_name(path: Any) -> str:
    """The folder or file that `path` means, as text."""
    return str(foreign_path(path) or find_model(epath.Path(path)))
