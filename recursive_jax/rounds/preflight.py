"""What can be known before anything is compiled: problems, as lines for one message, and what a training will cost."""

from __future__ import annotations

import jax

from recursive_jax import mesh as meshes
from recursive_jax.config import DataConfig, MeshConfig, ModelConfig, TrainConfig, row_length
from recursive_jax.data.language import Language
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from recursive_jax.errors import InputError
from recursive_jax.models import flops
from recursive_jax.models.model import parameter_count
from recursive_jax.models.network import Network, TransformerNetwork


def vocabulary(data: DataConfig) -> int:
    """The tokenizer's size, before any text is read (a BPE is taken at its asked size)."""
    if data.resolved_kind == "language":
        return Language(data.language).vocab
    if data.tokenizer == "byte":
        return ByteTokenizer.vocab
    return data.vocab_size if data.tokenizer == "bpe" else FileTokenizer.open(data.tokenizer).vocab


def with_vocabulary(model: ModelConfig, data: DataConfig) -> ModelConfig:
    return model if model.vocab else model.model_copy(update={"vocab": vocabulary(data)})


def model_problems(model: ModelConfig, data: DataConfig) -> list[str]:
    try:
        vocab = vocabulary(data)
    except InputError as error:
        return [str(error)]
    if model.vocab is not None and model.vocab < vocab:
        return [f"model.vocab={model.vocab} is smaller than the tokenizer's {vocab} ids; leave model.vocab out"]
    return []


def mesh_problems(network: Network, mesh: MeshConfig) -> list[str]:
    try:
        return network.mesh_problems(meshes.make_mesh(mesh))
    except InputError:
        return []  # said by `mesh_config_problems`


def batch_problems(mesh: MeshConfig, **trainings: TrainConfig) -> list[str]:
    """Batches that the mesh and the micro-batches do not divide."""
    try:
        shards = meshes.batch_divisor(meshes.make_mesh(mesh))
    except InputError:
        return []
    lines, seen = [], set()
    for name, train in trainings.items():
        divisor = shards * train.gradient_accumulation
        if train.batch % divisor and (train.batch, divisor) not in seen:
            lines.append(
                f"{name}.batch={train.batch} is not divisible by {divisor} (mesh.data x mesh.fsdp x "
                "gradient_accumulation)"
            )
        seen.add((train.batch, divisor))
    return lines


def training_cost(
    network: Network, train: TrainConfig, mesh, trained: int | None = None, generated: int = 0, what: str = ""
) -> list[str]:
    """Mesh, parameters, memory and compute, as lines. trained, generated: tokens (default: one training's); what: a
    line about them."""
    length = row_length(train.length, network.max_length)
    trained = train.steps * train.batch * length if trained is None else trained
    dtype = meshes.resolve_dtype(train.dtype, mesh)
    axes = " x ".join(f"{a} {n}" for a, n in mesh.shape.items())
    lines = [f"mesh          {axes} on {mesh.size} x {jax.devices()[0].device_kind}, {dtype} compute"]
    padded = f" (vocabulary {network.vocab:,}, padded to {network.padded_vocab:,})" if network.vocab else ""
    parameters = parameter_count(network)
    lines.append(f"parameters    {parameters:,}{padded}")
    if isinstance(network, TransformerNetwork):
        memory = flops.train_memory_bytes(network.config, train, parameters, mesh.size, 2 if dtype == "bfloat16" else 4)
        lines.append(f"memory        about {memory / 2**30:.2f} GiB per device while training (estimate)")
    lines.append(f"training      {what or f'{trained:,} tokens'}")
    if generated:
        lines.append(f"generation    about {generated:,} tokens, samples for the evaluations included")
    per_token = network.train_flops_per_token(length)
    if per_token is not None:
        total = per_token * trained + per_token / 3 * generated
        peak = flops.peak_flops(dtype)
        seconds = total / (0.4 * peak * mesh.size) if peak else 0
        at_40 = f"; {seconds:,.0f} s at 40% of this machine's peak, before compiling and evaluating" if peak else ""
        lines.append(
            f"compute       {per_token / 1e6:,.2f} MFLOP per trained token, {total / 1e12:,.2f} TFLOP in all{at_40}"
        )
    return lines
