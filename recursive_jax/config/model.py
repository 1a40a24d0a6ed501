"""What a model is: the switches of the Transformer, its rotary scaling, its adapter."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PositiveInt, model_validator

from recursive_jax.config.section import Section


class RopeScaling(Section):
    """How a rotary embedding is stretched beyond the length it was trained on."""

    kind: Literal["linear", "llama3", "yarn"]
    factor: float = Field(gt=0.0)
    original: PositiveInt = Field(8192, description="context before stretching (llama3, yarn)")
    low: float = Field(1.0, description="llama3: low_freq_factor; yarn: beta_slow")
    high: float = Field(4.0, description="llama3: high_freq_factor; yarn: beta_fast")
    attention: float | None = Field(None, description="yarn: attention_factor; default 0.1 ln(factor) + 1")


class ModelConfig(Section):
    """One Transformer, decoder or encoder; every family of `models/families.py` is a setting of these switches.
    `vocab` is filled from the tokenizer when it is left out."""

    # Layouts of the same weights and ways to compute the same function.
    HOW = frozenset(("scan", "remat", "attention", "experts_path"))
    RENAMED = {"width": "d_model", "hidden": "d_ff", "context": "max_length", "window": "sliding_window"}  # noqa: RUF012

    vocab: PositiveInt | None = Field(None, le=2**24)
    layers: PositiveInt = Field(4, le=10_000)
    d_model: PositiveInt = Field(256, le=2**20, description="width of the residual stream")
    heads: PositiveInt = Field(4, le=2**14)
    kv_heads: PositiveInt | None = Field(None, le=2**14, description="grouped-query attention; default: heads")
    head_dim: PositiveInt | None = Field(None, le=2**16, description="default: d_model / heads")
    d_ff: PositiveInt | None = Field(
        None, le=2**24, description="width of the MLP; default: 8/3 d_model (gated) or 4 d_model"
    )
    max_length: PositiveInt = Field(256, le=2**31 - 1, description="longest sequence, in tokens")
    causal: bool = Field(True, description="false: an encoder, every token sees every other")
    block: Literal["pre", "post", "sandwich", "output", "parallel"] = Field(
        "pre",
        description="where the norms stand: before each part (pre), after each sum (post), before and after each "
        "part (sandwich), after each part (output), or both parts of one input (parallel)",
    )
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = Field(1e-6, gt=0.0)
    norm_bias: bool = Field(True, description="layer norms add a bias")
    norm_plus_one: bool = Field(False, description="the scale is 1 + weight (Gemma)")
    final_norm: bool = True
    first_norm: bool = Field(True, description="false: layer 0 does not normalise before attention (ModernBERT)")
    embedding_norm: bool = Field(False, description="a norm right after the embeddings")
    embedding_scale: float = Field(1.0, description="embeddings are multiplied by this")
    embedding_width: PositiveInt | None = Field(None, description="embeddings of another width, projected in and out")
    position: Literal["rope", "learned", "none"] = "rope"
    position_offset: int = Field(
        0, ge=0, le=2**24, description="first row of the learned positions in use (OPT, RoBERTa: 2)"
    )
    token_types: int = Field(
        0, ge=0, le=2**16, description="kinds of segments with an embedding of their own (BERT: 2)"
    )
    rope_theta: float = Field(10_000.0, gt=0.0)
    rope_local_theta: float | None = Field(None, gt=0.0, description="theta of windowed layers; default: rope_theta")
    rope_fraction: float = Field(1.0, gt=0.0, le=1.0, description="share of each head that is rotated")
    rope_scaling: RopeScaling | None = Field(None, description="of full-attention layers, and of all with one theta")
    nope_layers: tuple[int, ...] = Field((), description="layers without rotary positions")
    sliding_window: PositiveInt | None = Field(None, description="sliding-window attention: tokens visible")
    layer_types: tuple[Literal["full", "window"], ...] | None = Field(
        None, description="which layers slide; default: all"
    )
    qk_norm: Literal["none", "head", "flat"] = Field("none", description="RMS norm of queries and keys, before rope")
    attention_scale: float | None = Field(None, gt=0.0, description="multiplies the scores; default: head_dim^-0.5")
    score_cap: float | None = Field(None, gt=0.0, description="attention scores become cap * tanh(score / cap)")
    logit_cap: float | None = Field(None, gt=0.0, description="the same for the output logits")
    gated: bool = True
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    experts: int = Field(0, ge=0, le=2**14, description="experts of each MLP; 0: one dense MLP")
    experts_per_token: PositiveInt = 2
    experts_renormalize: bool = Field(True, description="the chosen experts' weights sum to one")
    tied: bool = Field(True, description="one matrix for embedding and output")
    head: Literal["plain", "transform", "score", "none"] = Field(
        "plain",
        description="transform: dense, activation, norm before the output matrix (BERT); score: one number for a "
        "text, a reward model; none: states only",
    )
    head_bias: bool = False
    bias: bool = Field(False, description="biases everywhere; the next three say it for one place")
    qkv_bias: bool | None = None
    out_bias: bool | None = None
    mlp_bias: bool | None = None
    family: str = Field("", description="Hugging Face model_type this was read from, and is written as")
    scan: bool = Field(False, description="scan over layers: compiles faster, same parameters")
    remat: Literal["none", "dots", "full"] = "none"
    experts_path: Literal["dense", "grouped"] = Field(
        "dense", description="grouped: each expert multiplies its own tokens alone (on TPU, to write)"
    )
    attention: Literal["auto", "reference", "blocked", "cudnn", "splash"] = "auto"

    @property
    def G(self) -> int:
        return self.kv_heads or self.heads

    @property
    def K(self) -> int:
        return self.head_dim or self.d_model // self.heads

    @property
    def F(self) -> int:
        if self.d_ff:
            return self.d_ff
        return -(-self.d_model * 8 // 3 // 8) * 8 if self.gated else 4 * self.d_model

    @property
    def V(self) -> int:
        """Rows of the embedding: the vocabulary, padded so that it splits over any usual mesh."""
        return -(-(self.vocab or 1) // 64) * 64

    @property
    def E(self) -> int:
        return self.embedding_width or self.d_model

    def has_bias(self, where: Literal["qkv", "out", "mlp"]) -> bool:
        chosen = getattr(self, f"{where}_bias")
        return self.bias if chosen is None else chosen

    def is_windowed(self, layer: int) -> bool:
        return self.sliding_window is not None and (self.layer_types is None or self.layer_types[layer] == "window")

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        errors = []
        if self.head_dim is None and self.d_model % self.heads:
            errors.append(f"d_model={self.d_model} is not a multiple of heads={self.heads}; set head_dim")
        elif self.position == "rope" and int(self.K * self.rope_fraction) % 2:
            errors.append(f"rope needs an even head_dim, it is {int(self.K * self.rope_fraction)}")
        if self.heads % self.G:
            errors.append(f"heads={self.heads} is not a multiple of kv_heads={self.G}")
        if self.layer_types is not None and len(self.layer_types) != self.layers:
            errors.append(f"layer_types names {len(self.layer_types)} layers, layers={self.layers}")
        if self.layer_types is not None and "window" in self.layer_types and self.sliding_window is None:
            errors.append("layer_types has windowed layers but sliding_window is not set")
        if self.experts and self.experts_per_token > self.experts:
            errors.append(f"experts_per_token={self.experts_per_token} is more than experts={self.experts}")
        if errors:
            raise ValueError("; ".join(errors))
        return self


class LoraConfig(Section):
    """A low-rank adapter: W + scale A B on the chosen weights (LoRA, arXiv:2106.09685)."""

    RENAMED = {"base": "quantization"}  # noqa: RUF012

    rank: PositiveInt = 8
    alpha: float = Field(16.0, gt=0.0, description="the update is scaled by alpha / rank")
    dropout: float = Field(0.0, ge=0.0, lt=1.0, description="on the input of the update, in training")
    targets: tuple[str, ...] = Field(
        ("attention/*", "mlp/*"),
        description="patterns over the weights: attention/{query,key,value,out}, mlp/{up,gate,down}",
    )
    rslora: bool = Field(False, description="scale by alpha / sqrt(rank) (arXiv:2312.03732)")
    dora: bool = Field(False, description="train magnitudes apart from directions (arXiv:2402.09353)")
    quantization: Literal["none", "nf4"] = Field("none", description="nf4: the frozen weights in four bits (QLoRA)")

    @model_validator(mode="before")
    @classmethod
    def _old_values(cls, raw: Any) -> Any:
        """`base: float32` of before is `quantization: none`."""
        if isinstance(raw, dict) and "float32" in (raw.get("quantization"), raw.get("base")):
            return {**{k: v for k, v in raw.items() if k != "base"}, "quantization": "none"}
        return raw

    @property
    def scale(self) -> float:
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)
