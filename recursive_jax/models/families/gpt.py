"""GPT-2 and its generation: OPT, GPT-NeoX (Pythia). Layer norms, biases everywhere, plain MLPs."""

from __future__ import annotations

from typing import Any

from recursive_jax.config import ModelConfig
from recursive_jax.models.families.shared import (
    ACTIVATION_NAMES,
    INV_FREQ,
    QKV,
    QKV_BIAS,
    Family,
    Keys,
    linear,
    norms,
    rope,
    tensor_names,
    write_rope,
)

GPT = dict(norm="layer", gated=False, bias=True)  # GPT-2's generation


def _read_gpt2(k: Keys) -> dict[str, Any]:
    k.must(scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    width = k("n_embd")
    return GPT | dict(
        vocab=k("vocab_size"),
        layers=k("n_layer"),
        d_model=width,
        heads=k("n_head"),
        d_ff=k("n_inner", 4 * width),
        max_length=k("n_positions", k("n_ctx", 1024)),
        norm_eps=k("layer_norm_epsilon", 1e-5),
        activation=k.activation("activation_function", "gelu_new"),
        tied=k("tie_word_embeddings", True),
        position="learned",
    )


def _write_gpt2(c: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=c.vocab,
        n_layer=c.layers,
        n_embd=c.d_model,
        n_head=c.heads,
        n_inner=c.F,
        n_positions=c.max_length,
        n_ctx=c.max_length,
        layer_norm_epsilon=c.norm_eps,
        activation_function="gelu_new" if c.activation == "gelu_tanh" else c.activation,
        tie_word_embeddings=c.tied,
    )


def _read_opt(k: Keys) -> dict[str, Any]:
    k.must(enable_bias=True, layer_norm_elementwise_affine=True, _remove_final_layer_norm=False)
    width, before = k("hidden_size"), k("do_layer_norm_before", True)
    squeezed = k("word_embed_proj_dim", width)
    return GPT | dict(
        vocab=k("vocab_size"),
        layers=k("num_hidden_layers"),
        d_model=width,
        heads=k("num_attention_heads"),
        d_ff=k("ffn_dim"),
        max_length=k("max_position_embeddings"),
        norm_eps=1e-5,
        activation=k.activation("activation_function", "relu"),
        tied=k("tie_word_embeddings", True),
        position="learned",
        position_offset=2,
        block="pre" if before else "post",
        final_norm=before,
        embedding_width=None if squeezed == width else squeezed,
    )


def _write_opt(c: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=c.vocab,
        num_hidden_layers=c.layers,
        hidden_size=c.d_model,
        num_attention_heads=c.heads,
        ffn_dim=c.F,
        max_position_embeddings=c.max_length,
        activation_function=ACTIVATION_NAMES[c.activation],
        tie_word_embeddings=c.tied,
        do_layer_norm_before=c.block == "pre",
        word_embed_proj_dim=c.E,
    )


def _read_neox(k: Keys) -> dict[str, Any]:
    bias = k("attention_bias", True)
    turned = rope(k, k("rotary_emb_base", 10_000.0))
    fraction = k("rope_parameters", {}).get("partial_rotary_factor", k("rotary_pct", 0.25))
    return GPT | dict(
        vocab=k("vocab_size"),
        layers=k("num_hidden_layers"),
        d_model=k("hidden_size"),
        heads=k("num_attention_heads"),
        d_ff=k("intermediate_size"),
        max_length=k("max_position_embeddings"),
        norm_eps=k("layer_norm_eps", 1e-5),
        activation=k.activation("hidden_act", "gelu"),
        tied=k("tie_word_embeddings", False),
        block="parallel" if k("use_parallel_residual", True) else "pre",
        qkv_bias=bias,
        out_bias=bias,
        **turned | dict(rope_fraction=float(fraction)),
    )


def _write_neox(c: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=c.vocab,
        num_hidden_layers=c.layers,
        hidden_size=c.d_model,
        num_attention_heads=c.heads,
        intermediate_size=c.F,
        max_position_embeddings=c.max_length,
        layer_norm_eps=c.norm_eps,
        hidden_act=c.activation if c.activation != "gelu_tanh" else "gelu_new",
        tie_word_embeddings=c.tied,
        use_parallel_residual=c.block == "parallel",
        attention_bias=c.has_bias("qkv"),
        rotary_pct=c.rope_fraction,
        rotary_emb_base=c.rope_theta,
        **write_rope(c),
    )


_GPT2_NAMES = tensor_names(
    {"embedding": "transformer.wte.weight", "positions": "transformer.wpe.weight", "head": "lm_head.weight"}
    | norms(("final_norm", "transformer.ln_f")),
    "transformer.h.{l}",
    {
        QKV: ("attn.c_attn.weight", "conv"),
        QKV_BIAS: ("attn.c_attn.bias",),
        "attention/out": ("attn.c_proj.weight", "conv"),
        "attention/out_bias": "attn.c_proj.bias",
        "mlp/up": ("mlp.c_fc.weight", "conv"),
        "mlp/up_bias": "mlp.c_fc.bias",
        "mlp/down": ("mlp.c_proj.weight", "conv"),
        "mlp/down_bias": "mlp.c_proj.bias",
    }
    | norms(("attention_norm", "ln_1"), ("mlp_norm", "ln_2")),
)


_OPT_NAMES = tensor_names(
    {
        "embedding": "model.decoder.embed_tokens.weight",
        "positions": "model.decoder.embed_positions.weight",
        "project_in": "model.decoder.project_in.weight",
        "project_out": "model.decoder.project_out.weight",
        "head": "lm_head.weight",
    }
    | norms(("final_norm", "model.decoder.final_layer_norm")),
    "model.decoder.layers.{l}",
    linear(
        query="self_attn.q_proj", key="self_attn.k_proj", value="self_attn.v_proj", out="self_attn.out_proj",
        up="fc1", down="fc2",
    )
    | norms(("attention_norm", "self_attn_layer_norm"), ("mlp_norm", "final_layer_norm")),
)  # fmt: skip
_NEOX_NAMES = tensor_names(
    {"embedding": "gpt_neox.embed_in.weight", "head": "embed_out.weight"}
    | norms(("final_norm", "gpt_neox.final_layer_norm")),
    "gpt_neox.layers.{l}",
    {
        QKV: ("attention.query_key_value.weight", "per_head"),
        QKV_BIAS: ("attention.query_key_value.bias", "per_head"),
    }
    | linear(out="attention.dense", up="mlp.dense_h_to_4h", down="mlp.dense_4h_to_h")
    | norms(("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm")),
)

_BUFFERS = (r".*\.attn\.(masked_)?bias", r".*\.attention\.(masked_)?bias")
FAMILIES: dict[str, Family] = {
    "gpt2": Family("GPT2LMHeadModel", _read_gpt2, _write_gpt2, _GPT2_NAMES, "transformer.", _BUFFERS),
    "opt": Family("OPTForCausalLM", _read_opt, _write_opt, _OPT_NAMES, "model."),
    "gpt_neox": Family("GPTNeoXForCausalLM", _read_neox, _write_neox, _NEOX_NAMES, "gpt_neox.", _BUFFERS + INV_FREQ),
}
