"""Spectra of a Stable Diffusion model's score at the x_t of prompts, as a run: resumable step by step."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.audit.generate import identity, sample, say_contradiction, share_of_noise, warnings_of
from jaxmem.config import SpectrumConfig
from jaxmem.jacobian import ScoreJacobian
from jaxmem.krylov import Factorization, Status, begin
from jaxmem.runs import memory
from jaxmem.runs.directory import Run
from jaxmem.runs.progress import Progress, Say, quiet, silent
from jaxmem.runs.stages import timed, wall_seconds
from jaxmem.spectra.driver import Kept, drive
from jaxmem.spectra.programs import Programs, compile_programs, measure
from jaxmem.spectra.ritz import ritz_table, unstacked
from jaxmem.stable_diffusion.pipeline import StableDiffusion

KRYLOV = "krylov"  #: the folder, in that of the run, of factorisations that are under way


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
        out, asdict(config), experiment="spectrum", model=identity(model, config, with_images=False), dtype="float32"
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
    metrics["warnings"] = warnings_of(model, run)
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
                row["noise_share"] = share_of_noise(model, operators.value, x, sampler)
            run.append(row)
            if number == 0:
                say_contradiction(model, row.get("noise_share"), say)
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
