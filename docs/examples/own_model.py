"""Your own model in the recursive loop: give two plain JAX functions, nothing else.

python docs/examples/own_model.py runs/own
"""

import sys

import jax
import jax.numpy as jnp

import recursive_jax as rj

MAX_LENGTH, WIDTH, REACH = 32, 32, 4


def init(key):
    """An n-gram-like network: the embeddings of the last REACH tokens, mixed by one hidden layer."""
    keys = jax.random.split(key, 3)
    shapes = {"embed": (256, WIDTH), "mix": (REACH * WIDTH, 64), "out": (64, 256)}
    return {name: 0.1 * jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}


def apply(params, tokens_BT, segments_BT=None):
    """tokens [B, T] -> logits [B, T, 256]. Tokens of another packed document are hidden."""
    x = params["embed"][tokens_BT]
    views = []
    for back in range(REACH):
        shifted = jnp.pad(x, ((0, 0), (back, 0), (0, 0)))[:, : x.shape[1]]
        if segments_BT is not None:
            before = jnp.pad(segments_BT, ((0, 0), (back, 0)))[:, : x.shape[1]]
            shifted = jnp.where((before == segments_BT)[..., None], shifted, 0.0)
        views.append(shifted)
    return jax.nn.relu(jnp.concatenate(views, -1) @ params["mix"]) @ params["out"]


def main(workdir, overrides=()):
    config = rj.load_config(
        None,
        [
            f"model.max_length={MAX_LENGTH}",
            "train.batch=32",
            "train.steps=300",
            "rounds.count=3",
            "rounds.token_budget=20000",
            "data.real_tokens=40000",
            *overrides,
        ],
    )
    tokenizer = rj.LanguageTokenizer(rj.Language(config.data.language))
    model = rj.user_model(init, apply, tokenizer=tokenizer, max_length=MAX_LENGTH, vocab=256)
    return rj.collapse(config, workdir, model=model)


if __name__ == "__main__":
    for record in main(sys.argv[1], sys.argv[2:]):
        print(record["arm"], record["round"], f"KL to the truth {record['metrics']['kl_total']:.3f}")
