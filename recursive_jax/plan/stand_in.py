"""A tokenizer in name only: a plan compiles programs before there is any text."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Ids as most tokenizers have them; the last one hides tokens."""

    vocab: int
    bos: int = 0
    eos: int = 1
    pad: int = 2

    @property
    def mask(self) -> int:
        return self.vocab - 1
