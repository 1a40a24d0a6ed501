"""What the objectives on text reach, and what they cost: the figures of docs/objectives.md.

    python benchmarks/objectives.py speed                    tokens per second beside the causal step, at equal shapes
    python benchmarks/objectives.py hybrid --text FILE       a hybrid and a decoder on the same tokens
    python benchmarks/objectives.py twohop                   LinkBERT: facts that need two documents
    python benchmarks/objectives.py raft                     edited documents, and distractors alone
    python benchmarks/objectives.py scrub                    LEACE in SmolLM2-135M, layer by layer
    python benchmarks/objectives.py cache                    kept documents of 512 tokens

One at a time, and nothing beside it."""

import argparse
import collections
import json
import statistics
import time

import jax
import numpy as np

import recursive_jax as rj
from recursive_jax.collapse.scrubbing import inputs_of, probe, scrub
from recursive_jax.config import ModelConfig, TrainConfig
from recursive_jax.curate.api_calls import check_call
from recursive_jax.data.dataset import real_rows
from recursive_jax.data.retrieval import Mixture, Question, raft_rows
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer
from recursive_jax.generate.request import Request
from recursive_jax.mesh import make_mesh, put_batch
from recursive_jax.models.model import transformer
from recursive_jax.objectives import Causal, Denoisers, Hybrid, Masked, MaskedDiffusion
from recursive_jax.objectives.linked import LinkedPairs
from recursive_jax.train.measure import objective_metrics
from recursive_jax.train.optimizer import Hyper
from recursive_jax.train.step import start_program, step_program

MESH = make_mesh()


def say(**found) -> None:
    print(json.dumps(found), flush=True)


def speed(args) -> None:
    """One step of each objective in turn, five rounds; medians, as a share of the causal one's."""
    B, T, vocab = 16, 256, 4096
    rng = np.random.default_rng(0)
    tokenizer = ByteTokenizer()
    rows = real_rows([rng.integers(0, 250, T - 2).astype(np.int32) for _ in range(4 * B)], [""] * 4 * B)
    kinds = {
        "causal": (Causal(), True),
        "masked": (Masked(share=0.3, spans=3), False),
        "hybrid": (Hybrid(), True),
        "masked_diffusion": (MaskedDiffusion(), False),
        "turned": (MaskedDiffusion(anneal=0.5), True),
        "denoisers": (Denoisers(), True),
    }
    steps = {}
    for name, (objective, causal) in kinds.items():
        config = ModelConfig(layers=4, d_model=256, heads=4, d_ff=688, max_length=T, vocab=vocab, causal=causal)
        model = transformer(config, tokenizer, MESH).initialized(0)
        objective = objective.resolved(model)
        batches = objective.pack(rows, model, T)
        batches.begin(B, 0)
        program = step_program(model.network, objective, 1, "float32")
        with jax.set_mesh(MESH):
            state = start_program()(model.params, {}, {}, Hyper.of(TrainConfig(steps=100), 0))
        steps[name] = [program, state, batches]
    times = collections.defaultdict(list)
    with jax.set_mesh(MESH):
        for n in range(8):
            for name, held in steps.items():
                program, state, batches = held
                rows_ = put_batch(MESH, batches.next(n))
                start = time.perf_counter()
                state, metrics = program(state, rows_, {}, {})
                jax.block_until_ready(metrics)
                held[1] = state
                if n >= 2:
                    times[name].append(time.perf_counter() - start)
    base = statistics.median(times["causal"])
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        say(objective=name, seconds=round(middle, 3), of_causal=round(base / middle, 3), positions=B * T)


def hybrid(args) -> None:
    """A decoder, a hybrid with as many tokens, and one with as many causal tokens: perplexity and masked accuracy."""
    text = open(args.text, encoding="utf-8").read()[: args.characters]
    cut = int(len(text) * 0.95)
    tokenizer = FileTokenizer.train_bpe([text[:cut]], 2048)
    T = 128
    encode = lambda t: np.asarray(tokenizer.encode(t), np.int32)
    pieces = lambda ids: [ids[i : i + T] for i in range(0, len(ids), T)]
    learnt, held = pieces(encode(text[:cut])), pieces(encode(text[cut:]))[:64]
    data = real_rows(learnt, [""] * len(learnt))
    config = ModelConfig(layers=3, d_model=128, heads=4, max_length=T, vocab=tokenizer.vocab + 1)
    for name, objective in (
        ("causal", Causal()),
        ("hybrid 1/16", Hybrid(share=0.3, final_share=0.15, spans=3)),
        ("hybrid 1/2", Hybrid(causal=0.5, share=0.3, final_share=0.15, spans=3)),
        ("masked", Masked(share=0.3, final_share=0.15, spans=3)),
    ):
        start = time.perf_counter()
        trained = rj.train(
            transformer(config, tokenizer, MESH),
            data,
            objective,
            steps=args.steps,
            batch=16,
            learning_rate=2e-3,
            length=T,
            quiet=True,
        )
        nll = np.concatenate([-x for x in rj.token_logprobs(trained.model, held)])
        masked = objective_metrics(trained.model, real_rows(held, [""] * len(held)), Masked(), length=T, steps=8)
        say(
            objective=name,
            perplexity=round(float(np.exp(nll.mean())), 2),
            seconds=round(time.perf_counter() - start),
            masked_accuracy=round(masked["masked_accuracy"], 4),
        )


def twohop(args) -> None:
    """A world in which who somebody's friend is stands in one document, and where the friend lives in the one that it
    links to. Asked of people that nobody has read of: with both documents in sight, where does the friend live?"""
    rng = np.random.default_rng(0)
    people = [f"p{n}" for n in range(900)]
    cities = [f"c{n}" for n in range(12)]
    lives = {p: cities[rng.integers(12)] for p in people}
    friend = {p: people[n ^ 1] for n, p in enumerate(people)}
    vocabulary = ["<|bos|>", "<|eos|>", "<|pad|>", "[MASK]", *people, *cities, "friend", "of", "lives", "in", "thus"]
    ids = {w: n for n, w in enumerate(vocabulary)}

    class Words:
        vocab, bos, eos, pad, mask, special_ids = len(vocabulary), 0, 1, 2, 3, ()

        def encode(self, text):
            return [ids[w] for w in text.split()]

        def decode(self, tokens):
            return " ".join(vocabulary[int(t)] for t in tokens)

        def to_json(self):
            return {"kind": "words"}

    read, asked = people[:800], people[800:]
    documents = [{"name": p, "text": f"{p} lives in {lives[p]}", "links": []} for p in read]
    documents += [
        {"name": f"of {p}", "text": f"friend of {p} {friend[p]} thus {lives[friend[p]]}", "links": [friend[p]]}
        for p in read
    ]
    config = ModelConfig(layers=2, d_model=64, heads=4, max_length=16, causal=False, token_types=2)
    for relations in (("random", "linked"), ("random",)):
        model = transformer(config, Words(), MESH)
        trained = rj.train(
            model,
            documents,
            LinkedPairs(share=0.3, relations=relations, segment=6),
            steps=args.steps,
            batch=64,
            learning_rate=3e-3,
            length=16,
            quiet=True,
        )
        right = 0
        for p in asked:
            first = Words().encode(f"friend of {p} {friend[p]} thus")
            second = Words().encode(f"{friend[p]} lives in {lives[friend[p]]}")
            row = [0, *first, 3, 1, *second, 1]
            types = [0] * (len(first) + 3) + [1] * (len(second) + 1)
            logits = np.asarray(trained.model.logits(np.asarray([row]), types_BT=np.asarray([types])))
            city = logits[0, len(first) + 1, [ids[c] for c in cities]].argmax()
            right += cities[city] == lives[friend[p]]
        say(
            relations=relations,
            two_hop_accuracy=round(right / len(asked), 3),
            asked=len(asked),
            by_chance=round(1 / 12, 3),
        )


def raft(args) -> None:
    """APIs whose names nobody has seen: what a model that reads their documents does with a golden, an edited and a
    missing one, trained with its golden document always at hand, or in four of five rows."""
    rng = np.random.default_rng(0)
    word = lambda n: "".join(rng.choice(list("abcdefghijklmnoprstuvw"), n))
    things = [word(4) for _ in range(args.apis)]
    names = [word(5) for _ in range(args.apis)]
    arguments = [word(3) for _ in range(args.apis)]
    documents = [f"{t}: {n}({a}=1)" for t, n, a in zip(things, names, arguments, strict=True)]
    questions = [
        Question(t, f"{n}({a}=1)", i) for i, (t, n, a) in enumerate(zip(things, names, arguments, strict=True))
    ]
    cut = args.apis * 9 // 10

    def edit(document, answer, rng):
        new = "".join(rng.choice(list("abcdefghijklmnoprstuvw"), 3))
        at = int(document[document.index("(") + 1 : document.index("=")] in document) and document.index("(") + 1
        return document[:at] + new + document[at + 3 :], answer[: answer.index("(") + 1] + new + answer[
            answer.index("=") :
        ]

    tokenizer = ByteTokenizer()
    config = ModelConfig(layers=4, d_model=128, heads=4, max_length=160)
    for name, golden in (("always golden", 1.0), ("golden 0.8", 0.8)):
        rows = []
        for epoch in range(args.epochs):
            rows += raft_rows(
                questions[:cut],
                documents[:cut],
                Mixture(golden, distractors=2),
                seed=epoch,
                missing="none",
                prompt="{documents}\nQ {question}\nA",
            )
        trained = rj.train(
            transformer(config, tokenizer, MESH),
            [{k: r[k] for k in ("prompt", "completion")} for r in rows],
            steps=args.steps,
            batch=32,
            learning_rate=1e-3,
            length=160,
            quiet=True,
        ).model
        found = {}
        for kind, mixture in (
            ("golden", Mixture(1.0, distractors=2)),
            ("edited", Mixture(1.0, 1.0, 2)),
            ("missing", Mixture(0.0, distractors=2)),
        ):
            held = [Question(q.question, q.answer, n) for n, q in enumerate(questions[cut:])]
            test = raft_rows(
                held,
                documents[cut:],
                mixture,
                seed=99,
                edit=edit,
                missing="none",
                prompt="{documents}\nQ {question}\nA",
            )
            texts = rj.generate(trained, [r["prompt"] for r in test], {"temperature": 0.0, "max_tokens": 20}).column(
                "text"
            )
            said = collections.Counter(
                "right"
                if kind != "missing" and check_call(t, r["answer"]) == "right"
                else "none"
                if t.strip() == "none"
                else "another"
                for t, r in zip(texts, test, strict=True)
            )
            found[kind] = {k: round(v / len(test), 3) for k, v in said.items()}
        say(trained=name, **found)


def scrubbing(args) -> None:
    """Whether a token is a digit, in SmolLM2-135M: a fresh probe at every layer before and after, and the loss."""
    model = rj.load_model("smollm2")
    rng = np.random.default_rng(0)
    text = lambda n: " ".join(
        str(rng.integers(10, 99)) if rng.random() < 0.4 else w
        for w in rng.choice("the a of cats dogs run fast slow house tree in on red blue".split(), n)
    )
    rows = [np.asarray(model.tokenizer.encode(text(40)), np.int32)[:64] for _ in range(args.rows)]
    digit = np.array([model.tokenizer.token(i).strip("Ġ").isdigit() for i in range(model.vocab)])
    # What the *next* token is cannot be seen in the token itself: the concept is of the context.
    labels = [digit[r].astype(int) for r in rows]
    held = slice(args.rows * 3 // 4, None)
    learnt = slice(0, args.rows * 3 // 4)
    z, z_held = (np.concatenate(labels[s]) for s in (learnt, held))
    majority = max(z_held.mean(), 1 - z_held.mean())
    loss = lambda m: float(np.mean(np.concatenate([-x for x in rj.token_logprobs(m, rows[held])])))

    def probes(found, seen_model):
        seen = inputs_of(seen_model, rows)
        each = []
        for layer, erasers in zip(seen, found.erasers if found else [None] * len(seen), strict=True):
            for site, parts in layer.items():
                through = (lambda x, e=erasers, s=site: e[s].erase(x)) if erasers else (lambda x: x)
                x, x_held = (through(np.concatenate(parts[s]).astype(np.float64)) for s in (learnt, held))
                each.append(probe(x, z, x_held, z_held))
        return each

    say(
        state="before",
        majority=round(majority, 4),
        least=round(min(probes(None, model)), 4),
        loss=round(loss(model), 3),
    )
    for name, how in (
        ("scrubbed", {}),
        ("each layer for itself", {"independent": True}),
        ("random", {"method": "random"}),
    ):
        start = time.perf_counter()
        found = scrub(model, rows[learnt], labels[learnt], **how)
        took = time.perf_counter() - start
        each = np.array(probes(found, found.model))
        say(
            state=name,
            largest=round(float(each.max()), 4),
            mean=round(float(each.mean()), 4),
            seconds=round(took),
            off_by_more_than_1=int((np.abs(each - majority) > 0.01).sum()),
            sites=len(each),
            loss=round(loss(found.model), 3),
        )


def cache(args) -> None:
    """Eight questions about each of four documents of 512 tokens, by requests that read them once, and by plain
    ones."""
    config = ModelConfig(layers=4, d_model=256, heads=4, d_ff=688, max_length=640, vocab=4096)
    model = transformer(config, ByteTokenizer(), MESH).initialized(0)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 250, 511).astype(np.int32) for _ in range(4)]
    asked = [np.concatenate([documents[i % 4], rng.integers(0, 250, 12).astype(np.int32)]) for i in range(32)]
    kept = [Request(i, x, both_ways=512) for i, x in enumerate(asked)]
    plain = [Request(i, x) for i, x in enumerate(asked)]
    settings = {"temperature": 0.0, "max_tokens": 8, "batch": 8}
    times = collections.defaultdict(list)
    for n in range(4):
        for name, requests in (("kept", kept), ("plain", plain)):
            start = time.perf_counter()
            rj.generate(model, requests, settings)
            if n:
                times[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(x) for name, x in times.items()}
    say(**{k: round(v, 3) for k, v in middle.items()}, times_faster=round(middle["plain"] / middle["kept"], 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = {"speed": speed, "hybrid": hybrid, "twohop": twohop, "raft": raft, "scrub": scrubbing, "cache": cache}
    parser.add_argument("what", choices=known)
    parser.add_argument("--text")
    parser.add_argument("--characters", type=int, default=1_500_000)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--apis", type=int, default=2000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rows", type=int, default=160)
    args = parser.parse_args()
    known[args.what](args)


if __name__ == "__main__":
    main()
