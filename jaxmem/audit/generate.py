"""Images of a Stable Diffusion model as a run: one per prompt, resumable step by step."""

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.config import GenerateConfig
from jaxmem.first_step import noise_share
from jaxmem.runs.directory import Run
from jaxmem.runs.progress import Progress, Say, quiet, silent
from jaxmem.runs.stages import timed, wall_seconds
from jaxmem.samplers import DDIM
from jaxmem.sampling import sample_path
from jaxmem.score import GuidedScore
from jaxmem.stable_diffusion.pipeline import StableDiffusion


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
        out, asdict(config), experiment="generate", model=identity(model, config, with_images=True), dtype="float32"
    )
    if run.finished:
        return run.metrics()
    with timed(run, "sample"):
        latents = sample(model, config, run, config.ddim_steps, progress, say)
    with timed(run, "decode"):
        images = model.decode(jnp.asarray(latents))
    arrays = {"latents": latents, "images": images}
    metrics = {"prompts": list(config.prompt), "warnings": warnings_of(model, run), "num_products": 0}
    run.finalise(metrics | {"wall_seconds": wall_seconds(run)}, arrays)
    return run.metrics()


def identity(model: StableDiffusion, config: GenerateConfig, *, with_images: bool) -> dict[str, Any]:
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
                row["noise_share"] = share_of_noise(
                    model, _score_of_step(before, x, sampler.scales()[0]), before, sampler
                )
            run.append(row)
            if step == i == 0:
                say_contradiction(model, row["noise_share"], say)
            progress("sample", i * stop + step + 1, total)
        latents.append(x)
    return np.stack(latents)


def _score_of_step(x: np.ndarray, then: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The score that a DDIM step was made with: it is linear in the noise estimate."""
    alpha, sigma, next_alpha, next_sigma = scales
    x, then = np.asarray(x, np.float64), np.asarray(then, np.float64)
    eps = (then - next_alpha / alpha * x) / (next_sigma - next_alpha / alpha * sigma)
    return -eps / sigma


def share_of_noise(model: StableDiffusion, scores: Any, x: Any, sampler: DDIM) -> float | None:
    """See `jaxmem.first_step`; of guided scores, which is as good: guidance adds hardly any noise."""
    alpha, sigma = sampler.scales()[0, :2]
    return noise_share(model.scheduler.prediction, scores, x, alpha, sigma)


def say_contradiction(model: StableDiffusion, share: float | None, say: Say) -> None:
    warning = model.contradiction(share)
    if warning:
        say(f"warning: {warning}")


def warnings_of(model: StableDiffusion, run: Run) -> list[str]:
    """What may be wrong with the model as it was read: what its files gave rise to, what its first steps contradict."""
    shares = [row["noise_share"] for row in run.rows() if row.get("noise_share") is not None]
    found = model.contradiction(float(np.mean(shares)) if shares else None)
    return [*model.reading.warnings, *([found] if found else [])]
