"""LinkBERT (arXiv:2203.15827): an encoder learns from documents and those that they link to, in one context.

    pairs   = two segments: neighbours in a document, of unrelated documents, or of linked ones; a third each
    encoder = train(fresh or imported BERT, pairs, masked tokens + relation)
    measured: masked accuracy and relation accuracy on pairs drawn with other numbers; RUN/exported is a
    `BertForPreTraining` with three relations

Departures: pairs are drawn anew at every step. Expect (base, from BERT): HotpotQA 76.0 to 78.2, TriviaQA 70.3 to 73.9;
without links, or with random ones, BERT's."""

from __future__ import annotations

from typing import Any

import jax
from pydantic import Field, PositiveInt

from recursive_jax import mesh as meshes
from recursive_jax.config import ModelConfig, row_length
from recursive_jax.data.links import RELATIONS, LinkGraph, read_linked
from recursive_jax.data.tokenizers import FileTokenizer
from recursive_jax.errors import InputError
from recursive_jax.identity import named
from recursive_jax.models.model import transformer
from recursive_jax.models.network import Network, transformer_network
from recursive_jax.objectives.base import Extra
from recursive_jax.objectives.linked import LinkedPairs
from recursive_jax.recipes.recipe import Recipe, RecipeConfig, concluded
from recursive_jax.rounds.linkbert import save_linkbert
from recursive_jax.rounds.opening import load_model, open_network
from recursive_jax.rounds.preflight import batch_problems
from recursive_jax.rounds.run import Run
from recursive_jax.rounds.work import Training
from recursive_jax.train import checkpoint
from recursive_jax.train.measure import objective_metrics

BERT = ModelConfig(
    causal=False, layers=4, d_model=128, heads=4, max_length=128, block="post", norm="layer", norm_eps=1e-12,
    final_norm=False, embedding_norm=True, position="learned", token_types=2, head="transform", head_bias=True,
    bias=True, gated=False, activation="gelu",
)  # fmt: skip


class LinkBertConfig(RecipeConfig):
    """An encoder of documents with links."""

    NEEDS = ("documents",)

    recipe: str = "linkbert"

    base: str | None = Field(None, description="a BERT to go on from; default: a fresh one of `model`")
    documents: str = Field("", description="a folder of Markdown, wiki or text files that link to each other")
    relations: tuple[str, ...] = Field(RELATIONS, description="pairs that are drawn, as often each")
    segment: int = Field(0, ge=0, description="tokens of a segment; 0: half of a row")
    share: float = Field(0.15, gt=0.0, le=1.0, description="of tokens that are hidden")
    vocab_size: PositiveInt = Field(4096, description="of the tokenizer of a fresh model")
    model: ModelConfig = BERT
    export: bool = Field(True, description="write RUN/exported")


def objective_of(config: LinkBertConfig) -> LinkedPairs:
    return LinkedPairs(relations=config.relations, segment=config.segment, share=config.share)


def network_of(config: LinkBertConfig) -> Network:
    if config.base is not None:
        return open_network(config.base)
    return transformer_network(config.model.model_copy(update={"vocab": config.vocab_size}))


def linkbert(config: LinkBertConfig, workdir: Any, *, fork: Any = None, quiet: bool = False) -> list[dict]:
    """Runs (or goes on with) it in `workdir` and returns the metrics records."""
    documents = read_linked(config.documents)
    links = sum(map(len, LinkGraph.of(documents).neighbours))
    if not links:
        raise InputError(f"{config.documents}: none of {len(documents)} documents links to another of them")
    objective = objective_of(config)
    mesh = meshes.make_mesh(config.mesh)
    with Run(workdir, config, seed=config.seed, fork=fork, quiet=quiet) as run:
        round = run.round(0)
        if config.base is not None:
            blank = load_model(config.base, mesh)
        else:
            tokenizer = FileTokenizer.train_bpe([d.text for d in documents], config.vocab_size)
            blank = transformer(config.model, tokenizer, mesh, objective.extra_ids(tokenizer))
        length = row_length(config.train.length, blank.max_length)
        pairs = objective.resolved(blank).pack(documents, blank, length)
        model = round.train("encoder", blank, pairs, config.train, objective)
        with jax.set_mesh(mesh):
            like = objective.init(meshes.random_key(0), model)
        shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        target = jax.tree.map(shape, {"params": like.params, "state": like.state})
        extra = checkpoint.load(round.path / "encoder" / "extra", target)

        def numbers() -> dict[str, float]:
            how = {"batch": config.train.batch, "length": config.train.length, "seed": run.seed + 1}
            found = objective_metrics(model, documents, objective, extra=Extra(extra["params"]), **how)
            return {**found, "documents": len(documents), "links": links}

        round.evaluate("evaluation", model, named("linkbert", 1)(numbers))
        exported = run.path / "exported"
        if config.export and not exported.exists():
            made = run.path / "exported-part"  # named when it is whole
            meshes.on_main(lambda: made.rmtree(missing_ok=True))
            save_linkbert(model, extra["params"], made)
            meshes.on_main(lambda: made.rename(exported))
        return concluded(run, round, result="encoder")


recipe = Recipe(
    "linkbert",
    "an encoder learns from documents and those that they link to, in one context; exported with three relations",
    LinkBertConfig,
    linkbert,
    lambda config: batch_problems(config.mesh, train=config.train),
    lambda config: [Training("", network_of(config), config.train, 1.0, objective_of(config))],
    paper="arXiv:2203.15827",
    example="recursive-jax run configs/linkbert.yaml documents=wiki/ --workdir runs/linkbert",
)
