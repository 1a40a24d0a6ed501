"""What a parser is: it reads a model's reply as rows, or says why it cannot."""

from __future__ import annotations

import dataclasses
from typing import Any

import pyarrow as pa

from recursive_jax.identity import Value

Rows = list[dict[str, Any]]
TEXT = pa.large_string()


@dataclasses.dataclass(frozen=True)
class ParseError:
    """A reply that gives no row. text: the reply. reason: a word or two that are counted."""

    text: str
    reason: str = "form"

    @property
    def status(self) -> str:
        return f"parse_error:{self.reason}"


class Parser(Value):
    """Subclasses are frozen dataclasses of plain values; raise `version` when one reads something else."""

    @property
    def columns(self) -> dict[str, pa.DataType | None]:
        """The columns that its rows have, and their types (None: of what they hold)."""
        raise NotImplementedError

    def read(self, text: str, cut: bool = False) -> Rows | ParseError:
        """The rows of a reply, at least one. cut: it ended at the limit of its length, so that what stands last may not
        be whole, and is left out."""
        raise NotImplementedError

    def constraint(self) -> dict[str, str]:
        """Sampling settings under which every reply that ends is one that can be read; none: there are none."""
        return {}
