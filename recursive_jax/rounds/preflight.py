"""What can be known before anything is compiled: every problem in one message, and what a run will cost."""

from __future__ import annotations

import jax
import yaml

from recursive_jax import mesh as meshes
from recursive_jax.config import Config, ModelConfig
from recursive_jax.data.language import Language
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from recursive_jax.errors import InputError, problems
from recursive_jax.models import flops
from recursive_jax.models.model import Model, mesh_problems, parameter_count, transformer_architecture
from recursive_jax.rounds.stored import load_model
from recursive_jax.rounds.world import check_data
from recursive_jax.train.step import resolve_dtype


def vocabulary(config: Config) -> int:
    """The tokenizer's size, before any text is read (a BPE is taken at its asked size)."""
    if config.base is not None:
        return resolved_model(config).vocab
    if config.data.resolved_kind == "language":
        return Language(config.data.language).vocab
    if config.data.tokenizer == "byte":
        return ByteTokenizer.vocab
    return config.data.vocab_size if config.data.tokenizer == "bpe" else FileTokenizer.open(config.data.tokenizer).vocab


def resolved_model(config: Config) -> ModelConfig:
    if config.base is not None:
        return load_model(config.base).architecture.config
    return config.model if config.model.vocab else config.model.model_copy(update={"vocab": vocabulary(config)})


def preflight(config: Config) -> None:
    """Raises one InputError with all problems of data, vocabulary, mesh and batches."""
    lines = check_data(config.data)
    mesh = None
    try:
        mesh = meshes.make_mesh(config.mesh)
    except InputError as error:
        lines.append(str(error))
    if config.base is None and (not lines or not any("tokenizer" in line for line in lines)):
        vocab = vocabulary(config)
        if config.model.vocab is not None and config.model.vocab < vocab:
            lines.append(
                f"model.vocab={config.model.vocab} is smaller than the tokenizer's {vocab} ids; leave model.vocab out"
            )
    if mesh is not None:
        if config.base is None:  # a base is checked when it is loaded
            known = resolved_model(config) if not lines else None
            lines += mesh_problems(known or config.model.model_copy(update={"vocab": config.model.vocab or 64}), mesh)
        for name, train in (("train", config.train), ("student", config.student)):
            divisor = meshes.batch_divisor(mesh) * train.accumulate
            if train.batch % divisor and not (
                name == "student" and (train.batch, train.accumulate) == (config.train.batch, config.train.accumulate)
            ):
                lines.append(
                    f"{name}.batch={train.batch} is not divisible by {divisor} (mesh.data x mesh.fsdp x accumulate)"
                )
    if lines:
        raise problems(f"this run cannot start, {len(lines)} problem(s):", lines)


def settled(config: Config, base: Model) -> Config:
    """The config with the lengths that an imported model's long context leaves open: rows of at most 256 tokens."""
    length = min(base.context, config.train.length or 256)
    fill = lambda section, **values: section.model_copy(
        update={k: v for k, v in values.items() if getattr(section, k) is None}
    )
    return config.model_copy(
        update={
            "train": fill(config.train, length=length),
            "student": fill(config.student, length=length),
            "sampling": fill(config.sampling, max_tokens=length),
        }
    )


def check_real_tokens(config: Config, have: int) -> None:
    """Anchor and fresh rows must suffice for the last round before the first one is run."""
    for name, arm in config.arms.items():
        want = arm.real_tokens(config.rounds.sizes)
        if want > have:
            raise InputError(
                f"arms.{name} (anchor={arm.anchor}, fresh={arm.fresh}, weighted={arm.weighted}) needs {want:,} real tokens over {config.rounds.count} rounds of "
                f"{', '.join(f'{n:,}' for n in dict.fromkeys(config.rounds.sizes))} tokens, there are {have:,}; raise data.tokens, give more data, or lower the shares"
            )


def dry_run(config: Config) -> str:
    """The resolved config as YAML, and parameters, memory and FLOPs."""
    model, mesh = resolved_model(config), meshes.make_mesh(config.mesh)
    dtype = resolve_dtype(config.train.dtype)
    length = config.train.length or (model.context if config.base is None else min(model.context, 256))
    per_token = flops.train_flops_per_token(model, length)
    chains = len(config.arms) * config.replicates * config.rounds.count
    teacher = config.train.steps * config.train.batch * length
    each = [config.arm_student(arm) for arm in config.arms.values()]
    written = sum(config.rounds.sizes) * config.replicates
    students = round(sum(s.steps * s.batch * (s.length or length) for s in each) * written / config.rounds.tokens)
    generated = written * len(config.arms) + (chains + 1) * config.evaluate.samples * length // 2
    if config.recipe == "finetune":
        chains, students, generated = 1, 0, 0
    memory = flops.train_memory_bytes(model, config.train, mesh.size, 2 if dtype == "bfloat16" else 4)
    total = per_token * (teacher + students) + per_token / 3 * generated
    peak = flops.peak_flops(dtype)
    seconds = total / (0.4 * peak * mesh.size) if peak else 0
    at_40 = f"; {seconds:,.0f} s at 40% of this machine's peak, before compiling and evaluating" if peak else ""
    lines = [
        yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False).rstrip(),
        "---",
        f"mesh          {' x '.join(f'{a} {n}' for a, n in mesh.shape.items())} on {mesh.size} x {jax.devices()[0].device_kind}, {dtype} compute",
        f"parameters    {parameter_count(transformer_architecture(model)):,} (vocabulary {model.vocab:,}, padded to {model.V:,})",
        f"memory        about {memory / 2**30:.2f} GiB per device while training (estimate)",
        f"training      {teacher:,} tokens for the teacher, {students:,} for {chains} students",
        f"generation    about {generated:,} tokens, samples for the evaluations included",
        f"compute       {per_token / 1e6:,.2f} MFLOP per trained token, {total / 1e12:,.2f} TFLOP in all{at_40}",
    ]
    return "\n".join(lines)
