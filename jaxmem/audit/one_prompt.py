"""Images of a Stable Diffusion model, and spectra of its score, as runs: resumable step by step."""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.config import GenerateConfig, SpectrumConfig
from jaxmem.first_step import noise_share
from jaxmem.jacobian import ScoreJacobian
from jaxmem.krylov import Factorization, Status, begin
from jaxmem.runs import memory
from jaxmem.runs.directory import Run
from jaxmem.runs.progress import Progress, Say, quiet, silent
from jaxmem.runs.stages import timed, wall_seconds
from jaxmem.sampling import DDIM, sample_path
from jaxmem.score import GuidedScore
from jaxmem.spectra.driver import Kept, drive
from jaxmem.spectra.programs import Programs, compile_programs, measure
from jaxmem.spectra.ritz import ritz_table, unstacked
from jaxmem.stable_diffusion.pipeline import StableDiffusion

KRYLOV = "krylov"  #: the folder, in that of the run, of factorisations that are under way


def run_generate(
    model: StableDiffusion,
    config: GenerateConfig,
    out: str | Path,
    progress: Progress = silent,
    say: Say = quiet,
) -> dict[str, Any]:
    """Generate one image per prompt and return the metrics; the images are in the run's ``images/`` folder.

    ``say`` gets a warning if the first step contradicts the prediction type.

    Raises:
        ValueError: the folder holds another run, or there is too little memory.
        OSError: the folder cannot be written.
    """
    run = Run.open(
        out, asdict(config), experiment="generate", model=_identity(model, config, with_images=True), dtype="float32"
    )
    if run.finished:
        return run.metrics()
    with timed(run, "sample"):
        latents = sample(model, config, run, config.ddim_steps, progress, say)
    with timed(run, "decode"):
        images = model.decode(jnp.asarray(latents))
    arrays = {"latents": latents, "images": images}
    metrics = {"prompts": list(config.prompt), "warnings": _warnings(model, run), "num_products": 0}
    run.finalise(metrics | {"wall_seconds": wall_seconds(run)}, arrays)
    return run.metrics()


def _identity(model: StableDiffusion, config: GenerateConfig, *, with_images: bool) -> dict[str, Any]:
    """Everything of the model that decides a run's results."""
    model.require_memory()
    # Not where it lies: a folder that was moved is the same model. The tokens stand for the tokenizer.
    tokens = model.tokenize([*config.prompt, config.negative_prompt])
    parts = ("unet", "text_encoder", "vae") if with_images else ("unet", "text_encoder")
    return (
        {
            "sha256": model.fingerprint(parts),
            "tokens_sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            "unet": asdict(model.unet_config),
            "text_encoder": asdict(model.text_encoder_config),
            "scheduler": asdict(model.scheduler),
        }
        | model.reading.decisions
        | ({"vae": asdict(model.vae_config)} if with_images else {})
    )


def starting_noise(model: StableDiffusion, config: GenerateConfig) -> jax.Array:
    """Image i starts from ``fold_in(key(seed), i)``, whatever the other prompts are."""
    keys = [jax.random.fold_in(jax.random.key(config.seed), i) for i in range(len(config.prompt))]
    return jnp.stack([jax.random.normal(key, model.shape, jnp.float32) for key in keys])


def sample(
    model: StableDiffusion,
    config: GenerateConfig,
    run: Run,
    stop: int,
    progress: Progress = silent,
    say: Say = quiet,
) -> np.ndarray:
    """The latents after ``stop`` steps of guided DDIM, one prompt after another; every step is kept."""
    noise = np.asarray(starting_noise(model, config))
    if stop == 0:
        return noise
    total = stop * len(config.prompt)
    score, sampler = GuidedScore(model.score, config.guidance), model.sampler(config.ddim_steps)
    embedded = model.embed([*config.prompt, config.negative_prompt])
    latents = []
    for i, x in enumerate(noise):
        keys = [f"sample-{i:03d}-{step:04d}" for step in range(1, stop + 1)]
        first = sum(run.done(key) for key in keys)
        if first:
            x = run.load(keys[first - 1])["x"]
        progress("sample", i * stop + first, total)
        cond = jnp.stack([embedded[i], embedded[-1]])[None]
        path = sample_path(score, model.state, jnp.asarray(x)[None], cond, sampler=sampler, first=first)
        next(path)  # where we are
        for step in range(first, stop):
            before, x = x, np.asarray(next(path)[1])[0]
            run.save(keys[step], x=x)
            row: dict[str, Any] = {"key": keys[step]}
            if step == 0:
                row["noise_share"] = _share(model, _score_of_step(before, x, sampler.scales()[0]), before, sampler)
            run.append(row)
            if step == i == 0:
                _say_first(model, row["noise_share"], say)
            progress("sample", i * stop + step + 1, total)
        latents.append(x)
    return np.stack(latents)


def _score_of_step(x: np.ndarray, then: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The score that a DDIM step was made with: it is linear in the noise estimate."""
    alpha, sigma, next_alpha, next_sigma = scales
    x, then = np.asarray(x, np.float64), np.asarray(then, np.float64)
    eps = (then - next_alpha / alpha * x) / (next_sigma - next_alpha / alpha * sigma)
    return -eps / sigma


def _share(model: StableDiffusion, scores: Any, x: Any, sampler: DDIM) -> float | None:
    """See `jaxmem.first_step`; of guided scores, which is as good: guidance adds hardly any noise."""
    alpha, sigma = sampler.scales()[0, :2]
    return noise_share(model.scheduler.prediction, scores, x, alpha, sigma)


def _say_first(model: StableDiffusion, share: float | None, say: Say) -> None:
    warning = model.contradiction(share)
    if warning:
        say(f"warning: {warning}")


def _warnings(model: StableDiffusion, run: Run) -> list[str]:
    """What may be wrong with the model as it was read: what its files gave rise to, what its first steps contradict."""
    shares = [row["noise_share"] for row in run.rows() if row.get("noise_share") is not None]
    found = model.contradiction(float(np.mean(shares)) if shares else None)
    return [*model.reading.warnings, *([found] if found else [])]


def run_spectrum(
    model: StableDiffusion,
    config: SpectrumConfig,
    out: str | Path,
    progress: Progress = silent,
    say: Say = quiet,
) -> dict[str, Any]:
    """Ritz values of the score's Jacobian at each prompt's x_t, and the metrics; see `SpectrumConfig`.

    ``say`` gets the memory that the run needs, before it starts, and a warning if the first step contradicts the
    prediction type.

    Raises:
        ValueError: the timestep is not visited, there are more steps than dimensions, the folder holds another run, or
            there is too little memory.
        OSError: the folder cannot be written.
    """
    visited = model.sampler(config.ddim_steps).timesteps.tolist()
    timestep = visited[0] if config.timestep is None else config.timestep
    if timestep not in visited:
        near = model.sampler(config.ddim_steps).nearest([timestep])[0]
        raise ValueError(
            f"timestep: expected one that {config.ddim_steps} DDIM steps visit ({visited[-1]} to {visited[0]} in steps"
            f" of {visited[-2] - visited[-1] if len(visited) > 1 else 0}), got {timestep}; the nearest is {near}"
        )
    size = int(np.prod(model.shape))
    if config.num_steps > size:
        raise ValueError(f"num_steps: expected 1 to {size} (the size of a latent), got {config.num_steps}")
    run = Run.open(
        out, asdict(config), experiment="spectrum", model=_identity(model, config, with_images=False), dtype="float32"
    )
    if run.finished:
        return run.metrics()
    points = [(i, kind) for i in range(len(config.prompt)) for kind in ("conditional", "unconditional")]
    if not config.unconditional:
        points = points[::2]
    programs = _compile(model, config, min(config.batch, len(points)), say)
    with timed(run, "sample"):
        latents = sample(model, config, run, visited.index(timestep), progress, say)
    with timed(run, "spectra"):
        arrays, num_products = _analyse(model, config, run, programs, latents, points, timestep, progress, say)
    arrays |= {"latents": latents, "timestep": np.full(len(points), timestep)}
    metrics = _summary(model, config, arrays, points, timestep)
    metrics["num_products"] = num_products
    metrics["warnings"] = _warnings(model, run)
    run.finalise(metrics | {"wall_seconds": wall_seconds(run)}, arrays)
    shutil.rmtree(run.directory / KRYLOV, ignore_errors=True)
    return run.metrics()


def _compile(model: StableDiffusion, config: SpectrumConfig, batch: int, say: Say) -> Programs:
    """Compile for one batch of points; say what it takes, and refuse what does not fit."""
    tokens = model.text_encoder_config.max_position_embeddings
    shapes = (
        jax.ShapeDtypeStruct((batch, *model.shape), jnp.float32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
        jax.ShapeDtypeStruct((batch, tokens, model.unet_config.cross_attention_dim), jnp.float32),
    )
    programs = compile_programs(model.score, model.state, *shapes, symmetric=config.method == "lanczos")
    basis = 3 * 4 * batch * (config.num_steps + 1) * int(np.prod(model.shape))  # old, new, and one in between
    needed = programs.peak_bytes + basis
    say(
        f"memory: {memory.gigabytes(programs.parameter_bytes)} of parameters are there;"
        f" {memory.gigabytes(programs.peak_bytes)} for linearisation and products of {batch} point(s) at once,"
        f" {memory.gigabytes(basis)} for the Krylov basis, of {memory.gigabytes(memory.available_bytes())} free"
    )
    memory.require(needed, "the spectrum", "take a smaller `batch` or `num_steps`, or another `method`")
    return programs


def _analyse(
    model: StableDiffusion,
    config: SpectrumConfig,
    run: Run,
    programs: Programs,
    latents: np.ndarray,
    points: list[tuple[int, str]],
    timestep: int,
    progress: Progress,
    say: Say,
) -> tuple[dict[str, np.ndarray], int]:
    """Ritz values at all points, batch by batch, with what is known of their error; and the products they took."""
    embedded = model.embed([*config.prompt, ""])
    symmetric = config.method == "lanczos"
    batch = min(config.batch, len(points))
    parts: list[dict[str, np.ndarray]] = []
    num_products = 0
    for number, first in enumerate(range(0, len(points), batch)):
        # The last batch is filled up by repeating a point, so that one program serves all.
        chosen = [points[min(i, len(points) - 1)] for i in range(first, first + batch)]
        keep = min(batch, len(points) - first)
        x = jnp.asarray(np.stack([latents[i] for i, _ in chosen]))
        cond = jnp.stack([embedded[i if kind == "conditional" else -1] for i, kind in chosen])
        keys = [jax.random.fold_in(jax.random.key(config.seed), 1000 + i) for i, _ in chosen]
        starts = jnp.stack([jax.random.normal(key, (latents[0].size,), jnp.float32) for key in keys])
        operators = programs.operators(model.state, x, jnp.full(batch, timestep, jnp.int32), cond)

        key = f"measure-{number:03d}"
        if not run.done(key):
            found = measure(programs, operators, starts)
            run.save(key, noise=found.noise, asymmetry=found.asymmetry)
            row: dict[str, Any] = {"key": key, "products": found.num_products * keep}
            sampler = model.sampler(config.ddim_steps)
            if timestep == sampler.timesteps[0]:  # nothing was sampled: x is the noise itself
                row["noise_share"] = _share(model, operators.value, x, sampler)
            run.append(row)
            if number == 0:
                _say_first(model, row.get("noise_share"), say)
        measured = run.load(key)
        noise, asymmetry = measured["noise"], measured["asymmetry"]

        def told(steps: int, first: int = first, keep: int = keep) -> None:
            progress("products", first * config.num_steps + steps * keep, len(points) * config.num_steps)

        images = [image for image, _ in chosen]
        path = run.directory / KRYLOV / f"{number:03d}.npz"
        factorizations = _factorise(config, programs, operators, starts, images, path, told)
        table = ritz_table(factorizations, noise, symmetric=symmetric)
        part = table._asdict() | {"asymmetry": asymmetry, "status": factorizations.status.astype(int)}
        if not symmetric:
            part["asymmetry"] = np.array([_asymmetry_seen(f) for f in unstacked(factorizations)])
        parts.append({name: array[:keep] for name, array in part.items()})
        per_step = 2 if symmetric else 1
        num_products += keep * ((3 if symmetric else 2) + per_step * int(factorizations.num_steps.max()))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays["eigenvalues"] = arrays.pop("values")
    return arrays, num_products


def _factorise(
    config: SpectrumConfig,
    programs: Programs,
    operators: ScoreJacobian,
    starts: jax.Array,
    images: list[int],
    path: Path,
    told: Callable[[int], None],
) -> Factorization:
    """The Krylov factorisations of one batch, kept in a file while they grow."""
    # The run knows the model and the point; the scores there stand for both, up to float32 rounding.
    scores = np.asarray(operators.value)
    options = dict(num_steps=config.num_steps, method=config.method)
    kept = Kept(path, scores, 1e-4 * float(np.linalg.norm(scores)), options)

    def on_step(f: Factorization) -> None:
        bad = np.flatnonzero(np.asarray(f.status) == Status.NONFINITE)
        if bad.size:
            raise ValueError(
                f"score: product {int(f.num_steps[bad[0]]) + 1} of image {images[bad[0]]} holds NaN or infinity;"
                f" check the weights and the timestep"
            )
        kept.save(f)
        told(int(np.max(f.num_steps)))

    there = kept.load()
    f = jax.vmap(partial(begin, max_steps=config.num_steps))(starts) if there is None else there[0]
    told(int(np.max(f.num_steps)))
    f = jax.device_get(drive(programs.step(operators), f, on_step))
    told(config.num_steps)  # also where all spaces closed early
    return f


def _asymmetry_seen(f: Factorization) -> float:
    """‖H - Hᵀ‖ / ‖H‖ of J on the Krylov space, the part of it that was seen."""
    steps = int(f.num_steps)
    projected = np.asarray(f.hessenberg[:steps, :steps], np.float64)
    norm = np.linalg.norm(projected)
    return float(np.linalg.norm(projected - projected.T) / norm) if norm > 0 else 0.0


def _summary(
    model: StableDiffusion,
    config: SpectrumConfig,
    arrays: dict[str, np.ndarray],
    points: list[tuple[int, str]],
    timestep: int,
) -> dict[str, Any]:
    sigma = float(model.scheduler.schedule.sigma[timestep])
    rows = []
    for i, (index, kind) in enumerate(points):
        values, residuals = arrays["eigenvalues"][i], arrays["residuals"][i]
        there = ~np.isnan(residuals)
        values, residuals = values.real[there], residuals[there]
        rows.append(
            {
                "prompt": config.prompt[index] if kind == "conditional" else "",
                "kind": kind,
                "image": index,
                "largest": values[:5],
                "largest_residuals": residuals[:5],
                "smallest": values[-5:],
                "smallest_residuals": residuals[-5:],
                "num_ritz_values": len(values),
                "num_positive_ritz_values": int((values > arrays["noise"][i]).sum()),
                "status": Status(int(arrays["status"][i])).name.lower(),
                "noise": arrays["noise"][i],
                "asymmetry": arrays["asymmetry"][i],
            }
        )
    return {
        "method": config.method,
        "timestep": timestep,
        "sigma": sigma,
        "lower_bound": -1 / sigma**2,
        "dimension": int(np.prod(model.shape)),
        # Lanczos: ‖Jv − Jᵀv‖ / ‖Jv‖ of one random v; Arnoldi: ‖H − Hᵀ‖ / ‖H‖ of J on the Krylov space
        "asymmetry_of": "one random vector" if config.method == "lanczos" else "the Krylov space",
        "points": rows,
    }
