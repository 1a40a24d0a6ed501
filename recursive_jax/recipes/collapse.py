"""The collapse experiment: one teacher trained on real data, then chains of students trained on what the last model
wrote, one chain per regime and replicate.

The Curse of Recursion (arXiv:2305.17493) is the regime `replace` from a fine-tuned base; Is Model Collapse Inevitable
(arXiv:2404.01413) sets it against `accumulate`; a share of real rows every round is `anchor`.
"""

from __future__ import annotations

from typing import Any

from recursive_jax import mesh as meshes
from recursive_jax.collapse.measure import FORM, Yardstick, measure
from recursive_jax.config import ArmConfig, SamplingConfig, row_length
from recursive_jax.curate.select import Rule
from recursive_jax.data.sources import World
from recursive_jax.generate.request import FromRows, Unconditional
from recursive_jax.identity import named
from recursive_jax.models.model import Model, transformer
from recursive_jax.objectives import objective_of
from recursive_jax.recipes.collapse_checks import check, check_real_tokens, cost, grammar_verifier, settled
from recursive_jax.recipes.collapse_config import CollapseConfig
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.iterate import Pool, generate_and_mix, iterate
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.report.regimes import regimes_layout
from recursive_jax.rounds.round import Requests, Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.world import stored_world


def collapse(
    config: CollapseConfig,
    workdir: Any,
    *,
    fork: Any = None,
    quiet: bool = False,
    model: Model | None = None,
    verifier: Rule | None = None,
) -> list[dict]:
    """Runs (or goes on with) the experiment in `workdir` and returns the metrics records, one per evaluation.

    model: a user's own model without params (`user_model`), instead of the Transformer of the config. verifier: what is
    right in the arms with `filtered`; by default the grammar of the embedded language.
    """
    if model is None:
        recipe.preflight(config)
    mesh = meshes.make_mesh(config.mesh)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        per_round = 4 + sum(arm.real + arm.carry < 1.0 for arm in config.arms.values()) / len(config.arms)
        run.progress.total = 4 + round(len(config.arms) * config.replicates * config.rounds.count * per_round)
        blank = model.on(mesh) if model is not None else None
        if blank is None and config.base is not None:
            blank = load_model(config.base, mesh)
            config = settled(config, blank)
        row_tokens = row_length(config.train.length, blank.max_length) if blank else config.model.max_length
        if not (blank.network if blank else config.model).causal:  # the start token takes a place in the row
            row_tokens -= 1
        imported = blank if config.base is not None else None
        real = stored_world(run, config.data, row_tokens, config.evaluate.rows, imported)
        world: World = real.value
        check_real_tokens(config, world.train.token_count)
        verifiers = {name: verifier or grammar_verifier(name, arm, world) for name, arm in config.arms.items()}
        spare = objective_of(config.train.objective).extra_ids(world.tokenizer)
        blank = blank or transformer(config.model, world.tokenizer, mesh, spare)
        first = run.round(0)
        real_rows = real.view("train", lambda w: w.train)
        teacher = first.train("teacher", blank, real_rows, config.train)
        run.name_model("teacher", first, "teacher", default=not config.rounds.count)
        yardstick = Yardstick.of(world, teacher, config.evaluate)
        assess(first, teacher, config, config.sampling, yardstick, real, real_rows)
        for number, (name, arm) in enumerate(config.arms.items()):
            for replicate in range(config.replicates):
                chain = run.chain(name, replicate, config.replicates)
                chain.is_default = number == replicate == 0
                run_arm(chain, arm, config, blank, teacher, real, yardstick, verifiers[name])
        records = run.refresh_metrics()
        meshes.on_main(lambda: write_report(run.path, regimes_layout))
        return records


def run_arm(
    chain,
    arm: ArmConfig,
    config: CollapseConfig,
    blank: Model,
    teacher: Model,
    real: Stored,
    yardstick: Yardstick,
    verifier: Rule | None = None,
) -> Model:
    """One chain: generate, mix, train, evaluate, round after round. blank: what the teacher was trained from."""
    sampling = config.arm_sampling(arm)
    pool = Pool.of(real.view("train", lambda w: w.train), arm, config.rounds, verifier)

    def one_round(round: Round, last: Model, start: Model, pool: Pool) -> Model:
        data = generate_and_mix(round, last, pool, prompts(sampling, pool), sampling)
        student_config = config.arm_student(arm)
        size = data.value.token_count if pool.grow else pool.tokens
        if size != config.rounds.token_budget:  # equal epochs
            steps = max(1, int(student_config.steps * size / config.rounds.token_budget + 0.5))
            student_config = student_config.model_copy(update={"steps": steps})
        student = round.train("student", start, data, student_config)
        name = chain.arm if config.replicates == 1 else f"{chain.arm}-{chain.replicate}"
        chain.run.name_model(name, round, "student", default=chain.is_default)
        assess(round, student, config, sampling, yardstick, real, data)
        return student

    init = arm.init or config.rounds.init
    return iterate(chain, one_round, config.rounds.count, base=teacher, pool=pool, init=init, blank=blank)


def prompts(sampling: SamplingConfig, pool: Pool) -> Requests:
    """Requests for a round: from the start token, or from the first tokens of real or of the last round's rows."""
    if not sampling.prompt_tokens:
        return Unconditional()
    source = pool.rows[-1] if sampling.prompt_source == "previous" and pool.rows else pool.real
    return FromRows(source.value, sampling.prompt_tokens)


def assess(
    round: Round, model: Model, config: CollapseConfig, sampling, yardstick: Yardstick, real: Stored, training: Stored
) -> dict[str, Any]:
    """Samples from the model and measures it. training: what it was trained on."""
    pool = Pool(real.view("train", lambda w: w.train), config.rounds.token_budget)
    samples = round.generate("samples", model, prompts(sampling, pool), sampling, count=config.evaluate.samples)
    inputs = {"samples": samples.fingerprint, "real": real.fingerprint, "reference": yardstick.reference.fingerprint}
    inputs["training"] = training.fingerprint
    measured = named("measure", FORM)(lambda: measure(model, samples.value, yardstick, config.evaluate, training.value))
    return round.evaluate("evaluation", model, measured, inputs=inputs, config=config.evaluate)


recipe = Recipe(
    "collapse",
    "rounds of students that learn from students, under regimes side by side; exact loss on the embedded language",
    CollapseConfig,
    collapse,
    check,
    cost,
    regimes_layout,
    paper="arXiv:2305.17493, arXiv:2404.01413, arXiv:2410.16713",
    example="recursive-jax run configs/quickstart.yaml --workdir runs/quickstart",
    own_arms=True,
)
