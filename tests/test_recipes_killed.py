"""Recipes that are stopped again and again end as those that were not: the same rows, the same numbers, nothing asked
or made twice."""

from __future__ import annotations

import json
import random

import pytest

from recursive_jax.recipes import run
from recursive_jax.rounds import durable
from tests.openai_server import Server, running
from tests.test_recipes import base as reckoner  # noqa: F401 (a fixture)
from tests.test_recipes import sums
from tests.test_recipes_teachers import MORE, base, broad, config_of, narrow_config, teacher  # noqa: F401

pytestmark = pytest.mark.slow


class Stopped(BaseException):
    """As a kill: nothing catches it."""


def stopped_and_gone_on(config, folder, monkeypatch, seed, stops=6):
    """Runs to the end with a stop behind each few commits, or in the middle of a result."""
    rng, whole = random.Random(seed), durable.DurableFolder.durable
    left = [rng.randint(1, 5)]

    def durably(self, verb, name, inputs, settings, number, produce, read, *more):
        def half(path):
            if left[0] == 0:
                left[0] = -1
                raise Stopped
            left[0] -= 1
            return produce(path)

        return whole(self, verb, name, inputs, settings, number, half, read, *more)

    with monkeypatch.context() as patch:
        patch.setattr(durable.DurableFolder, "durable", durably)
        for _ in range(stops):
            left[0] = rng.randint(1, 5)
            try:
                return run(config, folder, quiet=True)
            except Stopped:
                continue
    return run(config, folder, quiet=True)


def committed(folder):
    """path -> fingerprint and counts of every result; those of speeds apart, whose numbers are a clock's."""
    found = {}
    for path in folder.rglob("manifest.json"):
        m = json.loads(path.read_text())
        if not m["name"].startswith("speed"):
            files = {k: v for k, v in m["files"].items() if k.startswith(("rows", "metrics"))}
            found[str(path.relative_to(folder))] = (m["fingerprint"], files)
    return found


@pytest.mark.parametrize("recipe", ["alpaca", "baize", "broad_to_narrow"])
def test_a_recipe_with_a_teacher(recipe, base, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with running(Server(write=broad if recipe == "broad_to_narrow" else teacher)) as server:
        if recipe == "broad_to_narrow":
            config = narrow_config(tmp_path / "task", server.url, rows=16)
            config = config.model_copy(update={"train": config.train.model_copy(update={"steps": 4})})
        else:
            url = f"openai:test-model@{server.url}"
            config = config_of(recipe, base, tmp_path / "task", teacher=url, **MORE[recipe])
        run(config, tmp_path / "whole", quiet=True)
        asked = len(server.asked)
        stopped_and_gone_on(config, tmp_path / "stopped", monkeypatch, recipe)
        assert len(server.asked) == 2 * asked
    assert committed(tmp_path / "stopped") == committed(tmp_path / "whole")


@pytest.mark.parametrize("recipe", ["star", "grpo", "step_beam"])
def test_a_recipe_of_one_model(recipe, reckoner, tmp_path, monkeypatch):  # noqa: F811
    more = {
        "star": {"rounds": 1, "first_steps": 5},
        "grpo": {"samples": 4, "policy_steps": 2, "policy_batch": 16, "rounds": 1},
        "step_beam": {"beams": 2, "samples": 2, "steps": 3, "step_tokens": 6, "solved": None, "epochs": None},
    }  # fmt: skip
    config = sums(reckoner, tmp_path / "task", recipe, **more[recipe])
    run(config, tmp_path / "whole", quiet=True)
    stopped_and_gone_on(config, tmp_path / "stopped", monkeypatch, recipe)
    assert committed(tmp_path / "stopped") == committed(tmp_path / "whole")
