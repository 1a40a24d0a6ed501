"""Encoders: BERT, RoBERTa, DistilBERT, ModernBERT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from recursive_jax.config import ModelConfig
from recursive_jax.models.families.gpt import GPT
from recursive_jax.models.families.shared import (
    ACTIVATION_NAMES,
    QKV,
    Family,
    Keys,
    Source,
    linear,
    norms,
    rope,
    tensor_names,
    windows,
    write_rope,
    write_windows,
)

_ENCODER = GPT | dict(
    causal=False,
    block="post",
    final_norm=False,
    embedding_norm=True,
    position="learned",
    head="transform",
    head_bias=True,
)


def _read_bert(k: Keys) -> dict[str, Any]:
    k.must(position_embedding_type="absolute", is_decoder=False, add_cross_attention=False)
    return _ENCODER | dict(
        vocab=k("vocab_size"),
        layers=k("num_hidden_layers"),
        d_model=k("hidden_size"),
        heads=k("num_attention_heads"),
        d_ff=k("intermediate_size"),
        max_length=k("max_position_embeddings"),
        norm_eps=k("layer_norm_eps", 1e-12),
        activation=k.activation("hidden_act", "gelu"),
        token_types=k("type_vocab_size", 2),
        tied=k("tie_word_embeddings", True),
    )


def _read_roberta(k: Keys) -> dict[str, Any]:
    offset = k("pad_token_id", 1) + 1
    return _read_bert(k) | dict(max_length=k("max_position_embeddings") - offset, position_offset=offset)


def _write_bert(c: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=c.vocab,
        num_hidden_layers=c.layers,
        hidden_size=c.d_model,
        num_attention_heads=c.heads,
        intermediate_size=c.F,
        max_position_embeddings=c.max_length + c.position_offset,
        layer_norm_eps=c.norm_eps,
        hidden_act=ACTIVATION_NAMES[c.activation],
        type_vocab_size=c.token_types,
        tie_word_embeddings=c.tied,
    )


def _write_roberta(c: ModelConfig) -> dict[str, Any]:
    return _write_bert(c) | dict(pad_token_id=c.position_offset - 1)


def _read_distilbert(k: Keys) -> dict[str, Any]:
    k.must(sinusoidal_pos_embds=False)
    return _ENCODER | dict(
        vocab=k("vocab_size"),
        layers=k("n_layers"),
        d_model=k("dim"),
        heads=k("n_heads"),
        d_ff=k("hidden_dim"),
        max_length=k("max_position_embeddings"),
        norm_eps=1e-12,
        activation=k.activation("activation", "gelu"),
        tied=k("tie_word_embeddings", True),
    )


def _write_distilbert(c: ModelConfig) -> dict[str, Any]:
    return dict(
        vocab_size=c.vocab,
        n_layers=c.layers,
        dim=c.d_model,
        n_heads=c.heads,
        hidden_dim=c.F,
        max_position_embeddings=c.max_length,
        activation=ACTIVATION_NAMES[c.activation],
        tie_word_embeddings=c.tied,
    )


def _read_modernbert(k: Keys) -> dict[str, Any]:
    k.must(norm_bias=False, attention_bias=False, mlp_bias=False, classifier_bias=False, classifier_activation="gelu")
    layers, every = k("num_hidden_layers"), k("global_attn_every_n_layers", 3)
    return dict(
        vocab=k("vocab_size"),
        layers=layers,
        d_model=k("hidden_size"),
        heads=k("num_attention_heads"),
        d_ff=k("intermediate_size"),
        max_length=k("max_position_embeddings"),
        norm="layer",
        norm_bias=False,
        norm_eps=k("norm_eps", 1e-5),
        activation=k.activation("hidden_activation", "gelu"),
        tied=k("tie_word_embeddings", True),
        causal=False,
        first_norm=False,
        embedding_norm=True,
        head="transform",
        head_bias=k("decoder_bias", True),
        **rope(k, 160_000.0, ("global_rope_theta", "local_rope_theta")),
        **windows(k, layers, k("local_attention", 128) // 2 + 1, lambda i: i % every != 0),
    )


def _write_modernbert(c: ModelConfig) -> dict[str, Any]:
    full = [i for i in range(1, c.layers) if not c.is_windowed(i)]
    return dict(
        vocab_size=c.vocab,
        num_hidden_layers=c.layers,
        hidden_size=c.d_model,
        num_attention_heads=c.heads,
        intermediate_size=c.F,
        max_position_embeddings=c.max_length,
        norm_eps=c.norm_eps,
        norm_bias=False,
        hidden_activation=ACTIVATION_NAMES[c.activation],
        tie_word_embeddings=c.tied,
        decoder_bias=c.head_bias,
        local_attention=2 * ((c.sliding_window or 1) - 1),
        global_attn_every_n_layers=full[0] if full else c.layers,
        layer_types=write_windows(c)["layer_types"],
        **write_rope(c, ("global_rope_theta", "local_rope_theta")),
    )


def _bert_names(base: str, head: Mapping[str, str], layer: Mapping[str, Any], prefix: str) -> dict[str, Source]:
    top = {
        "embedding": f"{base}.embeddings.word_embeddings.weight",
        "positions": f"{base}.embeddings.position_embeddings.weight",
        "token_types": f"{base}.embeddings.token_type_embeddings.weight",
    }
    return tensor_names(top | norms(("embedding_norm", f"{base}.embeddings.LayerNorm")) | dict(head), prefix, layer)


def _transform(dense: str, norm: str, bias: str, head: str) -> dict[str, str]:
    return {
        "head_dense": f"{dense}.weight",
        "head_dense_bias": f"{dense}.bias",
        "head_bias": bias,
        "head": head,
    } | norms(("head_norm", norm))


_BERT_LAYER = linear(
    query="attention.self.query", key="attention.self.key", value="attention.self.value",
    out="attention.output.dense", up="intermediate.dense", down="output.dense",
) | norms(("attention_norm", "attention.output.LayerNorm"), ("mlp_norm", "output.LayerNorm"))  # fmt: skip
_BERT_NAMES = _bert_names(
    "bert",
    _transform(
        "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", "cls.predictions.bias",
        "cls.predictions.decoder.weight",
    ),
    _BERT_LAYER,
    "bert.encoder.layer.{l}",
)  # fmt: skip
_ROBERTA_NAMES = _bert_names(
    "roberta",
    _transform("lm_head.dense", "lm_head.layer_norm", "lm_head.bias", "lm_head.decoder.weight"),
    _BERT_LAYER,
    "roberta.encoder.layer.{l}",
)
_DISTILBERT_NAMES = _bert_names(
    "distilbert",
    _transform("vocab_transform", "vocab_layer_norm", "vocab_projector.bias", "vocab_projector.weight"),
    linear(
        query="attention.q_lin", key="attention.k_lin", value="attention.v_lin", out="attention.out_lin",
        up="ffn.lin1", down="ffn.lin2",
    )
    | norms(("attention_norm", "sa_layer_norm"), ("mlp_norm", "output_layer_norm")),
    "distilbert.transformer.layer.{l}",
)  # fmt: skip
_MODERNBERT_NAMES = tensor_names(
    {
        "embedding": "model.embeddings.tok_embeddings.weight",
        "embedding_norm/scale": "model.embeddings.norm.weight",
        "final_norm/scale": "model.final_norm.weight",
        "head_dense": "head.dense.weight",
        "head_norm/scale": "head.norm.weight",
        "head_bias": "decoder.bias",
        "head": "decoder.weight",
    },
    "model.layers.{l}",
    {
        QKV: ("attn.Wqkv.weight",),
        "attention/out": "attn.Wo.weight",
        "mlp/gate+mlp/up": ("mlp.Wi.weight",),
        "mlp/down": "mlp.Wo.weight",
        "attention_norm/scale": "attn_norm.weight",
        "mlp_norm/scale": "mlp_norm.weight",
    },
)

_POOLER = (
    r".*pooler\..*",
    r"cls\.seq_relationship\..*",
    r".*position_ids",
    r"cls\.predictions\.decoder\.bias",
    r"lm_head\.decoder\.bias",
)
FAMILIES: dict[str, Family] = {
    "bert": Family("BertForMaskedLM", _read_bert, _write_bert, _BERT_NAMES, "bert.", _POOLER),
    "roberta": Family("RobertaForMaskedLM", _read_roberta, _write_roberta, _ROBERTA_NAMES, "roberta.", _POOLER),
    "distilbert": Family(
        "DistilBertForMaskedLM", _read_distilbert, _write_distilbert, _DISTILBERT_NAMES, "distilbert.", _POOLER
    ),
    "modernbert": Family("ModernBertForMaskedLM", _read_modernbert, _write_modernbert, _MODERNBERT_NAMES, "model."),
}
