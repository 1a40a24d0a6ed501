"""docs/preferences.md does what it says, with a small model of random weights, and names what there is."""

from __future__ import annotations

import re

import numpy as np
import pytest

import recursive_jax as rj
from recursive_jax.data.tokenizers import ByteTokenizer
from recursive_jax.objectives.policy_losses import LOSS_TYPES
from recursive_jax.objectives.preference_losses import LOSSES
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "preferences.md").read_text()
TEXT = (ROOT / "docs" / "objectives.md").read_text()


@pytest.mark.slow
def test_every_block_runs(mesh, capsys, tmp_path):
    config = rj.ModelConfig(layers=1, d_model=16, heads=2, max_length=64)
    model = rj.transformer(config, ByteTokenizer(), mesh).initialized(0)
    names = {"model": model, "workdir": tmp_path / "run", "__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    for number, block in enumerate(blocks):
        exec(compile(block, f"block {number}", "exec"), names)
    assert len(blocks) == 10 and capsys.readouterr().out.startswith("4\n")
    assert np.isfinite(rj.rewards.reward_model(names["judge"])([{"text": "x"}])).all()
    assert names["policy"].fingerprint != model.fingerprint


def test_every_loss_is_named():
    for name in (*LOSSES, *LOSS_TYPES):
        assert f"`{name}`" in PAGE, name
    for name in rj.objectives.__all__:
        if name.endswith(("_loss", "_reward", "_advantages", "_jsd")) and name[0].islower():
            assert name in PAGE or name in TEXT, name
