"""Evaluating one stored model outside a run."""

from __future__ import annotations

from typing import Any

from recursive_jax.collapse.measure import Yardstick, measure
from recursive_jax.data.dataset import real_rows
from recursive_jax.data.sources import World, documents, held_out_blocks
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import unconditional
from recursive_jax.mesh import make_mesh
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.options import EvaluateOptions


def evaluate_model(path: Any, config: EvaluateOptions, judge: Any = None) -> dict[str, Any]:
    """The metrics of `measure` for a stored model: real rows from config.data, samples from the start token. judge: the
    model that says how probable they are, by default the model itself."""
    model = load_model(path, make_mesh(config.mesh))
    judge_model = load_model(judge, model.mesh) if judge is not None else model
    language = getattr(model.tokenizer, "language", None)
    if config.data.path is not None:
        real = held_out_blocks(
            list(documents(config.data, config.data.path)), model.tokenizer, model.max_length, config.data
        )
        world = World(model.tokenizer, real, real)
    elif language is not None:
        rows = [r[: model.max_length] for r in language.sample(2, 0, config.evaluate.rows)]
        real = real_rows(rows, [model.tokenizer.decode(r) for r in rows])
        world = World(model.tokenizer, real, real, language)
    else:
        raise InputError(f"{path} was not trained on the embedded language; give real text with --data PATH")
    yardstick = Yardstick.of(world, judge_model, config.evaluate)
    samples = generate(model, unconditional(config.evaluate.samples), config.sampling, seed=config.seed)
    return measure(model, samples, yardstick, config.evaluate)
