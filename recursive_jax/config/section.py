"""What all sections of a config share: frozen, typed, refusing unknown keys, named by value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import pydantic
from pydantic import model_validator

from recursive_jax.errors import say_once
from recursive_jax.identity import fingerprint


class Section(pydantic.BaseModel):
    """Frozen, hashable, and refusing unknown keys.

    HOW: keys that say how a result is made, not what it is (logging, memory, slots): they stand in no fingerprint, and
    may change when a run goes on. GROWS: keys that may get larger, or longer, when a run goes on: it then has more of
    the same. OVERRIDES: keys that hold keys of another section, as a dict. RENAMED: old names of
    keys, which still work for one release and say the new one."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    HOW: ClassVar[frozenset[str]] = frozenset()
    GROWS: ClassVar[frozenset[str]] = frozenset()
    OVERRIDES: ClassVar[dict[str, type[Section]]] = {}
    RENAMED: ClassVar[dict[str, str]] = {}

    @property
    def fingerprint(self) -> str:
        """Names the section by the keys that change a result and differ from their defaults."""
        return fingerprint(self)

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, raw: Any) -> Any:
        if not isinstance(raw, Mapping):
            return raw
        for key, kind in cls.OVERRIDES.items():
            if isinstance(raw.get(key), Mapping):
                raw = {**raw, key: kind._take_old_names(raw[key])}
        if not cls.RENAMED.keys() & raw.keys():
            return raw
        found = {}
        for key, value in raw.items():
            new = cls.RENAMED.get(key, key)
            if new != key:
                if new in raw:
                    raise ValueError(f"{key} was renamed to {new}, and both are given")
                say_once(
                    f"{cls.__name__.removesuffix('Config').lower()}.{key} was renamed to {new}; the old name goes with "
                    "the next release"
                )
            found[new] = value
        return found
