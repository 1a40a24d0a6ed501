"""Regimes, budgets, lineage, the durable verbs, the report; and the examples of the README."""

from __future__ import annotations

import re
import runpy
from html.parser import HTMLParser

import numpy as np
import pytest

from recursive_jax.config import SamplingConfig, TrainConfig
from recursive_jax.curate.select import Rule, at_least, select, tokens_between, unique, with_status
from recursive_jax.data.dataset import Dataset, real_rows
from recursive_jax.errors import InputError
from recursive_jax.generate.request import unconditional
from recursive_jax.identity import named
from recursive_jax.models.model import transformer
from recursive_jax.recipes import load_config
from recursive_jax.recipes.collapse import collapse
from recursive_jax.rounds.durable import Stored
from recursive_jax.rounds.iterate import Pool, iterate
from recursive_jax.rounds.lineage import ancestors, evaluations, manifests
from recursive_jax.rounds.opening import load_model
from recursive_jax.rounds.report.charts import ticks
from recursive_jax.rounds.report.series import Arm, change
from recursive_jax.rounds.run import Run
from tests.conftest import ROOT

SMALL = [
    "data.real_tokens=4000",
    "data.language.types=2",
    "data.language.nouns=4",
    "data.language.verbs=2",
    "data.language.first_names=5",
    "data.language.last_names=5",
    "data.language.values=5",
    "model.layers=1",
    "model.d_model=16",
    "model.heads=2",
    "model.max_length=32",
    "train.steps=8",
    "train.batch=8",
    "train.tensorboard=false",
    "sampling.batch=32",
    "rounds.count=2",
    "rounds.token_budget=1500",
    "evaluate.rows=16",
    "evaluate.samples=32",
    "evaluate.token_budget=300",
    "mesh.data=1",
]


def stored(rows: Dataset, mark: str) -> Stored:
    return Stored(None, mark, lambda _: rows, {})


def synthetic(name: str, count: int) -> Stored:
    rows = real_rows([[7] * 10] * count, ["x"] * count, prefix=name)
    return stored(rows.with_column("synthetic", [True] * count), name)


REAL = stored(real_rows([[3] * 10] * 400, ["r"] * 400), "real")


def origins(data: Dataset) -> dict[str, int]:
    """Tokens by origin of the row."""
    out: dict[str, int] = {}
    for row, tokens in zip(data.column("id"), data.tokens(), strict=True):
        key = row.split("/")[0]
        out[key] = out.get(key, 0) + len(tokens)
    return out


def pool_after(rounds: int, **settings) -> Pool:
    pool = Pool(REAL, tokens=1000, **settings)
    pool.rows = [synthetic(f"s{k}", 200) for k in range(1, rounds + 1)]
    return pool


def test_replace_takes_only_the_last_round():
    assert origins(pool_after(3).mix(3, 0)) == {"s3": 1000}


def test_window_takes_the_last_k():
    found = origins(pool_after(4, data="window", window=2).mix(4, 0))
    assert set(found) == {"s3", "s4"} and sum(found.values()) == 1000


def test_accumulate_draws_from_everything_in_proportion():
    found = origins(pool_after(4, data="accumulate").mix(4, 0))
    assert set(found) == {"real", "s1", "s2", "s3", "s4"} and sum(found.values()) == 1000
    assert found["real"] == pytest.approx(1000 * 4000 / 12000, rel=0.25)


def test_anchor_is_the_same_real_rows_every_round():
    pool = pool_after(3, anchor=0.1)
    mixes = [pool.mix(k, 0) for k in (1, 2, 3)]
    real = [sorted(i for i in m.column("id") if i.startswith("real/")) for m in mixes]
    assert real[0] == real[1] == real[2] and len(real[0]) == 10
    assert origins(mixes[2]) == {"real": 100, "s3": 900} and pool.synthetic_tokens == 900


def test_fresh_is_new_real_rows_every_round_until_there_are_none():
    pool = pool_after(3, fresh=0.2, anchor=0.1)
    real = [{i for i in pool.mix(k, 0).column("id") if i.startswith("real/")} for k in (1, 2, 3)]
    anchor = set.intersection(*real)
    assert len(anchor) == 10 and all(len(r) == 30 for r in real)
    assert not (real[0] - anchor) & (real[1] - anchor) and not (real[1] - anchor) & (real[2] - anchor)
    with pytest.raises(InputError, match="round 40 has no new real rows left"):
        pool.mix(40, 0)


def test_grow_uses_the_whole_pool():
    assert sum(origins(pool_after(3, data="accumulate", grow=True).mix(3, 0)).values()) == 4000 + 6000


def test_accumulate_subsample_keeps_to_the_budget_where_accumulate_grows():
    found = origins(pool_after(3, data="accumulate_subsample", grow=True).mix(3, 0))
    assert sum(found.values()) == 1000 and set(found) == {"real", "s1", "s2", "s3"}


def test_carry_passes_rows_of_the_last_training_set_on():
    """The official code of arXiv:2305.17493 keeps a tenth of the current training set, not of the original one."""
    pool = pool_after(1, carry=0.1)
    assert origins(pool.mix(1, 0)) == {"real": 100, "s1": 900} and pool.synthetic_tokens == 900
    pool = pool_after(2, carry=0.1)
    pool.training = stored(pool_after(1, carry=0.1).mix(1, 0), "t1")
    found = origins(pool.mix(2, 0))
    assert sum(found.values()) == 1000 and found["s2"] == 900 and found.get("real", 0) < 60  # a tenth of a tenth, about
    assert "t1" in [s.fingerprint for s in pool.sources()]


def test_weighted_brings_as_much_new_truth_and_its_weight():
    pool = pool_after(2, weighted=0.7)
    first, second = pool.mix(1, 0), pool.mix(2, 0)
    assert origins(second) == {"real": 1000, "s2": 1000}
    assert not {i for i in first.column("id") if i.startswith("real")} & set(second.column("id"))
    weights = dict(zip([i.split("/")[0] for i in second.column("id")], second.column("weight"), strict=True))
    assert weights == pytest.approx({"real": 0.7, "s2": 0.3})


def test_a_verifier_keeps_right_and_wrong_rows_at_their_rates():
    data = synthetic("s", 4000).value
    right = np.arange(4000) % 2 == 0
    pool = pool_after(1, filtered=(Rule("even", lambda d: right), 0.9, 0.25))
    kept, dropped = select(data, [pool.verified(seed=3)])
    found = np.isin(data.column("id"), kept.column("id"))
    assert found[right].mean() == pytest.approx(0.9, abs=4 * np.sqrt(0.9 * 0.1 / 2000))
    assert found[~right].mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.25 * 0.75 / 2000))
    assert list(dropped) == ["even: right at 0.9, wrong at 0.25, seed 3"]


def test_rounds_may_grow_or_follow_a_schedule():
    assert load_config(None, ["rounds.count=3", "rounds.token_budget=100", "rounds.growth=2"]).rounds.sizes == (
        100,
        400,
        900,
    )
    config = load_config(None, ["rounds.count=3", "rounds.schedule=[300, 200, 700]", "arms.main.fresh=0.5"])
    pool = Pool.of(REAL, config.arms["main"], config.rounds)
    used: list[str] = []
    for k, size in enumerate((300, 200, 700), start=1):
        pool.rows = [synthetic(f"s{k}", 200)]
        pool.begin(k)
        mixed = pool.mix(k, 0)
        assert origins(mixed) == {"real": size // 2, f"s{k}": size // 2}
        used += [i for i in mixed.column("id") if i.startswith("real/")]
    assert len(used) == len(set(used)) == 60 and config.arms["main"].real_tokens(config.rounds.sizes) == 600
    with pytest.raises(InputError, match="schedule has 2 sizes, count=3; give as many"):
        load_config(None, ["rounds.count=3", "rounds.schedule=[1, 2]"])


def test_all_real_needs_no_generation():
    pool = Pool(REAL, tokens=1000, fresh=1.0)
    assert pool.synthetic_tokens == 0 and origins(pool.mix(1, 0)) == {"real": 1000}


def test_failed_rows_are_never_trained_on():
    pool = pool_after(1)
    rows = pool.rows[0].value
    pool.rows = [stored(rows.with_column("status", ["ok"] * 150 + ["prompt_too_long"] * 50), "s1")]
    assert len(pool.mix(1, 0).where(status="prompt_too_long")) == 0


def test_iterate_starts_students_where_it_says():
    class FakeChain:
        def round(self, number):
            return number

    class FakeModel:
        def __init__(self, name):
            self.name = name

        def with_params(self, params):
            return FakeModel("blank")

    def run(init):
        log = []

        def step(round, teacher, start, pool):
            log.append((round, teacher.name, start.name))
            return FakeModel(f"m{round}")

        iterate(FakeChain(), step, 3, base=FakeModel("base"), pool=None, init=init)
        return log

    assert run("base") == [(1, "base", "base"), (2, "m1", "base"), (3, "m2", "base")]
    assert run("previous") == [(1, "base", "base"), (2, "m1", "m1"), (3, "m2", "m2")]
    assert run("scratch") == [(1, "base", "blank"), (2, "m1", "blank"), (3, "m2", "blank")]
    with pytest.raises(InputError, match="init='middle'"):
        run("middle")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two regimes, two replicates, two rounds."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = load_config(
        None,
        [
            *SMALL,
            "arms={replace: {data: replace}, mixed: {data: accumulate, fresh: 0.2, sampling: {temperature: 0.8}}}",
            "replicates=2",
        ],
    )
    return folder, collapse(config, folder, quiet=True)


def test_the_folder_is_the_contract(finished):
    folder, records = finished
    for file in (
        "run.json",
        "metrics.jsonl",
        "report.html",
        "rounds/0000/teacher/manifest.json",
        "rounds/0000/teacher/checkpoint",
        "replace/replicate-1/rounds/0002/student/checkpoint",
        "mixed/replicate-0/rounds/0001/rows/rows-00000.parquet",
    ):
        assert (folder / file).exists(), file
    assert [(r["arm"], r["replicate"], r["round"]) for r in records] == [("main", 0, 0)] + [
        (a, r, k) for a in ("replace", "mixed") for r in (0, 1) for k in (1, 2)
    ]
    assert records == evaluations(folder)
    for m in manifests(folder):
        assert {"verb", "fingerprint", "inputs", "config", "seed", "counts", "seconds", "status"} <= set(m)
    assert not list(folder.rglob("resume")) and not list(folder.rglob("pending.json"))


def test_every_round_has_the_same_budget(finished):
    folder, _ = finished
    trained = [m for m in manifests(folder) if m["name"] == "training"]
    assert len(trained) == 8
    for m in trained:
        assert 0.97 * 1500 <= m["counts"]["tokens"] <= 1500
    fresh = [m["counts"]["real_tokens"] for m in trained if m["arm"] == "mixed"]
    assert min(fresh) >= 0.18 * 1500


def test_the_stopped_share_is_that_of_the_samples(finished):
    folder, records = finished
    for record in records[1:3]:
        where = folder / record["arm"] / f"replicate-{record['replicate']}" / f"rounds/{record['round']:04d}/samples"
        status = Dataset.read([str(p) for p in sorted(where.glob("rows-*.parquet"))]).column("status")
        assert record["metrics"]["stopped_share"] == pytest.approx(status.count("ok") / len(status))
        assert status.count("ok") != len(status) / 2  # else the share of the others would do


def test_metrics_are_finite_and_consistent(finished):
    for record in finished[1]:
        m = record["metrics"]
        lists = {k: [x for x in v if x is not None] if isinstance(v, list) else v for k, v in m.items()}
        assert all(np.isfinite(v).all() for v in lists.values())
        assert m["kl_total"] == pytest.approx(m["kl_syn"] + m["kl_sem"] + m["kl_fact"] + m["kl_dist"], abs=1e-6)
        assert sum(m["ppl_hist_under_gen0"]) == pytest.approx(1.0, abs=1e-3)


@pytest.mark.slow
def test_every_regime_of_the_laboratory_runs_on_models(tmp_path):
    arms = (
        "arms={sub: {data: accumulate_subsample}, carry: {carry: 0.2}, weighted: {weighted: 0.6}, "
        "filtered: {filtered: {verifier: syntax, keep_right: 1.0, keep_wrong: 0.2}}}"
    )
    config = load_config(None, [*SMALL, arms])
    collapse(config, tmp_path / "run", quiet=True)
    counts = {(m["arm"], m["round"], m["name"]): m["counts"] for m in manifests(tmp_path / "run")}
    assert counts["carry", 1, "training"]["real_tokens"] >= 0.17 * 1500
    assert 0 < counts["carry", 2, "training"]["real_tokens"] < counts["carry", 1, "training"]["real_tokens"]
    for k in (1, 2):
        weighted = counts["weighted", k, "training"]
        assert 0.97 * 1500 < weighted["real_tokens"] <= 1500 and weighted["tokens"] > 1.9 * 1500
        kept = counts["filtered", k, "kept"]
        assert 0 < kept["rows"] < kept["proposed"] and kept["rows"] == counts["filtered", k, "training"]["rows"]


def test_a_verifier_by_name_needs_the_embedded_language(tmp_path):
    (tmp_path / "text.txt").write_text("some words about nothing\n\n" * 400)
    over = ["arms.main.filtered.keep_wrong=0.5", f"data.path={tmp_path}/text.txt", "data.tokenizer=byte"]
    small = [x for x in SMALL if "language" not in x and "data.real_tokens" not in x]
    with pytest.raises(InputError, match=r"arms.main.filtered: .* give one in Python"):
        collapse(load_config(None, [*small, *over]), tmp_path / "run", quiet=True)


def test_replicates_differ_and_arms_share_their_random_numbers(finished):
    folder, records = finished
    values = {(r["arm"], r["replicate"], r["round"]): r["metrics"]["kl_total"] for r in records}
    assert values["replace", 0, 2] != values["replace", 1, 2]
    seeds = {
        (m["arm"], m["replicate"]): m["seed"] for m in manifests(folder) if m["name"] == "student" and m["round"] == 1
    }
    assert seeds["replace", 0] == seeds["mixed", 0] != seeds["replace", 1]


def test_ancestors_reach_the_real_data(finished):
    folder, _ = finished
    file = folder / "replace/replicate-1/rounds/0002/rows/rows-00000.parquet"
    row = Dataset.read([str(file)])[0]
    assert row["synthetic"] and row["round"] == 2 and row["model"] and len(row["logprobs"]) == len(row["tokens"])
    chain = ancestors(folder, row["id"])
    assert [s["what"] for s in chain] == ["row", "model", "data", "model", "data"]
    assert chain[1]["path"] == "replace/replicate-1/rounds/0001/student"
    assert chain[-1]["path"] == "rounds/0000/real"


def test_load_model_opens_runs_rounds_and_trainings(finished, mesh):
    folder, _ = finished
    last = load_model(folder, mesh)
    direct = load_model(folder / "replace/replicate-0/rounds/0002/student", mesh)
    assert last.fingerprint == direct.fingerprint
    assert load_model(folder / "rounds/0000", mesh).fingerprint != last.fingerprint
    assert np.isfinite(np.asarray(last.logits([[1, 3, 4]]))).all()


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.refs, self.words = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.refs += [v for k, v in attributes if k in ("src", "href") and v]
        if tag not in ("meta", "line", "rect", "circle", "polyline", "polygon", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def test_the_report_is_one_self_contained_well_formed_page(finished):
    folder, _ = finished
    text = (folder / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.refs == [] and "url(" not in text and "<script" not in text
    assert page.open == []
    words = " ".join(page.words)
    for piece in (
        "replace",
        "mixed",
        "KL to the truth",
        "The tail",
        "Perplexity of what is written",
        "Ledger",
        "Lineage",
        "2 replicates",
    ):
        assert piece in words
    assert "nan" not in re.sub(r"<pre>.*</pre>", "", text, flags=re.S).lower().replace("finance", "")


def test_verdicts_need_a_slope_beyond_its_error():
    def arm(values, stderr):
        return Arm("a", 0, {k: [{"kl_total": v, "kl_total_stderr": stderr}] for k, v in enumerate(values)})

    assert change(arm([0.1, 0.2, 0.3, 0.4, 0.5], 0.01), "kl_total").verdict == "keeps losing"
    assert change(arm([0.1, 0.2, 0.2, 0.21, 0.2], 0.01), "kl_total").verdict == "holds"
    assert change(arm([0.1, 0.2, 0.3, 0.4, 0.5], 0.2), "kl_total").verdict == "holds"
    assert change(arm([0.5, 0.4, 0.3, 0.2], 0.001), "kl_total").verdict == "recovers"
    assert change(arm([0.1, 0.2], 0.01), "kl_total").verdict == "too few rounds to tell"


def test_ticks_cover_and_are_round():
    rng = np.random.default_rng(0)
    for _ in range(200):
        low = rng.normal() * 10.0 ** rng.integers(-4, 5)
        high = low + rng.exponential() * 10.0 ** rng.integers(-4, 5)
        t = ticks(low, high)
        assert t[0] <= low + 1e-9 * abs(low) and t[-1] >= high - 1e-9 * abs(high) and 2 <= len(t) <= 9


def test_durable_verbs_store_and_refuse(tmp_path, tiny, tokenizer, language, mesh):
    rows = real_rows(language.sample(0, 0, 60), ["t"] * 60)
    with Run(tmp_path / "run", {"a": 1}, seed=3, quiet=True) as run:
        first = run.round(0)
        model = first.train("m", transformer(tiny, tokenizer, mesh), rows, TrainConfig(steps=2, batch=8))
        made = first.generate(
            "g", model, lambda i, n: unconditional(n, i), SamplingConfig(batch=8, max_tokens=6), count=20
        )
        assert len(made.value) == 20 and len(set(made.value.column("id"))) == 20
        scored = first.score("s", made, named("length", 1)(lambda d: [len(t) for t in d.tokens()]))
        kept = first.select("k", scored, [with_status("ok", "length"), at_least(6), unique(), tokens_between(1, 99)])
        assert kept.manifest["counts"]["proposed"] == 20
        assert sum(kept.manifest["counts"]["dropped"].values()) == 20 - len(kept.value)
        with pytest.raises(InputError, match="made from other inputs") as error:
            first.generate(
                "g", model, lambda i, n: unconditional(n, i), SamplingConfig(batch=8, max_tokens=7), count=20
            )
        assert "config.sampling.max_tokens: 6 -> 7" in str(error.value)
        with pytest.raises(InputError, match="in use by another process"):
            Run(tmp_path / "run", {"a": 1}, seed=3, quiet=True)
    with pytest.raises(InputError, match="a: 1 -> 2"):
        Run(tmp_path / "run", {"a": 2}, seed=3, quiet=True)
    with pytest.raises(InputError, match="decisions"):
        from recursive_jax.curate.select import select

        select(rows, [Rule("broken", lambda d: [True])])


def test_shares_that_real_text_cannot_cover_are_refused_at_once(tmp_path):
    config = load_config(None, [*SMALL, "arms.main.fresh=0.9", "rounds.count=9"])
    with pytest.raises(InputError, match="needs 12,150 real tokens over 9 rounds"):
        collapse(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run/rounds/0000/teacher").exists()


def test_continuations_are_not_judged_as_sentences(tmp_path):
    config = load_config(None, [*SMALL, "sampling.prompt_tokens=4", "rounds.count=1"])
    records = collapse(config, tmp_path / "run", quiet=True)
    assert "kl_total" in records[0]["metrics"] and "valid" not in records[0]["metrics"]
    row = Dataset.read([str(tmp_path / "run/rounds/0001/rows/rows-00000.parquet")])[0]
    assert len(row["prompt"]) == 5 and row["parents"][0].startswith("real/")


def test_readme_example_runs(tmp_path, monkeypatch):
    """The Python example of the README, as printed, at a small size."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.S).group(1)
    assert len(code.strip().splitlines()) < 15
    monkeypatch.chdir(ROOT)
    small = ", ".join(f'"{s}"' for s in SMALL)
    code = re.sub(r"load_config\((.*?), \[(.*?)\]\)", rf"load_config(\1, [\2, {small}])", code).replace(
        "runs/", f"{tmp_path}/"
    )
    scope: dict = {}
    exec(compile(code, "README.md", "exec"), scope)


def test_own_model_example_runs(tmp_path):
    example = runpy.run_path(str(ROOT / "docs/examples/own_model.py"))
    small = [s for s in SMALL if not s.startswith(("model.", "train.steps"))]
    records = example["main"](tmp_path / "own", [*small, "train.steps=20"])
    assert [r["round"] for r in records] == [0, 1, 2]
    assert all(np.isfinite(r["metrics"]["kl_total"]) for r in records)
