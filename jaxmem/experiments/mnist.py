"""The paper's section 5.2: a diffusion model that memorized one digit image and generalised over another digit.

Trains a class-conditional U-Net on many images of one digit and one image of another repeated, samples both classes
with DDIM, keeps the clearly new samples of the general class, and takes the whole spectrum of ∂s/∂x of every kept
sample along its sampling path. Writes a run (`jaxmem.runs.directory`): arrays, ``metrics.json`` and ``spectra.npz``.
"""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxmem.config import MnistConfig, TrainingConfig
from jaxmem.data.mnist import Digits, select_digits, to_pixels
from jaxmem.diffusion import NoiseSchedule
from jaxmem.experiments.mnist_analysis import mnist_metrics
from jaxmem.extras import require
from jaxmem.memorization.distances import calibrated_l2, nearest_training
from jaxmem.networks.parameters import load_parameters, save_parameters
from jaxmem.networks.unet import UNet
from jaxmem.prompts import Prompt
from jaxmem.runs.directory import Run
from jaxmem.runs.progress import Progress, silent
from jaxmem.runs.stages import save_losses, timed, wall_seconds
from jaxmem.samplers import DDIM
from jaxmem.sampling import sample
from jaxmem.score import NetworkScore, bind
from jaxmem.score_models import ClassConditional
from jaxmem.spectra.shared import record_spectra
from jaxmem.training import train

SCHEDULE = NoiseSchedule()  # DDPM linear, 1,000 steps: the paper's
CLASSES = ("general", "memorized")
_MODEL = "model.npz"  # the trained parameters, in the folder of the run


def score_network(config: MnistConfig) -> tuple[NetworkScore, Any]:
    """The untrained U-Net of a configuration, bound: ``(score, state)``."""
    module = UNet(
        features=config.features,
        num_blocks=config.num_blocks,
        embedding=config.embedding,
        schedule=SCHEDULE,
        rngs=nnx.Rngs(config.training.seed),
    )
    return bind(module, SCHEDULE, "eps")


def run_mnist(config: MnistConfig, out: Path, progress: Progress = silent) -> dict[str, Any]:
    """Run or resume the experiment in the folder ``out`` and return its metrics.

    Raises:
        ValueError: if ``out`` holds another run, or the data are missing or damaged; before any work.
        MissingExtra: packages of jaxmem[audit] are not installed; before any work.
    """
    require("audit", "the MNIST experiment")
    digits = select_digits(
        config.general_digit,
        config.memorized_digit,
        num_general=config.num_general_images,
        num_copies=config.num_copies,
        seed=config.data_seed,
        data_dir=config.data_dir,
    )
    score, state = score_network(config)
    # Where the data lie is no part of what was computed; what they are is.
    identity = {name: value for name, value in asdict(config).items() if name != "data_dir"}
    seeds = {"data": config.data_seed, "training": config.training.seed, "sampling": config.sampling_seed}
    run = Run.open(out, identity, experiment="mnist", seeds=seeds, data=digits.sha256, dtype="float32")
    if run.finished:
        return run.metrics()
    pixels, labels = to_pixels(digits.images), digits.labels.astype(np.int32)
    share, memorized = config.memorized_share, digits.memorized
    probabilities = np.where(memorized, share / memorized.sum(), (1 - share) / (~memorized).sum())

    with timed(run, "train"):
        result = train(
            score,
            state,
            (jnp.asarray(pixels), jnp.asarray(labels)),
            SCHEDULE,
            config.training,
            probabilities=jnp.asarray(probabilities, jnp.float32),
            folder=out / "checkpoints",
            progress=lambda _, step, total: progress("train", step, total),
        )
        save_losses(run, "losses", result.losses)
    state = result.state
    save_parameters(out / _MODEL, state)
    with timed(run, "sample"):
        sample_digits(config, run, score, state, progress)
    arrays = choose_samples(config, run, digits, progress)
    with timed(run, "spectra"):
        arrays |= analyse(config, run, score, state, arrays, progress)
    metrics = mnist_metrics(arrays)
    run.finalise(metrics | {"wall_seconds": wall_seconds(run)}, arrays)
    return run.metrics()


def load_model(folder: str | Path) -> ClassConditional:
    """The U-Net that a run of this experiment trained, as a model whose prompts are its two digits.

    The prompts that it brings with it have labels: one digit is memorized, of the other there were many images.

    Raises:
        ValueError: the folder holds no run of this experiment, or its training is not finished.
    """
    run = Run.read(folder)
    if run.manifest.get("experiment") != "mnist":
        raise ValueError(
            f"{run.directory}: expected a run of `jaxmem reproduce mnist`, whose network can be audited, got a run of"
            f" {run.manifest.get('experiment')!r}"
        )
    path = run.directory / _MODEL
    if not path.is_file():
        raise ValueError(
            f"{run.directory}: expected the trained network in {_MODEL}, got none; let `jaxmem reproduce mnist`"
            f" finish its training in this folder (runs of jaxmem 0.1 did not keep it: train in a new one)"
        )
    config = _config_of(run)
    score, like = score_network(config)
    return ClassConditional(
        score=score,
        state=load_parameters(path, like),
        schedule=SCHEDULE,
        shape=(28, 28, 1),
        classes={str(digit): digit for digit in (config.general_digit, config.memorized_digit)},
        prediction="eps",
        known=(
            Prompt(str(config.general_digit), False, CLASSES[0]),
            Prompt(str(config.memorized_digit), True, CLASSES[1]),
        ),
    )


def _config_of(run: Run) -> MnistConfig:
    """The configuration of a run, from what `dataclasses.asdict` and JSON made of it."""
    try:
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in run.manifest["config"].items()
        }
        return MnistConfig(**(values | {"training": TrainingConfig(**values["training"])}))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{run.directory}: expected the configuration of this version of jaxmem in manifest.json, got another one"
            f" ({error}); train again in a new folder"
        ) from None


def _batches(config: MnistConfig) -> Iterator[tuple[str, int, int, int]]:
    """Units of sampling, fixed by the configuration: (key, digit, first sample of its class, number)."""
    for name, digit, total in (
        ("general", config.general_digit, config.num_general_samples),
        ("memorized", config.memorized_digit, config.num_memorized_samples),
    ):
        for first in range(0, total, config.sample_batch):
            yield f"{name}-{first:05d}", digit, first, min(config.sample_batch, total - first)


def sample_digits(config: MnistConfig, run: Run, score: Any, state: Any, progress: Progress) -> None:
    """Sample every batch that the run does not have yet; keep x_0 and x_t at the analysed timesteps."""
    sampler = DDIM(SCHEDULE, config.num_ddim_steps, clip=config.clip)
    units = list(_batches(config))
    total = sum(number for *_, number in units)
    done = 0
    for key, digit, first, number in units:
        progress("sample", done, total)
        if not run.done(f"sample-{key}"):
            # The general and the memorized class start from the same noises: only the condition differs.
            noise_key = jax.random.fold_in(jax.random.key(config.sampling_seed), first)
            noise = jax.random.normal(noise_key, (config.sample_batch, 28, 28, 1))
            cond = jnp.full(config.sample_batch, digit, jnp.int32)
            samples, kept = sample(score, state, noise, cond, sampler=sampler, keep=config.timesteps)
            path = np.stack([np.asarray(kept[t])[:number] for t in config.timesteps], 1)
            run.save(f"sample-{key}", samples=np.asarray(samples)[:number, ..., 0], path=path)
            run.append({"key": f"sample-{key}", "digit": digit, "first": first, "number": number})
        done += number
        progress("sample", done, total)


def choose_samples(config: MnistConfig, run: Run, digits: Digits, progress: Progress) -> dict[str, np.ndarray]:
    """Measure every sample against the training set and choose the clearly new ones, and memorized ones, to analyse."""
    samples = np.concatenate([run.load(f"sample-{key}")["samples"] for key, *_ in _batches(config)])
    labels = np.concatenate([np.full(number, digit) for _, digit, _, number in _batches(config)])
    training = to_pixels(digits.images).reshape(len(digits.images), -1)
    flat = samples.reshape(len(samples), -1)
    # The copies are one image: the 50 nearest of a nine would all be the same one, and its calibrated distance 2.
    distinct = np.concatenate([training[~digits.memorized], training[digits.memorized][:1]])
    calibrated, index, distance = [], [], []
    for first in range(0, len(flat), config.sample_batch):
        group = jnp.asarray(flat[first : first + config.sample_batch])
        nearest = nearest_training(group, jnp.asarray(distinct))
        index.append(np.asarray(nearest.index))
        distance.append(np.asarray(nearest.distance))
        calibrated.append(np.asarray(calibrated_l2(group, jnp.asarray(distinct))))
        progress("compare with the training set", min(first + config.sample_batch, len(flat)), len(flat))
    calibrated_all, nearest_index = np.concatenate(calibrated), np.concatenate(index)
    memorized_sample = labels == config.memorized_digit
    new = np.flatnonzero(~memorized_sample & (calibrated_all >= config.new_threshold))[: config.num_analysed]
    copies = np.flatnonzero(memorized_sample)[: config.num_analysed]
    if len(new) < config.num_analysed:
        raise ValueError(
            f"only {len(new)} of {config.num_general_samples} samples of digit {config.general_digit} are clearly new"
            f" (calibrated distance at least {config.new_threshold}), {config.num_analysed} were asked for:"
            f" train longer, sample more (`num_general_samples`) or lower `new_threshold`, in a new folder"
        )
    analysed = np.concatenate([new, copies])
    return {
        "samples": samples,
        "sample_label": labels,
        "calibrated_l2": calibrated_all,
        "nearest_distance": np.concatenate(distance),
        "nearest_is_memorized": nearest_index == len(distinct) - 1,
        "nearest_image": distinct[nearest_index].reshape(-1, 28, 28),
        "training_memorized": distinct[-1].reshape(28, 28),
        "threshold": np.asarray(config.new_threshold),
        "analysed": analysed,
        "label": labels[analysed],
        "memorized": memorized_sample[analysed],
    }


def analyse(
    config: MnistConfig, run: Run, score: Any, state: Any, arrays: dict[str, np.ndarray], progress: Progress
) -> dict[str, np.ndarray]:
    """All 784 eigenvalues of every chosen sample at every timestep, one timestep after another."""
    paths = np.concatenate([run.load(f"sample-{key}")["path"] for key, *_ in _batches(config)])[arrays["analysed"]]
    count, steps = paths.shape[:2]
    found = record_spectra(
        run,
        score,
        state,
        paths.swapaxes(0, 1).reshape(-1, *paths.shape[2:]),
        np.repeat(np.asarray(config.timesteps), count),
        np.tile(arrays["label"].astype(np.int32), steps),
        unit=config.analysis_batch,
        batch=config.points,
        chunk=config.chunk,
        progress=progress,
    )

    def by_sample(values: np.ndarray) -> np.ndarray:
        return values.reshape(steps, count, *values.shape[1:]).swapaxes(0, 1)

    return {
        "eigenvalues": by_sample(found.eigenvalues).astype(np.float32),
        "asymmetry": by_sample(found.asymmetry),
        "noise": by_sample(found.noise),
        "timestep": np.asarray(config.timesteps),
        "sigma": SCHEDULE.sigma[list(config.timesteps)],
        "method": np.asarray("eigh"),
        "num_products": found.num_products.sum(),
    }
