"""The comparison of two programs itself: what it lets pass, and what not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity import EPS, MULTIPLE, Parity, Row, error, table

from jaxmem.kernels.normalization import normalise

X = np.random.default_rng(0).normal(size=(6, 6, 8)).astype(np.float32)
SIGNS = np.where(np.random.default_rng(1).random(X.shape) < 0.5, -1.0, 1.0)


def off(multiple_of_eps):
    return X * (1 + multiple_of_eps * EPS * SIGNS)


@pytest.mark.parametrize(("ours", "peer", "passes"), [(7, 0, True), (9, 0, False), (30, 4, True), (33, 4, False)])
def test_ours_may_be_off_by_a_multiple_of_the_peers_error_or_of_eps(ours, peer, passes):
    rows = []
    parity = Parity(rows.append)
    if passes:
        parity.check("x", off(ours), off(peer), X)
    else:
        with pytest.raises(AssertionError, match=rf"x: expected .* at most .* \({MULTIPLE} times the largest .*; got"):
            parity.check("x", off(ours), off(peer), X)
    np.testing.assert_allclose([rows[0].ours, rows[0].peer], [ours * EPS, peer * EPS])


def test_inputs_that_are_rounded_widen_the_bound():
    Parity(list().append).check("x", off(70), off(0), X, inputs=off(9))
    with pytest.raises(AssertionError, match=r"rounded inputs' 1\.07e-06"):
        Parity(list().append).check("x", off(80), off(0), X, inputs=off(9))


def test_in_float64_a_function_that_is_nearly_the_same_is_another():
    """An epsilon of 1e-6 instead of 1e-5, which rounding hides where the variance is not small."""
    large = jnp.asarray(100 * X)
    parity = Parity(list().append)
    parity.functions("same", lambda x: normalise(x, 4), jax.jit(lambda x: normalise(x, 4)), large)
    ours, theirs = normalise(large, 4, 1e-6), normalise(large, 4)
    parity.check("in float32", ours, theirs, theirs)
    with pytest.raises(AssertionError, match=r"other epsilon: .* in float64, \d"):
        parity.functions("other epsilon", lambda x: normalise(x, 4, 1e-6), lambda x: normalise(x, 4), large)


def test_nan_and_other_shapes_never_pass():
    with pytest.raises(AssertionError, match="got nan"):
        Parity(list().append).check("x", X * np.nan, X, X)
    with pytest.raises(AssertionError, match=r"expected shape \(6, 6, 8\), got \(8, 6, 6\)"):
        Parity(list().append).check("x", X.T, X, X)
    with pytest.raises(ValueError, match="longer"):
        Parity(list().append).check("x", [X], [X, X], [X, X])
    assert error(np.ones(4), np.zeros(4)) == 2.0


def test_the_table_has_the_largest_of_each_kind():
    rows = [Row("a", 2e-7, 1e-7, 1e-16), Row("a", 1e-7, 3e-7, None), Row("b", 8e-7, 4e-7, None)]
    assert table({"one": rows, "two": [*rows[1:], Row("a", 9e-7, 3e-7, 2e-16)]})[2:] == [
        "| a | 2 | 3.0e-07 | 2.0e-07 | 9.0e-07 | 2.0e-16 | 3.0 |",
        "| b | 1 | 4.0e-07 | 8.0e-07 | 8.0e-07 |  | 2.0 |",
    ]
