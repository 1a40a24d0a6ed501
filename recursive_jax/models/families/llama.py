"""Llama and its relatives: Mistral, Mixtral, Qwen, Gemma, Phi-3, OLMo 2, SmolLM3."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from recursive_jax.config import ModelConfig
from recursive_jax.models.families.shared import (
    ACTIVATION_NAMES,
    INV_FREQ,
    QKV,
    Family,
    Keys,
    rope,
    tensor_names,
    windows,
    write_rope,
    write_windows,
)

#: Where a config.json has no `num_key_value_heads`: the defaults of the config classes of transformers (4.57 and 5). A
#: null, and every other family, has as many as heads.
KV_HEADS = {
    **dict.fromkeys(("mistral", "mixtral"), 8),
    **dict.fromkeys(("qwen2", "qwen3"), 32),
    **dict.fromkeys(("qwen3_moe", "gemma2", "gemma3_text", "smollm3"), 4),
    "gemma": 16,
}


def _llama(
    k: Keys, theta: float = 10_000.0, eps: float = 1e-6, tied: bool = False, act: str = "silu"
) -> dict[str, Any]:
    """The keys of Llama-like configs."""
    k.must(quantization_config=None)
    heads = k("num_attention_heads")
    return dict(
        vocab=k("vocab_size"),
        layers=k("num_hidden_layers"),
        d_model=k("hidden_size"),
        heads=heads,
        kv_heads=k.absent("num_key_value_heads", KV_HEADS.get(k.values.get("model_type"))) or heads,
        head_dim=k("head_dim", k("hidden_size") // heads),
        d_ff=k("intermediate_size"),
        max_length=k("max_position_embeddings"),
        norm_eps=k("rms_norm_eps", eps),
        activation=k.activation("hidden_act", act),
        tied=k("tie_word_embeddings", tied),
        **rope(k, theta),
    )


def _write_llama(c: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=c.vocab,
        num_hidden_layers=c.layers,
        hidden_size=c.d_model,
        num_attention_heads=c.heads,
        num_key_value_heads=c.G,
        head_dim=c.K,
        intermediate_size=c.F,
        max_position_embeddings=c.max_length,
        rms_norm_eps=c.norm_eps,
        hidden_act=ACTIVATION_NAMES[c.activation],
        tie_word_embeddings=c.tied,
        **write_rope(c),
    )


_LLAMA_TOP = {
    "embedding": "model.embed_tokens.weight",
    "final_norm/scale": "model.norm.weight",
    "head": "lm_head.weight",
}
_LLAMA_LAYER = {
    "attention_norm/scale": "input_layernorm.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "attention/query": "self_attn.q_proj.weight",
    "attention/key": "self_attn.k_proj.weight",
    "attention/value": "self_attn.v_proj.weight",
    "attention/out": "self_attn.o_proj.weight",
    "attention/query_bias": "self_attn.q_proj.bias",
    "attention/key_bias": "self_attn.k_proj.bias",
    "attention/value_bias": "self_attn.v_proj.bias",
    "attention/out_bias": "self_attn.o_proj.bias",
    "attention/query_norm/scale": "self_attn.q_norm.weight",
    "attention/key_norm/scale": "self_attn.k_norm.weight",
    "mlp/gate": "mlp.gate_proj.weight",
    "mlp/up": "mlp.up_proj.weight",
    "mlp/down": "mlp.down_proj.weight",
    "mlp/gate_bias": "mlp.gate_proj.bias",
    "mlp/up_bias": "mlp.up_proj.bias",
    "mlp/down_bias": "mlp.down_proj.bias",
}
_SANDWICH = {
    "attention_out_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "mlp_out_norm/scale": "post_feedforward_layernorm.weight",
}


def _like_llama(
    architecture: str,
    read: Callable[[Keys], dict[str, Any]],
    write: Callable[[ModelConfig], dict[str, Any]],
    layer: Mapping[str, Any] | None = None,
) -> Family:
    names = tensor_names(_LLAMA_TOP, "model.layers.{l}", {**_LLAMA_LAYER, **(layer or {})})
    return Family(architecture, read, write, names, "model.", INV_FREQ)


def _read_llama(k: Keys) -> dict[str, Any]:
    bias = k("attention_bias", False)
    both = dict(causal=k("is_causal", True))  # transformers 5 reads a decoder in both directions, where this is false
    return _llama(k) | both | dict(qkv_bias=bias, out_bias=bias, mlp_bias=k("mlp_bias", False))


def _write_llama_full(c: ModelConfig) -> dict[str, Any]:
    both = {} if c.causal else {"is_causal": False}
    return _write_llama(c) | both | dict(attention_bias=c.has_bias("qkv"), mlp_bias=c.has_bias("mlp"))


def _read_mistral(k: Keys) -> dict[str, Any]:
    found = _llama(k)
    return found | windows(k, found["layers"], k.absent("sliding_window", 4096), lambda i: True)


def _write_mistral(c: ModelConfig) -> dict[str, Any]:
    return _write_llama(c) | dict(sliding_window=c.sliding_window)


def _read_qwen(k: Keys) -> dict[str, Any]:
    found = _llama(k)
    window = k.absent("sliding_window", 4096) if k("use_sliding_window", False) else None
    return found | windows(k, found["layers"], window, lambda i: i >= k("max_window_layers", 28))


def _read_qwen3(k: Keys) -> dict[str, Any]:
    bias = k("attention_bias", False)
    return _read_qwen(k) | dict(qk_norm="head", qkv_bias=bias, out_bias=bias, head_dim=k("head_dim", 128))


def _read_qwen3_moe(k: Keys) -> dict[str, Any]:
    k.must(decoder_sparse_step=1, mlp_only_layers=[])
    return _read_qwen3(k) | dict(
        experts=k("num_experts", k("num_local_experts", 128)),
        experts_per_token=k("num_experts_per_tok", 8),
        experts_renormalize=k("norm_topk_prob", False),
        d_ff=k("moe_intermediate_size"),
    )


def _write_qwen(c: ModelConfig) -> dict[str, Any]:
    windowed = [i for i in range(c.layers) if c.is_windowed(i)]
    return (
        _write_llama(c)
        | write_windows(c)
        | dict(use_sliding_window=bool(windowed), max_window_layers=windowed[0] if windowed else c.layers)
    )


def _write_qwen3(c: ModelConfig) -> dict[str, Any]:
    return _write_qwen(c) | dict(attention_bias=c.has_bias("qkv"))


def _write_qwen3_moe(c: ModelConfig) -> dict[str, Any]:
    return _write_qwen3(c) | dict(
        num_experts=c.experts,
        num_local_experts=c.experts,
        num_experts_per_tok=c.experts_per_token,
        norm_topk_prob=c.experts_renormalize,
        moe_intermediate_size=c.F,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _read_mixtral(k: Keys) -> dict[str, Any]:
    found = _llama(k, 1e6, 1e-5) | dict(
        experts=k("num_local_experts", 8), experts_per_token=k("num_experts_per_tok", 2)
    )
    return found | windows(k, found["layers"], k("sliding_window", None), lambda i: True)


def _write_mixtral(c: ModelConfig) -> dict[str, Any]:
    return _write_mistral(c) | dict(num_local_experts=c.experts, num_experts_per_tok=c.experts_per_token)


def _read_gemma(k: Keys) -> dict[str, Any]:
    """`hidden_act` is a leftover in Gemma 1 files: every implementation runs the tanh form."""
    k.must(use_bidirectional_attention=False, attention_bias=False)
    found = _llama(k, tied=True) | dict(activation=k.activation("hidden_activation", "gelu_pytorch_tanh"))
    return found | dict(norm_plus_one=True, embedding_scale=math.sqrt(found["d_model"]), head_dim=k("head_dim", 256))


def _write_gemma(c: ModelConfig) -> dict[str, Any]:
    return _write_llama(c) | dict(hidden_activation=ACTIVATION_NAMES[c.activation])


def _read_gemma2(k: Keys, score_cap: float | None = 50.0, logit_cap: float | None = 30.0) -> dict[str, Any]:
    found = _read_gemma(k)
    return found | dict(
        block="sandwich",
        attention_scale=float(k("query_pre_attn_scalar", 256)) ** -0.5,
        score_cap=k.absent("attn_logit_softcapping", score_cap),
        logit_cap=k.absent("final_logit_softcapping", logit_cap),
        **windows(k, found["layers"], k("sliding_window", 4096), lambda i: i % 2 == 0),
    )


def _write_gemma2(c: ModelConfig) -> dict[str, Any]:
    scalar = (c.attention_scale or c.K**-0.5) ** -2
    return (
        _write_gemma(c)
        | write_windows(c)
        | dict(
            query_pre_attn_scalar=round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
            attn_logit_softcapping=c.score_cap,
            final_logit_softcapping=c.logit_cap,
        )
    )


def _read_gemma3(k: Keys) -> dict[str, Any]:
    pattern = k("sliding_window_pattern", k("_sliding_window_pattern", 6))
    found = _read_gemma2(k, None, None) | dict(qk_norm="head", **rope(k, 1e6, ("rope_theta", "rope_local_base_freq")))
    found |= windows(k, found["layers"], k("sliding_window", 4096), lambda i: bool((i + 1) % pattern))
    return found


def _write_gemma3(c: ModelConfig) -> dict[str, Any]:
    turned = write_rope(c, ("rope_theta", "rope_local_base_freq"))
    full = [i for i in range(c.layers) if not c.is_windowed(i)]
    return _write_gemma2(c) | turned | dict(sliding_window_pattern=full[0] + 1 if full else c.layers + 1)


def _read_phi3(k: Keys) -> dict[str, Any]:
    found = _llama(k, eps=1e-5)
    return found | windows(k, found["layers"], k("sliding_window", None), lambda i: True)


def _write_phi3(c: ModelConfig) -> dict[str, Any]:
    return _write_mistral(c) | dict(original_max_position_embeddings=c.max_length)


def _read_olmo2(k: Keys) -> dict[str, Any]:
    k.must(attention_bias=False)
    return _llama(k, eps=1e-5) | dict(block="output", qk_norm="flat")


def _read_smollm3(k: Keys) -> dict[str, Any]:
    found = _llama(k, 2e6, tied=True)
    every = k("no_rope_layer_interval", 4)
    rotary = k("no_rope_layers", [int((i + 1) % every != 0) for i in range(found["layers"])])
    bias = k("attention_bias", False)
    found |= dict(nope_layers=tuple(i for i, on in enumerate(rotary) if not on), qkv_bias=bias, out_bias=bias)
    window = k("sliding_window", None) if k("use_sliding_window", False) else None
    return (
        found
        | dict(mlp_bias=k("mlp_bias", False))
        | windows(k, found["layers"], window, lambda i: i in found["nope_layers"])
    )


def _write_smollm3(c: ModelConfig) -> dict[str, Any]:
    return (
        _write_llama_full(c)
        | write_windows(c)
        | dict(
            no_rope_layers=[int(i not in c.nope_layers) for i in range(c.layers)],
            no_rope_layer_interval=c.nope_layers[0] + 1 if c.nope_layers else c.layers + 1,
            use_sliding_window=c.sliding_window is not None,
        )
    )


FAMILIES: dict[str, Family] = {
    "llama": _like_llama("LlamaForCausalLM", _read_llama, _write_llama_full),
    "qwen3": _like_llama("Qwen3ForCausalLM", _read_qwen3, _write_qwen3),
    "qwen2": _like_llama("Qwen2ForCausalLM", lambda k: _read_qwen(k) | dict(qkv_bias=True), _write_qwen),
    "mistral": _like_llama("MistralForCausalLM", _read_mistral, _write_mistral),
    "gemma": _like_llama("GemmaForCausalLM", _read_gemma, _write_gemma),
    "gemma2": _like_llama("Gemma2ForCausalLM", _read_gemma2, _write_gemma2, _SANDWICH),
    "gemma3_text": _like_llama("Gemma3ForCausalLM", _read_gemma3, _write_gemma3, _SANDWICH),
    "olmo2": _like_llama(
        "Olmo2ForCausalLM",
        _read_olmo2,
        _write_llama,
        {
            "attention_out_norm/scale": "post_attention_layernorm.weight",
            "mlp_out_norm/scale": "post_feedforward_layernorm.weight",
        },
    ),
    "smollm3": _like_llama("SmolLM3ForCausalLM", _read_smollm3, _write_smollm3),
    "phi3": _like_llama(
        "Phi3ForCausalLM",
        _read_phi3,
        _write_phi3,
        {QKV: ("self_attn.qkv_proj.weight",), "mlp/gate+mlp/up": ("mlp.gate_up_proj.weight",)},
    ),
    "qwen3_moe": _like_llama(
        "Qwen3MoeForCausalLM",
        _read_qwen3_moe,
        _write_qwen3_moe,
        {"mlp/router": "mlp.gate.weight"}
        | {f"mlp/{n}": f"mlp.experts.{{e}}.{n}_proj.weight" for n in ("gate", "up", "down")},
    ),
    "mixtral": _like_llama(
        "MixtralForCausalLM",
        _read_mixtral,
        _write_mixtral,
        {"mlp/router": "block_sparse_moe.gate.weight"}
        | {
            f"mlp/{n}": f"block_sparse_moe.experts.{{e}}.{w}.weight"
            for n, w in zip(("gate", "down", "up"), ("w1", "w2", "w3"), strict=True)
        },
    ),
}
