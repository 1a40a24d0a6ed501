"""Writes tests/fixtures/families: per family a tiny float16 model with redrawn parameters and the logits that
transformers gives for it. Needs the extra [parity]: `python -m tests.make_fixtures`."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import torch

from tests.tiny_models import MASKED, NAMES, tiny

HERE = Path(__file__).parent / "fixtures" / "families"
VARIANTS = ("gpt_neox-serial", "llama-yarn", "llama-linear", "llama-tied-bias", "opt-350m")


def main() -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    for name in NAMES:
        if name in VARIANTS:
            continue
        model = tiny(name)
        with torch.no_grad():  # rounded one by one: .half() would round the rotary frequencies too
            for p in model.parameters():
                p.copy_(p.half().float())
        tokens = np.random.default_rng(0).integers(3, 48, (2, 20))
        mask = np.ones_like(tokens)
        mask[1, 14:] = 0
        if name in MASKED:
            tokens[1, 14:] = model.config.pad_token_id
        with torch.no_grad():
            out = model(input_ids=torch.tensor(tokens), attention_mask=torch.tensor(mask))
        model.half().save_pretrained(HERE / name)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(
            HERE / name / "expected.npz", tokens=tokens.astype(np.int32), mask=mask.astype(np.int8), logits=out.logits
        )


if __name__ == "__main__":
    main()
