"""Tiny Hugging Face models with every parameter redrawn: the oracle of the parity tests (needs torch, transformers).

Untouched initialisation would hide forgotten biases and gains: it sets biases to 0 and gains to 1.
"""

from __future__ import annotations

import torch
import transformers as t

SMALL = dict(vocab_size=48, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GQA = dict(SMALL, num_key_value_heads=2, intermediate_size=24, pad_token_id=0, bos_token_id=1, eos_token_id=2)
ENCODER = dict(SMALL, intermediate_size=24, max_position_embeddings=64)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)

CAUSAL = {
    "gpt2": lambda: t.GPT2Config(
        vocab_size=48, n_embd=32, n_layer=2, n_head=4, n_inner=24, n_positions=64, bos_token_id=2, eos_token_id=2
    ),
    "opt": lambda: t.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=32),
    "opt-350m": lambda: t.OPTConfig(**SMALL, ffn_dim=24, word_embed_proj_dim=16, do_layer_norm_before=False),
    "gpt_neox": lambda: t.GPTNeoXConfig(**SMALL, intermediate_size=24),
    "gpt_neox-serial": lambda: t.GPTNeoXConfig(**SMALL, intermediate_size=24, use_parallel_residual=False),
    "llama": lambda: t.LlamaConfig(**GQA),
    "llama-tied-bias": lambda: t.LlamaConfig(**GQA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama3": lambda: t.LlamaConfig(**GQA, rope_parameters=LLAMA3),
    "llama-linear": lambda: t.LlamaConfig(
        **GQA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    ),
    "llama-yarn": lambda: t.LlamaConfig(**GQA, rope_parameters=YARN),
    "mistral": lambda: t.MistralConfig(**GQA, head_dim=12, sliding_window=8),
    "qwen2": lambda: t.Qwen2Config(**GQA, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": lambda: t.Qwen3Config(**GQA, head_dim=12),
    "qwen3_moe": lambda: t.Qwen3MoeConfig(
        **GQA, head_dim=12, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, norm_topk_prob=True
    ),
    "mixtral": lambda: t.MixtralConfig(**GQA, num_local_experts=4, sliding_window=None),
    "gemma": lambda: t.GemmaConfig(**GQA, head_dim=12),
    "gemma2": lambda: t.Gemma2Config(
        **GQA, head_dim=12, query_pre_attn_scalar=24, sliding_window=8, attn_implementation="eager"
    ),
    "gemma3_text": lambda: t.Gemma3TextConfig(
        **dict(GQA, num_hidden_layers=6), head_dim=12, query_pre_attn_scalar=24, sliding_window=8
    ),
    "phi3": lambda: t.Phi3Config(**GQA, sliding_window=None),
    "olmo2": lambda: t.Olmo2Config(**GQA),
    "smollm3": lambda: t.SmolLM3Config(**dict(GQA, num_hidden_layers=5)),
}
MASKED = {
    "bert": lambda: t.BertConfig(**ENCODER),
    "roberta": lambda: t.RobertaConfig(**dict(ENCODER, max_position_embeddings=66), type_vocab_size=1),
    "distilbert": lambda: t.DistilBertConfig(
        vocab_size=48, dim=32, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=64
    ),
    "modernbert": lambda: t.ModernBertConfig(
        **dict(SMALL, num_hidden_layers=4),
        intermediate_size=24,
        local_attention=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
NAMES = [*CAUSAL, *MASKED]


def tiny(name: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A tiny float32 model of the family in evaluation mode, every parameter redrawn."""
    config = (CAUSAL.get(name) or MASKED[name])()
    for key, value in changes.items():
        setattr(config, key, value)
    torch.manual_seed(seed)
    auto = t.AutoModelForCausalLM if name in CAUSAL else t.AutoModelForMaskedLM
    return redraw(auto.from_config(config), seed)


def redraw(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Matrices with standard deviation 0.25, biases 0.3, gains around 1 (around 0 for Gemma's 1 + w)."""
    draw = torch.Generator().manual_seed(seed)
    plus_one = "gemma" in model.config.model_type
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=draw)
            gain = "norm" in name.lower() or ".ln_" in name
            if p.ndim >= 2:
                p.copy_(0.25 * noise)
            elif gain and name.endswith("weight"):
                p.copy_(0.3 * noise if plus_one else 1 + 0.3 * noise)
            else:
                p.copy_(0.3 * noise)
    return model.eval().float()
