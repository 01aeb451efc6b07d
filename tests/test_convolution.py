"""The convolution primitive against a sum written in NumPy, torch, and XLA's own derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmem.networks.convolution import conv3x3


@pytest.fixture
def arrays(getkey):
    return jax.random.normal(getkey(), (6, 4, 5)), jax.random.normal(getkey(), (3, 3, 5, 7))


def xla(x, kernel):
    return jax.lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))[0]


def test_value_is_the_sum(arrays):
    x, kernel = (np.asarray(a, np.float64) for a in arrays)
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    expected = sum(padded[a : a + 6, b : b + 4] @ kernel[a, b] for a in range(3) for b in range(3))
    np.testing.assert_allclose(conv3x3(*arrays), expected, atol=1e-5)  # float32 sums of 45 products of order 1


def test_value_and_gradients_are_torchs(arrays, torch):
    x, kernel = (torch.tensor(np.array(a), requires_grad=True) for a in arrays)
    expected = torch.nn.functional.conv2d(x.permute(2, 0, 1)[None], kernel.permute(3, 2, 0, 1), padding=1)[0]
    (expected**3).sum().backward()
    gradients = jax.grad(lambda *a: jnp.sum(conv3x3(*a) ** 3), (0, 1))(*arrays)
    for ours, theirs in zip(gradients, (x.grad, kernel.grad), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("argnum", [0, 1])
@pytest.mark.parametrize("transform", ["jvp", "jacfwd", "jacrev", "fwd over rev", "rev over fwd", "vmap"])
def test_derivatives_are_xlas(arrays, transform, argnum):
    def apply(convolve):
        def f(argument):
            return jnp.tanh(convolve(*(argument if i == argnum else a for i, a in enumerate(arrays)))).sum((0, 1))

        argument = arrays[argnum]
        if transform == "jvp":
            return jax.jvp(f, (argument,), (jnp.cos(argument),))[1]
        if transform == "vmap":
            return jax.vmap(jax.jacrev(f))(jnp.stack([argument, -argument, 2 * argument]))
        nested = {
            "jacfwd": jax.jacfwd(f),
            "jacrev": jax.jacrev(f),
            "fwd over rev": jax.jacfwd(jax.grad(lambda a: jnp.sum(f(a) ** 2))),
            "rev over fwd": jax.grad(lambda a: jnp.sum(jax.jvp(f, (a,), (jnp.sin(a),))[1] ** 2)),
        }
        return jax.jit(nested[transform])(argument)

    ours, theirs = apply(conv3x3), apply(xla)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())  # float32, sums in another order


def test_a_loop_body_holds_only_the_layout_that_is_fast(arrays):
    # Elsewhere XLA's CPU compiler repairs the layout of a convolution; in a loop it does not (40 times slower).
    x, kernel = arrays

    def both(x, kernel):
        y, pull = jax.vjp(lambda x: conv3x3(x, kernel), x)
        return pull(jnp.sin(y))[0]

    @jax.jit
    def loop(x, kernel):
        return jax.lax.fori_loop(0, 3, lambda _, x: both(x, kernel), x)

    text = loop.lower(x, kernel).compile().as_text()
    labels = [line.split("dim_labels=")[1].split(",")[0] for line in text.splitlines() if " convolution(" in line]
    assert labels == ["b01f_01io->b01f"] * 2


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_lowers_for_accelerators_with_the_callers_precision(arrays, platform):
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(jax.vmap(conv3x3, (0, None))).trace(arrays[0][None], arrays[1])
    text = lowered.lower(lowering_platforms=(platform,)).as_text()
    assert "precision HIGHEST" in text
