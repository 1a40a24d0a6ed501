"""A recipe of your own: a teacher writes, only its longest rows are kept, a student learns from them, round after
round.

PYTHONPATH=docs/examples recursive-jax run docs/examples/own_recipe.yaml --workdir runs/longest
"""

import dataclasses

import recursive_jax as rj
from recursive_jax.collapse.likelihood import cross_entropy, token_losses
from recursive_jax.rounds.world import stored_world


class LongestConfig(rj.RecipeConfig):  # beside the keys that all recipes have
    rounds: int = 2
    rows: int = 200
    keep: int = 20
    model: rj.ModelConfig = rj.ModelConfig()
    data: rj.DataConfig = rj.DataConfig()


@dataclasses.dataclass(frozen=True)
class Length(rj.rewards.Reward):
    """Named by its values: with another `most` its stored scores are others."""

    most: int = 1000

    def __call__(self, data):
        return [min(self.most, len(tokens)) for tokens in data.tokens()]


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    def __call__(self, model, world):
        loss, stderr = cross_entropy(token_losses(model, world.held_out.tokens()[:64]))
        return {"held_out_loss": loss, "held_out_loss_stderr": stderr}


def longest(config, workdir, *, fork=None, quiet=False):
    with rj.Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        real = stored_world(run, config.data, config.model.max_length, held_out_rows=64)
        blank = rj.transformer(config.model, real.value.tokenizer, rj.make_mesh(config.mesh))
        model = run.round(0).train("model", blank, real.view("train", lambda world: world.train), config.train)
        for number in range(config.rounds + 1):
            round = run.round(number)
            if number:
                rows = round.generate("rows", model, rj.Unconditional(), config.sampling, count=config.rows)
                scored = round.score("scored", rows, Length())
                kept = round.select("kept", scored, [rj.rules.at_least(config.keep)])
                model = round.train("model", blank, kept, config.train)
            round.evaluate("evaluation", model, HeldOutLoss(), model, real)
        run.name_model("model", run.round(config.rounds), "model", default=True)
        records = run.refresh_metrics()
    rj.write_report(workdir)
    return records


recipe = rj.Recipe("longest", "students learn from the longest rows of the model before them", LongestConfig, longest)
