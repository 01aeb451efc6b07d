"""What a condition does to a score, against closed forms, dense LAPACK and torch in float64."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import optional_import
from operators import RectangularMatrix
from parity import double_module, in_double

import jaxmem as jm
from jaxmem.attribution import column_norms, condition_gradient, left_out
from jaxmem.stable_diffusion.pipeline import StableDiffusion


def saturating(state, x, t, cond):
    """A score that depends on its condition through a tanh; the timestep scales it."""
    return (state["a"] @ jnp.tanh(state["b"] @ cond.reshape(-1)) - x) / (1 + t)


def closed_form(state, cond, t):
    """Its derivative in the condition, in float64."""
    a, b = (np.asarray(state[name], np.float64) for name in "ab")
    inner = np.tanh(b @ np.asarray(cond, np.float64).reshape(-1))
    return a @ ((1 - inner**2)[:, None] * b) / (1 + t)


def example(d, tokens, features, seed=0):
    rng = np.random.default_rng(seed)
    state = {"a": rng.normal(size=(d, 7)), "b": 0.3 * rng.normal(size=(7, tokens * features))}
    state = {name: jnp.asarray(matrix, jnp.float32) for name, matrix in state.items()}
    return state, *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((d,), (tokens, features)))


@pytest.mark.parametrize(("d", "tokens", "features"), [(5, 4, 3), (20, 2, 3), (6, 2, 3)])
def test_a_condition_jacobian_is_its_closed_form(d, tokens, features, getkey):
    state, x, cond = example(d, tokens, features)
    found = jm.condition_jacobian(saturating, state, x, 2, cond)
    exact = closed_form(state, cond, 2)
    size = np.linalg.norm(exact)
    assert found.shape == exact.shape == (d, tokens * features)
    # Ten sums of at most 20 terms in float32.
    np.testing.assert_allclose(found.to_dense(chunk=4), exact, atol=1e-5 * size)
    v, u = (jax.random.normal(getkey(), (size,)) for size in (tokens * features, d))
    np.testing.assert_allclose(found.mv(v), exact @ np.asarray(v), atol=1e-5 * size * np.linalg.norm(v))
    np.testing.assert_allclose(jax.jit(lambda C, u: C.rmv(u))(found, u), np.asarray(u) @ exact, atol=1e-4 * size)
    np.testing.assert_allclose(found.value, saturating(state, x, 2, cond), atol=1e-6)
    assert found.unravel(v).shape == cond.shape


def test_conditions_in_parts_keep_the_order_of_their_leaves(getkey):
    def score(state, x, t, cond):
        return state * (cond["tokens"].sum(0) + cond["pooled"][0] * x)

    x, cond = jnp.array([1.0, 2.0, 3.0]), {"tokens": jnp.ones((2, 3)), "pooled": jnp.ones(2)}
    found = jm.condition_jacobian(score, jnp.float32(2), x, 0, cond)
    expected = np.concatenate([2 * np.array([[1, 0], [2, 0], [3, 0]]), np.tile(2 * np.eye(3), 2)], axis=1)
    np.testing.assert_array_equal(found.to_dense(), expected)  # pooled comes before tokens
    norms = column_norms(found)
    np.testing.assert_allclose(norms.values["tokens"], [np.sqrt(12)] * 2, rtol=1e-6)
    np.testing.assert_allclose(norms.values["pooled"], np.sqrt(4 * 14), rtol=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_torch_has_the_same_jacobian(family, torch, diffusers, tmp_path):
    """All of ∂s/∂c of a network of diffusers, by `torch.func.jacrev` in float64."""
    transformers = optional_import("transformers")
    prediction = "epsilon" if family == "sd1" else "v_prediction"
    pipeline, folder = tiny.make_pipeline(torch, diffusers, transformers, tmp_path, family, prediction, **tiny.SMALLEST)
    model = StableDiffusion.load(folder)
    generator = torch.Generator().manual_seed(3)
    x, cond = (torch.randn(shape, generator=generator) for shape in ((1, 4, 4, 4), (1, 77, 32)))
    alpha, sigma = (float(array[501]) for array in (model.schedule.alpha, model.schedule.sigma))
    unet = double_module(torch, pipeline.unet).requires_grad_(False)

    def score(cond):
        out = unet(x.double(), torch.tensor(501), cond).sample
        return -(out if model.prediction == "eps" else alpha * out + sigma * x.double()) / sigma

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peer = torch.func.jacrev(score, chunk_size=8)(cond.double())[0, :, :, :, 0]
    exact = peer.permute(1, 2, 0, 3, 4).reshape(64, -1).numpy()  # channels last

    def ours(state, x, cond):
        return jm.condition_jacobian(model.score, state, x, 501, cond).to_dense()

    arguments = model.state, *(jnp.asarray(part[0].numpy()) for part in (x.permute(0, 2, 3, 1), cond))
    scale = np.linalg.norm(exact)
    # float32's own rounding, a few hundred operations deep; in float64 it is the same function.
    assert np.linalg.norm(ours(*arguments) - exact) < 1e-4 * scale
    assert np.linalg.norm(in_double(ours, *arguments) - exact) < 1e-10 * scale


def _check(found, matrix, rtol):
    """Against LAPACK: values within their residuals, these within the tolerance, orthonormal vectors."""
    exact = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)[: len(found.values)]
    rounding = 8 * np.finfo(np.float32).eps * exact[0]  # of the products that measured
    assert (np.abs(found.values - exact) <= found.residuals + rounding).all()
    assert (found.residuals <= rtol * exact[0] + rounding).all()
    back = np.linalg.norm(found.right @ matrix.T.astype(np.float64) - found.values[:, None] * found.left, axis=1)
    forth = np.linalg.norm(found.left @ matrix.astype(np.float64) - found.values[:, None] * found.right, axis=1)
    np.testing.assert_allclose(np.hypot(back, forth), found.residuals, atol=rounding)
    for vectors in (found.left, found.right):
        np.testing.assert_allclose(vectors @ vectors.T, np.eye(len(vectors)), atol=1e-9)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30), (20, 20), (1, 7), (1, 1)])
@pytest.mark.parametrize("whole", [False, True])
def test_singular_values_are_lapacks(shape, whole, getkey):
    matrix = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    k = min(shape) if whole else min(4, *shape)
    found = jm.singular_values(RectangularMatrix(jnp.asarray(matrix)), k, max_products=600, key=getkey())
    assert found.status in (jm.Status.CONVERGED, jm.Status.INVARIANT)
    _check(found, matrix, 1e-4)


@pytest.mark.parametrize("scale", [1e-25, 1.0, 1e25])
def test_nothing_is_squared(scale, getkey):
    """Squares would lose the digits: of 1 and 1e-3 they are 1 and 1e-6, and of 1e-25 nothing is left."""
    rng = np.random.default_rng(5)
    left, right = (np.linalg.qr(rng.normal(size=(n, 25)))[0] for n in (40, 25))
    matrix = ((left * 10.0 ** -np.arange(25.0)) @ right.T * scale).astype(np.float32)
    operator = RectangularMatrix(jnp.asarray(matrix))
    found = jm.singular_values(operator, 3, max_products=600, key=getkey(), rtol=1e-5)
    assert found.status in (jm.Status.CONVERGED, jm.Status.INVARIANT)
    np.testing.assert_allclose(found.values, scale * np.array([1, 0.1, 0.01]), rtol=2e-3)
    _check(found, matrix, 1e-5)


def test_a_tolerance_below_rounding_is_said(getkey):
    matrix = np.random.default_rng(7).normal(size=(30, 12)).astype(np.float32)
    found = jm.singular_values(RectangularMatrix(jnp.asarray(matrix)), 4, max_products=600, key=getkey(), rtol=1e-9)
    assert found.status == jm.Status.ROUNDING


def test_a_search_that_ends_too_early_says_so(getkey):
    matrix = np.random.default_rng(6).normal(size=(300, 200)).astype(np.float32)
    found = jm.singular_values(RectangularMatrix(jnp.asarray(matrix)), 3, max_products=40, key=getkey())
    assert found.status == jm.Status.BUDGET
    assert found.num_products <= 40
    assert (found.residuals > 1e-4 * found.values[0]).any()


def test_singular_values_that_are_equal_all_come(getkey):
    rng = np.random.default_rng(2)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (40, 25))
    values = np.array([3.0, 3.0, 3.0, 2.0, *np.linspace(1, 0.1, 21)])
    matrix = (left[:, :25] * values) @ right
    found = jm.singular_values(RectangularMatrix(jnp.asarray(matrix, jnp.float32)), 4, max_products=600, key=getkey())
    np.testing.assert_allclose(found.values, values[:4], rtol=1e-5)


def test_singular_values_of_nothing_are_zero(getkey):
    found = jm.singular_values(RectangularMatrix(jnp.zeros((6, 9))), 2, max_products=100, key=getkey())
    np.testing.assert_array_equal(found.values, 0)
    np.testing.assert_array_equal(found.residuals, 0)


def test_products_of_singular_values_are_counted(getkey, monkeypatch):
    calls = []

    class Counted(RectangularMatrix):
        def mv(self, vector):
            jax.debug.callback(lambda _: calls.append(None), vector[0])
            return super().mv(vector)

        def rmv(self, vector):
            jax.debug.callback(lambda _: calls.append(None), vector[0])
            return super().rmv(vector)

    jax.tree_util.register_dataclass(Counted, ["matrix"], [])
    operator = Counted(jnp.asarray(np.random.default_rng(3).normal(size=(50, 30)), jnp.float32))
    found = jm.singular_values(operator, 3, max_products=300, key=getkey())
    jax.effects_barrier()
    assert len(calls) == found.num_products <= 300


def test_a_search_that_was_stopped_goes_on(tmp_path):
    matrix = RectangularMatrix(jnp.asarray(np.random.default_rng(4).normal(size=(90, 60)), jnp.float32))
    options = dict(max_products=300, key=jax.random.key(0), rtol=1e-6)
    whole = jm.singular_values(matrix, 3, **options)

    def stop(task, done, total):
        if done > 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jm.singular_values(matrix, 3, **options, folder=tmp_path, progress=stop)
    again = jm.singular_values(matrix, 3, **options, folder=tmp_path)
    np.testing.assert_array_equal(again.values, whole.values)
    np.testing.assert_array_equal(again.residuals, whole.residuals)


def test_the_trace_of_the_gram_operator_is_the_frobenius_norm():
    state, x, cond = example(20, 2, 3)
    found = jm.trace(jm.condition_jacobian(saturating, state, x, 2, cond).gram)
    np.testing.assert_allclose(found.value, np.linalg.norm(closed_form(state, cond, 2)) ** 2, rtol=1e-5)
    assert found.num_products == 2 * 6


def test_column_norms_are_exact_or_have_an_error(getkey):
    state, x, cond = example(200, 5, 6)
    jacobian = jm.condition_jacobian(saturating, state, x, 2, cond)
    exact = np.linalg.norm(closed_form(state, cond, 2).reshape(200, 5, 6), axis=(0, 2))
    whole = column_norms(jacobian)
    np.testing.assert_allclose(whole.values, exact, rtol=1e-5)
    assert whole.num_products == 200
    assert not whole.standard_errors.any()
    keys = jax.random.split(getkey(), 200)
    parts = [column_norms(jacobian, max_products=60, key=key) for key in keys]
    assert parts[0].num_products == 60
    # Five tokens share each key's probes, so these are 200 draws rather than 1,000: three deviations of 95 % are 4.6 %.
    covered = np.mean([np.abs(part.values - exact) <= 1.96 * part.standard_errors for part in parts], 0)
    assert (covered > 0.89).all()


def test_wens_gradient_is_torchs(torch):
    state, x, cond = example(8, 4, 3)
    uncond, sigma, t = cond[::-1] * 0.5, 0.7, 2
    found = condition_gradient(saturating, state, x, t, cond, uncond, sigma)
    a, b, point, given, absent = (
        torch.tensor(np.asarray(array), dtype=torch.float64) for array in (state["a"], state["b"], x, cond, uncond)
    )
    given.requires_grad_()

    def eps(c):
        return -sigma * (a @ torch.tanh(b @ c.reshape(-1)) - point) / (1 + t)

    torch.linalg.norm(eps(given) - eps(absent)).backward()
    np.testing.assert_allclose(found, torch.linalg.norm(given.grad, dim=1), rtol=1e-5)


def test_where_both_scores_agree_no_token_carries_anything():
    state, x, cond = example(8, 4, 3)
    np.testing.assert_array_equal(condition_gradient(saturating, state, x, 2, cond, cond, 0.7), 0)


def test_what_is_lost_without_a_word():
    state, x, cond = example(8, 4, 3)
    without = jnp.stack([cond.at[i].set(0) for i in range(4)])
    uncond = jnp.zeros_like(cond)
    found = left_out(saturating, state, x, 2, cond, without, uncond, 0.7)
    a, b = (np.asarray(state[name], np.float64) for name in "ab")

    def strength(c):
        inner = np.tanh(b @ np.asarray(c, np.float64).reshape(-1))
        return 0.7 * np.linalg.norm(a @ inner) / 3

    np.testing.assert_allclose(found, [strength(cond) - strength(one) for one in without], atol=1e-5)


@pytest.mark.usefixtures("unchecked")
def test_conditions_without_a_derivative_and_other_misuse_are_named(getkey):
    state, x, cond = example(8, 4, 3)
    with pytest.raises(ValueError, match="a class has no derivative"):
        jm.condition_jacobian(saturating, state, x, 2, jnp.arange(12))
    with pytest.raises(ValueError, match="cond: expected floating-point arrays"):
        jm.condition_jacobian(saturating, state, x, 2, None)
    jacobian = jm.condition_jacobian(saturating, state, x, 2, cond)
    with pytest.raises(ValueError, match="max_products: expected at least 17 for 3 singular values, got 16"):
        jm.singular_values(jacobian, 3, max_products=16, key=getkey())
    assert jm.singular_values(jacobian, 3, max_products=17, key=getkey()).num_products <= 17
    with pytest.raises(ValueError, match="operator: expected float32 or float64, got bfloat16"):
        jm.singular_values(RectangularMatrix(jnp.ones((3, 2), jnp.bfloat16)), 1, max_products=50, key=getkey())
    with pytest.raises(ValueError, match="k: expected 1 to 8"):
        jm.singular_values(jacobian, 9, max_products=1000, key=getkey())
    with pytest.raises(ValueError, match=r"operator: expected a square one for trace, got a ConditionJacobian.*gram"):
        jm.trace(jacobian)
    with pytest.raises(ValueError, match="for a square operator take"):
        jm.singular_values(jm.from_matvec(lambda v: v, 4), 1, max_products=100, key=getkey())
    with pytest.raises(ValueError, match="key: expected a random key"):
        column_norms(jacobian, max_products=4)
    with pytest.raises(ValueError, match="NaN or infinite at this point"):
        jm.singular_values(
            jm.condition_jacobian(saturating, state, x * jnp.nan, 2, cond), 1, max_products=100, key=getkey()
        )
