"""LinkBERT as other tools read it: a BERT with its pooler and the head of its relations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from recursive_jax import mesh as meshes
from recursive_jax.data.links import RELATIONS
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.rounds.writing import save_huggingface


def save_linkbert(model: Model, extra: Any, path: Any) -> Path:
    """Writes a folder that `transformers` opens as `BertForPreTraining`, with three relations in place of two (widen
    its `seq_relationship` before its weights are loaded). extra: the trained extra params. Raises InputError as
    `save_huggingface` does, and for a model that is no BERT."""
    folder = save_huggingface(model, path)
    config = json.loads((folder / "config.json").read_text())
    if config["model_type"] != "bert":
        raise InputError(f"relations are exported with a BERT, and this model is written as {config['model_type']}")
    extra = {k: np.asarray(meshes.fetch(v), np.float32) for k, v in extra.items()}

    def write() -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors |= {
            "bert.pooler.dense.weight": np.ascontiguousarray(extra["pooler"].T),
            "bert.pooler.dense.bias": extra["pooler_bias"],
            "cls.seq_relationship.weight": np.ascontiguousarray(extra["relation"].T),
            "cls.seq_relationship.bias": extra["relation_bias"],
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        relations = config | {"architectures": ["BertForPreTraining"], "relations": list(RELATIONS)}
        (folder / "config.json").write_text(json.dumps(relations, indent=2))

    meshes.on_main(write)
    return folder
