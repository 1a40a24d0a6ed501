"""The laboratory's families that are trained by gradient steps: a VAE on images, a transformer on the embedded
language."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from recursive_jax import lab
from recursive_jax.collapse.lab.chain import Family, Regime, chain
from recursive_jax.collapse.lab.network import TransformerFamily
from recursive_jax.collapse.lab.vae import VAE, load_images
from recursive_jax.errors import InputError
from recursive_jax.models.vae import patches, unpatch

SMALL = dict(layers=1, width=16, steps=8, batch=8, context=32, samples=40, rounds=2)


@pytest.fixture
def images(tmp_path):
    """Bars at random places: [N, 8, 8] in 0..255."""
    rng = np.random.default_rng(0)
    found = np.zeros((300, 8, 8), np.uint8)
    for n, (column, height) in enumerate(zip(rng.integers(0, 7, 300), rng.integers(2, 8, 300), strict=True)):
        found[n, :height, column : column + 2] = 255
    path = tmp_path / "bars.npz"
    np.savez(path, images=found)
    return str(path)


def test_patches_make_the_strided_convolution_and_unpatch_its_transpose():
    key = jax.random.key(0)
    x = jax.random.normal(key, (2, 8, 12, 3))
    kernel = jax.random.normal(jax.random.fold_in(key, 1), (4, 4, 3, 5))
    form = ("NHWC", "HWIO", "NHWC")
    wanted = jax.lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), dimension_numbers=form)
    # The kernel in the order of the patches: blocks of 2 x 2 first, then the place in the block.
    dense = kernel.reshape(2, 2, 2, 2, 3, 5).transpose(0, 2, 1, 3, 4, 5).reshape(48, 5)
    np.testing.assert_allclose(patches(x) @ dense, wanted, atol=1e-4)
    y = jax.random.normal(key, (2, 4, 6, 48))
    (transposed,) = jax.linear_transpose(patches, x)(y)
    np.testing.assert_allclose(unpatch(y), transposed, atol=1e-5)


def test_the_elbo_of_a_code_that_says_nothing_is_the_likelihood_of_the_pixels(images):
    """Zero weights: the code is N(0, I) whatever the image, every pixel a fair coin, so the bound is tight: -64 ln
    2."""
    family = VAE(images=images, channels=4)
    params = jax.tree.map(jnp.zeros_like, family.network.init(jax.random.key(0)))
    rows = jnp.asarray(load_images(images)[:10], jnp.float32) / 255
    np.testing.assert_allclose(family.log_prob(params, rows), -64 * np.log(2), rtol=1e-5)


@pytest.mark.slow
def test_a_vae_learns_and_loses_round_after_round_less_with_real_images(images):
    options = dict(images=images, channels=4, steps=150, batch=64, samples=300, rounds=2, replicates=2)
    result = lab("vae", **options)
    family = VAE(images=images, channels=4)
    untrained = float(
        family.log_prob(family.network.init(jax.random.key(0)), jnp.asarray(load_images(images) / 255.0)).mean()
    )
    assert result.config["images"] == images
    elbo = result.values["elbo"]
    assert (elbo[:, 0] > untrained + 10).all() and (elbo[:, 2] < elbo[:, 1]).all() and (elbo[:, 1] < elbo[:, 0]).all()
    anchored = lab("vae", regime="anchor", fraction=0.5, **options)
    assert (anchored.values["elbo"][:, 2] > elbo[:, 2]).all()


@pytest.mark.slow
def test_every_regime_runs_on_the_vae_and_none_samples_where_there_is_no_sampling(images):
    options = dict(images=images, channels=2, steps=5, batch=16, rounds=2)
    for regime in ("accumulate", "accumulate_subsample", "weighted"):
        assert np.isfinite(lab("vae", samples=20, regime=regime, **options).mean["code_std"]).all()
    assert np.isfinite(lab("vae", samples="inf", **options).mean["elbo"]).all()


@pytest.mark.slow
def test_a_transformer_goes_through_the_same_rounds():
    result = lab("transformer", **SMALL)
    assert result.values["kl"].shape == (1, 3) and result.mean["kl"][0] == 0 and (result.mean["kl"][1:] > 0.5).all()
    parts = sum(result.mean[k] for k in ("kl_syn", "kl_sem", "kl_fact", "kl_dist"))
    np.testing.assert_allclose(parts, result.mean["kl"], atol=1e-5)
    assert result.values["kl"].tolist() == lab("transformer", **SMALL).values["kl"].tolist()


@pytest.mark.slow
@pytest.mark.parametrize("regime", ["accumulate", "accumulate_subsample", "fresh", "anchor", "weighted", "filtered"])
def test_every_regime_runs_on_the_transformer(regime):
    result = lab("transformer", regime=regime, keep_right=1.0, keep_wrong=0.9, **SMALL)
    assert np.isfinite(result.mean["kl"]).all()


def test_the_truth_s_log_prob_is_the_language_s():
    """Mean over documents: minus the entropy of a document, of which cutting at 512 tokens takes nothing."""
    family = TransformerFamily(context=512)
    rows, _ = family.sample(None, jax.random.key(0), 2000, 2000, ())
    from recursive_jax.data.language import Language

    found = family.log_prob(None, rows)
    assert abs(found.mean() + Language().entropy) < 4 * found.std() / np.sqrt(len(found))


def test_a_family_of_numpy_alone_runs_the_same_chain():
    """What another library fits: means of draws, with no tracing. E var_k = (1 - 1/M)^k holds for it too (T1)."""

    class Plain(Family):
        name, traced = "plain", False

        def truth(self):
            return 0.0, 1.0

        def sample(self, params, key, most, count, context):
            rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
            return rng.normal(params[0], params[1], most), np.ones(most)

        def fit(self, data, weight_N, previous, context, key):
            data, weight_N = np.asarray(data), np.asarray(weight_N)
            mean = np.average(data, weights=weight_N)
            return mean, np.sqrt(np.average((data - mean) ** 2, weights=weight_N))

        def measure(self, params, context):
            return {"variance": params[1] ** 2}

    run = lambda regime, R: np.array(
        [chain(Plain(), Regime(regime), (10,) * 4, k)["variance"] for k in jax.random.split(jax.random.key(1), R)]
    )
    for regime, law in (("replace", 0.9**4), ("accumulate", np.prod(1 - 1 / (10 * np.arange(1, 5) ** 2.0)))):
        found = run(regime, 400)[:, 4]
        assert abs(found.mean() - law) < 4 * found.std() / 20


def test_images_that_cannot_be_read_are_named(tmp_path):
    with pytest.raises(InputError, match="images=.*nothing.npz: these images cannot be read"):
        lab("vae", images=str(tmp_path / "nothing.npz"))
    np.savez(tmp_path / "odd.npz", images=np.zeros((4, 7, 7)))
    with pytest.raises(InputError, match="a multiple of 4"):
        lab("vae", images=str(tmp_path / "odd.npz"))
    with pytest.raises(InputError, match="precision=float64: transformer is trained in float32"):
        lab("transformer", precision="float64")
