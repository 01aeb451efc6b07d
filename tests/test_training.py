import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxmem.config import TrainingConfig
from jaxmem.diffusion import NoiseSchedule
from jaxmem.networks.mlp import MLP
from jaxmem.oracles import GaussianMixtureScore, gaussian
from jaxmem.runs.checkpoints import restore_checkpoint, save_checkpoint
from jaxmem.score import bind
from jaxmem.training import dsm_loss, second_order_loss, sliced_second_order_loss, train

SCHEDULE = NoiseSchedule()


def linear_score(state, x, t, cond):
    """A score with a Jacobian that is known and not symmetric: state x."""
    return state @ x


def example(d=3):
    rng = np.random.default_rng(0)
    return (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((d, d), (d,), (d,)))


@pytest.mark.parametrize("t", [0, 150, 999])
def test_losses_are_their_formulas(t):
    state, x0, eps = example()
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    jacobian, x = np.asarray(state, np.float64), alpha * np.asarray(x0) + sigma * np.asarray(eps)
    residual = sigma * jacobian @ x + np.asarray(eps)
    error = sigma**2 * jacobian + np.eye(3) - np.outer(residual, residual)
    arguments = (linear_score, state, SCHEDULE, x0, t, eps)
    np.testing.assert_allclose(dsm_loss(*arguments), residual @ residual, rtol=1e-5)
    first, second = second_order_loss(*arguments)
    np.testing.assert_allclose(first, residual @ residual, rtol=1e-5)
    np.testing.assert_allclose(second, (error**2).sum(), rtol=1e-5)
    # All eight Rademacher vectors of three dimensions: their mean is the exact norm, no tolerance for chance.
    slices = []
    for signs in itertools.product([-1.0, 1.0], repeat=3):
        first, sliced = sliced_second_order_loss(*arguments, jnp.array(signs))
        np.testing.assert_allclose(first, residual @ residual, rtol=1e-5)
        np.testing.assert_allclose(sliced, ((error @ signs) ** 2).sum(), rtol=1e-5)
        slices.append(float(sliced))
    np.testing.assert_allclose(np.mean(slices), (error**2).sum(), rtol=1e-5)


def test_the_true_score_minimises_both_losses(x64):
    # Gaussian data, scores (truth + a·I) x: both expected losses are quadratic in a; their slope at 0 must vanish.
    t, n = 200, 100_000
    covariance = np.array([[1.0, 0.3], [0.3, 0.4]])
    state = gaussian(jnp.zeros(2), jnp.asarray(np.linalg.cholesky(covariance)))
    hessian = jnp.asarray(GaussianMixtureScore(SCHEDULE).hessian(state, np.zeros(2), t))
    rng = np.random.default_rng(1)
    x0 = jnp.asarray(rng.multivariate_normal(np.zeros(2), covariance, size=n))
    eps = jnp.asarray(rng.normal(size=(n, 2)))
    v = jnp.asarray(rng.choice([-1.0, 1.0], size=(n, 2)))

    def slopes(a):
        def one(a, x0, eps, v):
            arguments = (linear_score, hessian + a * jnp.eye(2), SCHEDULE, x0, t, eps)
            return jnp.stack(
                [dsm_loss(*arguments), second_order_loss(*arguments)[1], sliced_second_order_loss(*arguments, v)[1]]
            )

        return jax.vmap(jax.jacfwd(one), (None, 0, 0, 0))(a, x0, eps, v)

    at_truth, away = slopes(0.0), slopes(0.5)
    for i in range(3):
        error = float(at_truth[:, i].std()) / n**0.5
        assert abs(at_truth[:, i].mean()) < 4 * error  # four standard errors, fixed seed
        assert away[:, i].mean() > 20 * error  # and it does not vanish elsewhere


def test_the_outer_product_estimates_the_hessian(x64):
    # E[l lᵀ | x_t] = I + sigma² H: conditional on x_t, for a Gaussian, where the posterior of eps is known.
    t = 120
    alpha, sigma = SCHEDULE.alpha[t], SCHEDULE.sigma[t]
    state = gaussian(jnp.zeros(2), jnp.asarray(np.linalg.cholesky([[1.0, 0.3], [0.3, 0.4]])))
    oracle, x = GaussianMixtureScore(SCHEDULE), np.array([0.7, -0.2])
    hessian = oracle.hessian(state, x, t)
    # x_0 | x_t has covariance (sigma²/alpha²)(I + sigma² H); eps = (x - alpha x_0)/sigma then has I + sigma² H.
    precision = np.linalg.inv([[1.0, 0.3], [0.3, 0.4]]) + alpha**2 / sigma**2 * np.eye(2)
    np.testing.assert_allclose(
        alpha**2 / sigma**2 * np.linalg.inv(precision), np.eye(2) + sigma**2 * hessian, rtol=1e-6
    )


def small(**changes):
    return TrainingConfig(**dict(num_steps=60, batch_size=16, warmup_steps=5, checkpoint_every=20, seed=3) | changes)


def network(seed=0):
    return bind(MLP(2, width=16, depth=1, rngs=nnx.Rngs(seed)), SCHEDULE, "eps")


DATA = (jnp.asarray(np.random.default_rng(2).normal(size=(50, 2)) * [0.1, 0.5] + [2.0, -1.0], jnp.float32), None)


@pytest.mark.parametrize("order", ["none", "exact", "sliced"])
def test_training_lowers_the_loss_and_keeps_its_arguments(order):
    score, state = network()
    before = jax.tree.map(np.asarray, state)
    config = small(num_steps=300, second_order=order, second_order_start=0.5, learning_rate=5e-3)
    result = train(score, state, DATA, SCHEDULE, config)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, state))
    steps, first, second = result.losses.T
    assert steps[-1] == 300
    assert first[-1] < 0.8 * first[0]
    assert (second[steps <= 150] == 0).all()
    assert (second[steps > 150] > 0).all() == (order != "none")


def test_resuming_gives_the_same_bits(tmp_path):
    score, state = network()
    config = small(second_order="sliced", second_order_start=0.5)
    whole = train(score, state, DATA, SCHEDULE, config).state

    class Stop(Exception):
        pass

    def stop_at(limit):
        def on_step(step, total):
            if step == limit:
                raise Stop

        return on_step

    for limit in (25, 47):  # between checkpoints: the steps since the last one are repeated
        with pytest.raises(Stop):
            train(score, state, DATA, SCHEDULE, config, checkpoint_dir=tmp_path, on_step=stop_at(limit))
    seen = []
    resumed = train(
        score, state, DATA, SCHEDULE, config, checkpoint_dir=tmp_path, on_step=lambda step, total: seen.append(step)
    ).state
    assert seen[0] == 40
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    again = train(score, state, DATA, SCHEDULE, config, checkpoint_dir=tmp_path).state
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000040", "step-00000060"]


SCRIPT = """
import os, signal, sys
from pathlib import Path
import numpy as np, jax
sys.path.insert(0, {tests!r})
from test_training import DATA, SCHEDULE, network, small
from jaxmem.runs import checkpoints
from jaxmem.training import train

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

where, at = sys.argv[1], int(sys.argv[2])
digests = checkpoints._digests
if where == "write":  # the arrays of a checkpoint are there, its index and its name are not
    checkpoints._digests = lambda folder: die() if folder.name == f"partial-{{at:08d}}" else digests(folder)
score, state = network()
result = train(score, state, DATA, SCHEDULE, small(num_steps=300, checkpoint_every=50), checkpoint_dir=Path({folder!r}),
    on_step=lambda step, total: die() if (where, step) == ("step", at) else print(step))
np.savez({out!r}, *jax.tree.leaves(result.state))
"""


def test_kill_nine_and_resume_gives_the_same_bits(tmp_path):
    folder, out = tmp_path / "checkpoints", tmp_path / "out.npz"
    script = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), folder=str(folder), out=str(out))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", script]
    # The process kills itself: a parent that kills it can come too late on a busy machine.
    for where, at, left in (("step", 70, "step-00000050"), ("write", 150, "partial-00000150")):
        process = subprocess.run([*command, where, str(at)], env=environment, stdout=subprocess.DEVNULL)
        assert process.returncode == -signal.SIGKILL
        assert sorted(path.name for path in folder.iterdir() if path.name.startswith(left.split("-")[0]))[-1] == left
        assert not out.exists()
    last = subprocess.run([*command, "never", "0"], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert last.stdout.split()[0] == "100"  # not from the beginning, and not from the half-written one
    score, state = network()
    whole = train(score, state, DATA, SCHEDULE, small(num_steps=300)).state
    with np.load(out) as saved:
        for name, leaf in zip(saved.files, jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(saved[name], leaf)


@pytest.fixture
def checkpoints(tmp_path):
    tree = {"a": jnp.arange(5000.0), "b": [jnp.ones((3, 2)), jnp.int32(7)]}
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, jax.tree.map(lambda leaf, step=step: leaf * step, tree))
    return tmp_path, tree


def test_checkpoints_round_trip_and_keep_two(checkpoints):
    folder, tree = checkpoints
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002", "step-00000003"]
    step, restored = restore_checkpoint(folder, tree)
    assert step == 3
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a * 3, b), tree, restored)
    assert restore_checkpoint(folder / "nothing", tree) is None


def test_every_damaged_file_of_a_checkpoint_is_named(checkpoints):
    folder, tree = checkpoints
    newest = folder / "step-00000003"
    files = [path for path in newest.rglob("*") if path.is_file()]
    assert len(files) > 3
    for path in files:
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b""):
            path.write_bytes(damaged)
            if damaged != content:
                with pytest.raises(ValueError, match=r"checkpoint step-00000003: .* delete"):
                    restore_checkpoint(folder, tree)
        path.unlink()
        with pytest.raises(ValueError, match=r"step-00000003: .*missing.*\(then step-00000002 is used\)"):
            restore_checkpoint(folder, tree)
        path.write_bytes(content)
    assert restore_checkpoint(folder, tree)[0] == 3


def test_a_half_written_checkpoint_is_not_one(checkpoints):
    folder, tree = checkpoints
    (folder / "step-00000003").rename(folder / "partial-00000003")
    assert restore_checkpoint(folder, tree)[0] == 2
    save_checkpoint(folder, 4, tree)
    assert not list(folder.glob("partial-*"))


def test_another_models_checkpoint_is_refused(tmp_path):
    score, state = network()
    train(score, state, DATA, SCHEDULE, small(num_steps=10), checkpoint_dir=tmp_path)
    other, other_state = bind(MLP(2, width=32, depth=1, rngs=nnx.Rngs(0)), SCHEDULE, "eps")
    with pytest.raises(ValueError, match="it holds another model or optimiser"):
        train(other, other_state, DATA, SCHEDULE, small(num_steps=10), checkpoint_dir=tmp_path)


def test_nonfinite_loss_is_named_and_not_saved(tmp_path):
    score, state = network()
    data = (DATA[0].at[:].set(jnp.nan), None)
    with pytest.raises(ValueError, match=r"^training: the loss became nan.*lower `training.learning_rate` or"):
        train(score, state, data, SCHEDULE, small(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"^first_order_training: .*lower `first_order_training.learning_rate` or"):
        train(score, state, data, SCHEDULE, small(), checkpoint_dir=tmp_path, name="first_order_training")
    assert restore_checkpoint(tmp_path, state) is None


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(num_steps=20), r"step-00000040: .*another configuration \(num_steps 40 there, 20 here\)"),
        (dict(learning_rate=1e-4, seed=4), "learning_rate 0.002 there, 0.0001 here, seed 3 there, 4 here"),
    ],
)
def test_another_configurations_checkpoint_is_refused(tmp_path, changes, match):
    score, state = network()
    config = small(num_steps=40)
    done = train(score, state, DATA, SCHEDULE, config, checkpoint_dir=tmp_path).state
    with pytest.raises(ValueError, match=match):
        train(score, state, DATA, SCHEDULE, replace(config, **changes), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"schedule .*linear.* there, .*cosine.* here"):
        train(score, state, DATA, NoiseSchedule("cosine"), config, checkpoint_dir=tmp_path)
    odds = jnp.full(50, 1 / 50)
    with pytest.raises(ValueError, match=r"probabilities None there, '[0-9a-f]{12}' here"):
        train(score, state, DATA, SCHEDULE, config, probabilities=odds, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"data '[0-9a-f]{12}' there, '[0-9a-f]{12}' here"):
        train(score, state, (DATA[0] + 1, None), SCHEDULE, config, checkpoint_dir=tmp_path)
    # How often to save changes no bit of the result, so it may change.
    again = train(score, state, DATA, SCHEDULE, replace(config, checkpoint_every=7), checkpoint_dir=tmp_path).state
    jax.tree.map(np.testing.assert_array_equal, done, again)


def infinite_slope(state, x, t, cond):
    """A score that is finite and whose gradient is not: the derivative of a square root at 0."""
    return state * x + jnp.sqrt(0 * state)


def test_nonfinite_parameters_are_neither_saved_nor_returned(tmp_path):
    config = small(num_steps=1, warmup_steps=0)
    for folder in (tmp_path, None):
        with pytest.raises(ValueError, match=r"the parameters became NaN .* before step 1 though the loss is \d"):
            train(infinite_slope, jnp.float32(1), DATA, SCHEDULE, config, checkpoint_dir=folder)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(num_steps=0), "num_steps: expected at least 1, got 0"),
        (dict(ema_decay=1.5), "ema_decay: expected 0 to 0.999999, got 1.5"),
        (dict(warmup_steps=100), "warmup_steps: expected 0 to 60, got 100"),
        (dict(learning_rate=float("nan")), "learning_rate: expected more than 0 and at most 1,000,000, got nan"),
    ],
)
def test_bad_configurations_are_named(changes, match):
    with pytest.raises(ValueError, match=match):
        small(**changes)


def test_bad_data_is_named():
    score, state = network()
    with pytest.raises(ValueError, match="data: expected examples and conditions of one length"):
        train(score, state, (DATA[0], jnp.zeros(3)), SCHEDULE, small())
    with pytest.raises(ValueError, match="probabilities: expected 50 of them"):
        train(score, state, DATA, SCHEDULE, small(), probabilities=jnp.ones(50))


def test_examples_are_drawn_with_their_probabilities():
    # Only the first example is ever drawn: NaN in all others does no harm.
    score, state = network()
    data = (DATA[0].at[1:].set(jnp.nan), None)
    result = train(score, state, data, SCHEDULE, small(), probabilities=jnp.zeros(50).at[0].set(1.0))
    assert np.isfinite(result.losses).all()


def test_training_state_is_donated_without_waiting():
    # One compiled step serves first and later steps: two compilations at most (with and without the second order).
    from jaxmem.training import _step

    score, state = network()
    before = _step._cache_size()
    train(score, state, DATA, SCHEDULE, small(second_order="exact", second_order_start=0.5))
    assert _step._cache_size() - before <= 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda index: [], "checkpoint.json is missing or damaged"),
        (lambda index: index | {"recipe": None}, "checkpoint.json is missing or damaged"),
        (lambda index: index | {"step": "40"}, "checkpoint.json is missing or damaged"),
        (lambda index: index | {"files": {}}, "is not in its checkpoint.json"),
    ],
)
def test_a_damaged_index_is_named(tmp_path, change, match):
    score, state = network()
    config = small(num_steps=40)
    train(score, state, DATA, SCHEDULE, config, checkpoint_dir=tmp_path)
    path = tmp_path / "step-00000040" / "checkpoint.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(ValueError, match=match):
        train(score, state, DATA, SCHEDULE, config, checkpoint_dir=tmp_path)
