"""docs/curation.md does what it says, with a small model of random weights, and names everything that there is."""

from __future__ import annotations

import re

import pytest

import recursive_jax as rj
from recursive_jax.data.tokenizers import ByteTokenizer
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "curation.md").read_text()


@pytest.mark.slow
def test_every_block_runs(mesh, capsys, tmp_path):
    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=256)
    scorer = rj.transformer(config.model_copy(update={"head": "score"}), ByteTokenizer(), mesh).initialized(0)
    names = {
        "model": rj.transformer(config, ByteTokenizer(), mesh).initialized(0),
        "__name__": "page",
        "scorer": scorer,
        "workdir": tmp_path / "run",
    }
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number}", "exec"), names)
    said = capsys.readouterr().out
    assert len(blocks) == 8 and "1. " in said and "draw a map" in said.lower() and "unique texts: 2" in said
    assert names["dropped"] == {"unique texts": 1, "none of 2 keywords": 1}


def test_every_parser_reward_and_rule_is_named():
    for name in rj.parsers.PARSERS.values():
        assert f"p.{name.__name__}(" in PAGE, name
    for name in rj.rewards.REWARDS:
        assert f"r.{name}(" in PAGE or f"`{name}`" in PAGE or name == "token_count", name
    for name in rj.rules.RULES:
        assert f"rule.{name}(" in PAGE, name
    for name in rj.tasks.TASKS:
        assert f"{name}(path)" in PAGE, name
