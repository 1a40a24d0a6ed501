"""Boundary values: one row, one step, one token, one layer, one head. Every numeric key at its bounds, and at 1, gives
a result or one message."""

from __future__ import annotations

import annotated_types
import jax
import numpy as np
import pydantic
import pytest

from recursive_jax.config import LoraConfig, ModelConfig, SamplingConfig, TrainConfig
from recursive_jax.data.dataset import real_rows
from recursive_jax.errors import InputError, TrainingDiverged
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import Request
from recursive_jax.models.lora import adapted_model
from recursive_jax.models.model import transformer
from recursive_jax.train.loop import train

TRAIN = {"steps": 2, "batch": 2, "tensorboard": False}
MODEL = {"layers": 1, "d_model": 8, "heads": 2, "max_length": 16}
SAMPLING = {"batch": 2, "max_tokens": 4}


def corners(section: type[pydantic.BaseModel]) -> list[tuple[str, float]]:
    """(key, value) of every numeric key: its bounds (just inside of them where they are open), and 1."""
    found = []
    for name, field in section.model_fields.items():
        kinds = {k for k in (int, float) if k in (field.annotation, *getattr(field.annotation, "__args__", ()))}
        if not kinds:
            continue
        kind = min(kinds, key=lambda k: k is float)
        step = 1 if kind is int else 1e-3
        values = {kind(1)}
        for bound in field.metadata:
            for found_in, of, inside in (
                (annotated_types.Ge, "ge", 0),
                (annotated_types.Gt, "gt", step),
                (annotated_types.Lt, "lt", -step),
            ):
                if isinstance(bound, found_in):
                    values.add(kind(getattr(bound, of) + inside))
            if isinstance(bound, annotated_types.Le) and bound.le <= 64:
                values.add(kind(bound.le))
        found += [(name, value) for value in sorted(values)]
    return found


@pytest.fixture(autouse=True)
def few_programs():
    """Every corner compiles anew: a process may map only so many pieces of memory."""
    yield
    jax.clear_caches()


def rows(count: int = 3):
    return real_rows([[5, 6, 7], [8, 9], [4]][:count], ["a", "b", "c"][:count])


def attempt(run) -> None:
    """A result, or one message."""
    try:
        run()
    except (InputError, pydantic.ValidationError, TrainingDiverged):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("key, value", corners(TrainConfig))
def test_train(tokenizer, mesh, key, value):
    model = transformer(ModelConfig(**MODEL), tokenizer, mesh)
    attempt(lambda: train(model, rows(), config=TrainConfig(**{**TRAIN, key: value}), quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("key, value", corners(SamplingConfig))
def test_sampling(tokenizer, mesh, key, value):
    model = transformer(ModelConfig(**MODEL), tokenizer, mesh).initialized(0)
    requests = [Request(0, np.array([], np.int32)), Request(1, np.array([5], np.int32))]
    attempt(lambda: generate(model, requests, SamplingConfig(**{**SAMPLING, key: value})))


@pytest.mark.slow
@pytest.mark.parametrize("key, value", [c for c in corners(ModelConfig) if isinstance(c[1], int)])
def test_model(tokenizer, mesh, key, value):
    def run():
        model = transformer(ModelConfig(**{**MODEL, key: value}), tokenizer, mesh)
        trained = train(model, rows(), config=TrainConfig(**TRAIN), quiet=True).model
        generate(trained, [Request(0, np.array([], np.int32))], SamplingConfig(**SAMPLING))

    attempt(run)


@pytest.mark.slow
@pytest.mark.parametrize("key, value", corners(LoraConfig))
def test_lora(tokenizer, mesh, key, value):
    base = transformer(ModelConfig(**MODEL), tokenizer, mesh).initialized(0)
    adapt = lambda: adapted_model(base, LoraConfig(**{"rank": 2, key: value}))
    attempt(lambda: train(adapt(), rows(), config=TrainConfig(**TRAIN), quiet=True))


@pytest.mark.slow
@pytest.mark.parametrize("count, batch, accumulation", [(1, 1, 1), (1, 2, 2), (3, 1, 1), (2, 4, 4), (1, 4, 2)])
def test_one_row_and_one_row_each(tokenizer, mesh, count, batch, accumulation):
    model = transformer(ModelConfig(**MODEL), tokenizer, mesh)
    config = TrainConfig(**{**TRAIN, "steps": 1, "batch": batch, "gradient_accumulation": accumulation})
    assert np.isfinite(train(model, rows(count), config=config, quiet=True).summary["loss"])
