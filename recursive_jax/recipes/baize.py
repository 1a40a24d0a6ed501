"""Baize (arXiv:2304.01196): a teacher talks with itself about seed questions; a student learns the talks; then it
learns the best of its own answers (self-distillation with feedback, sec. 4).

    talks   = self_chat(teacher, seed question): one call for a whole transcript, or one for every turn (`turn_by_turn`)
    chat    = train(base, talks), an adapter, loss on what the assistant says
    answers = `samples` answers of chat to each seed question
    rated   = teacher(answers), 1 to 100
    sdf     = train(chat, best of each question's answers), a new adapter over the frozen first one

Departures: the transcript's header is our words; the first adapter is merged into the frozen base under the new one,
which is the same function; in a model without a chat form every answer is a row behind the talk so far. Expect: by
GPT-4 against ChatGPT on 80 prompts, 87% (talks) to 90% (sdf) for 7B."""

from __future__ import annotations

from typing import Any

from pydantic import Field, PositiveInt

from recursive_jax.config import LoraConfig
from recursive_jax.curate import rules
from recursive_jax.curate.select import with_status
from recursive_jax.data.parsers import Completion, Score
from recursive_jax.generate.dialogue import Dialogue
from recursive_jax.models.model import Model
from recursive_jax.recipes.answers import judge_of
from recursive_jax.recipes.instruction_config import InstructionsConfig, check, cost
from recursive_jax.recipes.instructions import Studio
from recursive_jax.recipes.recipe import Recipe, concluded
from recursive_jax.recipes.talks import AI, HUMAN, as_rows, with_talk
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report.written import written_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run

SAID = Completion("{said}", whole=True)
RATE = (
    "Rate the answer's help, relevance, accuracy and detail from 1 to 100.\nQuestion: {asked}\n\nAnswer: {reply}\n\n"
    "End with the line Score: N.\n"
)


class BaizeConfig(InstructionsConfig):
    """Self-chat, and feedback on a student's own answers."""

    recipe: str = "baize"

    lora: LoraConfig = LoraConfig()
    turn_by_turn: bool = Field(False, description="a call for every turn, as the paper's second version has it")
    exchanges: PositiveInt = Field(3, description="of a talk that is held turn by turn")
    feedback: bool = Field(True, description="the second step: the best of the student's own answers")
    samples: PositiveInt = Field(4, description="answers to a question, of which the best is learnt")
    rate: str = Field(RATE, description="what the teacher reads of an answer; its reply ends with Score: n")


def talks(studio: Studio, round: Round, seed: Stored) -> Stored:
    """A talk about each seed question, as rows that are learnt."""
    begun = round.dataset("begun", with_talk, seed)
    if studio.config.turn_by_turn:
        turn = lambda who: (studio.ask("{talk}\n" + who, SAID), {"talk": "{talk}\n" + who + " {said}"})
        helper, person = turn(AI), turn(HUMAN)
        template: Any = Dialogue((helper, person), 2 * studio.config.exchanges - 1)
        settings = studio.settings(temperature=1.0, stop=(HUMAN, AI))
    else:
        template = studio.ask("{talk}\n" + AI)
        settings = studio.settings(temperature=1.0, max_tokens=512)
    written = round.generate("written", studio.teacher, begun, settings, template=template)
    read = round.dataset("read", as_rows, written, studio.template.chat)
    return round.select("talks", read, [with_status("ok", "length")])


def fed_back(studio: Studio, round: Round, seed: Stored, chat: Model) -> Stored:
    """The best of the student's answers to each seed question, by the teacher."""
    settings = {"max_tokens": 256, "temperature": 1.0, **studio.config.sampling.model_dump(exclude_unset=True)}
    answers = round.generate("answers", chat, seed, settings, template=studio.template, each=studio.config.samples)
    template = studio.ask(studio.config.rate, Score(low=1, high=100, lenient=studio.remote))
    rated = round.score("rated", answers, judge_of(studio.teacher, template))
    return round.select("best", rated, [with_status("ok"), rules.best_of("score")])


def baize(config: BaizeConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir`; the metrics records: round 0 is the base, round 1 the student of the
    talks, round 2 that of its own best answers."""
    studio = Studio(config)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 26 if config.feedback else 14
        round = run.round(0)
        seed = studio.seed(round, studio.seeds)
        before = studio.measure(round, studio.base)
        round = run.round(1)
        data = talks(studio, round, seed)
        student = studio.tuned(round, data)
        studio.measure(round, student, before, len(data))
        if config.feedback:
            round = run.round(2)
            best = fed_back(studio, round, seed, student)
            student = studio.tuned(round, best, start=studio.adapted(student))
            studio.measure(round, student, before, len(best))
        return concluded(run, round, written_layout)


recipe = Recipe(
    "baize",
    "a teacher talks with itself, a student learns the talks, and then the best of its own answers",
    BaizeConfig,
    baize,
    check,
    cost,
    written_layout,
    paper="arXiv:2304.01196",
    example="recursive-jax run configs/baize.yaml --workdir runs/baize",
)
