"""Models behind OpenAI-compatible servers: what is asked, what a bad network does to it, and what is never paid
twice."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import textwrap
import time

import pytest

import recursive_jax as rj
from recursive_jax import parsers
from recursive_jax.cli import main
from recursive_jax.config import RemoteConfig, SamplingConfig
from recursive_jax.config.loader import parse_section
from recursive_jax.curate import rewards
from recursive_jax.data.dataset import Dataset
from recursive_jax.data.given import as_dataset
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.errors import InputError
from recursive_jax.generate.remote.client import Unreachable
from recursive_jax.generate.remote.journal import Replies
from recursive_jax.generate.remote.wire import Again, Reply, Wrong, body_of, meaning
from recursive_jax.rounds.iterate import usable
from recursive_jax.rounds.run import Run
from tests.openai_server import Proxy, Server, running, text_of

ASK = Template("Write about {topic}.", chat=True)
TOPICS = [{"topic": f"t{i}"} for i in range(12)]


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def server():
    with running(Server()) as found:
        yield found


def remote(server, **settings):
    return rj.load_model(f"openai:test-model@{server.url}", remote=RemoteConfig(backoff=0.01, **settings))


def refusal(code, message, **more):
    return code, {}, {"error": {"message": message, **more}}


def last(body):
    return body["messages"][-1]["content"]


# ---- what is asked, and what comes


def test_rows_are_what_the_server_writes(server):
    model = remote(server)
    examples = rj.Examples(((TOPICS[:3], 1),), completion="It is {topic}.")
    shown = Template("Write about {topic}.", system="Be brief.", chat=True, examples=examples)
    data = rj.generate(model, TOPICS, template=shown, each=2, temperature=0.5, max_tokens=20)
    assert len(server.asked) == 24 and len({body["seed"] for body in server.asked}) == 24
    wanted = {last(b): b for b in server.asked}
    for row in data:
        assert row["text"].endswith(f"Write about {row['topic']}.") and row["model"] == model.fingerprint
        asked = model.tokenizer.asked(row["prompt"])
        assert asked == wanted[asked[-1]["content"]]["messages"] and len(asked) == 4
        assert (row["reply_input_tokens"], row["reply_output_tokens"], len(row["tokens"])) == (10, 5, 0)
    body = server.asked[0]
    assert (body["temperature"], body["max_tokens"], body["model"]) == (0.5, 20, "test-model") and "top_p" not in body
    again = rj.generate(model, TOPICS, template=shown, each=2, temperature=0.5, max_tokens=20)
    assert again.column("text") == data.column("text") and len(set(data.column("text"))) == 24
    assert rj.generate(model, ["Once", "Twice upon"]).column("text")[1].endswith("Twice upon")
    assert server.asked[-1]["prompt"] in ("Once", "Twice upon")
    assert rj.generate(remote(server, api="chat"), "Hello").column("text")[0].endswith(" Hello")
    assert server.asked[-1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_a_conversation_holds_any_character(server):
    """Separators of lines that are none in JSON: U+2028, U+2029, U+0085."""
    said = "a\u2028b\u2029c\u0085d\r\ne"
    rj.generate(remote(server), [[{"role": "user", "content": said}]])
    assert server.asked[-1]["messages"] == [{"role": "user", "content": said}]


def test_a_request_has_the_names_of_the_api():
    """The parameters of the `openai` package, and those of vLLM beyond it."""
    openai = pytest.importorskip("openai")
    sampling = SamplingConfig(
        temperature=0.3, top_p=0.9, presence_penalty=0.1, frequency_penalty=0.2, stop=("END",), max_tokens=7
    )
    params = openai.types.chat.completion_create_params.CompletionCreateParamsNonStreaming
    known = {key for kind in params.__mro__ for key in getattr(kind, "__annotations__", {})}
    known |= set(openai.types.chat.completion_create_params.CompletionCreateParamsBase.__annotations__)
    _, body = body_of([{"role": "user", "content": "x"}], sampling, RemoteConfig(logprobs=True), "m", 3)
    assert body.keys() <= known
    assert body == {
        **{"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0.3, "max_tokens": 7},
        **{"top_p": 0.9, "presence_penalty": 0.1, "frequency_penalty": 0.2, "stop": ["END"], "logprobs": True},
        "seed": 3,
    }
    schema = SamplingConfig(json_schema='{"type": "object"}')
    _, body = body_of("text", schema, RemoteConfig(body={"seed": None, "reasoning_effort": "low"}), "m", 3)
    assert body["response_format"]["json_schema"]["schema"] == {"type": "object"} and body["prompt"] == "text"
    assert body["seed"] is None and body["reasoning_effort"] == "low"
    own = SamplingConfig(top_k=5, min_p=0.1, repetition_penalty=1.1, min_tokens=2, regex=None, stop_tokens=(7,))
    _, body = body_of("text", own, RemoteConfig(), "m", 3)
    assert (body["top_k"], body["min_p"], body["repetition_penalty"]) == (5, 0.1, 1.1)
    assert (body["min_tokens"], body["stop_token_ids"]) == (2, [7])


def test_what_an_answer_means():
    def chat(**choice):
        return json.dumps({"choices": [{"finish_reason": "stop", **choice}], "usage": None}).encode()

    said = lambda code, data, **headers: meaning(code, headers, data, "chat/completions")
    good = {"message": {"content": "yes"}}
    assert said(200, chat(**good)) == Reply("yes")
    assert said(200, chat(**{**good, "finish_reason": "length"})).status == "length"
    assert said(200, chat(**{**good, "finish_reason": "content_filter"})).status == "refused"
    assert said(200, chat(message={"content": None, "refusal": "I cannot"})) == Reply("I cannot", "refused")
    assert said(200, chat(message={"content": None})) == Reply("")
    scored = chat(**good, logprobs={"content": [{"token": "y", "logprob": -0.5}, {"token": "es", "logprob": -1}]})
    assert said(200, scored).logprobs == [-0.5, -1.0]
    for broken in (b"", b"{", chat(**good)[:-9], b'{"choices": []}', b"[]", b"[" * 100_000, chat(message="x"), b"null"):
        assert said(200, broken).status == "error:malformed"
    assert said(429, b'{"error": {"message": "slow down"}}', **{"retry-after": "7"}) == Again(
        "error:429", "429 slow down", 7.0, busy=True, of_row=False
    )
    assert 0 <= said(503, b"", **{"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}).after < 1 and said(500, b"").of_row
    assert isinstance(said(429, b'{"error": {"message": "no money", "code": "insufficient_quota"}}'), Wrong)
    long = b'{"error": {"message": "This model\'s maximum context length is 8 tokens"}}'
    assert said(400, long).status == "prompt_too_long"
    assert said(400, b'{"error": {"code": "content_filter", "message": "m"}}').status == "refused"
    assert said(422, b'{"detail": "?"}') == Wrong("error:422", "?")


def test_log_probabilities_are_kept_where_there_are_some():
    def behave(body):
        assert body["logprobs"] is True
        content = [{"token": "a", "logprob": -0.25}]
        message = {"role": "assistant", "content": "a"}
        return 200, {}, {"choices": [{"message": message, "finish_reason": "length", "logprobs": {"content": content}}]}

    with running(Server(behave)) as server:
        data = rj.generate(remote(server, logprobs=True), TOPICS[:2], template=ASK)
    assert data.column("reply_logprobs") == [[-0.25]] * 2 and data.column("status") == ["length"] * 2


def test_it_judges(server):
    def behave(body):
        content = f"fine\nScore: {len(last(body)) % 5}"
        return 200, {}, {"choices": [{"message": {"content": content}, "finish_reason": "stop"}]}

    judge = rewards.judge(
        remote(server), Template("Rate: {reply}", chat=True, parser=parsers.Score(low=0, high=5)), constrained=False
    )
    server.behave = behave
    rows = [{"text": "a" * n} for n in range(6)]
    assert rj.score(rows, judge).column("score") == [float((n + 6) % 5) for n in range(6)]


# ---- what goes wrong


def test_what_cannot_be_asked_is_said(server, mesh, monkeypatch):
    for text in ("openai:m@ftp://x", "openai:@http://x/v1", "openai:m@http://u:p@x/v1", "openai:m@http://x/v1?k=1"):
        with pytest.raises(InputError, match="is no remote model"):
            rj.load_model(text)
    with pytest.raises(InputError, match="OPENAI_BASE_URL"):
        rj.load_model("openai:m")
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/")
    assert rj.load_model("openai:m").source == f"openai:m@{server.url}"
    model = remote(server)
    for settings in ({"beams": 2}, {"best_of": 2}, {"guidance": 2.0}, {"bad_words": ("x",)}):
        with pytest.raises(InputError, match=r"sampling\.(beams|best_of|guidance|bad_words)"):
            rj.generate(model, "x", **settings)
    with pytest.raises(InputError, match="its weights are not here"):
        rj.train(model, ["a text"])
    with pytest.raises(InputError, match="its weights are not here"):
        rj.score([{"text": "x", "tokens": [1]}], rewards.likelihood(model))
    with pytest.raises(InputError, match="max_cost needs"):
        parse_section(RemoteConfig, {}, ["max_cost=1"], "remote")
    with pytest.raises(InputError, match="set by the request itself"):
        parse_section(RemoteConfig, {}, ["body={n: 2}"], "remote")
    gone = rj.load_model("openai:m@http://127.0.0.1:9/v1")
    with pytest.raises(InputError, match="nobody answers at"):
        rj.generate(gone, "x")


def test_one_bad_row_costs_its_row():
    def behave(body):
        what = last(body)
        if "t3." in what:
            return refusal(400, "maximum context length is 4 tokens")
        if "t4." in what:
            return refusal(400, "no emoji, please")
        if "t5." in what:
            return refusal(500, "it crashes here")
        return None

    with running(Server(behave)) as server:
        data = rj.generate(remote(server, tries=3), TOPICS, template=ASK, max_tokens=5)
        wanted = ["ok"] * 3 + ["prompt_too_long", "error:400", "error:500"] + ["ok"] * 6
        assert data.column("status") == wanted and data.column("answer")[3:6] == [None] * 3
        assert sum("t5." in last(b) for b in server.asked) == 3
        server.behave = lambda body: refusal(400, "temperature is not supported")
        with pytest.raises(InputError, match=r"does not take the request \(400\): temperature is not supported"):
            rj.generate(remote(server), TOPICS, template=ASK)
        server.behave = lambda body: refusal(404, "there is no model test-model")
        with pytest.raises(InputError, match=r"\(404\): there is no model"):
            rj.generate(remote(server), TOPICS, template=ASK)
        server.behave = lambda body: (301, {"Location": "http://127.0.0.1:9/"}, {})
        with pytest.raises(InputError, match=r"\(301\)"):
            rj.generate(remote(server), TOPICS, template=ASK)


def test_a_server_that_is_gone_stops_the_call_and_keeps_what_came(tmp_path):
    with running(Server()) as server:
        asked = []

        def behave(body):
            asked.append(body)
            return refusal(503, "restarting") if len(asked) > 5 else None

        server.behave = behave
        model = remote(server, patience=0.3, journal=str(tmp_path / "replies.jsonl"))
        with pytest.raises(Unreachable, match=r"no reply for 0\.3 seconds \(503 restarting\)") as error:
            rj.generate(model, TOPICS, template=ASK)
        assert error.value.exit_code == 75
        kept = {text_of(b) for b in asked[:5]}
        server.behave, server.asked = None, []
        data = rj.generate(model, TOPICS, template=ASK)
        assert len(server.asked) == 7 and kept <= set(data.column("text")) and set(data.column("status")) == {"ok"}
        server.asked = []
        assert rj.generate(model, TOPICS, template=ASK).table.equals(data.table) and not server.asked


def test_a_hung_server_costs_a_try():
    hung = []

    def behave(body):
        if "t2." in last(body) and len(hung) < 2:
            hung.append(1)
            time.sleep(1.5)
        return None

    with running(Server(behave)) as server:
        data = rj.generate(remote(server, timeout=0.3), TOPICS, template=ASK)
    assert len(hung) == 2 and set(data.column("status")) == {"ok"}


def test_rate_limits_are_kept_and_are_no_failures():
    """A server that bears two at once: the client comes down to it, and waits as long as it is told."""
    limits = []

    def behave(body):
        if server.at_once > 2:
            limits.append(time.monotonic())
            return 429, {"Retry-After": "0.1"}, {"error": {"message": "slow down"}}
        time.sleep(0.02)
        return None

    rows = [{"topic": f"t{i}"} for i in range(100)]
    with running(Server(behave)) as server:
        data = rj.generate(remote(server, tries=2), rows, template=ASK)
    assert set(data.column("status")) == {"ok"} and limits
    assert len(limits) < 150, f"{len(limits)}: one that does not come down is told so thousands of times"


def test_the_key_is_sent_and_appears_nowhere(tmp_path, monkeypatch, capfd):
    key = "sk-test-0123456789abcdef"
    monkeypatch.setenv("MY_KEY", key)
    ask = tmp_path / "ask.yaml"
    ask.write_text("prompt: Write about {topic}.\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(t) + "\n" for t in TOPICS))

    def echo(body):
        return 200, {}, {"choices": [{"message": {"content": f"your key is {key}"}, "finish_reason": "stop"}]}

    with running(Server(echo, key=key)) as server:
        name = f"openai:test-model@{server.url}"
        words = ["generate", name, "--in", str(rows), "--template", str(ask), "--out", str(tmp_path / "out.jsonl")]
        assert main([*words, "remote.key_env=MY_KEY"]) == 0
        with Run(tmp_path / "run", {"a": 1}, quiet=True) as run:
            found = run.round(0).generate("r", remote(server, key_env="MY_KEY"), TOPICS, template=ASK).value
        assert found.column("text") == ["your key is ***"] * 12
        monkeypatch.setenv("MY_KEY", key + "wrong")
        with pytest.raises(InputError, match=r"answers 401: the key in MY_KEY is not taken") as error:
            rj.generate(remote(server, key_env="MY_KEY"), "x")
        with pytest.raises(InputError, match="it wants a key, and OPENAI_API_KEY is not set"):
            rj.generate(remote(server), "x")
    said = capfd.readouterr()
    everything = [said.out, said.err, str(error.value), repr(remote(server, key_env="MY_KEY"))]
    files = [p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) > 5 and not any(key.encode() in x for x in files) and not any(key in x for x in everything)
    assert "***" in (tmp_path / "out.jsonl").read_text()


# ---- budgets


def test_a_budget_is_never_passed_and_the_rest_is_asked_when_it_is_raised(tmp_path):
    with running(Server()) as server:
        settings = {"input_price": 1e4, "output_price": 2e4, "journal": str(tmp_path / "replies.jsonl")}  # 0.2 a reply
        with pytest.raises(InputError, match=r"remote\.max_cost=2.*raise it, and the same command goes on"):
            rj.generate(remote(server, max_cost=2.0, **settings), TOPICS, template=ASK, max_tokens=5)
        first = len(server.asked)
        assert 0 < first and first * 0.2 <= 2.0, "a ceiling for each request: bytes of its prompt, max_tokens"
        data = rj.generate(remote(server, max_cost=20.0, **settings), TOPICS, template=ASK, max_tokens=5)
        assert len(server.asked) == 12 and set(data.column("status")) == {"ok"}
        with pytest.raises(InputError, match=r"180 tokens"):
            rj.generate(remote(server, max_tokens=200, **settings), "another", max_tokens=15)
        with pytest.raises(InputError, match=r"set sampling\.max_tokens"):
            rj.generate(remote(server, max_tokens=10**9), "x")
        server.usage = False
        with pytest.raises(InputError, match="does not count tokens"):
            rj.generate(remote(server, max_tokens=10**9), "x", max_tokens=5)


# ---- what is paid for is kept


def test_replies_are_kept_by_what_was_asked(tmp_path, capfd):
    path = tmp_path / "replies.jsonl"
    replies = Replies(path)
    for n in range(5):
        replies.add(f"k{n}", "m", {"text": f"t{n}", "input_tokens": 1, "output_tokens": n})
    assert replies.get("k3")["text"] == "t3" and replies.get("x") is None and replies.spent("m") == (5, 10)
    replies.close()
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = lines[1].replace(b"t1", b"t9")
    path.write_bytes(lines[0] + damaged + b"".join(lines[2:]) + lines[0][:20])  # and a torn one
    again = Replies(path)
    assert [n for n in range(5) if again.get(f"k{n}")] == [0, 2, 3, 4] and "1 damaged" in capfd.readouterr().err
    again.add("k1", "m", {"text": "new", "input_tokens": 0, "output_tokens": 0})
    again.close()
    third = Replies(tmp_path / "other.jsonl", [path])
    assert [third.get(f"k{n}")["text"] for n in range(5)] == ["t0", "new", "t2", "t3", "t4"]
    assert third.spent("m") == (0, 0), "another run paid"


def test_a_run_keeps_replies_and_a_fork_uses_them(tmp_path, server):
    model = remote(server, input_price=1.0, output_price=2.0)
    judge = rewards.judge(model, Template("Rate {reply}", chat=True, parser=parsers.Score()), constrained=False)
    with Run(tmp_path / "a", {"a": 1}, quiet=True) as run:
        stored = run.round(0).generate("rows", model, TOPICS, template=ASK)
        run.round(0).score("scored", stored, judge)
    replies = json.loads((tmp_path / "a/rounds/0000/rows-replies/manifest.json").read_text())
    assert replies["counts"]["output_tokens"] == 60 and replies["counts"]["cost"] == pytest.approx((120 + 120) / 1e6)
    assert len(server.asked) == 24
    more = [*TOPICS, {"topic": "another"}]
    with Run(tmp_path / "b", {"a": 2}, fork=tmp_path / "a", quiet=True) as run:
        found = run.round(0).generate("rows", model, more, template=ASK).value
        with pytest.raises(InputError, match=r"give count="):
            run.round(0).generate("x", model, rj.Unconditional(), tokens=5)
    assert len(server.asked) == 25 and found.column("text")[:12] == stored.value.column("text")


def test_the_command_line_asks_reads_and_goes_on(tmp_path, server, capsys):
    ask, rows, out = tmp_path / "ask.yaml", tmp_path / "rows.jsonl", tmp_path / "out.parquet"
    ask.write_text("prompt: Write about {topic}.\n")
    rows.write_text("".join(json.dumps(t) + "\n" for t in TOPICS))
    words = [
        "generate",
        f"openai:test-model@{server.url}",
        "--in",
        str(rows),
        "--template",
        str(ask),
        "--out",
        str(out),
    ]
    prices = ["remote.input_price=10000", "remote.output_price=20000", "sampling.max_tokens=5"]
    assert main([*words, *prices, "remote.max_cost=2"]) == 2
    assert "raise it, and the same command goes on" in capsys.readouterr().err and not out.exists()
    first = len(server.asked)
    assert main([*words, *prices, "remote.max_cost=20"]) == 0
    assert len(server.asked) == 12 and 0 < first < 12
    assert Dataset.read([str(out)]).column("topic") == [t["topic"] for t in TOPICS]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ask.yaml", "out.parquet", "rows.jsonl"]
    assert main(["generate", f"openai:test-model@{server.url}", "--chat", "--prompt", "hello"]) == 0
    assert "hello" in capsys.readouterr().out
    assert main([*words[:-1], str(tmp_path / "x.jsonl"), "remote.max_cost=1"]) == 2
    assert "max_cost needs input_price" in capsys.readouterr().err


# ---- the bad proxy


def test_a_bad_network_changes_nothing(server):
    rows = [{"topic": f"t{i}"} for i in range(60)]
    wanted = rj.generate(remote(server, name="m"), rows, template=ASK)
    with running(Proxy(server)) as proxy:
        found = rj.generate(remote(proxy, name="m", tries=40), rows, template=ASK)
        assert {"drop", "lose", "delay", "cut", "429", "500"} <= set(proxy.done)
    assert found.table.equals(wanted.table)


SCRIPT = """
import sys
import recursive_jax as rj
from recursive_jax.config import RemoteConfig
from recursive_jax.rounds.run import Run

model = rj.load_model(f"openai:test-model@{sys.argv[1]}", remote=RemoteConfig(name="m", tries=60, backoff=0.01))
rows = [{"topic": f"t{i}"} for i in range(150)]
with Run(sys.argv[2], {"a": 1}, quiet=True) as run:
    stored = run.round(0).generate("rows", model, rows, template=rj.Template("Write about {topic}.", chat=True))
    again = run.round(0).generate("more", model, stored, template=rj.Template("Go on: {answer}", chat=True))
"""


@pytest.mark.slow
def test_kills_behind_the_bad_proxy_lose_nothing_and_pay_nothing_twice(tmp_path, server):
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    start = lambda url, run: subprocess.Popen([sys.executable, str(script), url, str(run)], stderr=subprocess.PIPE)
    calm = start(server.url, tmp_path / "calm")
    assert calm.wait() == 0, calm.stderr.read().decode()
    server.asked = []
    journal, rng, killed = tmp_path / "run" / "replies.jsonl", random.Random(0), 0
    kept: set[str] = set()
    with running(Proxy(server, share=0.5)) as proxy:
        for _ in range(40):
            process = start(proxy.url, tmp_path / "run")
            had = len(server.asked)
            until = had + rng.randrange(10, 90)
            while process.poll() is None and len(server.asked) < until:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.1))
            if process.poll() is not None:
                assert process.returncode == 0, process.stderr.read().decode()
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
            time.sleep(0.3)  # what was under way has arrived
            assert not kept & {text_of(b) for b in server.asked[had:]}, "asked again what was journaled"
            lines = journal.read_bytes().split(b"\n") if journal.exists() else []
            now = {json.loads(line)["reply"]["text"] for line in lines if line.endswith(b"}")}
            assert kept <= now, "a reply was lost"
            kept = now
    assert killed >= 5 and process.returncode == 0
    for name in ("rows-replies", "rows", "more-replies", "more"):
        a, b = (Dataset.read([str(tmp_path / r / f"rounds/0000/{name}/rows-00000.parquet")]) for r in ("calm", "run"))
        assert a.table.equals(b.table), name


# ---- what is done with its rows


def test_its_rows_are_learnt_by_their_text_beside_others(server, mesh):
    """Text alone: the ids of the prompt are bytes, not the student's; a second row of one reply is not learnt again."""
    model = rj.transformer(rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=64), ByteTokenizer(), mesh)
    far = rj.generate(remote(server), TOPICS[:2], template=ASK)
    far = far.without("topic", "reply_input_tokens", "reply_output_tokens", "answer")
    near = Dataset.from_texts(["abc", "de"], ByteTokenizer())
    both = as_dataset(near + far, ByteTokenizer())
    assert [len(t) for t in both.tokens()] == [4, 3, *(len(t) + 1 for t in far.column("text"))]
    assert [len(p) for p in both.prompts()] == [0] * 4
    found = rj.evaluate(model.initialized(0), near + far)
    assert found.metrics["tokens"] == both.token_count and found.metrics["rows"] == 4
    again = far.with_column("id", ["a/0", "a/0#1"])
    assert [len(t) > 0 for t in as_dataset(again, ByteTokenizer()).tokens()] == [True, False]
    with pytest.raises(InputError, match="a pool is measured in tokens"):
        usable(far)


def test_what_belongs_to_a_server_is_refused_elsewhere(server, tmp_path, capsys):
    with pytest.raises(InputError, match="remote settings are for a model behind a server"):
        rj.load_model("smollm2", remote={"patience": 5})
    assert rj.load_model(f"openai:m@{server.url}", remote={"patience": 5}).settings.patience == 5
    with pytest.raises(InputError, match="unknown key patients"):
        rj.load_model(f"openai:m@{server.url}", remote={"patients": 5})
    server.behave = lambda body: refusal(400, "this model has no chat template") if "messages" in body else None
    with pytest.raises(InputError, match="`chat: false` in the template, or remote.api=completions"):
        rj.generate(remote(server), TOPICS, template=ASK)
    ask, rows = tmp_path / "ask.yaml", tmp_path / "rows.jsonl"
    ask.write_text("prompt: Write about {topic}.\n")
    rows.write_text('{"topic": "a"}\n')
    words = ["generate", f"openai:test-model@{server.url}", "--in", str(rows), "--template", str(ask), "--preview", "1"]
    assert main([*words, "remote.api=completions"]) == 0 and "Write about a." in capsys.readouterr().out
    rows.write_text("")
    assert main(words) == 2 and "there is no row in it" in capsys.readouterr().err
    with pytest.raises(InputError, match=r"is it http.*/v1/v1\?|is it http://127.0.0.1:\d+/v1\?"):
        server.behave = lambda body: refusal(404, "Not Found")
        rj.generate(rj.load_model(f"openai:test-model@{server.url.removesuffix('/v1')}"), "x")
