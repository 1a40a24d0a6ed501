"""The table of metrics: what a number is called, what it is in, and in which direction something is lost. Report,
status and profile read it; a new metric is a line here and the function that computes it. One that is not here is shown
by its name."""

from __future__ import annotations

import dataclasses
import math

SHARE = {"least": 0.0, "most": 1.0}
POSITIVE = {"least": 0.0}
COUNTED = {"counted": True}


@dataclasses.dataclass(frozen=True)
class Metric:
    """loss: the direction in which something is lost: `higher`, `lower` or `either`. unit: empty for shares and counts.
    panel: its chart in the report has this place, 0: none. headline: its column in `status` has this place, 0: none.
    note: a line below the chart's title. needs: what it is computed from. counted: whether it depends on how much was
    counted, so that it is one number only beside the number of tokens or rows. least, most: the range it has."""

    name: str
    title: str
    loss: str = "either"
    unit: str = ""
    panel: int = 0
    headline: int = 0
    note: str = ""
    needs: str = "rows"
    counted: bool = False
    least: float = -math.inf
    most: float = math.inf


# fmt: off
METRICS: dict[str, Metric] = {
    m.name: m
    for m in (
        Metric("accuracy", "Right answers", "lower", "", 0, 1, "share of held-out rows with every field right", "task",
               **SHARE),
        Metric("format", "Well-formed answers", "lower", "", 0, 2,
               "share that has the completion's form and ends by itself", "task", **SHARE),
        Metric("ce_task", "Loss of the right answers", "higher", "nats per token", 0, 3,
               "nats per token on held-out rows; lower is better", "task", **POSITIVE),
        Metric("score", "Mean score", "lower", "", 0, 12, "of the task's reward, over held-out rows", "task"),
        Metric("win_rate", "Answers better than before", "lower", "", 0, 13,
               "by the judge, in both orders; a tie is a half", "task", **SHARE),
        Metric("data_rows", "Rows learnt from", note="of the round's training"),
        Metric("target", "Target task", "lower", "", 10, 10, "mean score of the round's student", "task"),
        Metric("retention", "Retention probe", "lower", "", 11, 11, "mean score on what is not trained for", "task"),
        Metric("kl_total", "KL to the truth", "higher", "nats per token", 1, 5,
               "nats per token; exact, or a bound where a model fills gaps", "model, embedded language", **POSITIVE),
        Metric("ce_real", "Held-out real text", "higher", "nats per token", 2, 4,
               "cross-entropy, nats per token; lower is better", "model, real rows", **POSITIVE),
        Metric("ppl_pseudo", "Pseudo-perplexity", "higher", "", 0, 14,
               "each held-out token given all others (arXiv:1910.14659)", "model, real rows", least=1.0),
        Metric("ppl_gen", "Generated text, judged by the round-0 model", "either", "", 3, 6, "perplexity",
               "rows, the round-0 model", least=1.0),
        Metric("valid", "Valid sentences", "lower", "", 4, 7,
               "right form, agreement and facts; share of generated sentences", "rows, embedded language", **SHARE),
        Metric("distinct_2", "Distinct bigrams", "lower", "", 5, 8, "share of generated bigrams that differ",
               **COUNTED, **SHARE),
        Metric("entropy_2gram_mm", "Bigram entropy", "lower", "nats", 6, 0, "nats, with the Miller-Madow correction",
               **COUNTED, **POSITIVE),
        Metric("tail_mass_lost", "Tail mass lost", "higher", "", 7, 9,
               "share of the real mass on types no longer produced", "rows, real rows", **COUNTED, **SHARE),
        Metric("repetition_2", "Repetition", "higher", "", 8, 0, "share of repeated bigrams within a row", **SHARE),
        Metric("length_mean", "Length", "either", "tokens", 9, 0, "tokens per generated row", **POSITIVE),
        Metric("entropy_1gram_mm", "unigram entropy, nats", "lower", "nats", **COUNTED, **POSITIVE),
        *(Metric(f"distinct_{n}", f"distinct {n}-grams, share", "lower", **COUNTED, **SHARE) for n in (1, 3, 4)),
        *(Metric(f"self_bleu_{n}", f"self-BLEU-{n}", "higher", **COUNTED, **SHARE) for n in (2, 3, 4)),
        Metric("zipf_mle", "Zipf exponent", **COUNTED),
        Metric("types_alive", "token types in use", "lower", **COUNTED, **POSITIVE),
        Metric("good_turing", "mass of unseen types (Good-Turing)", "lower", **COUNTED, **SHARE),
        Metric("decile_drift", "drift of the frequency deciles, |log ratio|", "higher", needs="rows, real rows",
               **COUNTED, **POSITIVE),
        Metric("kl_1gram", "KL(real || generated) of unigrams, nats", "higher", "nats", needs="rows, real rows",
               **COUNTED, **POSITIVE),
        Metric("js_1gram", "Jensen-Shannon of unigrams, nats", "higher", "nats", needs="rows, real rows",
               **COUNTED, least=0.0, most=math.log(2)),
        Metric("tv_1gram", "total variation of unigrams", "higher", needs="rows, real rows", **COUNTED, **SHARE),
        Metric("variance_ratio", "variance over the real one", "lower", needs="vectors", **POSITIVE),
        Metric("logdet_diff", "log-determinant against the real one, nats per feature", "lower", "nats",
               needs="vectors"),
        Metric("frechet", "Frechet distance", "higher", needs="vectors", **COUNTED, **POSITIVE),
        Metric("kid", "kernel distance (KID)", "higher", needs="vectors"),
        Metric("wasserstein_sliced", "sliced Wasserstein-1", "higher", needs="vectors", **COUNTED, **POSITIVE),
        *(Metric(f"vendi_{q}", f"Vendi score, order {q}", "lower", needs="vectors", **COUNTED, least=1.0)
          for q in ("0.5", "1", "2", "inf")),
        Metric("mean_cosine", "mean cosine of two rows", "higher", needs="vectors", least=-1.0, most=1.0),
        Metric("neighbour_entropy", "entropy from neighbours, nats", "lower", "nats", needs="vectors", **COUNTED),
        *(Metric(name, name, "lower", needs="vectors", **COUNTED, **SHARE)
          for name in ("precision", "recall", "coverage")),
        Metric("density", "density", "lower", needs="vectors", **COUNTED, **POSITIVE),
        Metric("mauve", "MAUVE", "lower", needs="vectors", **COUNTED, **SHARE),
        Metric("representation_drift", "distance of the means over the real spread", "higher", needs="vectors",
               **POSITIVE),
    )
}
# fmt: on


#: What stands around a number: its error, its interval, its null.
AROUND = ("_stderr", "_null", "_ci_lo", "_ci_hi")


def metric(name: str) -> Metric:
    """The table's line, or for a metric of the user's its name alone."""
    return METRICS.get(name) or Metric(name, name)


def headlines(names: set[str]) -> list[str]:
    """Of the metrics that there are, those of `status`, in the table's order; where it names none, all of them. A score
    beside an accuracy is the same number."""
    names = names - {"score"} if "accuracy" in names else names
    known = sorted((m for m in METRICS.values() if m.headline and m.name in names), key=lambda m: m.headline)
    return [m.name for m in known] or sorted(n for n in names if not n.endswith(AROUND))[:8]


def panels(names: set[str]) -> list[Metric]:
    """The charts of a report, in the table's order; behind them those of metrics that the table does not know."""
    known = sorted((m for m in METRICS.values() if m.panel and m.name in names), key=lambda m: m.panel)
    own = [n for n in sorted(names) if n not in METRICS and not n.endswith(AROUND)]
    return known or [metric(n) for n in [*own, *(n for n in sorted(names) if n in METRICS)]]
