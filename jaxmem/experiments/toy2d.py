"""The paper's section 5.1: a Gaussian and one distant point, duplicated 100 times, in two dimensions.

Trains the score of the mixture twice, with the second-order loss and with the first-order loss alone, samples each,
and compares the learned Hessian with the closed form along one memorized and one non-memorized sampling path, at every
timestep. Writes a run (`jaxmem.runs.directory`): ``metrics.json`` and ``spectra.npz``.

The closed form is that of the *population*, ``w N(mean, covariance) + (1 - w) delta(point)``. The density of the
training points themselves is another one (at small t a peak at each of them); its Hessians stand beside.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.config import Toy2dConfig, TrainingConfig
from jaxmem.diffusion import NoiseSchedule
from jaxmem.jacobian import score_jacobian
from jaxmem.networks.mlp import MLP
from jaxmem.oracles import EmpiricalScore, GaussianMixture, GaussianMixtureScore
from jaxmem.runs.directory import Run
from jaxmem.runs.identity import fingerprint
from jaxmem.runs.progress import Progress, silent
from jaxmem.runs.stages import save_losses, timed, wall_seconds
from jaxmem.samplers import DDIM
from jaxmem.sampling import sample_path
from jaxmem.score import NetworkScore, bind
from jaxmem.training import train

SCHEDULE = NoiseSchedule()  # DDPM linear, 1,000 steps
PATHS = ("memorized", "general")
MODELS = ("second_order", "first_order")
STORED = ("samples", "paths", "hessians", "field")
MEDIAN_TIMESTEPS = (20, 900)  # the range of hessian_rel_error_median


def population(config: Toy2dConfig) -> GaussianMixture:
    """The data distribution in closed form."""
    share = config.num_gaussian / (config.num_gaussian + config.num_copies)
    factor = np.linalg.cholesky(np.asarray(config.covariance))
    return GaussianMixture(
        log_weights=jnp.log(jnp.array([share, 1 - share])),
        means=jnp.array([config.mean, config.point], jnp.float32),
        factors=jnp.asarray(np.stack([factor, np.zeros((2, 2))]), jnp.float32),
        variances=jnp.zeros(2),
    )


def training_points(config: Toy2dConfig) -> np.ndarray:
    """The Gaussian draws, then the copies of the point; float32, shape (n, 2)."""
    rng = np.random.default_rng(config.data_seed)
    draws = rng.multivariate_normal(config.mean, config.covariance, size=config.num_gaussian)
    return np.concatenate([draws, np.tile(config.point, (config.num_copies, 1))]).astype(np.float32)


def run_toy2d(config: Toy2dConfig, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Run or resume the experiment in the folder ``out`` and return its metrics.

    Raises:
        ValueError: if ``out`` holds another run; before any work.
    """
    points = training_points(config)
    seeds = {"data": config.data_seed, "training": config.training.seed, "sampling": config.sampling_seed}
    data = fingerprint(points)
    run = Run.open(out, asdict(config), experiment="toy2d", seeds=seeds, data=data, dtype="float32")
    if run.finished:
        return run.metrics()
    arrays: dict[str, np.ndarray] = {"training_points": points, "sigma": SCHEDULE.sigma}
    for model, training in zip(MODELS, (config.training, config.first_order_training), strict=True):
        arrays |= analyse_model(config, run, model, training, points, progress)
    arrays |= landscapes(config)
    spectra = {
        # Common to all runs: the second-order model is the one that is meant.
        "eigenvalues": arrays["second_order_eigenvalues"],
        "label": np.asarray(PATHS),
        "timestep": np.arange(SCHEDULE.num_timesteps),
        "method": np.asarray("eigh"),
        "num_products": np.asarray(len(MODELS) * len(PATHS) * SCHEDULE.num_timesteps * 2),
    }
    arrays |= spectra
    run.finalise(toy2d_metrics(arrays) | {"wall_seconds": wall_seconds(run)}, arrays)
    return run.metrics()


def analyse_model(
    config: Toy2dConfig, run: Run, model: str, training: TrainingConfig, points: np.ndarray, progress: Progress
) -> dict[str, np.ndarray]:
    """Train one model unless the run has it, and set its Hessians beside the closed forms on the same paths."""
    if not run.done(model):
        measure_model(config, run, model, training, points, progress)
    arrays = run.load(model)
    samples, paths, hessians, field = (arrays[name] for name in STORED)
    population_score, empirical_score = GaussianMixtureScore(SCHEDULE), EmpiricalScore(SCHEDULE)
    mixture, data = population(config), points.astype(np.float64)  # the copies count by the number of their rows
    steps = range(SCHEDULE.num_timesteps)
    return {
        f"{model}_samples": samples,
        f"{model}_memorized_sample": is_memorized(config, samples),
        f"{model}_paths": paths,
        f"{model}_hessians": hessians,
        f"{model}_eigenvalues": np.linalg.eigvalsh(_symmetric(hessians))[..., ::-1],
        f"{model}_closed_form": np.stack(
            [[population_score.hessian(mixture, path[t], t) for t in steps] for path in paths]
        ),
        f"{model}_empirical": np.stack([[empirical_score.hessian(data, path[t], t) for t in steps] for path in paths]),
        f"{model}_field": field,
        "field_grid": field_grid(config),
        "field_timestep": np.asarray(config.field_timestep),
    }


def measure_model(
    config: Toy2dConfig, run: Run, model: str, training: TrainingConfig, points: np.ndarray, progress: Progress
) -> None:
    """Train one model, sample it, take Hessians along a memorized and a general path, and store what was found."""
    score, state = bind(MLP(2, width=config.width, depth=config.depth, rngs=nnx.Rngs(training.seed)), SCHEDULE, "eps")
    label = model.replace("_", "-")
    with timed(run, f"train {label}"):
        result = train(
            score,
            state,
            (jnp.asarray(points), None),
            SCHEDULE,
            training,
            folder=run.directory / "checkpoints" / model,
            progress=lambda _, step, total: progress(f"train {label}", step, total),
            name="training" if model == "second_order" else "first_order_training",
        )
        save_losses(run, f"{model}-losses", result.losses)
    state = result.state
    with timed(run, f"sample {label}"):
        samples, paths = sample_paths(config, score, state, lambda done, n: progress(f"sample {label}", done, n))
    with timed(run, f"hessians {label}"):
        hessians = np.asarray(path_hessians(score, state, jnp.asarray(paths)))  # waits: a call returns at once
    t = jnp.int32(config.field_timestep)
    field = jax.vmap(lambda x: score(state, x, t, None))(jnp.asarray(field_grid(config)))
    run.save(model, samples=samples, paths=paths, hessians=hessians, field=np.asarray(field))
    run.append({"key": model, "products": len(PATHS) * SCHEDULE.num_timesteps * 2})


def _symmetric(hessians: np.ndarray) -> np.ndarray:
    return (hessians.astype(np.float64) + hessians.astype(np.float64).swapaxes(-1, -2)) / 2


def is_memorized(config: Toy2dConfig, samples: np.ndarray) -> np.ndarray:
    """Whether a sample landed on the duplicated point: within ``landing_radius`` of it."""
    return np.linalg.norm(samples - np.asarray(config.point), axis=-1) <= config.landing_radius


def sample_paths(
    config: Toy2dConfig, score: Any, state: Any, on_step: Callable[[int, int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """All samples, and the whole paths of the first that is memorized and the first that is not: (2, T, 2) by timestep.

    Raises:
        ValueError: if all samples or none are memorized.
    """
    sampler = DDIM(SCHEDULE, SCHEDULE.num_timesteps)
    noise = jax.random.normal(jax.random.key(config.sampling_seed), (config.num_samples, 2))
    kept = {}
    for done, (t, x) in enumerate(sample_path(score, state, noise, sampler=sampler)):
        kept[t] = np.asarray(x)
        on_step(done, sampler.num_steps)
    samples = kept[-1]
    memorized = is_memorized(config, samples)
    if memorized.all() or not memorized.any():
        raise ValueError(
            f"{int(memorized.sum())} of {len(samples)} samples landed on the duplicated point: no pair of paths to"
            f" compare; train longer (`training.num_steps`), in a new folder"
        )
    chosen = [int(memorized.argmax()), int((~memorized).argmax())]
    return samples, np.stack([kept[t][chosen] for t in range(SCHEDULE.num_timesteps)], 1)


@partial(jax.jit, static_argnames="score")
def path_hessians(score: NetworkScore, state: Any, paths: Any) -> jax.Array:
    """The learned ∂s/∂x at every timestep of every path: (paths, T, 2, 2)."""

    def one(x: jax.Array, t: jax.Array) -> jax.Array:
        return score_jacobian(score, state, x, t).to_dense(x.shape[0])

    return jax.vmap(jax.vmap(one), (0, None))(paths, jnp.arange(paths.shape[1]))


def field_grid(config: Toy2dConfig) -> np.ndarray:
    """Where the score field is drawn: a grid over the training points with a margin, shape (k², 2)."""
    corners = np.array([config.mean, config.point])
    spread = 3.5 * np.sqrt(np.diag(config.covariance))
    low, high = (corners - spread).min(0), (corners + spread / 2).max(0)
    axes = [np.linspace(a, b, 26) for a, b in zip(low, high, strict=True)]
    return np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2).astype(np.float32)


def landscapes(config: Toy2dConfig) -> dict[str, np.ndarray]:
    """Figure 1 from the closed form: log p_t on a square of the same side in the Gaussian and around the point."""
    oracle, state, t = GaussianMixtureScore(SCHEDULE), population(config), config.landscape_timestep
    alpha = SCHEDULE.alpha[t]
    offsets = np.linspace(-1.5, 1.5, 61)
    arrays: dict[str, np.ndarray] = {"landscape_offsets": offsets, "landscape_timestep": np.asarray(t)}
    for name, point in zip(PATHS, (config.point, config.mean), strict=True):
        x, y = alpha * np.asarray(point)
        arrays[f"landscape_{name}"] = np.array(
            [[oracle.log_density(state, np.array([x + a, y + b]), t) for b in offsets] for a in offsets]
        )
    return arrays


def _errors(learned: np.ndarray, exact: np.ndarray, sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    gap = np.linalg.norm(learned.astype(np.float64) - exact, axis=(-1, -2))
    return gap / np.linalg.norm(exact, axis=(-1, -2)), sigma**2 * gap


def toy2d_metrics(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything in ``metrics.json`` but the seconds, from the arrays of ``spectra.npz`` alone."""
    sigma = arrays["sigma"]

    def table(values: np.ndarray) -> dict[str, dict[str, float]]:
        return {str(t): {path: float(values[i, t]) for i, path in enumerate(PATHS)} for t in range(values.shape[1])}

    def of_model(model: str) -> dict[str, Any]:
        hessians = arrays[f"{model}_hessians"]
        relative, absolute = _errors(hessians, arrays[f"{model}_closed_form"], sigma)
        to_empirical, _ = _errors(hessians, arrays[f"{model}_empirical"], sigma)
        first, last = MEDIAN_TIMESTEPS
        asymmetry = np.linalg.norm(hessians - hessians.swapaxes(-1, -2), axis=(-1, -2)) / np.linalg.norm(
            hessians, axis=(-1, -2)
        )
        return {
            "memorized_fraction": float(arrays[f"{model}_memorized_sample"].mean()),
            "hessian_rel_error": table(relative),
            "hessian_abs_error": table(absolute),
            "hessian_rel_error_median": float(np.median(relative[:, first : last + 1])),
            "empirical": {"hessian_rel_error": table(to_empirical)},
            "asymmetry_median": float(np.median(asymmetry)),
        }

    return of_model("second_order") | {
        "first_order": of_model("first_order"),
        "num_products": int(arrays["num_products"]),
    }
