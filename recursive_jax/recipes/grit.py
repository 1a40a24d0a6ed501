"""GRIT (arXiv:2402.09906): a model that writes learns to embed, and goes on writing.

    student = train(base, pairs of query and passage, and texts, L_rep + L_gen)
    measured before and after: how well its embeddings find the held-out passages among all of them (MRR, nDCG, recall),
    and the loss of held-out text

Departures: one pair file in place of E5's and Tulu's data; hard negatives where the rows have `negative`. Expect: at 7B
both tasks as well as models of either kind alone (MTEB 66.8, generation 55.5)."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax import mesh as meshes
from recursive_jax.collapse.likelihood import cross_entropy, token_losses
from recursive_jax.collapse.retrieval import evaluate_retrieval
from recursive_jax.config import LoraConfig, ModelConfig
from recursive_jax.data.files import read_text
from recursive_jax.data.task import hold_out, read_rows
from recursive_jax.data.tokenizers import FileTokenizer
from recursive_jax.errors import InputError
from recursive_jax.identity import named
from recursive_jax.models.model import Model, transformer
from recursive_jax.models.network import Network, transformer_network
from recursive_jax.objectives import Grit
from recursive_jax.recipes.finetune import as_they_are
from recursive_jax.recipes.recipe import Recipe, RecipeConfig, concluded, student_network, with_adapter
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.round import Round
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Training, Work


class GritConfig(RecipeConfig):
    """A model learns to embed and to write."""

    NEEDS = ("pairs", "text")

    recipe: str = "grit"

    base: str | None = Field(None, description="the model; default: a fresh one that first learns the text alone")
    pairs: str = Field("", description="rows with `query` and `positive`, and perhaps `negative` and `source`")
    text: str = Field("", description="a file of text to go on writing; its last twentieth is held out")
    instruction: str = Field("", description="what is looked for, in words; before queries")
    holdout: float = Field(0.1, gt=0.0, lt=1.0, description="share of the pairs that is held out")
    temperature: float = Field(0.02, gt=0.0, description="of InfoNCE")
    generative: float = Field(1.0, ge=0.0, description="weight of the text's loss")
    dimensions: tuple[PositiveInt, ...] = Field((), description="first so many entries that do alone, too (Matryoshka)")
    generative_batch: int = Field(0, ge=0, description="rows of text in a batch; 0: as many as pairs")
    vocab_size: PositiveInt = Field(4096, description="of the tokenizer of a fresh model")
    model: ModelConfig = ModelConfig(layers=4, d_model=128, heads=4, max_length=128)
    pretrain_steps: PositiveInt = Field(500, description="on the text alone, of a fresh model")
    lora: LoraConfig | None = Field(None, description="train an adapter on the frozen base, not the whole model")


def objective_of(config: GritConfig) -> Grit:
    return Grit(config.temperature, config.generative, config.dimensions, config.generative_batch)


def numbers(config: GritConfig, model: Model, held_out: list[dict[str, Any]], text: str) -> dict[str, float]:
    queries, passages = [r["query"] for r in held_out], list(dict.fromkeys(r["positive"] for r in held_out))
    relevant = [passages.index(r["positive"]) for r in held_out]
    found = evaluate_retrieval(model, queries, passages, relevant, instruction=config.instruction)
    ids = np.asarray(model.tokenizer.encode(text), np.int32)
    step = min(model.max_length, 256)
    loss, stderr = cross_entropy(token_losses(model, [ids[i : i + step] for i in range(0, len(ids), step)]))
    return {**found, "ce_real": loss, "ce_real_stderr": stderr, "passages": float(len(passages))}


def assess(round: Round, config: GritConfig, model: Model, held_out: list[dict[str, Any]], text: str) -> None:
    measured = named("grit", 1)(lambda: numbers(config, model, held_out, text))
    round.evaluate("evaluation", model, measured, config=[config.instruction, config.holdout])


def grit(config: GritConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records: round 0 before, round 1 after."""
    rows = read_rows(config.pairs)
    missing = next((n for n, r in enumerate(rows) if not (r.get("query") and r.get("positive"))), None)
    if missing is not None:
        raise InputError(f"{config.pairs}, row {missing}: `query` and `positive` are wanted")
    pairs, held_out, _ = hold_out(rows, config.holdout, config.seed)
    text = read_text(config.text, None)
    cut = len(text) * 19 // 20
    text, rest = text[:cut], text[cut:][:40_000]
    mesh = meshes.make_mesh(config.mesh)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        first, second = run.round(0), run.round(1)
        if config.base is not None:
            base = load_model(config.base, mesh)
        else:
            tokenizer = FileTokenizer.train_bpe([text, *(r["positive"] for r in pairs)], config.vocab_size)
            plain = config.train.model_copy(update={"steps": config.pretrain_steps})
            base = first.train("base", transformer(config.model, tokenizer, mesh), [text], plain)
        assess(first, config, base, held_out, rest)
        asked = [{**r, "query": [config.instruction, r["query"]]} for r in pairs]
        objective = objective_of(config)
        data = second.dataset("rows", as_they_are, objective.rows([*asked, {"text": text}], base.tokenizer))
        start = with_adapter(second, base, config.lora)
        student = second.train("student", start, data, config.train, objective)
        assess(second, config, student, held_out, rest)
        return concluded(run, second)


def cost(config: GritConfig) -> list[Work]:
    """The fresh model's text, where there is no base, and both losses together."""
    if config.base is not None:
        network: Network = student_network(config.base, config.lora)
    else:
        network = transformer_network(config.model.model_copy(update={"vocab": config.vocab_size}))
    both = Training("", network, config.train, 1.0, objective_of(config))
    plain = config.train.model_copy(update={"steps": config.pretrain_steps})
    return [both] if config.base is not None else [Training("its text", network, plain), both]


recipe = Recipe(
    "grit",
    "a model that writes learns to embed and goes on writing; retrieval and loss before and after",
    GritConfig,
    grit,
    lambda config: batch_problems(config.mesh, train=config.train),
    cost,
    paper="arXiv:2402.09906",
    example="recursive-jax run configs/grit.yaml pairs=rows.jsonl text=corpus.txt --workdir runs/grit",
)
