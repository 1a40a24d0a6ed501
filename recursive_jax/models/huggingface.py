"""Hugging Face folders: `config.json` + safetensors into sharded params, and back."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from jax.sharding import Mesh
from safetensors.numpy import save_file

from recursive_jax import mesh as meshes
from recursive_jax.config import ModelConfig
from recursive_jax.errors import InputError, say
from recursive_jax.models import weights
from recursive_jax.models.families import FAMILIES, read_config, write_config
from recursive_jax.models.model import abstract_params
from recursive_jax.models.network import check_mesh, transformer_network
from recursive_jax.storage import plain_json

SHARD_BYTES = 5 * 10**9
CLASSIFIER = "ForSequenceClassification"  # end of the class names of models with a head per label


def read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path} does not exist: {what} is wanted")
    values = plain_json(path, what)
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: {what} is a mapping")
    return values


def new_folder(path: Any) -> Path:
    """The path, if nothing is there yet. Raises InputError otherwise: an export overwrites nothing."""
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"{folder} is not an empty folder; give a new one, nothing is overwritten")
    return folder


@contextlib.contextmanager
def whole_or_none(folder: Path) -> Iterator[None]:
    """What is written into a new folder stays only if all of it was: after an error the folder is gone again."""
    there = folder.exists()
    try:
        yield
    except BaseException:
        for path in folder.iterdir() if there and folder.is_dir() else [folder]:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        raise


def inside(folder: Path, name: str, where: str) -> Path:
    """A file that another file names, if it lies below the folder. Raises InputError for `../` and absolute paths: a
    folder from elsewhere opens nothing outside itself."""
    path = Path(name)
    file = folder / path
    # The hub's cache keeps a model as links from snapshots/REVISION into blobs beside it.
    home = folder.resolve().parent.parent if folder.resolve().parent.name == "snapshots" else folder.resolve()
    if path.is_absolute() or ".." in path.parts or not file.resolve().is_relative_to(home):
        raise InputError(f"{where} names {name!r}, which lies outside {folder}: only files below it are opened")
    return file


def _places(index: Path) -> dict[str, str]:
    """Tensor -> file, of an index of shards."""
    places = read_json(index, "the index of the shards").get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(f, str) and f.isprintable() and f for f in places.values()):
        raise InputError(f"{index} is damaged: weight_map is a mapping of tensors to files")
    return places


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a folder's tensors are read from."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return sorted({inside(folder, f, str(index)) for f in _places(index).values()})
    single = [p for p in (folder / "model.safetensors", *sorted(folder.glob("*.safetensors"))) if p.exists()]
    return single[:1]


class _Files:
    """The tensors of a folder's safetensors files, read one at a time from the mapped files."""

    def __init__(self, folder: Path):
        index = folder / "model.safetensors.index.json"
        files = weight_files(folder)
        if not files:
            other = sorted(p.name for p in folder.glob("*.bin"))
            hint = f"; {other[0]} is a pickle: convert it with save_pretrained(...) first" if other else ""
            raise InputError(f"{folder} has no .safetensors file{hint}")
        places = _places(index) if index.exists() else None
        missing = [f for f in files if not f.exists()]
        if missing:
            raise InputError(f"{folder}: the shard {missing[0].relative_to(folder)} named in {index.name} is missing")
        self._open = {str(f.relative_to(folder)): self._opened(f) for f in files}
        self._place = {name: f for f, handle in self._open.items() for name in handle.keys()}
        if places is not None and set(places) != set(self._place):
            odd = sorted(set(places) ^ set(self._place))[0]
            raise InputError(f"{folder}: {index.name} and the shards disagree about {odd}")

    @staticmethod
    def _opened(path: Path):
        try:
            return safetensors.safe_open(str(path), "np")
        except (safetensors.SafetensorError, OSError) as error:
            raise InputError(f"{path} is truncated or damaged: {error}") from None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {n: tuple(self._open[f].get_slice(n).get_shape()) for n, f in self._place.items()}

    def dtypes(self) -> dict[str, str]:
        return {n: self._open[f].get_slice(n).get_dtype() for n, f in self._place.items()}

    def read(self, name: str) -> np.ndarray:
        return self._open[self._place[name]].get_tensor(name)


def put_leaf(host: np.ndarray, leaf: Any) -> jax.Array:
    """A host array onto the mesh as `leaf` (ShapeDtypeStruct) says; each device takes its part."""
    return jax.make_array_from_callback(host.shape, leaf.sharding, lambda index: host[index])


def params_from(
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], np.ndarray],
    mesh: Mesh,
    dtype: str,
    where: str,
    dtypes: Mapping[str, str] | None = None,
) -> tuple[ModelConfig, Any]:
    """(config, params) from the tensors of one file format under Hugging Face names. dtypes: of the tensors, as
    safetensors calls them.

    The config comes back without its output head when the file holds a bare encoder, and untied where the file has a
    head of its own that differs from the embedding, whatever the config says (as `transformers` 5 reads it).
    """
    family = FAMILIES[config.family]
    files = weights.names_without_prefix(family, shapes)
    if config.head == "transform" and family.names["head_dense"].file not in files:
        config = config.model_copy(update={"head": "none", "head_bias": False})
    if config.tied and config.head not in ("none", "score"):
        config = _untied(config, [files.get(family.names[n].file) for n in ("head", "embedding")], shapes, read, where)
    check_mesh(transformer_network(config), mesh)
    abstract = abstract_params(transformer_network(config), mesh)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), sharding=x.sharding), abstract)
    kinds = {n: dtypes[f] for n, f in files.items()} if dtypes else None
    weights.check(config, family, target, {n: shapes[f] for n, f in files.items()}, where, kinds)
    return config, weights.assemble(config, family, target, lambda n: read(files[n]), put_leaf)


def _untied(config: ModelConfig, tensors: list[str | None], shapes: Mapping, read: Callable, where: str) -> ModelConfig:
    """The config with `tied` as the file has it: a head that differs from the embedding is kept."""
    head, table = tensors
    if head is None or table is None or shapes[head] != shapes[table] or np.array_equal(read(head), read(table)):
        return config
    say(f"{where}: its config says that output and embedding are one matrix, its file has two: the file is right")
    return config.model_copy(update={"tied": False})


def folder_config(folder: Path) -> ModelConfig:
    """What its `config.json` says; the weights need not be there. Errors as `read_huggingface`."""
    where = folder / "config.json"
    values = read_json(where, "the model's config")
    config = read_config(values, str(where))
    if any(str(name).endswith(CLASSIFIER) for name in values.get("architectures") or ()):
        config = config.model_copy(update={"head": "score", "head_bias": False})
        _check_labels(config, values, str(where))
    return config


def read_huggingface(folder: Path, mesh: Mesh, dtype: str = "float32") -> tuple[ModelConfig, Any]:
    """(config, params on the mesh) of a folder with `config.json` and safetensors, single or sharded, in any float
    type.

    Raises InputError naming the key, tensor or file that is unknown, missing, unexpected, misshapen or damaged.
    """
    config = folder_config(folder)
    files = _Files(folder)
    return params_from(config, files.shapes(), files.read, mesh, dtype, str(folder), files.dtypes())


def _check_labels(config: ModelConfig, values: Mapping[str, Any], where: str) -> None:
    """Raises InputError for a classifier that is no reward model: of several labels, or an encoder's."""
    labels = len(values["id2label"]) if isinstance(values.get("id2label"), dict) else values.get("num_labels", 2)
    if labels != 1:
        raise InputError(f"{where}: a classifier with {labels} labels; of these, reward models (one label) are read")
    if "score" not in FAMILIES[config.family].names:
        raise InputError(f"{where}: {values['architectures'][0]} pools its states in a way that is not supported")


def write_huggingface(
    folder: Path, config: ModelConfig, params: Any, extra: Mapping[str, Any], dtype: str = "float32"
) -> None:
    """`config.json` and safetensors of at most 5 GB each. extra: token ids for the config. Collective over
    processes."""
    shown = config.model_copy(update={"head": "plain"}) if config.head == "score" else config
    values = write_config(shown) | {"dtype": dtype, "torch_dtype": dtype, **extra}
    family = FAMILIES[values["model_type"]]
    if config.head == "none":
        values["architectures"] = [family.architecture.replace("ForMaskedLM", "Model").replace("ForCausalLM", "Model")]
    if config.head == "score":
        if "score" not in family.names:
            raise InputError(f"transformers reads no reward models of the kind {values['model_type']}")
        name = family.architecture.removesuffix("ForCausalLM").removesuffix("LMHeadModel") + CLASSIFIER
        values |= {"architectures": [name], "num_labels": 1}
        values |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    folder.mkdir(parents=True, exist_ok=True)
    params = meshes.fetch(params)
    kind = jnp.dtype(dtype)
    shards: list[dict[str, np.ndarray]] = [{}]
    size = 0
    for name, make in weights.tensors(config, family, params):
        array = np.ascontiguousarray(make().astype(kind))
        if size + array.nbytes > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    total = sum(a.nbytes for shard in shards for a in shard.values())
    if meshes.is_main():
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        if len(shards) == 1:
            save_file(shards[0], folder / "model.safetensors", metadata={"format": "pt"})
        else:
            files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
            for file, shard in zip(files, shards, strict=True):
                save_file(shard, folder / file, metadata={"format": "pt"})
            places = {n: f for f, shard in zip(files, shards, strict=True) for n in shard}
            index = {"metadata": {"total_size": total}, "weight_map": places}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    meshes.barrier("export")
