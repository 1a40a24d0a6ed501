"""Which values the keys of a `config.json` may have, by type and range, for every family in one place. Checked before
anything is computed or allocated from them; a GGUF's header comes through here too."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from recursive_jax.errors import problems

_SIZE = (1, 2**31 - 1)
#: Integers: key -> (least, most).
_INTEGERS = {
    **dict.fromkeys(("vocab_size",), (1, 2**24)),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), (1, 10_000)),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_key_value_heads"), (1, 2**14)),
    **dict.fromkeys(("hidden_size", "n_embd", "dim", "word_embed_proj_dim"), (1, 2**20)),
    **dict.fromkeys(("head_dim",), (1, 2**16)),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "hidden_dim"), (1, 2**24)),
    **dict.fromkeys(("moe_intermediate_size",), (0, 2**24)),  # dense relatives carry it as 0
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), _SIZE),
    **dict.fromkeys(("original_max_position_embeddings", "sliding_window_pattern", "_sliding_window_pattern"), _SIZE),
    **dict.fromkeys(("no_rope_layer_interval", "global_attn_every_n_layers"), _SIZE),
    **dict.fromkeys(("sliding_window", "local_attention", "max_window_layers"), (-1, 2**31 - 1)),
    **dict.fromkeys(("num_experts", "num_local_experts", "num_experts_per_tok"), (0, 2**14)),
    **dict.fromkeys(("type_vocab_size",), (0, 2**16)),
    **dict.fromkeys(("pad_token_id",), (-1, 2**24)),
}
#: Numbers: key -> (more than, at most). Where 0 means off, it is allowed.
_NUMBERS = {
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), (0.0, 1.0)),
    **dict.fromkeys(("rope_theta", "rotary_emb_base", "rope_local_base_freq"), (0.0, 1e15)),
    **dict.fromkeys(("global_rope_theta", "local_rope_theta"), (0.0, 1e15)),
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), (0.0, 1.0)),
    **dict.fromkeys(("query_pre_attn_scalar",), (0.0, 1e9)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (-1e-9, 1e9)),
    **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"), (0.0, 1e9)),
    **dict.fromkeys(("attention_factor", "mscale", "mscale_all_dim"), (-1e-9, 1e9)),
}
_SWITCHES = (
    *(
        "tie_word_embeddings",
        "attention_bias",
        "mlp_bias",
        "decoder_bias",
        "norm_topk_prob",
        "use_sliding_window",
        "is_causal",
    ),
    *("do_layer_norm_before", "use_parallel_residual", "truncate"),
)
_TEXTS = ("model_type", "hidden_act", "hidden_activation", "activation", "activation_function", "rope_type", "type")
_LISTS = {"layer_types": str, "no_rope_layers": int}
_MAPPINGS = ("rope_scaling", "rope_parameters")


def check_values(values: Mapping[str, Any], where: str) -> None:
    """Raises InputError with every key whose value has another type or is out of its range; absent and null ones are
    the families' matter."""
    lines = _problems(values, "")
    if lines:
        raise problems(f"{where}:", lines)


def _problems(values: Mapping[str, Any], prefix: str) -> list[str]:
    lines = []
    for key, value in values.items():
        wanted = None if value is None else _wanted(key, value)
        if wanted is not None:
            lines.append(f"{prefix}{key}={_shown(value)}: {wanted} is wanted")
        elif key in _MAPPINGS or (prefix and isinstance(value, Mapping)):
            if isinstance(value, Mapping) and prefix.count(".") < 3:
                lines += _problems(value, f"{prefix}{key}.")
    return lines


def _wanted(key: str, value: Any) -> str | None:
    """What a key wants, where its value is not that."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if key in _INTEGERS:
        least, most = _INTEGERS[key]
        whole = whole or (isinstance(value, float) and value.is_integer())  # 8192.0, as some tools write it
        return None if whole and least <= value <= most else f"an integer from {least} to {most:,}"
    if key in _NUMBERS:
        above, most = _NUMBERS[key]
        fits = (whole or (isinstance(value, float) and math.isfinite(value))) and above < value <= most
        return None if fits else f"a number above {max(above, 0.0):g}, at most {most:g},"
    if key in _SWITCHES:
        return None if isinstance(value, bool) else "true or false"
    if key in _TEXTS:
        return None if isinstance(value, str) else "a text"
    if key in _LISTS:
        kind = _LISTS[key]
        fits = isinstance(value, list | tuple) and len(value) <= 10_000 and all(isinstance(x, kind) for x in value)
        return None if fits else f"a list of {'texts' if kind is str else 'integers'}"
    return None if key not in _MAPPINGS or isinstance(value, Mapping) else "a mapping"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits has no text
        return "a value without end"
    return text if len(text) <= 100 else f"{text[:100]}..."
