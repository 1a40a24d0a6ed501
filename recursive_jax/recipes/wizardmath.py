"""WizardMath, reinforced Evol-Instruct (arXiv:2308.09583, sec. 3): problems are evolved down and up, two reward models
are taught, and a student is reinforced by the product of both.

    student_0 = train(base, solutions)
    evolved_k = teacher(easier or harder problem), `evolutions` rounds; all of them are problems
    IRM       = train(base's trunk, problems' versions ranked by the teacher's ratings), listwise
    steps     = student_0's solutions, each step marked right or wrong: by the teacher, or by its equation (`marks`)
    PRM       = train(base's trunk, steps), a probability on the end of each
    student_k = PPO on problems and evolved ones from student_k-1, reward = sigmoid(IRM(problem)) * min PRM(steps)

Departures: the paper's two evolvers are one teacher; ratings become the ranking; `marks: equation` needs no teacher
that can do sums. Expect: Llama-2-7B on GSM8K 14.6 to 54.9%, most of it from the evolved solutions, little from the
reinforcement."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt

from recursive_jax import rewards
from recursive_jax.config import TrainConfig
from recursive_jax.curate.rewards import Reward
from recursive_jax.data.parsers import Label, Score
from recursive_jax.data.template import Template
from recursive_jax.generate.remote.model import Remote
from recursive_jax.models.model import Model
from recursive_jax.models.scoring import scoring_model
from recursive_jax.objectives import ListwiseReward, ProcessReward
from recursive_jax.recipes import wizardmath_rows as rows
from recursive_jax.recipes.answers import Course, check, judge_of, question_of
from recursive_jax.recipes.evolution import MATHS, to_evolve
from recursive_jax.recipes.policy_rounds import PolicyConfig, reinforced
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.recipes.self_training import cost, rounds_of
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.round import Round

RATE = (
    "Rate the problem from 1 to 10: is it well defined, precise and whole?\nProblem: {problem}\n\nEnd with the line "
    "Score: N.\n"
)
MARK = "Is the last step of the solution right?\nProblem: {problem}\nSolution:\n{before}{step}\nRight or wrong: "


class WizardmathConfig(PolicyConfig):
    """Evolution, two reward models, and reinforcement by their product."""

    NEEDS = ("base", "task", "teacher")

    recipe: str = "wizardmath"

    teacher: str = Field("", description="who evolves, rates and marks: a model, or openai:MODEL@URL")
    evolutions: PositiveInt = Field(2, description="rounds of evolution")
    versions: int = Field(4, ge=2, description="of a problem that are ranked, itself among them")
    solutions: PositiveInt = Field(4, description="of student_0 to a problem, whose steps are marked")
    marks: Literal["teacher", "equation"] = Field("teacher", description="who says which steps are right")
    separator: str = Field("\n", description="between the steps of a solution")
    reward: TrainConfig = Field(
        TrainConfig(steps=100, batch=16, learning_rate=1e-4), description="of both reward models"
    )
    signal: Literal["grpo", "rloo", "reinforce", "gae"] = "gae"
    loss_type: str = "ppo"


def problems_of(course: Course, round: Round, teacher: Any, column: str) -> tuple[Stored, Stored]:
    """(all problems, those evolved among them; their versions in order, the best first)."""
    c: Any = course.config
    pool = round.dataset("problems-0", rows.as_asked, course.problems, column)
    found = [pool]
    chat = isinstance(teacher, Remote)
    for k in range(1, c.evolutions * (c.versions - 1) + 1):
        asked = round.dataset(f"operators-{k}", to_evolve, pool, MATHS, round.seed(f"operators-{k}") % 2**31)
        settings = {"temperature": 0.7, "max_tokens": 160, "batch": c.sampling.batch, "stop": ("\n\n",)}
        new = round.generate(
            f"evolved-{k}", teacher, asked, settings, template=Template("{ask}", "{evolved}", chat=chat)
        )
        found.append(round.dataset(f"problems-{k}", rows.evolved_problems, new))
        if k % (c.versions - 1) == 0:  # the last version of a round is what the next one evolves
            pool = round.dataset(f"pool-{k}", rows.next_problems, pool, found[-1])
    everything = round.dataset("problems", rows.all_problems, column, *found)
    template = Template(
        RATE.replace("{problem}", f"{{{column}}}"), parser=Score(low=1, high=10, lenient=True), chat=chat
    )
    rated = round.score("rated", everything, judge_of(teacher, template))
    return everything, round.dataset("ranked", rows.ranked, rated, column, c.versions)


def steps_of(course: Course, round: Round, student: Model, teacher: Any) -> Stored:
    """The student's solutions in steps, each marked."""
    c: Any = course.config
    answers = course.answers(round, "solutions", student, course.problems, each=c.solutions, temperature=0.7)
    cut = round.dataset("steps", rows.in_steps, answers, course.template, c.separator)
    if c.marks == "equation":
        marked = round.dataset("marked", rows.marked_by_equation, cut)
    else:
        chat = isinstance(teacher, Remote)
        template = Template(MARK, parser=Label(("Right", "Wrong"), "mark", lenient=chat), chat=chat)
        settings = {"temperature": 0.0, "max_tokens": 4, "batch": c.sampling.batch}
        marked = round.generate("marked", teacher, cut, settings, template=template, constrained=not chat)
    return round.dataset("marked-solutions", rows.with_labels, answers, marked, c.separator)


def both_rewards(course: Course, round: Round, student: Model) -> tuple[Reward, Stored]:
    """(the product of the two reward models, all problems), made of the first student's answers."""
    c: Any = course.config
    teacher = course.model(c.teacher)
    column = question_of(course.template)
    everything, ranked = problems_of(course, round, teacher, column)
    trunk = scoring_model(course.start, round.seed("head") % 2**31)
    irm = round.train("instruction-reward", trunk, ranked, c.reward, ListwiseReward())
    steps = steps_of(course, round, student, teacher)
    prm = round.train("process-reward", trunk, steps, c.reward, ProcessReward(separator=c.separator))
    return rows.Instructed(irm, column) * rewards.process_model(prm, separator=c.separator), everything


def wizardmath(config: WizardmathConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir`; the metrics records: round 0 is the student of the solutions."""
    taught: list[tuple[Reward, Stored]] = []

    def advance(course: Course, round: Round, student: Model) -> tuple[Model, int]:
        taught[:] = taught or [both_rewards(course, round, student)]
        reward, problems = taught[0]
        return reinforced(course, round, student, reward, problems.value)

    return rounds_of(config, workdir, advance, fork=fork, quiet=quiet)


recipe = Recipe(
    "wizardmath",
    "problems evolved down and up, an instruction and a process reward model, and PPO by their product",
    WizardmathConfig,
    wizardmath,
    check,
    cost,
    paper="arXiv:2308.09583",
    example="recursive-jax run configs/wizardmath.yaml --workdir runs/wizardmath",
)
