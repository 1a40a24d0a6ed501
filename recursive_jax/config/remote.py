"""How a model behind an OpenAI-compatible server is asked."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from recursive_jax.config.section import Section


class RemoteConfig(Section):
    """Of `openai:MODEL@URL`. The first group decides what is written, the others how it is asked for."""

    HOW = frozenset(
        ("key_env", "concurrency", "timeout", "tries", "patience", "backoff", "journal")
        + ("input_price", "output_price", "max_cost", "max_tokens")
    )

    api: Literal["auto", "chat", "completions"] = Field(
        "auto", description="auto: conversations are asked as chats, texts as completions; chat: a text is a user's"
    )
    body: dict[str, Any] = Field({}, description="more fields of every request; null takes one out")
    logprobs: bool = Field(False, description="keep the log-probabilities, where the server has them")
    name: str = Field("", description="names the model in fingerprints instead of its address, when the server moves")

    key_env: str = Field("OPENAI_API_KEY", min_length=1, description="the environment variable that holds the key")
    concurrency: PositiveInt = Field(32, le=1024, description="requests at once, at most; less where the server says")
    timeout: PositiveFloat = Field(300.0, description="seconds that one try may take")
    tries: PositiveInt = Field(12, description="of a request that fails while others get replies; rate limits are none")
    patience: PositiveFloat = Field(600.0, description="seconds without any reply after which the call stops")
    backoff: PositiveFloat = Field(0.5, description="seconds before the second try; twice as long before each other")
    journal: str = Field("", description="a file that keeps every reply, outside a run (a run keeps its own)")

    input_price: float = Field(0.0, ge=0.0, description="dollars for a million tokens read")
    output_price: float = Field(0.0, ge=0.0, description="dollars for a million tokens written")
    max_cost: float | None = Field(None, gt=0.0, description="dollars after which nothing more is asked")
    max_tokens: NonNegativeInt | None = Field(None, description="tokens, read and written, after which nothing is")

    def cost(self, read: int, written: int) -> float:
        """Dollars for tokens read and written."""
        return (read * self.input_price + written * self.output_price) / 1e6

    @model_validator(mode="after")
    def _check(self) -> RemoteConfig:
        if self.max_cost is not None and not self.input_price + self.output_price:
            raise ValueError("max_cost needs input_price and output_price, in dollars for a million tokens")
        reserved = {"model", "messages", "prompt", "n", "stream"} & self.body.keys()
        if reserved:
            raise ValueError(f"body: {', '.join(sorted(reserved))}: set by the request itself")
        return self
