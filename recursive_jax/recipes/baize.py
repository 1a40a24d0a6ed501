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

from recursive_jax import mesh as meshes
from recursive_jax import rewards
from recursive_jax.config import LoraConfig
from recursive_jax.curate import rules
from recursive_jax.curate.select import with_status
from recursive_jax.data.dataset import Dataset, python_rows
from recursive_jax.data.parsers import Score, Turns
from recursive_jax.generate.dialogue import Dialogue
from recursive_jax.models.model import Model
from recursive_jax.recipes import instructions as shared
from recursive_jax.recipes.instructions import InstructionsConfig, Studio, check, cost
from recursive_jax.recipes.recipe import Recipe
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.report import write_report
from recursive_jax.rounds.report.written import written_layout
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run

HUMAN, AI = "[Human]", "[AI]"
HEADER = (
    "The transcript of a conversation between a person and an AI assistant. The person asks and follows up; the "
    "assistant answers in detail and asks no questions. A turn of the person begins with "
    f"{HUMAN}, one of the assistant with {AI}.\n\n{HUMAN} Hello!\n{AI} Hi! How can I help you?\n"
)
RATE = "Rate the answer's help, relevance, accuracy and detail from 1 to 100.\nQuestion: {asked}\n\nAnswer: {reply}\n\n"


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
        person = studio.ask("{talk}\n" + HUMAN, completion=" {said}"), {"talk": "{talk}\n" + HUMAN + " {said}"}
        helper = studio.ask("{talk}\n" + AI, completion=" {said}"), {"talk": "{talk}\n" + AI + " {said}"}
        template: Any = Dialogue((helper, person), 2 * studio.config.exchanges - 1)
        settings = studio.settings(temperature=1.0, stop=(HUMAN, AI))
    else:
        template = studio.ask("{talk}\n" + AI)
        settings = studio.settings(temperature=1.0, max_tokens=512)
    written = round.generate("written", studio.teacher, begun, settings, template=template)
    return round.dataset("talks", as_rows, written, studio.template.chat)


def with_talk(seed: Dataset) -> Dataset:
    return seed.with_column("talk", [f"{HEADER}{HUMAN} {text}" for text in seed.column("asked")])


def as_rows(written: Dataset, chat: bool) -> Dataset:
    """The talks that could be read: whole ones as `messages` where the student has a chat form, else a row for every
    answer."""
    rows = []
    for row in python_rows(written.table):
        text = row["talk"].removeprefix(HEADER)
        if not written.has("turns"):  # one call: the reply goes on from the first answer
            text += f"\n{AI} " + row["text"].strip().removeprefix(AI)
        found = Turns(HUMAN, AI).read(text, row["status"] == "length")
        if not isinstance(found, list):
            continue
        messages = found[0]["messages"]
        core = {key: row[key] for key in ("id", "parents", "model", "round")} | {"synthetic": True}
        if chat:
            rows.append(
                {**core, "asked": messages[0]["content"], "output": messages[1]["content"], "messages": messages}
            )
            continue
        said = [messages[0]["content"], *(f"{(HUMAN, AI)[n % 2]} {m['content']}" for n, m in enumerate(messages) if n)]
        for n in range(1, len(messages), 2):
            more = {"asked": "\n".join(said[:n]), "output": messages[n]["content"]}
            rows.append({**core, **more, "id": f"{row['id']}/{n}"})
    return Dataset.from_rows(rows) if rows else written.take([]).with_column("output", [])


def fed_back(studio: Studio, round: Round, seed: Stored, chat: Model) -> Stored:
    """The best of the student's answers to each seed question, by the teacher."""
    settings = {"max_tokens": 256, "temperature": 1.0, **studio.config.sampling.model_dump(exclude_defaults=True)}
    answers = round.generate("answers", chat, seed, settings, template=studio.template, each=studio.config.samples)
    judge = rewards.judge(studio.teacher, studio.ask(studio.config.rate, Score(low=1, high=100)))
    rated = round.score("rated", answers, judge)
    return round.select("best", rated, [with_status("ok"), rules.best_of("score")])


def baize(config: BaizeConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir`; the metrics records: round 0 is the base, round 1 the student of the
    talks, round 2 that of its own best answers."""
    studio = Studio(config)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        run.progress.total = 26 if config.feedback else 14
        round = run.round(0)
        seed = round.dataset("seed", shared.given, studio.seeds)
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
        run.name_model("student", round, "student", default=True)
        records = run.refresh_metrics()
        meshes.on_main(lambda: write_report(run.path, written_layout))
        return records


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
