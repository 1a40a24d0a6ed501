"""Models on disk: `checkpoint/` (Orbax) beside `model.json` (network and tokenizer); and folders that other tools
read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from etils import epath

from recursive_jax import mesh as meshes
from recursive_jax import storage
from recursive_jax.data.tokenizer_files import token_ids, write_tokenizer
from recursive_jax.errors import InputError, machine_errors
from recursive_jax.models.huggingface import new_folder, whole_or_none, write_huggingface
from recursive_jax.models.model import Model, parameter_count
from recursive_jax.models.network import TransformerNetwork
from recursive_jax.train import checkpoint


def write_model(folder: Any, model: Model) -> None:
    """Stores params, network and tokenizer; of an adapted model the adapter, with the name of its base. Collective over
    processes."""
    folder = epath.Path(folder)
    described = {
        "kind": model.network.kind,
        "network": model.network.store(),
        "vocab": model.vocab,
        "max_length": model.max_length,
        "tokenizer": model.tokenizer.to_json(),
    }
    if model.sampling:
        described["sampling"] = model.sampling
    if model.network.frozen:
        described["base"] = {"source": model.base_source, "fingerprint": model.base_fingerprint}
    meshes.on_main(lambda: storage.write_json(folder / "model.json", described))
    checkpoint.save(folder / "checkpoint", model.params["lora"] if model.network.frozen else model.params)


def save_huggingface(model: Model, path: Any, dtype: str = "float32") -> Path:
    """Writes `config.json`, safetensors and the tokenizer so that `transformers` 4.57 and 5 (and what reads their
    folders: vLLM, llama.cpp's converter) load the model with equal logits. An adapter is merged into its base.

    dtype: float32, bfloat16 or float16. Raises InputError for a folder that is not empty, for a network that no Hugging
    Face family is, and for switches that none has. Collective over processes."""
    folder = Path(path)
    if not isinstance(model.network, TransformerNetwork):
        raise InputError(f"a network of kind {model.network.kind} has no Hugging Face form")
    if model.params is None:
        raise InputError("this model has no params to export: train it or load one")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype={dtype!r}: float32, bfloat16 or float16 is wanted")
    new_folder(folder)
    model = model.merged()
    config = model.network.config
    mask = getattr(model.tokenizer, "mask", None)
    if mask is None and model.tokenizer is not None and model.vocab == model.tokenizer.vocab + 1:
        mask = model.tokenizer.vocab  # the one id that a model has beyond its tokenizer's hides tokens
    with machine_errors(None), whole_or_none(folder):
        write_huggingface(folder, config, model.params, token_ids(model.tokenizer), dtype)
        meshes.on_main(lambda: write_tokenizer(folder, model.tokenizer, config.max_length, mask))
    return folder


def describe_model(model: Model) -> str:
    """One line about a model, for the command line."""
    return f"{model.network.summary()}, {parameter_count(model.network):,} parameters"


def save_imported(model: Model, folder: Path) -> None:
    """Stores a model in the project's own form, so that runs start from it and no conversion is needed again. Its
    manifest says what it is of, with the checksum of every file."""
    new_folder(folder)

    def commit() -> None:
        storage.sync_tree(folder)
        manifest = {"verb": "import", "fingerprint": model.fingerprint, "source": model.source}
        storage.write_json(folder / "manifest.json", {**manifest, "files": storage.describe(epath.Path(folder))})

    with machine_errors(None), whole_or_none(folder):
        meshes.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        write_model(folder, model)
        meshes.on_main(commit)
