"""Identity by value: equal values agree, different ones differ, and what has no value is refused."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from typing import ClassVar

import numpy as np
import pyarrow as pa
import pytest
from pydantic import Field

from recursive_jax.config import LanguageConfig, ModelConfig, SamplingConfig, Section, TrainConfig
from recursive_jax.curate import rules
from recursive_jax.curate.select import Rule, at_least
from recursive_jax.data.dataset import Dataset, real_rows
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.identity import describe, fingerprint, named


@dataclasses.dataclass(frozen=True)
class Scale:
    factor: float = 1.0
    note: str = dataclasses.field(default="", metadata={"how": True})


def module_reward(data, floor=0.0):
    return [floor] * len(data)


def test_values_are_told_apart_and_equal_ones_agree():
    values = [
        None, True, False, 0, 2, 1.5, "", "a", "2", [], [1], [1, 2], {"a": 1}, {"a": 2}, np.arange(3), np.arange(4),
        np.arange(3.0), Scale(2.0), Scale(3.0), TrainConfig(steps=7), TrainConfig(steps=8), SamplingConfig(top_k=3),
        functools.partial(module_reward, floor=0.5), functools.partial(module_reward, floor=0.7), module_reward,
        at_least(0.5), at_least(0.6), named("f", 1)(lambda: 0), named("f", 2)(lambda: 0), b"x", b"y", float("inf"),
    ]  # fmt: skip
    marks = [fingerprint(v) for v in values]
    assert len(set(marks)) == len(marks)
    assert fingerprint(1) == fingerprint(1.0) == fingerprint(np.float32(1))
    assert fingerprint({"b": 1, "a": 2}) == fingerprint({"a": 2, "b": 1})
    assert fingerprint((1, 2)) == fingerprint([1, 2])
    assert fingerprint(Scale(2.0)) == fingerprint(Scale(2))
    assert fingerprint(functools.partial(module_reward, floor=0.5)) == fingerprint(
        functools.partial(module_reward, floor=0.5)
    )


def test_a_fingerprint_is_that_of_every_process():
    code = "from recursive_jax.identity import *; print(fingerprint({'a': {3, 1, 2}, 'b': [1.5, 'x']}))"
    seen = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": str(i)}
        ).stdout
        for i in (1, 2)
    }
    assert seen == {fingerprint({"b": [1.5, "x"], "a": {1, 2, 3}}) + "\n"}


def test_defaults_and_ways_of_making_stand_in_no_fingerprint():
    """A new key with a default strands no run, nor does another way to the same result."""

    class Before(Section):
        steps: int = 3

    class After(Section):
        HOW: ClassVar = frozenset(("log_every",))
        steps: int = 3
        momentum: float = 0.9
        log_every: int = 10
        more: dict[str, int] = Field({})

    assert fingerprint(Before()) == fingerprint(After()) == fingerprint(After(log_every=1))
    assert fingerprint(After()) != fingerprint(After(momentum=0.8))
    assert fingerprint(Scale()) == fingerprint(Scale(note="x")) != fingerprint(Scale(2.0))
    assert fingerprint(ModelConfig()) == fingerprint(ModelConfig(remat="full", scan=True, attention="reference"))
    assert fingerprint(ModelConfig()) != fingerprint(ModelConfig(rope_theta=5e4))
    assert fingerprint(TrainConfig()) == fingerprint(TrainConfig(log_every=3, checkpoint_every=7, tensorboard=False))
    assert fingerprint(SamplingConfig()) == fingerprint(SamplingConfig(batch=3, chunk=2))
    for change in ({"steps": 9}, {"beta2": 0.9}, {"truncate": 0.5}, {"dtype": "bfloat16"}):
        assert fingerprint(TrainConfig(**change)) != fingerprint(TrainConfig())


def test_a_version_is_part_of_an_identity():
    @dataclasses.dataclass(frozen=True)
    class Counted:
        n: int = 1
        version: ClassVar[int] = 1

    before = fingerprint(Counted())
    Counted.version = 2
    assert fingerprint(Counted()) != before


def test_what_has_no_identity_is_refused_with_the_remedy():
    limit = 3

    def inner(data):
        return limit

    for value in (lambda data: 0, inner, functools.partial(inner, 1)):
        with pytest.raises(InputError, match="name and a version"):
            fingerprint(value)
    with pytest.raises(InputError, match="frozen dataclass"):
        fingerprint(object())

    @dataclasses.dataclass
    class Open:
        n: int = 1

    with pytest.raises(InputError, match="frozen=True"):
        fingerprint(Open())
    with pytest.raises(InputError, match="name and a version"):
        _ = Rule("x", lambda data: [True]).fingerprint
    assert (
        Rule("x", lambda data: [True], version=1).fingerprint != Rule("x", lambda data: [True], version=2).fingerprint
    )


def test_rules_are_their_values():
    language = LanguageConfig(nouns=4)
    made = {
        "with_status": (("ok",), ("ok", "length")),
        "tokens_between": ((1, 5), (1, 6)),
        "at_least": ((0.5,), (0.5, "reward")),
        "unique": ((), ("other",)),
        "correct": ((), ("other",)),
        "wrong": ((), ("other",)),
        "top": ((3,), (4,)),
        "best_of": ((), ("score", "q")),
        "pairs": ((), ("score", "q")),
        "cap": ((2,), (3,)),
        "distinct": (("a",), ("b",)),
        "distinct_equations": ((), ("solution",)),
        "words": ((1, 5), (1, 6)),
        "characters": ((1, 5), (1, 6)),
        "without_keywords": ((["a"],), (["b"],)),
        "first_character": ((), ("[a-z]",)),
        "script": (("Latin",), ("Greek",)),
        "difficulty": ((0.1, 0.9), (0.2, 0.9)),
        "valid": ((language,), (language, "syntax")),
        "novel": ((0.7,), (0.8,)),
        "decontaminate": ((["a b"],), (["a c"],)),
        "fits": ((Template("{a}"), ByteTokenizer(), 5), (Template("{a}"), ByteTokenizer(), 6)),
    }
    for name, (one, other) in made.items():
        rule = getattr(rules, name)
        assert rule(*one).fingerprint == rule(*one).fingerprint != rule(*other).fingerprint, name
    assert set(made) == set(rules.RULES)


def test_rows_are_named_by_what_they_are_and_how_they_were_derived():
    data = real_rows([[1, 2], [3], [4, 5, 6]], ["a", "b", "c"])
    same = real_rows([[1, 2], [3], [4, 5, 6]], ["a", "b", "c"])
    assert data.fingerprint == same.fingerprint
    marks = [data.fingerprint]
    for column, values in (
        ("tokens", [[1, 2], [3], [4, 5, 7]]), ("status", ["ok", "ok", "length"]),
        ("loss", [[True, True], [True], [True] * 3]),
        ("loss", [[True, True], [True], [True, True, False]]), ("weight", [1.0, 1.0, 2.0]), ("score", [0.1, None, 0.2]),
        ("score", [0.1, 0.0, 0.2]), ("own", ["x", "y", "z"]), ("own", ["x", "yz", ""]),
    ):  # fmt: skip
        marks.append(data.with_column(column, values).fingerprint)
    marks += [data.take([1, 0]).fingerprint, data.where(status="length").fingerprint, (data + same).fingerprint]
    assert len(set(marks)) == len(marks)
    # Of a stored result: from the operation, its arguments and its parents, without a look at the rows.
    stored = Dataset(data.with_column("score", [1.0, 0.0, 1.0]).table, "s" * 16)
    views = [
        stored.where(score=1),
        stored.where(score=0),
        stored.take([0]),
        stored.take([1]),
        stored + stored,
        stored[:2],
    ]
    assert len({v.fingerprint for v in views} | {stored.fingerprint}) == 7
    assert stored.where(score=1).fingerprint == Dataset(stored.table, "s" * 16).where(score=1).fingerprint
    assert stored.where(score=1).origins == ("s" * 16,)
    # A function need not be named: the result then is named by its rows.
    assert stored.where(lambda r: r["score"] == 1).fingerprint != stored.where(lambda r: r["score"] == 0).fingerprint


def test_slices_of_equal_rows_have_equal_names():
    """However Arrow lays them out."""
    data = real_rows([[1, 2], [3], [1, 2], [3]], ["a", "b", "a", "b"]).with_column("id", ["x", "y", "x", "y"])
    assert data[0:2].fingerprint == data[2:4].fingerprint
    assert (data[0:1] + data[1:2]).fingerprint == data[2:4].fingerprint
    assert describe(np.arange(6)[::2]) == describe(np.array([0, 2, 4]))


LIMIT = 3


def reads_a_constant(data):
    return LIMIT


def keyword_default(data, *, n=LIMIT):
    return n


def test_what_a_user_s_code_reads_and_computes_is_part_of_its_name(monkeypatch):
    """A constant of its module, defaults, a decorator's argument, and the body of a class."""
    before = fingerprint(reads_a_constant), fingerprint(keyword_default)
    monkeypatch.setitem(globals(), "LIMIT", 4)
    monkeypatch.setattr(keyword_default, "__kwdefaults__", {"n": 4})
    assert fingerprint(reads_a_constant) != before[0] and fingerprint(keyword_default) != before[1]

    def times(factor):
        def decorate(function):
            @functools.wraps(function)
            def wrapped(*arguments):
                return factor * function(*arguments)

            return wrapped

        return decorate

    assert fingerprint(times(2)(module_reward)) != fingerprint(times(3)(module_reward))

    def make(body):
        namespace = {"dataclasses": dataclasses, "__name__": "user_module"}
        source = (
            f"@dataclasses.dataclass(frozen=True)\nclass Count:\n    n: int = 1\n\n    def __call__(self, data):\n     "
            f"   return {body}\n"
        )
        import linecache

        name = f"<user {body}>"
        linecache.cache[name] = (len(source), None, source.splitlines(True), name)
        module = type(sys)("user_module")
        module.__file__ = name
        monkeypatch.setitem(sys.modules, "user_module", module)
        exec(compile(source, name, "exec"), namespace)
        module.Count = namespace["Count"]
        return fingerprint(namespace["Count"]())

    assert make("1") != make("2")


def test_inherited_names_hide_nothing():
    """A subclass that is no dataclass of its own has attributes that its parent's fields do not know."""

    class Sub(Scale):
        def __init__(self, extra):
            super().__init__()
            object.__setattr__(self, "extra", extra)

    with pytest.raises(InputError, match="frozen=True"):
        fingerprint(Sub(1))
    from recursive_jax.curate.rewards import Reward

    class Plain(Reward):
        pass

    with pytest.raises(InputError, match="frozen=True"):
        fingerprint(Plain())
    one = named("a", 1)(module_reward)
    two = named("b", 2)(module_reward)
    assert fingerprint(one) != fingerprint(two) != fingerprint(module_reward)


def test_values_that_look_alike_are_told_apart():
    import datetime

    import ml_dtypes

    pairs = [({1: 2}, {"1": 2}), ({1, 2}, [1, 2]), (float("nan"), "nan"), ({1: "a", "1": "b"}, {"1": "b"})]
    for one, other in pairs:
        assert fingerprint(one) != fingerprint(other)
    assert fingerprint(datetime.date(2026, 1, 2)) != fingerprint(datetime.date(2026, 1, 3))
    half = np.arange(3).astype(ml_dtypes.bfloat16)
    assert fingerprint(half) != fingerprint(half + half) and fingerprint(half) != fingerprint(np.arange(3.0))
    objects = np.array(["a", None], object)
    assert fingerprint(objects) == fingerprint(np.array(["a", None], object)) != fingerprint(objects[:1])
    data = real_rows([[1], [2]], ["", ""])
    mask = lambda *values: data.with_column("own", pa.array(values, pa.int8())).fingerprint
    assert mask(None, 1) != mask(1, 0) != mask(0, 1)
    import flax.linen as nn

    assert fingerprint(nn.Dense(3).apply) != fingerprint(nn.Dense(4).apply)


def test_a_name_does_not_depend_on_who_looked():
    """Reading the fingerprint of rows changed that of all that was derived from them after."""
    make = lambda: real_rows([[1, 2], [3], [4]], ["a", "b", "c"])
    one, two = make(), make()
    _ = two.fingerprint
    assert one.take([0, 2]).fingerprint == two.take([0, 2]).fingerprint
    assert (one + make()).fingerprint == (two + make()).fingerprint
    assert one.take(np.array([True, False, True])).column("text") == ["a", "c"] == one.take([0, -1]).column("text")
    with pytest.raises(InputError, match="there are 3"):
        one.take([3])
    scored = one.with_column("score", [1.0, None, None])
    assert len(scored.where(score=None)) == 2
