"""The Transformer against a second implementation written plainly in NumPy, and its invariances."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax.config import MeshConfig, ModelConfig, SamplingConfig, TrainConfig
from recursive_jax.errors import InputError
from recursive_jax.generate.generate import generate
from recursive_jax.generate.request import Request, from_rows, unconditional
from recursive_jax.mesh import make_mesh
from recursive_jax.models.attention import BLOCK, attention
from recursive_jax.models.flops import decode_cost_per_token, matmul_parameters
from recursive_jax.models.masks import Mask
from recursive_jax.models.model import transformer
from recursive_jax.models.network import transformer_network
from tests.helpers import plain_functions

CONFIGS = {
    "llama": {},
    "mha-untied": {"kv_heads": None, "tied": False},
    "gpt2": {
        "norm": "layer",
        "position": "learned",
        "gated": False,
        "activation": "gelu_tanh",
        "bias": True,
        "kv_heads": None,
    },
    "window": {"window": 5},
    "wide-heads": {"head_dim": 16, "activation": "gelu"},
    "relu-mlp": {"gated": False, "activation": "relu", "kv_heads": 1},
}


def randomised(model, seed=0):
    """Every parameter random: untouched initialisation hides forgotten gains and biases."""
    random = np.random.default_rng(seed)
    params = model.initialized(0).params
    return model.with_params(
        jax.tree.map(
            lambda x: jax.device_put(x + 0.2 * random.normal(size=x.shape).astype(x.dtype), x.sharding), params
        )
    )


def numpy_forward(params, c: ModelConfig, tokens, segments=None):
    """Loops and float64; shares no code with the model."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    H, G, K = c.heads, c.G, c.K
    T = len(tokens)
    segments = np.ones(T, int) if segments is None else segments
    position = np.array([i - np.flatnonzero(segments == segments[i])[0] for i in range(T)])

    def norm(x, q):
        if c.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * q["scale"]
        return x + q["bias"] if c.norm == "layer" else x

    def act(x):
        if c.activation == "silu":
            return x / (1 + np.exp(-x))
        if c.activation == "relu":
            return np.maximum(x, 0)
        if c.activation == "gelu_tanh":
            return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        from scipy.special import erf

        return 0.5 * x * (1 + erf(x / np.sqrt(2)))

    def rope(x, t):
        out = x.copy()
        for i in range(K // 2):
            a = t * c.rope_theta ** (-2 * i / K)
            out[i] = x[i] * np.cos(a) - x[i + K // 2] * np.sin(a)
            out[i + K // 2] = x[i + K // 2] * np.cos(a) + x[i] * np.sin(a)
        return out

    x = p["embedding"][tokens]
    if c.position == "learned":
        x = x + p["positions"][position]
    for layer in range(c.layers):
        b = jax.tree.map(lambda w, layer=layer: w[layer], p["blocks"])
        a, h = b["attention"], norm(x, b["attention_norm"])
        q, k, v = (
            np.einsum("td,dhk->thk", h, a[n]) + (a[f"{n}_bias"] if c.bias else 0) for n in ("query", "key", "value")
        )
        if c.position == "rope":
            q = np.array([[rope(q[t, i], position[t]) for i in range(H)] for t in range(T)])
            k = np.array([[rope(k[t, i], position[t]) for i in range(G)] for t in range(T)])
        mixed = np.zeros((T, H, K))
        for t in range(T):
            seen = [
                s
                for s in range(t + 1)
                if segments[s] == segments[t] > 0 and (c.sliding_window is None or t - s < c.sliding_window)
            ]
            for i in range(H):
                if seen:
                    scores = np.array([q[t, i] @ k[s, i // (H // G)] for s in seen]) / np.sqrt(K)
                    w = np.exp(scores - scores.max())
                    mixed[t, i] = sum(w[j] / w.sum() * v[s, i // (H // G)] for j, s in enumerate(seen))
        x = x + np.einsum("thk,hkd->td", mixed, a["out"]) + (a["out_bias"] if c.bias else 0)
        m, h = b["mlp"], norm(x, b["mlp_norm"])
        up = h @ m["up"] + (m["up_bias"] if c.bias else 0)
        hidden = act(h @ m["gate"]) * up if c.gated else act(up)
        x = x + hidden @ m["down"] + (m["down_bias"] if c.bias else 0)
    return norm(x, p["final_norm"]) @ p["embedding" if c.tied else "head"].T


@pytest.mark.parametrize("name", CONFIGS)
def test_forward_agrees_with_numpy(name, tiny, tokenizer, mesh):
    """Float32 against float64 through two layers: 1e-4 of logits of order 10."""
    c = tiny.model_copy(update=CONFIGS[name])
    model = randomised(transformer(c, tokenizer, mesh))
    tokens = np.random.default_rng(0).integers(3, tokenizer.vocab, 20)
    expected = numpy_forward(model.params, c, tokens)[:, : tokenizer.vocab]
    np.testing.assert_allclose(np.asarray(model.logits(tokens[None]))[0], expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("name", ["llama", "gpt2", "window"])
def test_packed_segments_do_not_see_each_other(name, tiny, tokenizer, mesh):
    c = tiny.model_copy(update=CONFIGS[name])
    model = randomised(transformer(c, tokenizer, mesh))
    rng = np.random.default_rng(1)
    a, b = rng.integers(3, 40, 9), rng.integers(3, 40, 7)
    packed = np.concatenate([a, b])
    segments = np.array([1] * 9 + [2] * 7)
    with jax.set_mesh(mesh):
        together = model.network.apply(model.params, jnp.asarray(packed[None]), jnp.asarray(segments[None]))[0]
    apart = np.concatenate([np.asarray(model.logits(x[None]))[0] for x in (a, b)])
    np.testing.assert_allclose(np.asarray(together)[:, : tokenizer.vocab], apart, atol=2e-4)


@pytest.mark.parametrize("T", [BLOCK + 1, 3 * BLOCK])
@pytest.mark.parametrize("window", [None, 50])
def test_blocked_attention_is_the_reference(T, window):
    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(x, (2, T, h, 8)) for x, h in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.sort(jax.random.randint(jax.random.key(1), (2, T), 1, 5), axis=1)
    for mask in (Mask(window=window), Mask(window=window, segments_BT=segments)):
        a, b = (attention(q, k, v, mask, kind) for kind in ("reference", "blocked"))
        np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize("window", [None, 40])
def test_splash_attention_is_the_reference(window):
    """The TPU kernel, interpreted; forward and gradients. Rows of one sharding, padding positions left out."""
    from recursive_jax.models import splash

    keys = jax.random.split(jax.random.key(0), 3)
    q, k, v = (jax.random.normal(x, (2, 128, h, 128)) for x, h in zip(keys, (4, 2, 2), strict=True))
    segments = jnp.sort(jax.random.randint(jax.random.key(1), (2, 128), 1, 4), axis=1)
    mask = Mask(window=window, segments_BT=segments)
    weigh = jnp.sin(jnp.arange(q.size, dtype=jnp.float32)).reshape(q.shape)
    results = [
        jax.jit(jax.value_and_grad(lambda q, k, v, f=f: jnp.sum(f(q, k, v) * weigh), argnums=(0, 1, 2)))(q, k, v)
        for f in (
            lambda q, k, v: attention(q, k, v, mask, "reference"),
            lambda q, k, v: splash.attention(q, k, v, mask, interpret=True),
        )
    ]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *results)


def test_splash_attention_runs_on_a_mesh():
    from recursive_jax.models import splash

    q, k, v = (jax.random.normal(jax.random.key(i), (2, 128, 2, 128)) for i in range(3))
    expected = attention(q, k, v, Mask(), "reference")
    with jax.set_mesh(make_mesh(MeshConfig(data=2, tensor=2))):
        put = lambda x: jax.device_put(x, jax.P(("data", "fsdp"), None, "tensor", None))
        found = jax.jit(lambda q, k, v: splash.attention(q, k, v, Mask(), interpret=True))(put(q), put(k), put(v))
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_reference_attention_is_jax_s_own():
    q, k, v = (jax.random.normal(jax.random.key(i), (2, 17, h, 8)) for i, h in enumerate((4, 2, 2)))
    np.testing.assert_allclose(
        attention(q, k, v, Mask(), "reference"), jax.nn.dot_product_attention(q, k, v, is_causal=True), atol=2e-6
    )
    np.testing.assert_allclose(
        attention(q, k, v, Mask(causal=False), "reference"), jax.nn.dot_product_attention(q, k, v), atol=2e-6
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_with_the_cache_equals_the_full_forward(name, tiny, tokenizer, mesh):
    """Greedy tokens and their log-probabilities, prompts of several lengths left-padded in one batch."""
    model = randomised(transformer(tiny.model_copy(update=CONFIGS[name]), tokenizer, mesh))
    rng = np.random.default_rng(2)
    requests = [Request(i, rng.integers(3, 40, n).astype(np.int32)) for i, n in enumerate((0, 1, 5, 11))]
    rows = generate(model, requests, SamplingConfig(temperature=0.0, max_tokens=10, batch=4))
    for request, tokens, logprobs in zip(requests, rows.tokens(), rows.column("logprobs"), strict=True):
        sequence = np.concatenate([[tokenizer.bos], request.prompt, tokens])
        logits = np.asarray(model.logits(sequence[None, :-1]), np.float64)[0, len(request.prompt) :]
        logp = (
            logits
            - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
            - logits.max(-1, keepdims=True)
        )
        np.testing.assert_allclose(logprobs, logp[np.arange(len(tokens)), tokens], atol=1e-4)
        masked = logits.copy()
        masked[:, [tokenizer.bos, tokenizer.pad]] = -np.inf
        assert (masked.argmax(-1) == tokens).mean() > 0.9  # equal but for ties at float32 resolution
        best = masked.max(-1) - masked[np.arange(len(tokens)), tokens]
        assert best.max() < 1e-3


def test_a_user_s_functions_decode_like_the_built_in_model(tiny, tokenizer, mesh):
    built_in = randomised(transformer(tiny, tokenizer, mesh))
    plain = plain_functions(built_in)
    plain = plain.with_params(built_in.params)
    requests = [Request(i, np.full(i, 5, np.int32)) for i in range(4)]
    sampling = SamplingConfig(max_tokens=8, batch=4)
    a, b = generate(built_in, requests, sampling, seed=1), generate(plain, requests, sampling, seed=1)
    assert [t.tolist() for t in a.tokens()] == [t.tolist() for t in b.tokens()]


def test_a_row_does_not_depend_on_its_company(tiny, tokenizer, mesh, language):
    model = randomised(transformer(tiny, tokenizer, mesh))
    requests = unconditional(12)
    whole = generate(model, requests, SamplingConfig(batch=12, max_tokens=12), seed=9)
    for batch, order in ((5, 1), (4, -1), (16, 1)):
        other = generate(model, requests[::order], SamplingConfig(batch=batch, max_tokens=12), seed=9)
        assert [t.tolist() for t in whole.tokens()] == [t.tolist() for t in other.tokens()[::order]]
    another = generate(model, requests, SamplingConfig(batch=12, max_tokens=12), seed=10)
    assert [t.tolist() for t in whole.tokens()] != [t.tolist() for t in another.tokens()]


def test_limits_and_statuses(tiny, tokenizer, mesh):
    model = randomised(transformer(tiny, tokenizer, mesh))
    requests = [
        Request(0, np.full(31, 5, np.int32)),
        Request(1, np.full(32, 5, np.int32)),
        Request(2, np.full(40, 5, np.int32)),
    ]
    rows = generate(model, requests, SamplingConfig(batch=3))
    assert [len(t) for t in rows.tokens()] == [1, 0, 0]
    assert rows.column("status")[1:] == ["length", "prompt_too_long"]
    assert len(generate(model, [], SamplingConfig())) == 0
    with pytest.raises(InputError, match="no params"):
        generate(transformer(tiny, tokenizer, mesh), requests)
    with pytest.raises(InputError, match="long enough"):
        from_rows(rows, 50, 3)


def test_stop_tokens_end_a_row(tiny, tokenizer, mesh):
    model = randomised(transformer(tiny, tokenizer, mesh))
    free = generate(model, unconditional(20), SamplingConfig(batch=20))
    stop = free.tokens()[0][2].item()
    cut = generate(model, unconditional(20), SamplingConfig(batch=20, stop_tokens=(stop,)))
    for a, b, status in zip(free.tokens(), cut.tokens(), cut.column("status"), strict=True):
        where = np.flatnonzero(a == stop)
        assert b.tolist() == (a[: where[0] + 1] if len(where) else a).tolist()
        assert status == ("ok" if len(b) and b[-1] in (stop, tokenizer.eos) else "length")


def test_bad_tokens_are_refused(tiny, tokenizer, mesh):
    model = transformer(tiny, tokenizer, mesh).initialized()
    with pytest.raises(InputError, match="T <= max_length=32"):
        model.logits(np.zeros((1, 33), np.int32))
    with pytest.raises(InputError, match="token ids must be in"):
        model.logits(np.full((1, 3), tokenizer.vocab, np.int32))
    with pytest.raises(InputError, match="no params"):
        transformer(tiny, tokenizer, mesh).logits(np.zeros((1, 3), np.int32))


def test_logits_take_any_batch_on_any_mesh_and_padding_is_not_seen(tiny, tokenizer, mesh):
    model = randomised(transformer(tiny, tokenizer, mesh))
    tokens = np.random.default_rng(0).integers(3, 40, (3, 10))
    mask = np.ones((3, 10), int)
    mask[1, 6:] = 0
    other = model.on(make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)))
    np.testing.assert_allclose(model.logits(tokens, mask), other.logits(tokens, mask), atol=1e-4)
    np.testing.assert_allclose(
        np.asarray(model.logits(tokens, mask))[1, :6], np.asarray(model.logits(tokens[1:2, :6]))[0], atol=1e-4
    )


def test_bfloat16_compute_keeps_float32_masters(tiny, tokenizer, mesh, language):
    from recursive_jax.data.packing import pack
    from recursive_jax.train.loop import train

    rows = pack(language.sample(1, 0, 100), 32, tokenizer.bos, tokenizer.pad)
    results = {}
    for dtype in ("float32", "bfloat16"):
        trained = train(
            transformer(tiny, tokenizer, mesh), rows, config=TrainConfig(steps=15, batch=8, dtype=dtype), quiet=True
        )
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(trained.model.params))
        results[dtype] = trained.summary["loss"]
    assert results["float32"] != results["bfloat16"]
    assert results["bfloat16"] == pytest.approx(results["float32"], rel=0.02)


def test_flops_are_those_xla_counts(mesh):
    """A forward pass of T tokens is 2 FLOPs a weight and token, and 4 T^2 a head dimension of attention over the whole
    square; decoding the same tokens attends to half of it. XLA also counts element-wise work: a few percent."""
    T, config = 128, ModelConfig(layers=2, d_model=128, heads=4, max_length=128, vocab=512)
    network = transformer_network(config)
    with jax.set_mesh(mesh):
        params = jax.jit(network.init)(jax.random.key(0))
        counted = jax.jit(network.apply).lower(params, jnp.zeros((1, T), jnp.int32)).cost_analysis()["flops"]
    attention = T * T * config.layers * config.heads * config.K
    assert counted == pytest.approx(2 * matmul_parameters(config) * T + 4 * attention, rel=0.08)
    per_token, read = decode_cost_per_token(config, rows=1, prompt=1, new=T - 1, bytes_per_value=4)
    assert per_token * (T - 1) == pytest.approx(2 * matmul_parameters(config) * T + 2 * attention, rel=0.02)
    # At batch 1 every step reads all weights; a batch of 64 shares them.
    assert read > 4 * matmul_parameters(config)
    shared = decode_cost_per_token(config, rows=64, prompt=1, new=T - 1, bytes_per_value=4)[1]
    cache = 4 * 2 * (1 + (T - 1) / 2) * config.layers * config.G * config.K
    assert shared == pytest.approx(4 * matmul_parameters(config) * T / (T - 1) / 64 + cache, rel=1e-6)
