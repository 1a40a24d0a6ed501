"""Sampling settings in random company: whatever is not refused keeps the promise of each of its keys."""

from __future__ import annotations

import json
import random
import re

import jax
import numpy as np
import pydantic
import pytest
import tokenizers

from recursive_jax.config import ModelConfig, SamplingConfig
from recursive_jax.data.chat import encode, encode_prompt
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer, FileTokenizer, Special
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import Request, unconditional
from recursive_jax.generate.text import Continuation, cut_at_stop, stop_texts
from recursive_jax.models.model import transformer
from tests.test_model import randomised

SCHEMA = json.dumps({"enum": ["ab", "abc", 12]})
CHOICES = {
    "temperature": (0.0, 0.7, 3.0),
    "top_k": (1, 5),
    "top_p": (0.3, 0.9),
    "min_p": (0.1, 0.6),
    "typical_p": (0.4,),
    "repetition_penalty": (0.5, 2.0),
    "presence_penalty": (-1.0, 2.0),
    "frequency_penalty": (1.0,),
    "bad_words": (("a",), ("e", "th", " ")),
    "min_tokens": (1, 5, 12),
    "max_tokens": (0, 1, 7),
    "stop": (("a", "b"), ("e", " t", "\n"), ("<|eos|>",)),
    "stop_tokens": ((97, 98), tuple(range(100, 180))),
    "guidance": (0.0, 2.0),
    "beams": (2,),
    "length_penalty": (0.0, 2.0),
    "best_of": (2,),
    "n_best": (2,),
    "regex": ("[ab]{2,4}", " ?x+"),
    "json_schema": (SCHEMA,),
}


@pytest.fixture(scope="module")
def model(mesh):
    config = ModelConfig(layers=1, d_model=16, heads=2, d_ff=32, max_length=24)
    return randomised(transformer(config, ByteTokenizer(), mesh))


def drawn(seed: int) -> dict:
    rng = random.Random(seed)
    return {key: rng.choice(CHOICES[key]) for key in rng.sample(sorted(CHOICES), rng.choice([2, 2, 2, 3, 4]))}


def contains(tokens: list[int], ids: list[int]) -> bool:
    return any(tokens[i : i + len(ids)] == ids for i in range(len(tokens) - len(ids) + 1))


def check(row: dict, s: SamplingConfig, tokenizer, room: int) -> None:
    """Every promise that a row's settings make."""
    tokens, text, status = list(row["tokens"]), row["text"], row["status"]
    most = min(room, room if s.max_tokens is None else s.max_tokens)
    text_of = Continuation(tokenizer, row["prompt"])
    texts, ids = stop_texts(tokenizer, s.stop)
    ends = {tokenizer.eos, *s.stop_tokens, *ids}
    assert status in ("ok", "length", "constraint") and len(tokens) <= most
    assert len(row["logprobs"]) == len(tokens) and all(x <= 1e-6 for x in row["logprobs"])
    assert text_of(tokens).startswith(text), "tokens and text agree"
    if text_of(tokens) != text:  # the stop text begins within the last token
        assert len(text_of(tokens[:-1])) < len(text)
    assert not any(t in ends for t in tokens[:-1])
    assert status == "length" or not tokens or tokens[-1] in ends or s.stop or s.regex or s.json_schema
    if status == "ok":
        assert len(tokens) >= min(s.min_tokens, most)
    begin = len(text_of(tokens[: s.min_tokens]))
    assert not any(stop in text[begin:] for stop in texts)
    for word in s.bad_words:
        assert not contains(tokens, tokenizer.encode(word)) and not contains(tokens, tokenizer.encode(f" {word}"))
    if status == "ok" and s.regex is not None:
        assert re.fullmatch(s.regex, text)
    if status == "ok" and s.json_schema is not None:
        assert json.loads(text) in ("ab", "abc", 12)
    if status == "length":
        assert len(tokens) == most


def one(model, seed: int) -> str:
    settings = drawn(seed)
    try:
        sampling = SamplingConfig(batch=4, chunk=4, **settings)
    except pydantic.ValidationError:
        return "refused"
    prompts = [np.array([], np.int32), np.frombuffer(b"the", np.uint8).astype(np.int32)]
    requests = [Request(i, prompts[i % 2]) for i in range(4)]
    try:
        rows = generate(model, requests, sampling, seed=seed)
    except InputError:
        return "refused"
    for row in rows.table.to_pylist():
        try:
            check(row, sampling, model.tokenizer, model.max_length + 1 - len(row["prompt"]))
        except AssertionError as error:
            raise AssertionError(f"{settings}: {row} {error}") from error
    other = generate(model, requests, sampling.model_copy(update={"chunk": 3}), seed=seed)
    assert other.column("tokens") == rows.column("tokens") and other.column("text") == rows.column("text"), settings
    return "rows"


@pytest.mark.parametrize("seed", range(12))
def test_settings_keep_their_promises_in_any_company(model, seed):
    one(model, seed)


@pytest.mark.slow
def test_many_more_of_them(model):
    outcomes = []
    for seed in range(100, 150):
        if len(outcomes) % 10 == 0:
            jax.clear_caches()  # hundreds of programs: a process may map only so many pieces of memory
        outcomes.append(one(model, seed))
    assert outcomes.count("rows") > 17 and outcomes.count("refused") > 5


# ---- stop texts by hand


def test_a_stop_text_is_cut_in_tokens_too():
    text_of = lambda tokens: "".join(tokens)
    cut = lambda tokens, *stop, least=0: cut_at_stop(tokens, stop, least, text_of)
    assert cut(["a", "b", "c", "d"], "c") == (2, "ab")
    assert cut(["a", "b", "c", "d"], "x") is None
    assert cut(["a", "bc", "d"], "c") == (2, "ab")  # the token holds text and stop text
    assert cut(["a", "b", "c", "d", "e"], "bcde", "c") == (2, "ab")  # the one that is complete first
    assert cut(["a", "bcd"], "cd", "bc") == (1, "a")  # complete with one token: the one that begins first
    assert cut(["x", "a", "x", "b"], "x", least=1) == (2, "xa")
    assert cut(["x", "a", "x", "b"], "x", least=3) is None
    assert cut(["s", "t", "o"], "st") == (0, "")


def test_min_tokens_holds_against_stop_texts(model):
    """30 of 40 rows were shorter than min_tokens=20, one of one token."""
    stop = tuple(chr(i) for i in range(97, 110))
    rows = generate(model, unconditional(20), SamplingConfig(batch=4, min_tokens=9, stop=stop), seed=2)
    assert min(len(t) for t in rows.tokens()) >= 9 and "ok" in rows.column("status")
    free = generate(model, unconditional(20), SamplingConfig(batch=4, stop=stop), seed=2)
    assert min(len(t) for t in free.tokens()) < 9


def words(names: list[str], special: list[str], template: str | None = None) -> FileTokenizer:
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(names)}, unk_token=names[0]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(special)
    ids = {name: inner.token_to_id(name) for name in special}
    return FileTokenizer(inner, Special(ids["<s>"], ids["</s>"], None, (ids["</s>"],)), template)


def test_a_stop_text_that_is_a_special_token_ends_the_row(mesh):
    """24 of 40 rows ran through <|end|> to the limit."""
    tokenizer = words(["<unk>", "<s>", "</s>", "<|end|>", *(f"w{i}" for i in range(12))], ["<s>", "</s>", "<|end|>"])
    model = randomised(transformer(ModelConfig(layers=1, d_model=16, heads=2, max_length=40), tokenizer, mesh))
    rows = generate(model, unconditional(30), SamplingConfig(batch=8, max_tokens=30, stop=("<|end|>", "w5")), seed=1)
    ended = [t.tolist() for t in rows.tokens() if 3 in t.tolist()]
    assert ended and all(t.index(3) == len(t) - 1 for t in ended)
    assert not any("w5" in text or "<|end|>" in text for text in rows.column("text"))
    with pytest.raises(InputError, match=r"contains the special token '<\|end\|>'"):
        generate(model, unconditional(1), SamplingConfig(stop=("w1<|end|>",)))


# ---- where characters and tokens meet


def byte_level(merges: list[tuple[str, str]], template: str) -> FileTokenizer:
    """A byte-level BPE with the given merges, and a template."""
    names = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(names)}
    for a, b in merges:
        vocabulary[a + b] = len(vocabulary)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(["</s>"])
    end = inner.token_to_id("</s>")
    return FileTokenizer(inner, Special(end, end, None, (end,), False), template)


ASSISTANT = (
    "{% for m in messages %}{% if m.role == 'assistant' %}A: {{ m.content }}{{ eos_token }}{% else %}"
    "U: {{ m.content }} {% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)


def test_an_answer_that_begins_on_the_prompt_s_blank_is_learnt():
    """Only the end token was: '2 of 24 tokens count in the loss'."""
    tokenizer = byte_level([("Y", "e"), ("Ye", "s"), ("Ġ", "Yes")], ASSISTANT)
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "Yes"}]
    tokens, mask = encode(tokenizer, messages)
    assert [tokenizer.token(t) for t, m in zip(tokens, mask, strict=True) if m] == ["ĠYes", "</s>"]
    prompt = encode_prompt(tokenizer, messages[:1])
    assert tokens[: len(prompt)].tolist() == prompt.tolist() and len(tokens) == len(prompt) + 2
    assert Continuation(tokenizer, prompt)(tokens[len(prompt) :]) == " Yes"


def test_an_answer_that_cannot_be_asked_as_it_is_taught_is_refused():
    tokenizer = byte_level([("Ċ", "Ċ")], ASSISTANT.replace("A: ", "A:\n"))
    row = {"q": "q", "a": "\n\nNo"}
    with pytest.raises(InputError, match="take the blanks from the beginning"):
        Template("{q}", "{a}", chat=True).example(row, tokenizer)
    assert Template("{q}", "{a}", chat=True).example({"q": "q", "a": "No"}, tokenizer).loss.sum() == 3


class Blanks:
    """A decoder that strips the first blank, as SentencePiece does."""

    def decode(self, tokens):
        return "".join("\u2581a\u2581bc d"[2 * t : 2 * t + 2].replace("\u2581", " ") for t in tokens).removeprefix(" ")


def test_prompt_and_text_are_the_text_of_both():
    tokenizer = Blanks()
    for prompt in ([], [0], [1, 2], [0, 1, 0]):
        for tokens in ([0], [1, 1], [2, 0], []):
            text = Continuation(tokenizer, prompt)(tokens)
            assert tokenizer.decode(prompt) + text == tokenizer.decode([*prompt, *tokens])
    bytes_ = ByteTokenizer()
    euro = list("€".encode())
    assert Continuation(bytes_, euro[:2])(euro[2:]) == "€"  # a character that the prompt began


# ---- Python as people write it


def test_texts_conversations_and_settings_by_name(model, mesh):
    asked = [Request(0, np.frombuffer(b"the", np.uint8).astype(np.int32))]
    wanted = generate(model, asked, SamplingConfig(max_tokens=5, temperature=0.5), seed=1)
    for prompts in ("the", ["the"]):
        for settings in ({"max_tokens": 5, "temperature": 0.5}, {"sampling": {"max_tokens": 5}, "temperature": 0.5}):
            assert generate(model, prompts, seed=1, **settings).column("tokens") == wanted.column("tokens")
    names = ["<unk>", "<s>", "</s>", "user:", "hi", "bye"]
    speaking = words(names, ["<s>", "</s>"], "{% for m in messages %}user: {{ m.content }}{% endfor %}")
    other = randomised(transformer(ModelConfig(layers=1, d_model=16, heads=2, max_length=16), speaking, mesh))
    one, two = [{"role": "user", "content": "hi"}], [{"role": "user", "content": "bye"}]
    assert generate(other, one, max_tokens=2).column("prompt") == [[3, 4]]
    assert generate(other, [one, two], max_tokens=2).column("prompt") == [[3, 4], [3, 5]]


@pytest.mark.parametrize(
    "prompts, settings, says",
    [
        ("a", {"temprature": 1.0}, "did you mean temperature"),
        ("a", {"top_p": 2.0}, "top_p=2.0"),
        (3, {}, "prompts are texts"),
        ([3], {}, "prompt 0 is neither"),
        ([{"role": "user", "content": "x"}], {}, "no chat template"),
    ],
)
def test_what_is_no_prompt_or_setting_is_named(model, prompts, settings, says):
    with pytest.raises(InputError, match=says):
        generate(model, prompts, **settings)
