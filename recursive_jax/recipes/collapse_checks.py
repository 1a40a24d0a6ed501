"""What can be said of a collapse experiment before it runs: what is wrong with it, what it costs, what it leaves
open."""

from __future__ import annotations

from recursive_jax.collapse.exact import GrammarVerifier
from recursive_jax.config import ArmConfig, row_length
from recursive_jax.curate.select import Rule
from recursive_jax.data.sources import World
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model
from recursive_jax.models.network import Network, transformer_network
from recursive_jax.recipes.collapse_config import CollapseConfig
from recursive_jax.rounds import preflight
from recursive_jax.rounds.opening import open_network
from recursive_jax.rounds.work import Reading, Training, Work, Writing
from recursive_jax.rounds.world import check_data


def check(config: CollapseConfig) -> list[str]:
    """Problems of data, vocabulary, mesh and batches."""
    lines = check_data(config.data)
    if config.base is None and not lines:  # a base is checked when it is loaded
        lines += preflight.model_problems(config.model, config.data)
    if config.base is None:
        known = config.model if lines else preflight.with_vocabulary(config.model, config.data)
        network = transformer_network(known.model_copy(update={"vocab": known.vocab or 64}))
        lines += preflight.mesh_problems(network, config.mesh)
    return lines + preflight.batch_problems(config.mesh, train=config.train, student=config.student)


def cost(config: CollapseConfig) -> list[Work]:
    """The teacher, the students, what they write for each other and for the evaluation, and the held-out text."""
    network: Network
    if config.base is not None:
        network = open_network(config.base)
    else:
        network = transformer_network(preflight.with_vocabulary(config.model, config.data))
    length = row_length(config.train.length, network.max_length)
    rounds = config.rounds
    times = sum(rounds.sizes) / rounds.token_budget * config.replicates
    work: list[Work] = [Training("the teacher", network, config.train)]
    prompt = max(1, config.sampling.prompt_tokens)
    new = max(1, min(config.sampling.max_tokens or length, length + 1 - prompt))
    written = sum(rounds.sizes) * config.replicates / new
    models = config.replicates * rounds.count + 1
    for name, arm in config.arms.items():
        student = config.arm_student(arm)
        work.append(Training(f"the students of {name}", network, student, times))
        if network.causal:
            rows = written + models * config.evaluate.samples
            work.append(Writing(f"rows of {name}", network, config.arm_sampling(arm), rows, prompt, new))
    if network.causal:
        tokens = models * len(config.arms) * config.evaluate.rows * length
        work.append(Reading("held-out rows", network, tokens, length))
    return work


def settled(config: CollapseConfig, base: Model) -> CollapseConfig:
    """The config with the lengths that an imported model leaves open."""
    length = row_length(config.train.length, base.max_length)
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


def check_real_tokens(config: CollapseConfig, have: int) -> None:
    """Anchor and fresh rows must suffice for the last round before the first one is run."""
    for name, arm in config.arms.items():
        want = arm.real_tokens(config.rounds.sizes)
        if want > have:
            sizes = ", ".join(f"{n:,}" for n in dict.fromkeys(config.rounds.sizes))
            raise InputError(
                f"arms.{name} (anchor={arm.anchor}, fresh={arm.fresh}, weighted={arm.weighted}) needs {want:,} real "
                "tokens "
                f"over {config.rounds.count} rounds of {sizes} tokens, there are {have:,}; raise data.real_tokens, "
                "give more "
                "data, or lower the shares"
            )


def grammar_verifier(name: str, arm: ArmConfig, world: World) -> Rule | None:
    """What `filtered` holds to be right without a verifier of the user's."""
    if arm.filtered is None:
        return None
    if world.language is None:
        raise InputError(
            f"arms.{name}.filtered: the grammar of the embedded language is the only verifier by name, and this text "
            "is not of "
            "it; give one in Python: collapse(config, workdir, verifier=Rule(name, keep))"
        )
    level = arm.filtered.verifier
    return Rule(f"verifier {level}", GrammarVerifier(world.language.config, level))
