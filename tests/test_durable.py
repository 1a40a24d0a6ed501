"""The durable verbs: what a result was made from decides whether it is returned, refused or gone on with; and a user's
recipe."""

from __future__ import annotations

import dataclasses
import json

import jax
import numpy as np
import pytest

from recursive_jax import cli
from recursive_jax.collapse.metrics import METRICS
from recursive_jax.config import MeshConfig, SamplingConfig, TrainConfig
from recursive_jax.curate import rewards
from recursive_jax.curate.rewards import REWARDS, Reward
from recursive_jax.curate.select import Rule
from recursive_jax.data.dataset import Dataset, real_rows
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError, Preempted
from recursive_jax.generate.request import Request, Unconditional, unconditional
from recursive_jax.identity import fingerprint, named
from recursive_jax.mesh import make_mesh
from recursive_jax.models.model import transformer
from recursive_jax.models.registry import NETWORKS
from recursive_jax.objectives import OBJECTIVES, Causal, Masked
from recursive_jax.recipes import RECIPES, find_recipe, load_config
from recursive_jax.rounds.opening import chosen_name, load_model, named_models
from recursive_jax.rounds.run import Run
from recursive_jax.train import signals
from tests.conftest import ROOT

FAST = TrainConfig(steps=3, batch=8, tensorboard=False)
SHORT = SamplingConfig(batch=8, max_tokens=6)


@dataclasses.dataclass(frozen=True)
class Constant(Reward):
    value: float | None = 0.5

    def __call__(self, data):
        return [self.value] * len(data)


@dataclasses.dataclass(frozen=True)
class FirstTokens:
    """Requests that are named by a value."""

    token: int

    def __call__(self, first, count):
        return [Request(i, np.array([self.token])) for i in range(first, first + count)]


@pytest.fixture
def run(tmp_path):
    with Run(tmp_path / "run", seed=3, quiet=True) as run:
        yield run


@pytest.fixture(scope="module")
def model(language, tokenizer, mesh):
    from recursive_jax.config import ModelConfig

    return transformer(ModelConfig(layers=1, d_model=16, heads=2, max_length=32), tokenizer, mesh).initialized(0)


@pytest.fixture
def rows():
    return real_rows([[5, 6, 7], [8, 9]] * 8, ["a", "b"] * 8)


def test_an_edited_prompt_is_another_result(run, model):
    """Requests count by value: as a list, as a dataclass, and as what a function gives."""
    round = run.round(1)
    ask = lambda token, n=12: [Request(i, np.array([token])) for i in range(n)]
    first = round.generate("list", model, ask(5), SHORT)
    assert round.generate("list", model, ask(5), SHORT).fingerprint == first.fingerprint
    round.generate("value", model, FirstTokens(5), SHORT, count=12)
    round.generate("function", model, lambda first, n: ask(5)[first : first + n], SHORT, count=12)
    round.generate("budget", model, lambda first, n: FirstTokens(5)(first, n), SHORT, tokens=40)
    late = lambda token: lambda first, n: FirstTokens(5 if first < 1024 else token)(first, n)
    round.generate("late", model, late(5), SHORT, tokens=40)
    assert round.generate("late", model, late(6), SHORT, tokens=40)  # never asked that far: the same rows
    changed = {
        "list": lambda: round.generate("list", model, ask(6), SHORT),
        "value": lambda: round.generate("value", model, FirstTokens(6), SHORT, count=12),
        "function": lambda: round.generate(
            "function", model, lambda first, n: ask(6)[first : first + n], SHORT, count=12
        ),
        "budget": lambda: round.generate("budget", model, lambda first, n: FirstTokens(6)(first, n), SHORT, tokens=40),
    }
    for name, again in changed.items():
        with pytest.raises(InputError, match="other inputs") as error:
            again()
        assert "requests" in str(error.value), name
    assert first.value.prompts()[0].tolist() == [model.tokenizer.bos, 5]


def test_an_edited_template_is_another_result(run, mesh):
    from recursive_jax.config import ModelConfig

    model = transformer(ModelConfig(layers=1, d_model=16, heads=2, max_length=32), ByteTokenizer(), mesh).initialized(0)
    data = Dataset.from_rows([{"q": "one", "k": 1}, {"q": "two", "k": 2}])
    made = run.round(1).generate("asked", model, data, SHORT, template=Template("{q}?", "{a}"), each=2)
    assert made.column("k") == [1, 1, 2, 2] and len(made) == 4
    with pytest.raises(InputError, match="template.prompt: '{q}\\?' -> '{q}!'"):
        run.round(1).generate("asked", model, data, SHORT, template=Template("{q}!", "{a}"), each=2)
    with pytest.raises(InputError, match="template="):
        run.round(1).generate("asked", model, data, SHORT)


def test_functions_of_data_and_measures_are_named(run, model, rows):
    round = run.round(1)
    for verb in (
        lambda: round.dataset("d", lambda: rows),
        lambda: round.evaluate("e", model, lambda: {"x": 1.0}),
        lambda: round.score("s", rows, lambda data: [1.0] * len(data)),
        lambda: round.select("k", rows, [Rule("all", lambda data: [True] * len(data))]),
    ):
        with pytest.raises(InputError, match="name and a version"):
            verb()
    assert not (round.path / "d").exists()  # refused before anything was made
    round.evaluate("e", model, named("x", 1)(lambda: {"x": 1.0}))
    with pytest.raises(InputError, match="measure.version: 1 -> 2"):
        round.evaluate("e", model, named("x", 2)(lambda: {"x": 2.0}))


def test_a_reward_is_its_values(run, rows):
    """r(1) and r(7), of one class, had one name: the scores of the first were returned for the second."""
    round = run.round(1)
    assert round.score("s", rows, Constant(1)).column("score") == [1.0] * 16
    with pytest.raises(InputError, match="reward.value: 1 -> 7"):
        round.score("s", rows, Constant(7))
    assert fingerprint(Causal(truncate=0.9)) != fingerprint(Causal(truncate=0.5))
    assert round.score("none", rows, Constant(None)).column("score") == [None] * 16
    half = named("half", 1)(lambda data: [None if i % 2 else 1 for i in range(len(data))])
    kept = round.score("half", rows, half).where(score=1)
    assert len(kept) == 8
    for bad, says in (
        (named("x", 1)(lambda data: ["no"] * len(data)), "row 0 'no'"),
        (named("y", 1)(lambda data: [1.0]), "1 scores for 16 rows"),
    ):
        with pytest.raises(InputError, match=says):
            round.score("bad", rows, bad)


def test_a_student_of_other_rows_is_another_student(run, model, rows):
    """A selection of stored rows kept the name of the whole: the student of `score=1` was returned for `score=0`."""
    round = run.round(1)
    scored = round.score("s", rows.with_column("score", [1.0, 0.0] * 8), Alternating())
    one = round.train("one", model, scored.where(score=1), FAST)
    with pytest.raises(InputError, match="inputs.data"):
        round.train("one", model, scored.where(score=0), FAST)
    two = round.train("two", model, scored.where(score=0), FAST)
    assert one.fingerprint != two.fingerprint
    view = run.round(0).durable(
        "data", "w", {}, {}, None, lambda folder: {"rows": 0, "tokens": 0}, lambda folder: (rows, rows[:4])
    )
    parts = view.view("all", lambda w: w[0]), view.view("some", lambda w: w[1])
    assert len({p.fingerprint for p in parts} | {view.fingerprint}) == 3
    assert {p.origins for p in parts} == {(view.fingerprint,)}


@dataclasses.dataclass(frozen=True)
class Alternating(Reward):
    def __call__(self, data):
        return [float(i % 2 == 0) for i in range(len(data))]


def test_a_half_done_result_of_other_inputs_is_kept(run, model, rows, monkeypatch):
    """Editing an objective in mid-training deleted the half-done checkpoint without a word."""
    asked = iter([False, True])
    monkeypatch.setattr(signals, "stop_requested", lambda now=False: next(asked, False))
    config = FAST.model_copy(update={"steps": 6, "checkpoint_every": 1})
    with pytest.raises(Preempted):
        run.round(1).train("m", model, rows, config)
    folder = run.round(1).path / "m"
    kept = sorted(p.name for p in (folder / "resume").iterdir())
    with pytest.raises(InputError, match="half-done from other inputs") as error:
        run.round(1).train("m", model, rows, config, Causal(truncate=0.5))
    assert "objective.truncate: default -> 0.5" in str(error.value)
    assert sorted(p.name for p in (folder / "resume").iterdir()) == kept and kept
    assert run.round(1).train("m", model, rows, config).params is not None  # goes on


def test_a_run_goes_on_on_another_mesh_and_with_other_ways(tmp_path, tokenizer, rows):
    """Devices, logging, slots and memory are how, not what."""
    from recursive_jax.config import ModelConfig

    base = ["train.steps=4", "train.batch=8", "rounds.count=1", "rounds.token_budget=600", "data.real_tokens=1500",
            "model.layers=1", "model.d_model=16", "model.heads=2", "model.max_length=32", "evaluate.rows=8",
            "evaluate.samples=8", "evaluate.token_budget=64", "sampling.batch=8"]  # fmt: skip
    one, two = (
        load_config(None, [*base, *more])
        for more in (
            ["mesh.data=1"],
            ["mesh.data=2", "train.log_every=1", "sampling.batch=16", "model.remat=full", "evaluate.show=1"],
        )
    )
    from recursive_jax.recipes.collapse import collapse

    first = collapse(one, tmp_path / "run", quiet=True)
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("manifest.json")}
    assert collapse(two, tmp_path / "run", quiet=True) == first
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("manifest.json")} == before  # nothing made again
    changed = load_config(None, [*base, "mesh.data=1", "train.steps=5"])
    with pytest.raises(InputError, match="train.steps: 4 -> 5"):
        collapse(changed, tmp_path / "run", quiet=True)
    assert ModelConfig(remat="full") != ModelConfig()


def test_auto_is_named_by_what_it_became(run, model, rows, monkeypatch):
    run.round(1).train("m", model, rows, FAST)
    manifest = json.loads((run.round(1).path / "m" / "manifest.json").read_text())
    assert manifest["config"]["train"]["dtype"] == "float32"
    from recursive_jax import mesh as meshes

    monkeypatch.setattr(meshes, "platform", lambda mesh=None: "gpu")
    with pytest.raises(InputError, match="train.dtype: 'float32' -> 'bfloat16'"):
        run.round(1).train("m", model, rows, FAST)


def test_a_trained_model_is_kept_and_not_read_back(run, model, rows, monkeypatch):
    from recursive_jax.rounds import round as rounds

    monkeypatch.setattr(rounds, "load_stored_model", lambda *a: pytest.fail("read back what was just trained"))
    made = run.round(1).train("m", model, rows, FAST)
    monkeypatch.undo()
    again = run.round(1).train("m", model, rows, FAST)
    assert again.fingerprint == made.fingerprint
    for a, b in zip(jax.tree.leaves(made.params), jax.tree.leaves(again.params), strict=True):
        assert np.array_equal(a, b)


def test_a_run_names_its_models_and_opening_never_guesses(run, model, rows, mesh):
    round = run.round(1)
    with pytest.raises(InputError, match="no stored model"):
        load_model(run.path, mesh)
    round.train("actor", model, rows, FAST)
    assert load_model(run.path, mesh).fingerprint  # the only one
    critic = round.train("critic", model, rows, FAST.model_copy(update={"steps": 4}))
    with pytest.raises(InputError, match="names no model as its result"):
        load_model(run.path, mesh)
    with pytest.raises(InputError, match="several models"):
        load_model(round.path, mesh)
    run.name_model("critic", round, "critic")
    run.name_model("actor", round, "actor", default=True)
    assert load_model(f"{run.path}:critic", mesh).fingerprint == critic.fingerprint
    assert load_model(run.path, mesh).fingerprint != critic.fingerprint
    assert named_models(run.path)[1] == "actor" and "critic" in chosen_name(run.path)
    with pytest.raises(InputError, match="no model 'judge'"):
        load_model(f"{run.path}:judge", mesh)


def test_seeds_have_63_bits(run):
    seeds = {run.round(k).seed(name) for k in range(200) for name in ("a", "b", "c")}
    assert len(seeds) == 600 and max(seeds) > 2**61 and all(0 <= s < 2**63 for s in seeds)
    import jax.numpy as jnp

    from recursive_jax.mesh import random_key

    small, big = random_key(5), random_key(5 + 2**40)
    assert jnp.array_equal(jax.random.key_data(small), jax.random.key_data(jax.random.key(5)))
    assert not jnp.array_equal(jax.random.key_data(small), jax.random.key_data(big))


def test_metrics_are_appended_and_journals_stay_linear(run, model, rows, monkeypatch):
    from recursive_jax.rounds import lineage

    monkeypatch.setattr(lineage, "manifests", lambda run: pytest.fail("every manifest was read for one evaluation"))
    for k in range(3):
        run.round(k).evaluate("e", model, named("x", 1)(lambda: {"x": 1.0}), config={"k": k})
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["round"] for line in lines] == [0, 1, 2]
    (run.path / "metrics.jsonl").write_text((run.path / "metrics.jsonl").read_text() + '{"torn')
    run.round(3).evaluate("e", model, named("x", 1)(lambda: {"x": 1.0}))
    monkeypatch.undo()
    assert [r["round"] for r in run.refresh_metrics()] == [0, 1, 2, 3]
    calls = []
    ask = lambda first, n: (calls.append(n), unconditional(n, first))[1]
    made = run.round(1).generate("many", model, ask, SamplingConfig(batch=64, max_tokens=1), count=2500)
    assert len(made) == 2500 and sum(calls) < 4 * 2500  # asked for blocks a few times over, not for each row


def test_a_folder_of_another_format_says_so(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps({"format": 1, "config": {}, "seed": 0}))
    with pytest.raises(InputError, match="another version of recursive_jax"):
        Run(tmp_path / "run", {}, quiet=True)


# Tables.


def test_every_line_of_every_table_is_a_value(tokenizer):
    assert {n for n, kind in OBJECTIVES.items() if fingerprint(kind()) == fingerprint(kind())} == set(OBJECTIVES)
    assert len({fingerprint(kind()) for kind in OBJECTIVES.values()}) == len(OBJECTIVES)
    assert fingerprint(Masked(share=0.3)) != fingerprint(Masked(share=0.15)) == fingerprint(Masked())
    given = {"regex": ("a+",), "contains": (("a",),), "process_reward": (rewards.exact_match(),), "function": (len,)}
    asking = {"judge", "likelihood", "reward_model", "process_model"}  # by the fingerprint of their model: test_rewards
    kinds = {name: getattr(rewards, name) for name in REWARDS if name not in asking}
    made = {name: kind(*given.get(name, ())) for name, kind in kinds.items()}
    assert len({fingerprint(reward) for reward in made.values()}) == len(REWARDS) - len(asking)
    assert fingerprint(rewards.exact_match("a")) != fingerprint(rewards.exact_match("b")) and fingerprint(
        rewards.token_count(3)
    ) != fingerprint(rewards.token_count(4))
    plain = [reward for name, reward in made.items() if name not in ("process_reward", "function")]
    for value in (*(kind() for kind in OBJECTIVES.values()), *plain):  # written and read back
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        assert fingerprint(type(value)(**json.loads(json.dumps(fields)))) == fingerprint(value)
    for name in RECIPES:
        recipe = find_recipe(name)
        assert recipe.name == name and recipe.summary and recipe.paper and recipe.example
    config = load_config(None, ["train.steps=3"])
    again = type(config)(**json.loads(config.model_dump_json()))
    assert fingerprint(again) == fingerprint(config) != fingerprint(load_config(None, ["train.steps=4"]))
    assert all(kind.kind == name for name, kind in NETWORKS.items())
    assert all(m.name == name and m.loss in ("higher", "lower", "either") and m.title for name, m in METRICS.items())


def test_every_network_is_stored_and_read_back():
    from recursive_jax.config import LoraConfig, ModelConfig
    from recursive_jax.models.network import FunctionNetwork, transformer_network
    from recursive_jax.models.vae import VAENetwork

    config = ModelConfig(vocab=50, d_model=32, heads=2)
    made = {
        "transformer": (
            transformer_network(config),
            transformer_network(config.model_copy(update={"rope_theta": 3.0})),
        ),
        "vae": (VAENetwork(8), VAENetwork(8, latent=3)),
        "functions": (FunctionNetwork(make_init, make_apply, 5, 8), FunctionNetwork(make_init, make_apply, 5, 9)),
    }
    assert set(made) == set(NETWORKS)
    for name, (one, other) in made.items():
        assert one.fingerprint != other.fingerprint and one == dataclasses.replace(one)
        if name != "functions":
            again = NETWORKS[name].load(json.loads(json.dumps(one.store())), "here")
            assert again == one and again.fingerprint == one.fingerprint
    assert transformer_network(config).fingerprint != transformer_network(config, LoraConfig()).fingerprint
    with pytest.raises(InputError, match="user functions"):
        FunctionNetwork.load({"name": "mine"}, "here")
    with pytest.raises(InputError, match="name and a version"):
        _ = FunctionNetwork(lambda key: {}, make_apply, 5, 8).fingerprint
    assert FunctionNetwork(lambda key: {}, make_apply, 5, 8, version=1).fingerprint


def make_init(key):
    return {}


def make_apply(params, tokens, segments=None):
    return tokens


def test_equal_functions_share_their_programs(tokenizer, mesh):
    from recursive_jax.models.model import user_model

    one, two = (user_model(make_init, make_apply, tokenizer=tokenizer, max_length=8, mesh=mesh) for _ in range(2))
    assert one.network == two.network and hash(one.network) == hash(two.network)


# A recipe of the user's.


def test_a_user_s_recipe_runs_prices_reports_and_resumes(tmp_path, monkeypatch, capsys):
    """docs/examples/own_recipe.py, under 60 lines, by the commands that every recipe has."""
    examples = ROOT / "docs" / "examples"
    assert len((examples / "own_recipe.py").read_text().splitlines()) < 60
    monkeypatch.syspath_prepend(str(examples))
    small = ["train.steps=3", "train.batch=8", "rows=24", "keep=1", "model.d_model=16", "model.max_length=32",
             "data.real_tokens=1500", "sampling.batch=8", "mesh.data=1", "train.tensorboard=false",
             "rounds=1"]  # fmt: skip
    words = ["run", str(examples / "own_recipe.yaml"), *small, "--workdir", str(tmp_path / "run"), "--quiet"]
    assert cli.main([*words, "--dry-run"]) == 0
    assert "recipe: own_recipe:recipe" in capsys.readouterr().out and not (tmp_path / "run").exists()
    assert cli.main(words) == 0
    shown = capsys.readouterr().out
    assert "held_out_loss" in shown
    page = (tmp_path / "run" / "report.html").read_text()
    assert "held_out_loss" in page and "teacher" not in page
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("manifest.json")}
    assert cli.main(words) == 0 and cli.main(["report", str(tmp_path / "run")]) == 0
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "run").rglob("manifest.json")} == before
    assert load_model(tmp_path / "run", make_mesh(MeshConfig(data=1), jax.devices()[:1])).params is not None
    capsys.readouterr()
    assert cli.main(["recipes", "own_recipe:recipe"]) == 0
    assert "keep=20" in capsys.readouterr().out
    assert cli.main([*words[:2], "evaluate.show=3", *words[2:]]) == 2
    assert "it is for recipe=collapse" in capsys.readouterr().err
    assert cli.main([*words[:2], "arms.main.dato=replace", *words[2:]]) == 2
    assert "unknown key dato; did you mean data?" in capsys.readouterr().err


def test_recipes_are_listed_and_wrong_ones_named(capsys, tmp_path):
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in RECIPES)
    assert cli.main(["recipes", "collapse"]) == 0
    shown = capsys.readouterr().out
    assert (
        "arXiv:2305.17493" in shown
        and "rounds.count=5" in shown
        and "recursive-jax run configs/quickstart.yaml" in shown
    )
    for name, says in (
        ("collaps", "did you mean collapse"),
        ("nowhere:recipe", "cannot be imported"),
        ("json:nope", "has no nope"),
        ("json:dumps", "Recipe is wanted"),
    ):
        assert cli.main(["recipes", name]) == 2
        assert says in capsys.readouterr().err


# What a second reading found.


def test_a_model_s_name_is_of_its_network_and_tokenizer_too(tokenizer, mesh):
    from recursive_jax.config import LoraConfig, ModelConfig
    from recursive_jax.models.lora import adapted_model

    config = ModelConfig(layers=1, d_model=16, heads=2, max_length=32)
    one, other = (transformer(config.model_copy(update={"rope_theta": t}), tokenizer, mesh) for t in (1e4, 500.0))
    assert one.fingerprint != other.fingerprint and one.initialized(0).fingerprint != other.initialized(0).fingerprint
    base = one.initialized(0)
    adapters = [adapted_model(base, LoraConfig(rank=2, **more)) for more in ({}, {"alpha": 64.0}, {"dropout": 0.5})]
    assert len({a.fingerprint for a in adapters}) == 3
    assert dataclasses.replace(base, tokenizer=ByteTokenizer()).fingerprint != base.fingerprint
    assert base.on(mesh) is base  # a content hash is made once


def test_signals_lose_no_rank_of_a_request(run, model, monkeypatch):
    """Asked to stop between the first and the second row of a request: it is made again whole."""
    sampling = SamplingConfig(batch=8, max_tokens=4, best_of=2, n_best=2)
    whole = run.round(1).generate("whole", model, Unconditional(), sampling, count=4)
    count = iter(range(10**6))
    monkeypatch.setattr(signals, "stop_requested", lambda now=False: next(count) == 0)
    with pytest.raises(Preempted):
        run.round(1).generate("cut", model, Unconditional(), sampling, count=4)
    made = run.round(1).generate("cut", model, Unconditional(), sampling, count=4)
    ranks = lambda rows: [i.rsplit("/", 1)[1] for i in rows.column("id")]
    assert ranks(made) == ranks(whole) and len(made) == 8


def test_new_real_rows_are_named_by_where_they_begin():
    from recursive_jax.rounds.durable import Stored
    from recursive_jax.rounds.iterate import Pool

    real = Stored(None, "real", lambda _: real_rows([[3] * 10] * 400, ["r"] * 400), {})
    pools = [Pool(real, 100, anchor=0.1, fresh=0.2, sizes=sizes) for sizes in ((100, 200), (100, 1000))]
    assert pools[0].settings(1) != pools[1].settings(1)
    plain = [Pool(real, 100, sizes=sizes) for sizes in ((100, 200), (100, 1000))]
    assert plain[0].settings(1) == plain[1].settings(1)


def test_a_run_takes_a_dataclass_config_and_shows_its_difference(tmp_path, model):
    @dataclasses.dataclass(frozen=True)
    class Mine:
        a: int = 1
        train: TrainConfig = FAST

    with Run(tmp_path / "r", Mine(), quiet=True) as run:
        run.round(0).evaluate("e", model, named("x", 1)(lambda: {"x": np.float32(1.5), "nan": float("nan")}))
        assert run.refresh_metrics()[0]["metrics"] == {"x": 1.5, "nan": None}
    with pytest.raises(InputError, match="a: 1 -> 2"):
        Run(tmp_path / "r", Mine(2), quiet=True)
    with pytest.raises(InputError, match="not a int"):
        Run(tmp_path / "s", 3, quiet=True)
    with pytest.raises(InputError, match="is closed"):
        run.round(1).select("k", real_rows([[1]], [""]), [])


def test_carried_columns_keep_their_types_whenever_rows_finish(run, model, monkeypatch):
    import pyarrow as pa

    from recursive_jax.generate.request import FromRows
    from recursive_jax.rounds import journal

    monkeypatch.setattr(journal, "EVERY", 0.0)  # a flush for every row
    data = real_rows([[5, 6, 7]] * 4, [""] * 4)
    data = data.with_column("small", pa.array([1, 2, None, 4], pa.int8())).with_column(
        "s", [{"a": 1}, {"a": None}, None, {"a": 2}]
    )
    made = run.round(1).generate("rows", model, FromRows(data, 2), SamplingConfig(batch=1, max_tokens=2), count=4)
    assert made.value.table.schema.field("small").type == pa.int8() and made.column("small") == [1, 2, None, 4]
    assert made.value.table["s"].to_pylist() == [{"a": 1}, {"a": None}, None, {"a": 2}]
    mixed = [Request(0, np.array([5]), columns={"a": 1}), Request(1, np.array([5]))]
    assert run.round(1).generate("mixed", model, mixed, SamplingConfig(batch=1, max_tokens=2)).column("a") == [1, None]
    with pytest.raises(InputError, match="ids of a list"):
        run.round(1).generate("ids", model, [Request(5, np.array([5]))], SHORT)
    with pytest.raises(InputError, match="the list has 1"):
        run.round(1).generate("ids", model, [Request(0, np.array([5]))], SHORT, count=5)
    assert len(run.round(1).generate("none", model, [], SHORT)) == 0


def test_an_adapter_of_a_trained_model_is_opened_again(run, model, rows, mesh):
    from recursive_jax.config import LoraConfig
    from recursive_jax.models.lora import adapted_model

    base = run.round(0).train("base", model, rows, FAST)
    adapted = run.round(1).train("adapted", adapted_model(base, LoraConfig(rank=2)), rows, FAST)
    opened = load_model(run.round(1).path / "adapted", mesh)
    assert opened.fingerprint == adapted.fingerprint
    np.testing.assert_array_equal(opened.logits([[3, 4]]), adapted.logits([[3, 4]]))


def test_a_fork_takes_only_what_is_of_the_same_requests(tmp_path, model):
    ask = lambda token: lambda first, n: FirstTokens(5 if first < 1024 else token)(first, n)
    sampling = SamplingConfig(batch=64, max_tokens=1)
    with Run(tmp_path / "old", quiet=True) as run:
        run.round(1).generate("rows", model, ask(6), sampling, tokens=1100)
    with Run(tmp_path / "new", quiet=True, fork=tmp_path / "old") as run:
        made = run.round(1).generate("rows", model, ask(7), sampling, tokens=1100)
        assert made.value.prompts()[-1][-1] == 7
    with Run(tmp_path / "same", quiet=True, fork=tmp_path / "old") as run:
        again = run.round(1).generate("rows", model, ask(6), sampling, tokens=1100)
        assert again.value.prompts()[-1][-1] == 6


def test_rules_and_rewards_decide_and_nothing_is_guessed(run, rows):
    round = run.round(1)
    for keep in (lambda d: ["no"] * len(d), lambda d: [None] * len(d), lambda d: [1] * len(d)):
        with pytest.raises(InputError, match="True or False is wanted"):
            round.select("bad", rows, [Rule("bad", keep, 1)])
    for k, found in enumerate((["1"] * 16, "1" * 16, [float("nan")] * 16, [10**400] * 16, None, 3)):
        with pytest.raises(InputError, match="the reward"):
            round.score(f"bad{k}", rows, named("bad", k)(lambda data, found=found: found))
    from recursive_jax.curate.select import at_least

    assert len(round.select("one", round.score("s", rows, Constant(1)), at_least(0.5))) == 16
    with pytest.raises(InputError, match="holds texts"):
        round.select("text", rows, [at_least(0.5, "text")])
    with pytest.raises(InputError, match="a dict of metrics"):
        round.evaluate("e", NAMELESS, named("x", 1)(lambda: 3))


class _Nameless:
    fingerprint = "n"


NAMELESS = _Nameless()
