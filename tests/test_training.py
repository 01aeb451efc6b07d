import itertools
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
from conftest import command_environment, with_xla_flags
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from killing import Stopped, stop

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

    def stop_at(limit):
        return lambda name, step, total: stop() if step == limit else None

    for limit in (25, 47):  # between checkpoints: the steps since the last one are repeated
        with pytest.raises(Stopped):
            train(score, state, DATA, SCHEDULE, config, folder=tmp_path, progress=stop_at(limit))
    seen = []
    resumed = train(
        score, state, DATA, SCHEDULE, config, folder=tmp_path, progress=lambda *call: seen.append(call), name="small"
    ).state
    assert (seen[0], seen[-1]) == (("small", 40, 60), ("small", 60, 60))
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    again = train(score, state, DATA, SCHEDULE, config, folder=tmp_path).state
    jax.tree.map(np.testing.assert_array_equal, whole, again)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000040.npz", "step-00000060.npz"]


def shifted_score(state, x, t, cond):
    """A score whose state is what is trained beside what is not."""
    trained, fixed = state
    return linear_score(trained + fixed, x, t, cond)


FIXED = -jnp.eye(2)


def closed_over(state, x, t, cond):
    return shifted_score((state, FIXED), x, t, cond)


def test_frozen_parameters_are_not_trained(tmp_path):
    start = jnp.zeros((2, 2))
    frozen = train(shifted_score, start, DATA, SCHEDULE, small(), frozen=FIXED, folder=tmp_path).state
    alone = train(closed_over, start, DATA, SCHEDULE, small()).state
    np.testing.assert_allclose(frozen, alone, rtol=1e-5, atol=1e-7)  # one function, two programs in float32
    assert np.abs(frozen).max() > 1e-3
    with pytest.raises(ValueError, match=r"frozen\[0\]|frozen: there"):
        train(shifted_score, start, DATA, SCHEDULE, small(), frozen=2 * FIXED, folder=tmp_path)


def test_each_checkpoint_is_handed_out(tmp_path):
    score, state = network()
    kept = {}
    keep = lambda step, parameters, average: kept.update({step: jax.tree.map(np.asarray, (parameters, average))})  # noqa: E731
    result = train(score, state, DATA, SCHEDULE, small(num_steps=50), keep=keep)
    assert list(kept) == [20, 40, 50]
    jax.tree.map(np.testing.assert_array_equal, kept[50][1], jax.tree.map(np.asarray, result.state))
    first = [np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(kept[step][0])]) for step in (20, 40)]
    assert np.any(first[0] != first[1])
    # After a kill at 47 those from the last saved state on come again, and are the same.
    again = []
    with pytest.raises(Stopped):
        train(
            score, state, DATA, SCHEDULE, small(num_steps=50), folder=tmp_path,
            progress=lambda name, step, total: stop() if step == 47 else None,
        )  # fmt: skip
    train(
        score, state, DATA, SCHEDULE, small(num_steps=50), folder=tmp_path,
        keep=lambda step, *both: again.append((step, jax.tree.map(np.asarray, both))),
    )  # fmt: skip
    assert [step for step, _ in again] == [50]
    jax.tree.map(np.testing.assert_array_equal, kept[50], again[0][1])


SCRIPT = """
import sys
from pathlib import Path
import numpy as np, jax
sys.path.insert(0, {tests!r})
from killing import die
from test_training import DATA, SCHEDULE, network, small
from jaxmem.runs import resume
from jaxmem.training import train

where, at = sys.argv[1], int(sys.argv[2])
writer = resume.arrays_writer

def torn(arrays):
    def write(stream):
        middle = stream.tell()
        writer(arrays)(stream)
        stream.truncate(middle + (stream.tell() - middle) // 2)
        stream.flush()
        die()
    return write if (where, at) == ("write", arrays["step"]) else writer(arrays)

resume.arrays_writer = torn
score, state = network()
result = train(score, state, DATA, SCHEDULE, small(num_steps=300, checkpoint_every=50), folder=Path({folder!r}),
    progress=lambda name, step, total: die() if (where, step) == ("step", at) else print(step))
np.savez({out!r}, *jax.tree.leaves(result.state))
"""


def test_kill_nine_and_resume_gives_the_same_bits(tmp_path):
    folder, out = tmp_path / "checkpoints", tmp_path / "out.npz"
    script = textwrap.dedent(SCRIPT).format(tests=str(Path(__file__).parent), folder=str(folder), out=str(out))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", script]
    # The process kills itself: a parent that kills it can come too late on a busy machine.
    for where, at, left in (
        ("step", 70, ["step-00000050.npz"]),
        ("write", 150, [".tmp-0-step-00000150.npz", "step-00000050.npz", "step-00000100.npz"]),
    ):
        process = subprocess.run([*command, where, str(at)], env=environment, stdout=subprocess.DEVNULL)
        assert process.returncode == -signal.SIGKILL
        assert sorted(path.name for path in folder.iterdir()) == left
        assert not out.exists()
    last = subprocess.run([*command, "never", "0"], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    assert last.stdout.split()[0] == "100"  # not from the beginning, and not from the half-written one
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000250.npz", "step-00000300.npz"]
    score, state = network()
    whole = train(score, state, DATA, SCHEDULE, small(num_steps=300)).state
    with np.load(out) as saved:
        for name, leaf in zip(saved.files, jax.tree.leaves(whole), strict=True):
            np.testing.assert_array_equal(saved[name], leaf)


def train_on_two_devices(folder):
    """Half of each kernel's rows and of the examples on each device: stopped, resumed, and as if it had not been."""
    mesh = Mesh(jax.devices(), ("half",))

    def place(leaf):
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec("half" if len(leaf) % 2 == 0 else None)))

    score, state = network()
    state, data = jax.tree.map(place, state), (place(DATA[0]), None)
    assert any(not leaf.is_fully_replicated for leaf in jax.tree.leaves(state))
    config, path = small(num_steps=40), Path(folder)
    whole = train(score, state, data, SCHEDULE, config).state
    with pytest.raises(Stopped):
        train(score, state, data, SCHEDULE, config, folder=path, progress=lambda name, n, _: stop() if n == 25 else 0)
    resumed = train(score, state, data, SCHEDULE, config, folder=path).state
    for one, other in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(one, other)
        assert one.sharding == other.sharding
    save_checkpoint(path / "alone", 1, state, {})
    restored = restore_checkpoint(path / "alone", state, {})[1]
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, state)


def test_states_on_several_devices_resume_there(tmp_path):
    command = "import sys, test_training; test_training.train_on_two_devices(sys.argv[1])"
    environment = with_xla_flags(command_environment(), "--xla_force_host_platform_device_count=2")
    environment["PYTHONPATH"] += f"{os.pathsep}{Path(__file__).parent}"
    subprocess.run([sys.executable, "-c", command, str(tmp_path)], env=environment, check=True)


@pytest.fixture
def checkpoints(tmp_path):
    tree = {"a": jnp.arange(5000.0), "b": [jnp.ones((3, 2), jnp.bfloat16), jnp.int32(7)], "file": jnp.float32(1)}
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, jax.tree.map(lambda leaf, step=step: leaf * step, tree), {"seed": 1})
    return tmp_path, tree


def test_checkpoints_round_trip_and_keep_two(checkpoints):
    folder, tree = checkpoints
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000002.npz", "step-00000003.npz"]
    step, restored = restore_checkpoint(folder, tree, {"seed": 1})
    assert step == 3
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a * 3, b), tree, restored)
    assert jax.tree.map(lambda leaf: leaf.dtype, restored) == jax.tree.map(lambda leaf: leaf.dtype, tree)
    assert restore_checkpoint(folder / "nothing", tree, {"seed": 1}) is None


def test_a_damaged_checkpoint_is_named_and_the_one_before_may_be_used(checkpoints):
    folder, tree = checkpoints
    newest = folder / "step-00000003.npz"
    content = newest.read_bytes()
    for damaged in (content[: len(content) // 2], b"", content[:300] + bytes([content[300] ^ 1]) + content[301:]):
        newest.write_bytes(damaged)
        match = (
            r"step-00000003\.npz: expected the state .*got a damaged file .*delete it to train on from step-00000002"
        )
        with pytest.raises(ValueError, match=match):
            restore_checkpoint(folder, tree, {"seed": 1})
    newest.unlink()
    assert restore_checkpoint(folder, tree, {"seed": 1})[0] == 2
    (folder / "step-00000002.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="delete it to train on from the beginning"):
        restore_checkpoint(folder, tree, {"seed": 1})


def test_checkpoints_of_the_version_before_are_refused(tmp_path):
    (tmp_path / "step-00000040" / "arrays").mkdir(parents=True)
    (tmp_path / "step-00000040" / "checkpoint.json").write_text('{"step": 40}')
    score, state = network()
    with pytest.raises(ValueError, match=r"got the folder step-00000040, which jaxmem 0\.1 wrote; finish the training"):
        train(score, state, DATA, SCHEDULE, small(), folder=tmp_path)


def test_another_models_checkpoint_is_refused(tmp_path):
    score, state = network()
    train(score, state, DATA, SCHEDULE, small(num_steps=10), folder=tmp_path)
    other, other_state = bind(MLP(2, width=32, depth=1, rngs=nnx.Rngs(0)), SCHEDULE, "eps")
    with pytest.raises(
        ValueError, match=r"got another one \(model\.\.parameters.*: there \"float32 .*choose another folder"
    ):
        train(other, other_state, DATA, SCHEDULE, small(num_steps=10), folder=tmp_path)


def test_nonfinite_loss_is_named_and_not_saved(tmp_path):
    score, state = network()
    data = (DATA[0].at[:].set(jnp.nan), None)
    with pytest.raises(ValueError, match=r"^training: the loss became nan.*lower `training.learning_rate` or"):
        train(score, state, data, SCHEDULE, small(), folder=tmp_path)
    with pytest.raises(ValueError, match=r"^first_order_training: .*lower `first_order_training.learning_rate` or"):
        train(score, state, data, SCHEDULE, small(), folder=tmp_path, name="first_order_training")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(num_steps=20), r"step-00000040\.npz: .*the same call, got another one \(num_steps: there 40, now 20\)"),
        (dict(learning_rate=1e-4, seed=4), "learning_rate: there 0.002, now 0.0001; seed: there 3, now 4"),
    ],
)
def test_another_configurations_checkpoint_is_refused(tmp_path, changes, match):
    score, state = network()
    config = small(num_steps=40)
    done = train(score, state, DATA, SCHEDULE, config, folder=tmp_path).state
    with pytest.raises(ValueError, match=match):
        train(score, state, DATA, SCHEDULE, replace(config, **changes), folder=tmp_path)
    with pytest.raises(ValueError, match=r"schedule: there .*linear.*, now .*cosine"):
        train(score, state, DATA, NoiseSchedule("cosine"), config, folder=tmp_path)
    odds = jnp.full(50, 1 / 50)
    with pytest.raises(ValueError, match=r'probabilities: there \[\], now \["[0-9a-f]{12}"\]\)'):
        train(score, state, DATA, SCHEDULE, config, probabilities=odds, folder=tmp_path)
    with pytest.raises(ValueError, match=r'data: there \["[0-9a-f]{12}"\], now \["[0-9a-f]{12}"\]\)'):
        train(score, state, (DATA[0] + 1, None), SCHEDULE, config, folder=tmp_path)
    # How often to save changes no bit of the result, so it may change.
    again = train(score, state, DATA, SCHEDULE, replace(config, checkpoint_every=7), folder=tmp_path).state
    jax.tree.map(np.testing.assert_array_equal, done, again)


def infinite_slope(state, x, t, cond):
    """A score that is finite and whose gradient is not: the derivative of a square root at 0."""
    return state * x + jnp.sqrt(0 * state)


def test_nonfinite_parameters_are_neither_saved_nor_returned(tmp_path):
    config = small(num_steps=1, warmup_steps=0)
    for folder in (tmp_path, None):
        with pytest.raises(ValueError, match=r"the parameters became NaN .* before step 1 though the loss is \d"):
            train(infinite_slope, jnp.float32(1), DATA, SCHEDULE, config, folder=folder)
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
