"""Two ways to write synthetic text, compared: from left to right, and by filling gaps (arXiv:2405.12630).

    clm = train(fresh decoder, texts)                            both of one size, on the same texts
    mlm = train(fresh encoder, texts, half of the tokens hidden)
    for each text: clm goes on from its first half; mlm fills the half that is hidden, in several ways
    how much of the original stands at the positions that were written; then a classifier that learns from the written
    texts alone, with the labels of the originals, on real held-out rows

Departures: the paper's corpora (discharge summaries, plots, authors) are not here; any labelled file is. Its scores are
of whole texts, which hold the tokens that were given: here only written positions count, and `copy` (as many tokens of
the context, again) is scored beside them. Expect: the paper finds MLM better on all its corpora, and no strong tie
between the quality of texts and their use."""

from __future__ import annotations

from typing import Any

import numpy as np
from pydantic import Field, PositiveInt

from recursive_jax import mesh as meshes
from recursive_jax.config import ModelConfig, TaskConfig, TrainConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.task import hold_out, read_rows
from recursive_jax.data.tokenizers import FileTokenizer
from recursive_jax.errors import InputError
from recursive_jax.identity import named
from recursive_jax.models.model import transformer
from recursive_jax.models.network import TransformerNetwork, transformer_network
from recursive_jax.objectives import Masked
from recursive_jax.recipes.finetune import as_they_are
from recursive_jax.recipes.infilling_rows import FILLED, overlap, utility, written_anew
from recursive_jax.recipes.recipe import Recipe, RecipeConfig, concluded
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Training


class InfillingConfig(RecipeConfig):
    """A decoder and an encoder of one size write texts anew."""

    NEEDS = ("task",)

    recipe: str = "infilling"

    task: TaskConfig
    text: str = Field("text", description="the rows' column with the text")
    label: str = Field("label", description="the rows' column with the class")
    vocab_size: PositiveInt = Field(2048, description="of the tokenizer that is trained on the texts")
    model: ModelConfig = ModelConfig(layers=4, d_model=128, heads=4, max_length=64)
    train: TrainConfig = TrainConfig(steps=1000, batch=32, learning_rate=2e-3)
    hidden: float = Field(0.5, gt=0.0, lt=1.0, description="share of the tokens that are hidden, in training and after")
    rewritten: PositiveInt = Field(1000, description="texts that are written anew, of those learnt from")


def network_of(config: InfillingConfig) -> TransformerNetwork:
    return transformer_network(config.model.model_copy(update={"vocab": config.vocab_size}))


def infilling(config: InfillingConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records, one for each way to write."""
    rows = read_rows(config.task.path)[: config.task.limit]
    held = read_rows(config.task.validation) if config.task.validation else None
    train, held, _ = (rows, held, "") if held else hold_out(rows, config.task.holdout, config.seed, config.label)
    for n, row in enumerate((*train, *held)):
        missing = [key for key in (config.text, config.label) if not isinstance(row.get(key), str) or not row[key]]
        if missing:
            raise InputError(f"row {n} has no text under {missing[0]!r}; there are: {', '.join(map(str, row))}")
    tokenizer = FileTokenizer.train_bpe([r[config.text] for r in train], config.vocab_size)
    longest = config.model.max_length - 2
    encoded = lambda found: [tokenizer.encode(r[config.text])[:longest] for r in found]
    texts, test = encoded(train), (encoded(held), [r[config.label] for r in held])
    if min(map(len, texts)) < 2:
        raise InputError(f"{config.task.path} has texts of one token, which have no part to write: leave them out")
    n = min(config.rewritten, len(texts))
    chosen = np.random.default_rng(config.seed).permutation(len(texts))[:n]
    some, labels = [texts[i] for i in chosen], [train[i][config.label] for i in chosen]
    mesh = meshes.make_mesh(config.mesh)
    objective = Masked(share=config.hidden, replaced=1.0, random=0.0)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        round = run.round(0)
        data = round.dataset("texts", as_they_are, Dataset.from_rows([{"tokens": [*t, tokenizer.eos]} for t in texts]))
        models = {}
        for name, causal, how in (("clm", True, {}), ("mlm", False, {"objective": objective})):
            shape = config.model.model_copy(update={"causal": causal})
            spare = 0 if causal else objective.extra_ids(tokenizer)
            models[name] = round.train(name, transformer(shape, tokenizer, mesh, spare), data, config.train, **how)
        real = utility(some, labels, test, tokenizer.vocab)
        for way in ("clm", *FILLED):
            model = models[way[:3]]
            new = round.dataset(
                f"{way}-texts", written_anew, model, way, some, config.hidden, config.sampling, config.seed
            )
            measured = lambda new=new: {
                **overlap(new.value, some),
                "utility": utility(new.value.column("tokens"), labels, test, tokenizer.vocab),
                "utility_real": real,
            }
            round.evaluate(f"{way}-scores", model, named("infilling", 1)(measured), inputs={"written": new.fingerprint})
        return concluded(run, round, result="mlm")


recipe = Recipe(
    "infilling",
    "a decoder and an encoder of one size write texts anew, from left to right or by filling gaps; what each is worth",
    InfillingConfig,
    infilling,
    lambda config: batch_problems(config.mesh, train=config.train),
    lambda config: [Training("", network_of(config), config.train, 2.0)],
    paper="arXiv:2405.12630",
    example="recursive-jax run configs/infilling.yaml --workdir runs/infilling",
)  # fmt: skip
