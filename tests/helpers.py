"""What several tests need: an objective's sum and count outside of training, networks of functions, a GGUF."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from recursive_jax.models.network import FunctionNetwork
from recursive_jax.objectives.base import Context, Loss, Objective, Params, Term
from recursive_jax.objectives.causal import causal
from tests.test_families import FOLDER


def loss_of(objective: Objective, apply, params, batch, others=None, key=None, extra=None) -> Loss:
    """The loss of one batch; apply(params, *inputs) is called as it is."""
    run = lambda p, *inputs, **kw: apply(p.model, *inputs, **kw)
    ctx = Context(run, others or {}, jax.random.key(0) if key is None else key, jnp.int32(0), None)
    return objective.loss(ctx, Params(params, {} if extra is None else extra), batch)


def sum_and_count(objective: Objective, apply, params, batch):
    """Of an objective with one term."""
    (term,) = loss_of(objective, apply, params, batch).terms.values()
    return term.sum, term.count


@dataclasses.dataclass(frozen=True)
class Exploding(Objective):
    """The causal loss until the first norm has moved, then infinity."""

    def loss(self, ctx, params, batch):
        (term,) = causal.loss(ctx, params, batch).terms.values()
        scale = params.model["final_norm"]["scale"][0]
        return Loss({"nll": Term(term.sum / jnp.where(scale > 0.999, 1.0, 0.0), term.count)})


@dataclasses.dataclass(frozen=True)
class ShardedFunctions(FunctionNetwork):
    """Functions that lay out their arrays themselves, as the built-in Transformer's do."""

    def bind(self, dtype="float32"):
        return self.apply_function


def plain_functions(model):
    """A built-in model as two functions: without its cache, every step is a whole forward pass."""
    network = ShardedFunctions(model.network.init, model.network.bind(), model.vocab, model.max_length, "plain", 1)
    return dataclasses.replace(model, network=network)


def write_llama_gguf(path: Path, kind: str = "F32", **keys: int | float | str) -> dict[str, np.ndarray]:
    """The stored tiny Llama as llama.cpp's converter writes it; its tensors as they dequantise, by their Hugging Face
    names. keys: more of the architecture's, `__` for a dot: `rope__scaling__factor=4.0`."""
    import gguf
    from safetensors.numpy import load_file

    tensors = load_file(FOLDER / "llama" / "model.safetensors")
    config = json.loads((FOLDER / "llama" / "config.json").read_text())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(1e4)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*(f"t{i}" for i in range(45)), "x", "y", "xy"])
    writer.add_token_types([3] * 3 + [1] * 45)
    writer.add_token_merges(["x y"])
    writer.add_eos_token_id(2)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output",
             "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
             "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    expected = {}
    for name, value in tensors.items():
        value, short = value.astype(np.float32), name.removesuffix(".weight")
        new = top.get(short)
        if new is None:
            _, _, layer, part = short.split(".", 3)
            new = f"blk.{layer}.{names[part]}"
            heads = {"attn_q": 4, "attn_k": 2}.get(names[part])
        stored, permuted = value, value
        if new not in top.values() and heads:
            permuted = value.reshape(heads, 2, -1, 32).swapaxes(1, 2).reshape(value.shape)
        stored = permuted
        quantised = gguf.GGMLQuantizationType[kind if value.ndim == 2 and value.shape[1] % 32 == 0 else "F32"]
        data = gguf.quants.quantize(stored, quantised)
        writer.add_tensor(f"{new}.weight", data, raw_dtype=quantised)
        back = gguf.quants.dequantize(data, quantised).reshape(value.shape)
        if new not in top.values() and heads:
            back = back.reshape(heads, -1, 2, 32).swapaxes(1, 2).reshape(value.shape)
        expected[name] = back
    add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    for name, value in keys.items():
        add[type(value)](f"llama.{name.replace('__', '.')}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected
