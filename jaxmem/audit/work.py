"""What the stages of an audit share: the model's functions, the run they record in, and the points of a batch."""

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem.audit.plan import Plan
from jaxmem.runs.progress import Progress
from jaxmem.sampling import DDIM
from jaxmem.score import NetworkScore
from jaxmem.spectra.devices import each_point
from jaxmem.stable_diffusion import first_step
from jaxmem.stable_diffusion.pipeline import StableDiffusion


@partial(jax.jit, static_argnames=("score", "mesh"))
def evaluate(score: Any, state: Any, x: Any, t: Any, cond: Any, mesh: Any = None) -> Array:
    """The scores of a batch: the one program behind every evaluation of an audit."""
    with jax.default_matmul_precision("highest"):
        return each_point(score, mesh, state, x, t, cond)


@dataclass(frozen=True)
class Work:
    """A model, a plan and the run; arrays of prompts and noises stay on the host."""

    run: Any  #: a `Run`; None while only an estimate is made
    plan: Plan
    model: StableDiffusion
    sampler: DDIM
    embedded: np.ndarray  #: (prompts + 1, tokens, features); the last is the empty prompt's
    noise: np.ndarray  #: (noises, *latent), the same for every prompt
    texts: Sequence[str]
    seed: int
    mesh: Any
    progress: Progress

    @property
    def score(self) -> NetworkScore:
        return self.model.score

    def first(self, points: np.ndarray) -> np.ndarray:
        """x_T of points."""
        return self.noise[points % self.plan.noises]

    def cond(self, points: np.ndarray) -> np.ndarray:
        """The embeddings of the points' prompts."""
        return self.embedded[points // self.plan.noises]

    def uncond(self, count: int) -> np.ndarray:
        """The empty prompt's, for so many points."""
        return np.broadcast_to(self.embedded[-1:], (count, *self.embedded.shape[1:]))

    def scores(self, x: Any, t: int, cond: Any) -> Array:
        """The scores of one batch at one timestep, on all devices."""
        return evaluate(self.score, self.spread_state, *self.batch(x, t, cond), self.mesh)

    def batch(self, x: Any, t: int, cond: Any) -> tuple[Array, Array, Array]:
        """The arguments of one batch, each device with its share."""
        arrays = (jnp.asarray(x), jnp.full(self.plan.batch, t, jnp.int32), jnp.asarray(cond))
        if self.mesh is None:
            return arrays
        return jax.device_put(arrays, jax.NamedSharding(self.mesh, jax.P(self.mesh.axis_names)))

    @cached_property
    def spread_state(self) -> Any:
        """The parameters, on every device."""
        if self.mesh is None:
            return self.model.state
        return jax.device_put(self.model.state, jax.NamedSharding(self.mesh, jax.P()))

    def noise_share(self, scores: Any, x: Any, t: int) -> float | None:
        """See `jaxmem.stable_diffusion.first_step`."""
        scheduler = self.model.scheduler
        alpha, sigma = scheduler.schedule.alpha[t], scheduler.schedule.sigma[t]
        return first_step.noise_share(scheduler.prediction, scores, x, alpha, sigma)

    def check(self, values: Any, points: np.ndarray, t: int, what: str = "score") -> None:
        """Refuse numbers that are not finite, by the name of the prompt; a point is a leading index of ``values``."""
        bad = ~np.isfinite(np.asarray(values)).reshape(len(values), -1).all(1)
        if bad.any():
            prompt, noise = divmod(int(points[min(int(bad.argmax()), len(points) - 1)]), self.plan.noises)
            text = [*self.texts, ""][prompt]  # the empty prompt is last
            raise ValueError(
                f"score: NaN or infinity in the {what} at t = {t} for prompt {text!r:.60}, noise {noise};"
                f" check the weights of the model"
            )

    @contextmanager
    def unit(
        self, key: str, stage: str, evaluations: int = 0, products: int = 0, memory: int = 0
    ) -> Iterator[dict[str, Any]]:
        """Record a unit that the body computes and saves: its row, which it may add to, then what it cost."""
        start = time.perf_counter()
        counted = {"evaluations": evaluations, "products": products}
        row: dict[str, Any] = {"key": key, **counted}
        yield row
        self.run.append(row)
        seconds = time.perf_counter() - start
        self.run.cost({"stage": stage, "key": key, **counted, "seconds": seconds, "bytes": memory})


def starting_noise(seed: int, noises: int, shape: tuple[int, ...]) -> np.ndarray:
    """Noise j is drawn with ``fold_in(key(seed), j)``: every prompt starts from the same ones."""
    keys = [jax.random.fold_in(jax.random.key(seed), j) for j in range(noises)]
    return np.stack([np.asarray(jax.random.normal(key, shape, jnp.float32)) for key in keys])


def embed(model: StableDiffusion, texts: Sequence[str], batch: int = 16) -> np.ndarray:
    """Embeddings of texts, a few at a time by one program; what the tokenizer cuts is said elsewhere."""
    parts = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for first in range(0, len(texts), batch):
            part = list(texts[first : first + batch])
            filled = part + part[-1:] * (batch - len(part))
            parts.append(np.asarray(model.embed(filled))[: len(part)])
    return np.concatenate(parts)
