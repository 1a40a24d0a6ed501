"""The collapse experiment: one teacher trained on real data, then chains of students trained on what the last model
wrote, one chain per regime and replicate.

The Curse of Recursion (arXiv:2305.17493) is the regime `replace` from a fine-tuned base; Is Model Collapse Inevitable
(arXiv:2404.01413) sets it against `accumulate`; a share of real rows every round is `anchor`.
"""

from __future__ import annotations

from typing import Any

from recursive_jax import mesh as meshes
from recursive_jax.collapse.exact import right_rows
from recursive_jax.collapse.measure import FORM, Yardstick, measure
from recursive_jax.config import ArmConfig, Config
from recursive_jax.curate.select import Rule
from recursive_jax.data.sources import World
from recursive_jax.errors import InputError
from recursive_jax.generate.request import from_rows, unconditional
from recursive_jax.models.model import Model, transformer
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.iterate import Pool, generate_and_mix, iterate
from recursive_jax.rounds.preflight import check_real_tokens, preflight, settled
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.stored import load_model
from recursive_jax.rounds.world import stored_world


def collapse(
    config: Config,
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
        preflight(config)
    mesh = meshes.make_mesh(config.mesh)
    with Run(workdir, config.model_dump(), seed=config.seed, fork=fork, quiet=quiet) as run:
        per_round = 4 + sum(arm.real + arm.carry < 1.0 for arm in config.arms.values()) / len(config.arms)
        run.progress.total = 4 + round(len(config.arms) * config.replicates * config.rounds.count * per_round)
        blank = model.on(mesh) if model is not None else None
        if blank is None and config.base is not None:
            blank = load_model(config.base, mesh)
            config = settled(config, blank)
        real = stored_world(run, config, blank if config.base is not None else None)
        world: World = real.value
        check_real_tokens(config, world.train.token_count)
        verifiers = {name: verifier or grammar_verifier(name, arm, world) for name, arm in config.arms.items()}
        blank = blank or transformer(config.model, world.tokenizer, mesh)
        first = run.round(0)
        teacher = first.train("teacher", blank, real.view(lambda w: w.train), config.train)
        yardstick = Yardstick.of(world, teacher, config.evaluate)
        assess(first, teacher, config, config.sampling, yardstick, real, real.view(lambda w: w.train))
        for name, arm in config.arms.items():
            for replicate in range(config.replicates):
                chain = run.chain(name, replicate, config.replicates)
                run_arm(chain, arm, config, blank, teacher, real, yardstick, verifiers[name])
        records = run.refresh_metrics()
        if meshes.is_main():
            write_report(run.path)
        meshes.barrier("report")
        return records


def grammar_verifier(name: str, arm: ArmConfig, world: World) -> Rule | None:
    """What `filtered` holds to be right without a verifier of the user's."""
    if arm.filtered is None:
        return None
    if world.language is None:
        raise InputError(
            f"arms.{name}.filtered: the grammar of the embedded language is the only verifier by name, and this text is not of "
            "it; give one in Python: collapse(config, workdir, verifier=Rule(name, keep))"
        )
    level = arm.filtered.verifier
    return Rule(f"verifier {level}", lambda data: right_rows(world.language, data.tokens(), level))


def run_arm(
    chain,
    arm: ArmConfig,
    config: Config,
    blank: Model,
    teacher: Model,
    real: Stored,
    yardstick: Yardstick,
    verifier: Rule | None = None,
) -> Model:
    """One chain: generate, mix, train, evaluate, round after round. blank: what the teacher was trained from."""
    sampling = config.arm_sampling(arm)
    pool = Pool.of(real.view(lambda w: w.train), arm, config.rounds, verifier)

    def one_round(round: Round, last: Model, start: Model, pool: Pool) -> Model:
        data = generate_and_mix(round, last, pool, prompts(sampling, pool), sampling)
        student_config = config.arm_student(arm)
        size = data.value.token_count if pool.grow else pool.tokens
        if size != config.rounds.tokens:  # equal epochs
            steps = max(1, int(student_config.steps * size / config.rounds.tokens + 0.5))
            student_config = student_config.model_copy(update={"steps": steps})
        student = round.train("student", start, data, student_config)
        assess(round, student, config, sampling, yardstick, real, data)
        return student

    init = arm.init or config.rounds.init
    return iterate(chain, one_round, config.rounds.count, base=teacher, pool=pool, init=init, blank=blank)


def prompts(sampling, pool: Pool):
    """Requests for a round: from the start token, or from the first tokens of real or of the last round's rows."""
    if not sampling.prompt_tokens:
        return lambda first, count: unconditional(count, first)

    def requests(first: int, count: int):
        source = pool.rows[-1] if sampling.prompt_source == "previous" and pool.rows else pool.real
        return from_rows(source.value, sampling.prompt_tokens, count, first)

    return requests


def assess(
    round: Round, model: Model, config: Config, sampling, yardstick: Yardstick, real: Stored, training: Stored
) -> dict[str, Any]:
    """Samples from the model and measures it. training: what it was trained on."""
    pool = Pool(real.view(lambda w: w.train), config.rounds.tokens)
    samples = round.generate("samples", model, prompts(sampling, pool), sampling, count=config.evaluate.samples)
    inputs = {"samples": samples.fingerprint, "real": real.fingerprint, "base": yardstick.base.fingerprint}
    inputs["training"] = training.fingerprint
    return round.evaluate(
        "evaluation",
        model,
        lambda: measure(model, samples.value, yardstick, config.evaluate, training.value),
        inputs,
        config.evaluate.model_dump() | {"form": FORM},
    )
