"""The client of remote models against a server that is not ours: `transformers serve` (extra [parity])."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("fastapi")

import recursive_jax as rj
from recursive_jax.config import RemoteConfig
from recursive_jax.data.template import Template
from tests.test_foreign import speaking

pytestmark = pytest.mark.parity


@pytest.fixture
def serving(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [str(Path(sys.executable).parent / "transformers"), "serve", "--host", "127.0.0.1", "--port", str(port)]
    home = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "server.log", "wb") as log:
        process = subprocess.Popen([*words, "--device", "cpu"], stdout=log, stderr=log, env={**os.environ, **home})
    until = time.monotonic() + 180
    while True:
        assert process.poll() is None and time.monotonic() < until, (tmp_path / "server.log").read_text()
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}/v1"
    process.terminate()
    process.wait(30)


def test_a_model_behind_transformers_own_server_writes_what_it_writes_here(serving, mesh, tmp_path):
    """The greedy replies of one model, asked there through its chat template and rendered here by ours."""
    config = rj.ModelConfig(layers=1, d_model=32, heads=2, max_length=128, tied=False)
    model = rj.transformer(config, speaking(), mesh).initialized(5)
    folder = rj.save_huggingface(model, tmp_path / "model")
    far = rj.load_model(f"openai:{folder}@{serving}", remote=RemoteConfig(concurrency=2, timeout=120))
    rows = [{"who": who} for who in ("the cat", "a friend", "me")]
    template = Template("hi {who}", chat=True)
    settings = {"temperature": 0.0, "max_tokens": 12}
    got = rj.generate(far, rows, settings, template=template)
    here = rj.generate(rj.load_model(folder, mesh), rows, settings, template=template)
    assert got.column("status") == here.column("status")
    assert got.column("text") == here.column("text") and len(set(got.column("text"))) > 1
    assert got.column("reply_output_tokens") == [len(t) for t in here.tokens()]
