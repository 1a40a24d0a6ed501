"""What is asked of a model: a prompt, an id that addresses the randomness, and settings of its own where it has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from recursive_jax.config import SamplingConfig
from recursive_jax.data.dataset import Dataset
from recursive_jax.errors import InputError
from recursive_jax.models.model import Model


@dataclasses.dataclass(frozen=True)
class Request:
    """prompt: token ids. id: addresses the randomness. parents: ids of the prompt's rows. opened: whether the prompt
    begins the sequence as it stands (a rendered chat); otherwise the start token is put before it. sampling: settings of
    its own, in place of the generation's. negative: what the guide reads instead of the prompt (default: nothing).
    sample: tells candidates of one request apart (`best_of`)."""

    id: int
    prompt: np.ndarray
    parents: tuple[str, ...] = ()
    opened: bool = False
    sampling: SamplingConfig | None = None
    negative: np.ndarray | None = None
    sample: int = 0

    def tokens(self, bos: int) -> np.ndarray:
        """What the model reads, int32; an empty prompt always starts with the start token."""
        prompt = np.asarray(self.prompt, np.int32)
        return prompt if self.opened and len(prompt) else np.concatenate([[bos], prompt]).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Guide:
    """A second forward pass that steers the first. combine(logits_BV, other_BV, weight_B) -> logits_BV, a pure function
    (give the same object every time: programs are compiled for it). same_prompt: the guide reads the request's prompt (a
    weaker model, contrastive decoding), else its `negative` one (the same model, classifier-free guidance)."""

    model: Model
    combine: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] | None = None
    same_prompt: bool = False

    def __post_init__(self):
        if self.combine is None:
            from recursive_jax.generate.programs import classifier_free

            object.__setattr__(self, "combine", classifier_free)

    def prompt(self, request: Request, bos: int) -> np.ndarray:
        if self.same_prompt:
            return request.tokens(bos)
        negative = np.empty(0, np.int32) if request.negative is None else np.asarray(request.negative, np.int32)
        return dataclasses.replace(request, prompt=negative).tokens(bos)


@dataclasses.dataclass(frozen=True)
class Draft:
    """Speculative decoding (arXiv:2211.17192): a small model of the same vocabulary guesses `ahead` tokens, the model
    checks them in one pass. Both draw with the same random numbers, so that the rows are those of the model alone."""

    model: Model
    ahead: int = 4


def unconditional(count: int, first: int = 0) -> list[Request]:
    """Requests `first .. first + count` from the start token alone."""
    return [Request(i, np.empty(0, np.int32)) for i in range(first, first + count)]


def from_rows(data: Dataset, prompt_tokens: int, count: int, first: int = 0) -> list[Request]:
    """Requests whose prompts are the first tokens of rows, cycling through the rows that are long enough."""
    usable = [(i, t) for i, t in zip(data.column("id"), data.tokens(), strict=True) if len(t) >= prompt_tokens]
    if not usable:
        raise InputError(f"no row is long enough for sampling.prompt_tokens={prompt_tokens}")
    return [
        Request(r, usable[r % len(usable)][1][:prompt_tokens], (usable[r % len(usable)][0],))
        for r in range(first, first + count)
    ]


def shared_prefix(requests: Sequence[Request], bos: int) -> np.ndarray:
    """The tokens that all the prompts begin with (a few-shot header), int32; none for fewer than two different prompts."""
    prompts = [r.tokens(bos) for r in requests]
    if len({p.tobytes() for p in prompts}) < 2:
        return np.empty(0, np.int32)
    length = min(map(len, prompts)) - 1  # each keeps a token of its own to read
    first = prompts[0][:length]
    for prompt in prompts[1:]:
        differs = np.flatnonzero(first != prompt[: len(first)])
        first = first[: differs[0]] if len(differs) else first
    return first
