from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity import EPS, in_double

from jaxmem.diffusion import NoiseSchedule
from jaxmem.networks.unet import GroupNorm, SelfAttention, UNet, fold, unfold
from jaxmem.score import bind

SCHEDULE = NoiseSchedule()


def small_unet(**changes):
    sizes = {"features": (8, 16), "num_blocks": (1, 1), "embedding": 16, "groups": 4} | changes
    return UNet((12, 8, 1), rngs=nnx.Rngs(0), **sizes)


def randomised(module, key):
    """Replace every parameter by noise: several start at zero, and would hide mistakes behind them."""
    graphdef, state = nnx.split(module)
    leaves, tree = jax.tree.flatten(state)
    keys = jax.random.split(key, len(leaves))
    leaves = [jax.random.normal(k, p.shape) / max(p.shape[0], 4) ** 0.5 for k, p in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))


def test_fold_and_unfold_are_inverse_and_local(getkey):
    x = jax.random.normal(getkey(), (6, 4, 3))
    folded = fold(x, 2)
    assert folded.shape == (3, 2, 12)
    np.testing.assert_array_equal(unfold(folded, 2), x)
    np.testing.assert_array_equal(folded[1, 0].reshape(2, 2, 3), x[2:4, 0:2])


def test_group_norm_equals_flax_and_survives_a_large_mean(getkey, parity):
    norm = randomised(GroupNorm(8, 4), getkey())
    x = jax.random.normal(getkey(), (6, 4, 8))
    twin = nnx.GroupNorm(8, 4, epsilon=1e-5, use_fast_variance=False, rngs=nnx.Rngs(0))
    twin.scale[...], twin.bias[...] = norm.scale[...], norm.shift[...]
    parity.functions("GroupNorm", lambda norm, twin, x: norm(x), lambda norm, twin, x: twin(x[None])[0], norm, twin, x)
    # A mean of 48 numbers near 1000 is off by at most 48 · 6e-8 · 1000 = 3e-3, in any order, and is what is left of
    # rounding; the one-pass variance would be wrong by 1000² · 6e-8 = 0.06 at the least.
    scale = float(jnp.abs(norm.scale[...]).max())
    np.testing.assert_allclose(norm(x + 1000.0), norm(x), atol=4e-3 * max(scale, 1))


def test_self_attention_equals_its_formula(getkey, parity):
    module = randomised(SelfAttention(8, 2, 4, rngs=nnx.Rngs(0)), getkey())
    x = jax.random.normal(getkey(), (3, 5, 8))

    def formula(module, x):
        q, k, v = jnp.split(module.norm(x).reshape(15, 8) @ module.qkv.kernel[...], 3, axis=1)
        heads = []
        for columns in (slice(0, 4), slice(4, 8)):
            weights = jnp.exp(q[:, columns] @ k[:, columns].T / 2)  # a head has 4 features
            heads.append(weights / weights.sum(1, keepdims=True) @ v[:, columns])
        mixed = jnp.concatenate(heads, 1) @ module.out.kernel[...] + module.out.bias[...][None]
        return x + mixed.reshape(x.shape)

    parity.functions("SelfAttention", lambda module, x: module(x), formula, module, x)


def test_attention_is_at_the_levels_asked_for():
    module = small_unet(features=(8, 8, 16), num_blocks=(1, 2, 1), num_heads=(0, 2, 4), patch=1)
    heads = [[block.attention and block.attention.num_heads for block in level] for level in module.down]
    assert heads == [[None], [2, 2], [4]]
    assert [[block.attention and block.attention.num_heads for block in level] for level in module.up] == [
        [2, 2],
        [None],
    ]


@pytest.mark.parametrize("num_heads", [None, (2, 4)])
def test_a_new_network_is_the_linear_denoiser(num_heads, getkey):
    x = jax.random.normal(getkey(), (12, 8, 1))
    graphdef, state = nnx.split(small_unet(num_heads=num_heads))
    module = jax.jit(lambda *args: nnx.merge(graphdef, state)(*args))
    for t in (0, 100, 999):
        # Unit-variance pixels: E[eps | x] = sigma x. The last layer starts at zero, the gate at sigma².
        np.testing.assert_allclose(module(x, jnp.int32(t), jnp.int32(3)), SCHEDULE.sigma[t] * x, rtol=2e-5)


def test_batch_matches_single_examples(getkey, parity):
    module = randomised(small_unet(), getkey())
    x = jax.random.normal(getkey(), (3, 12, 8, 1))
    t, cond = jnp.array([0, 50, 999]), jnp.array([0, 3, 9])
    score, state = bind(module, SCHEDULE, "eps")
    batch, single = jax.jit(jax.vmap(score, (None, 0, 0, 0))), jax.jit(score)

    def one_by_one(state, x):
        return [single(state, x[i], t[i], cond[i]) for i in range(3)]

    parity.functions("UNet of MNIST: points together", lambda *a: list(batch(*a, t, cond)), one_by_one, state, x)


def test_derivatives_match_finite_differences_in_double_precision(getkey, x64):
    graphdef, state = nnx.split(randomised(small_unet(features=(8,), num_blocks=(1,), num_heads=(2,)), getkey()))
    state = jax.tree.map(lambda p: p.astype(jnp.float64), state)
    x, v = jax.random.normal(getkey(), (2, 12, 8, 1), dtype=jnp.float64)

    @jax.jit
    def along(x, t):
        def f(x):
            return nnx.merge(graphdef, state)(x, t, 3)

        def first(x):
            return jax.jvp(f, (x,), (v,))

        (value, slope), (_, curvature) = jax.jvp(first, (x,), (v,))
        return value, slope, curvature

    for t in (0, 300):
        step = 1e-5 * float(SCHEDULE.sigma[t])
        _, slope, curvature = along(x, t)
        above, below = along(x + step * v, t), along(x - step * v, t)
        for exact, high, low in zip((slope, curvature), above, below, strict=False):
            # Central differences: truncation near 1e-9 relative, rounding 1e-16 / step = 1e-9 of larger terms.
            np.testing.assert_allclose(exact, (high - low) / (2 * step), atol=1e-5 * float(jnp.abs(exact).max()))


def test_second_order_loss_has_finite_gradients_for_every_parameter(getkey):
    score, state = bind(randomised(small_unet(num_heads=(0, 2)), getkey()), SCHEDULE, "eps")
    x, v = jax.random.normal(getkey(), (2, 12, 8, 1))

    @jax.jit
    def gradient(state):
        def loss(state):
            return jnp.sum(jax.jvp(lambda x: score(state, x, jnp.int32(0), jnp.int32(3)), (x,), (v,))[1] ** 2)

        return jax.grad(loss)(state)

    gradients = gradient(state)
    for path, leaf in jax.tree.leaves_with_path(gradients):
        assert np.isfinite(leaf).all(), path
    assert np.abs(gradients["down"][0][0]["conv1"]["kernel"][...]).max() > 0


def test_time_and_class_change_the_output(getkey):
    module = randomised(small_unet(), getkey())
    x = jax.random.normal(getkey(), (12, 8, 1))
    assert not jnp.allclose(module(x, 10, 3), module(x, 10, 4))
    # Beside the explicit 1/sigma: neighbouring first timesteps are told apart.
    maps = [module(x, t, 3) * SCHEDULE.sigma[t] for t in (0, 1)]
    assert not jnp.allclose(*maps, rtol=1e-2)


def test_equal_modules_bind_to_equal_scores():
    first, second = bind(small_unet(), SCHEDULE, "eps")[0], bind(small_unet(), SCHEDULE, "eps")[0]
    assert first == second
    assert hash(first) == hash(second)


def test_unconditional(getkey):
    module = small_unet(num_classes=0)
    assert module(jnp.ones((12, 8, 1)), 0, None).shape == (12, 8, 1)
    with pytest.raises(ValueError, match="cond: expected None"):
        module(jnp.ones((12, 8, 1)), 0, 3)


def test_misuse_is_named():
    with pytest.raises(ValueError, match="multiples of 4"):
        UNet((10, 8, 1), features=(8, 16), num_blocks=(1, 1), groups=4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="one number per level"):
        small_unet(num_blocks=(1,))
    for num_heads in ((2,), (0, 3), (-1, 2)):
        with pytest.raises(ValueError, match=r"num_heads: expected one number per level that divides.*\(8, 16\), or 0"):
            small_unet(num_heads=num_heads)
    with pytest.raises(ValueError, match="multiples of groups=4"):
        small_unet(features=(6, 16))
    with pytest.raises(ValueError, match=r"expected one image of shape \(12, 8, 1\).*jax.vmap"):
        small_unet()(jnp.ones((2, 12, 8, 1))[0, :, :4], 0, 3)
    with pytest.raises(ValueError, match="a class from 0 to 9"):
        small_unet()(jnp.ones((12, 8, 1)), 0, None)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # inside torch.func.jvp
def test_torch_twin_agrees_in_value_and_jacobian_product(getkey, parity):
    torch = pytest.importorskip("torch", reason="torch comes with jaxmem[test,parity] (CONTRIBUTING)")
    from torch_unet import from_state, torch_score

    @partial(jax.jit, static_argnums=0)
    def product(score, state, x, t, cond, v):
        return jax.jvp(lambda x: score(state, x, t, cond), (x,), (v,))

    for num_blocks in ((1, 2), (2, 1)):
        module = randomised(small_unet(num_blocks=num_blocks), getkey())
        score, state = bind(module, SCHEDULE, "eps")
        x, v = jax.random.normal(getkey(), (2, 12, 8, 1))
        for t in (0, 100, 800):

            def theirs(dtype, rounded=0.0, t=t, module=module, state=state, x=x, v=v):
                model, generator = from_state(module, state, dtype), torch.Generator().manual_seed(0)
                with torch.no_grad():
                    for tensor in (*model.parameters(), *model.buffers()):
                        tensor.mul_(1 + rounded * torch.randn(tensor.shape, generator=generator, dtype=dtype))
                inputs = (torch.tensor(np.array(a).transpose(2, 0, 1), dtype=dtype) for a in (x, v))
                pair = torch.func.jvp(
                    lambda x: torch_score(model, x, torch.tensor(t), torch.tensor(3)), *((part,) for part in inputs)
                )
                return [part.detach().numpy().transpose(1, 2, 0) for part in pair]

            def ours(state, x, v, score=score, t=t):
                return product(score, state, x, jnp.int32(t), jnp.int32(3), v)

            peer, truth, inputs = theirs(torch.float32), theirs(torch.float64), theirs(torch.float64, EPS)
            exact = in_double(ours, state, x, v)
            for i, name in enumerate(("score", "product")):
                parts = (parts[i] for parts in (ours(state, x, v), peer, truth, exact))
                parity.check(f"UNet of MNIST: {name}", *parts, inputs=inputs[i])


@pytest.mark.parametrize("cond", [10, -1, jnp.int32(10)])
def test_classes_that_are_not_there_are_refused(cond):
    with pytest.raises(ValueError, match="cond: expected a class from 0 to 9, got"):
        small_unet()(jnp.zeros((12, 8, 1)), 0, cond)
