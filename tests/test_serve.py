"""The engine behind an OpenAI-compatible API, asked by the `openai` package."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.config import RemoteConfig
from recursive_jax.data.parsers import Label
from recursive_jax.data.template import Template
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.generate.score import token_logprobs

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")

from recursive_jax.serve.app import Limits, application  # noqa: E402


class Speaking(ByteTokenizer):
    """Bytes, with a chat template."""

    chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def model(mesh):
    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=128)
    return rj.transformer(config, Speaking(), mesh).initialized(3)


class Running:
    def __init__(self, model, limits):
        self.app = application(model, "tiny", limits)
        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/v1"
        self.server = uvicorn.Server(uvicorn.Config(self.app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def client(self, key="none"):
        return openai.OpenAI(base_url=self.url, api_key=key, max_retries=0)

    def close(self):
        self.server.should_exit = True
        self.thread.join()


@pytest.fixture(scope="module")
def running(model):
    found = Running(model, Limits(slots=4, rows=16, waiting=64, body=100_000))
    yield found
    found.close()


@pytest.fixture(scope="module")
def client(running):
    return running.client()


def test_a_choice_is_the_row_that_generate_gives(model, client):
    settings = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 12, "stop": ["q"]}
    got = client.completions.create(model="tiny", prompt=["Once", "upon"], n=3, seed=7, logprobs=0, **settings)
    for p, prompt in enumerate(("Once", "upon")):
        rows = rj.generate(model, [prompt] * 3, settings, seed=7)
        choices = got.choices[3 * p : 3 * p + 3]
        assert [c.text for c in choices] == rows.column("text") and len({c.text for c in choices}) == 3
        finished = {"ok": "stop", "length": "length"}
        assert [c.finish_reason for c in choices] == [finished[s] for s in rows.column("status")]
        for choice, logprobs in zip(choices, rows.lists("logprobs"), strict=True):
            np.testing.assert_allclose(choice.logprobs.token_logprobs, logprobs, atol=1e-5)
    assert got.usage.prompt_tokens == 10 and got.usage.completion_tokens == sum(
        len(c.logprobs.tokens) for c in got.choices
    )
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    said = client.chat.completions.create(model="tiny", messages=talk, seed=3, max_completion_tokens=9, top_p=0.5)
    assert said.choices[0].message.content == rj.generate(model, talk, top_p=0.5, max_tokens=9, seed=3)[0]["text"]
    assert said.system_fingerprint == model.fingerprint and said.choices[0].message.role == "assistant"
    ids = client.completions.create(model="tiny", prompt=[256, *b"Once"], seed=7, **settings)
    assert ids.choices[0].text == got.choices[0].text


def test_sixty_four_at_once_are_what_each_is_alone(model, client):
    """Prompts, seeds and settings unlike, more than there are slots, on several lanes."""

    def settings(n):
        kinds = ({"temperature": 0.5}, {"top_p": 0.7}, {"frequency_penalty": 0.5}, {"temperature": 0.0})
        return {"max_tokens": 3 + n % 9, **kinds[n % 4], **({"stop": ["e"]} if n % 3 else {})}

    def ask(n):
        return client.completions.create(model="tiny", prompt=f"row {n}", seed=n, **settings(n)).choices[0].text

    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        found = list(pool.map(ask, range(64)))
    for n in range(0, 64, 5):
        assert found[n] == rj.generate(model, f"row {n}", settings(n), seed=n)[0]["text"], n


def test_a_stream_says_what_the_whole_says(client):
    for n, settings in enumerate(({}, {"stop": ["a", "\n"]}, {"n": 3})):
        more = {"model": "tiny", "prompt": "Once", "seed": n, "max_tokens": 40, **settings}
        whole = client.completions.create(**more)
        texts, ends, used = {}, {}, None
        for event in client.completions.create(**more, stream=True, stream_options={"include_usage": True}):
            used = event.usage or used
            for choice in event.choices:
                texts[choice.index] = texts.get(choice.index, "") + choice.text
                ends[choice.index] = choice.finish_reason or ends.get(choice.index)
        assert [texts[i] for i in sorted(texts)] == [c.text for c in whole.choices]
        assert [ends[i] for i in sorted(ends)] == [c.finish_reason for c in whole.choices] and used == whole.usage
    talk = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "seed": 5, "max_tokens": 20}
    events = list(client.chat.completions.create(**talk, stream=True))
    assert events[0].choices[0].delta.role == "assistant"
    said = "".join(e.choices[0].delta.content or "" for e in events)
    assert said == client.chat.completions.create(**talk).choices[0].message.content


def test_log_probabilities_of_prompt_and_alternatives(model, client):
    got = client.completions.create(
        model="tiny", prompt=[256, *b"Once upon"], echo=True, logprobs=2, max_tokens=3, seed=1
    )
    found = got.choices[0].logprobs
    assert got.choices[0].text.startswith("Once upon") and len(found.tokens) == 13
    assert found.token_logprobs[0] is None and found.top_logprobs[0] is None
    ids = [*b"Once upon", *rj.generate(model, "Once upon", max_tokens=3, seed=1)[0]["tokens"]]
    np.testing.assert_allclose(found.token_logprobs[1:], next(token_logprobs(model, [np.array(ids)])), atol=1e-5)
    logits_TV = np.asarray(model.logits(np.array([[256, *ids[:-1]]])))[0].astype(np.float64)
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
    for t, top in enumerate(found.top_logprobs[1:]):
        np.testing.assert_allclose(max(top.values()), logp_TV[t].max(), atol=1e-5)
    scored = client.completions.create(model="tiny", prompt="Once upon", echo=True, logprobs=1, max_tokens=0)
    assert scored.choices[0].text == "Once upon" and len(scored.choices[0].logprobs.token_logprobs) == 9
    talk = [{"role": "user", "content": "x"}]
    said = client.chat.completions.create(
        model="tiny", messages=talk, logprobs=True, top_logprobs=3, max_tokens=4, temperature=0
    )
    for token in said.choices[0].logprobs.content:
        assert token.logprob == token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob, "greedy: the best one"


def test_replies_are_held_to_a_form(client):
    schema = {
        "type": "object",
        "properties": {"k": {"type": "boolean"}},
        "required": ["k"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "k", "schema": schema}}
    talk = [{"role": "user", "content": "x"}]
    said = client.chat.completions.create(model="tiny", messages=talk, response_format=form, max_tokens=40, seed=1)
    assert isinstance(json.loads(said.choices[0].message.content)["k"], bool)
    chosen = {"structured_outputs": {"choice": ["yes", "no"]}}
    texts = {
        client.completions.create(model="tiny", prompt="x", seed=n, max_tokens=9, extra_body=chosen).choices[0].text
        for n in range(4)
    }
    assert texts <= {"yes", "no"}


def test_embeddings(model, client):
    found = client.embeddings.create(model="tiny", input=["a text", "another"])
    wanted = rj.embed(model, ["a text", "another"])
    np.testing.assert_allclose([d.embedding for d in found.data], wanted, atol=1e-6)
    plain = client.embeddings.create(model="tiny", input=[list(b"a text")], encoding_format="float")
    np.testing.assert_allclose(plain.data[0].embedding, rj.embed(model, [np.array(list(b"a text"))])[0], atol=1e-6)


def test_what_is_wrong_is_said_in_the_apis_form(running, client):
    def refused(kind, match, call=client.completions.create, **more):
        asked = {"model": "tiny", **({} if "messages" in more or "input" in more else {"prompt": "x"}), **more}
        with pytest.raises(kind, match=match):
            call(**asked)

    bad, chat = openai.BadRequestError, client.chat.completions.create
    refused(openai.NotFoundError, "no model 'other' here", model="other")
    refused(bad, "temperature", temperature=-1)
    refused(bad, "maximum context length is 128", prompt="x" * 200)
    refused(bad, "token ids are 0 to", prompt=[5, 9999])
    refused(bad, "at most 16 choices", n=17)
    refused(bad, "at least one is wanted", prompt=[])
    refused(bad, "colour: unknown; known here: model, temperature", extra_body={"colour": "red"})
    refused(bad, "suffix: not served", suffix="x")
    refused(bad, "tools: not served", chat, messages=[{"role": "user", "content": "x"}], tools=[{"type": "function"}])
    refused(bad, "not valid", extra_body={"structured_outputs": {"regex": "("}})
    refused(bad, "not served in a stream", stream=True, logprobs=1)
    refused(bad, "messages", chat, messages=[])
    refused(bad, "1 to 16 texts", client.embeddings.create, input=["x"] * 17)
    refused(openai.APIStatusError, "larger than 100,000 bytes", prompt="x" * 200_000)
    import httpx2

    for method, path, data in (
        ("POST", "/nothing", b"{}"),
        ("GET", "/completions", None),
        ("POST", "/completions", b"{"),
        ("POST", "/completions", b'{"model": "tiny", "prompt": "\\ud800"}'),
        ("POST", "/embeddings", b'{"model": "tiny", "input": "\\ud800"}'),
    ):
        answer = httpx2.request(method, running.url + path, content=data)
        assert answer.status_code in (400, 404, 405) and answer.json()["error"]["message"]
    assert [m.id for m in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"
    assert client.completions.create(model="tiny", prompt="x", user="me", max_tokens=1).choices, "it goes on"


def test_keys_and_limits(model):
    found = Running(model, Limits(slots=1, waiting=2, token="secret"))
    try:
        with pytest.raises(openai.AuthenticationError):
            found.client("wrong").completions.create(model="tiny", prompt="x")
        client = found.client("secret")
        with pytest.raises(openai.RateLimitError, match="2 rows wait"):
            client.completions.create(model="tiny", prompt="x", n=3)
        assert client.completions.create(model="tiny", prompt="x", n=2, max_tokens=2).choices
    finally:
        found.close()


def test_clients_that_vanish_free_their_rows(model, running):
    lanes = running.app.routes[0].endpoint.__self__.lanes
    body = {"model": "tiny", "prompt": "x", "n": 4, "max_tokens": 100, "temperature": 1.0, "min_tokens": 99}
    for stream in (True, False):
        for _ in range(4):
            data = json.dumps({**body, "stream": stream}).encode()
            with socket.create_connection(("127.0.0.1", running.socket.getsockname()[1])) as wire:
                head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
                wire.sendall(head.encode() + data)
                time.sleep(0.05)
        until = time.monotonic() + 30
        while any(not lane.idle for lane in lanes._lanes.values()) and time.monotonic() < until:
            time.sleep(0.02)
        assert all(lane.idle for lane in lanes._lanes.values())
    got = running.client().completions.create(model="tiny", prompt="x", seed=1, max_tokens=9)
    assert got.choices[0].text == rj.generate(model, "x", max_tokens=9, seed=1)[0]["text"]


def test_our_own_client_gets_what_the_model_gives(model, running):
    """A remote model that is this server is the model itself."""
    far = rj.load_model(f"openai:tiny@{running.url}", remote=RemoteConfig())
    rows = [{"q": f"row {n}"} for n in range(6)]
    template = Template("Is {q} good?", chat=True, parser=Label(("yes", "no")))
    got = rj.generate(far, rows, template=template, max_tokens=8, constrained=True, temperature=0.0)
    here = rj.generate(model, rows, template=template, max_tokens=8, constrained=True, temperature=0.0)
    assert got.column("label") == here.column("label") and got.column("text") == here.column("text")
    assert got.column("reply_output_tokens") == [len(t) for t in here.tokens()]


@pytest.mark.slow
def test_the_command_serves_and_ends_cleanly(model, tmp_path):
    with rj.Run(tmp_path / "run", {"a": 1}, quiet=True) as run:
        plain = rj.transformer(rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=64), ByteTokenizer())
        run.round(0).train("m", plain, ["some text"] * 8, {"steps": 1, "batch": 8})
    words = [sys.executable, "-m", "recursive_jax.cli", "serve", str(tmp_path / "run"), "--port", "0", "--name", "m"]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    line = ""
    while "serving" not in line:
        line = process.stderr.readline()
        assert line, process.wait()
    url = line.split(" at ")[1].split()[0]
    client = openai.OpenAI(base_url=url, api_key="x", max_retries=0)
    assert client.completions.create(model="m", prompt="x", max_tokens=3).usage.completion_tokens <= 3
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        going = pool.submit(
            client.completions.create, model="m", prompt="x", max_tokens=50, extra_body={"min_tokens": 50}
        )
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        assert going.result().usage.completion_tokens == 50, "what is in work ends"
    assert process.wait(60) == 0 and "Traceback" not in process.stderr.read()
