"""What the stages of an audit share: the model's functions, the run they record in, and the points of a batch."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxmem import first_step
from jaxmem.audit.plan import Plan
from jaxmem.detectors import Detector
from jaxmem.model import Model
from jaxmem.runs.progress import Progress
from jaxmem.samplers import Sampler
from jaxmem.score import Score
from jaxmem.spectra.devices import each_point


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
    model: Model
    sampler: Sampler
    conditions: Any  #: of all prompts, the leading axis of each leaf; with pairs of scores the empty prompt's is last
    noise: np.ndarray  #: (noises, *shape), the same for every prompt
    texts: Sequence[str]
    seed: int
    mesh: Any
    progress: Progress
    detectors: tuple[Detector, ...] = ()  #: columns of the audit
    condition_of: np.ndarray | None = None  #: which of ``conditions`` each prompt has; None where it is its own

    @property
    def score(self) -> Score:
        return self.model.score

    def first(self, points: np.ndarray) -> np.ndarray:
        """Starting noises of points."""
        return self.noise[points % self.plan.noises]

    def cond(self, points: np.ndarray) -> Any:
        """Conditions of points."""
        prompts = points // self.plan.noises
        which = prompts if self.condition_of is None else self.condition_of[prompts]
        return jax.tree.map(lambda leaf: leaf[which], self.conditions)

    def cond_of(self, point: int) -> Any:
        """Condition of one point, without a leading axis."""
        return jax.tree.map(lambda leaf: leaf[0], self.cond(np.array([point])))

    def uncond(self, count: int) -> Any:
        """Condition of the empty prompt, repeated."""
        return jax.tree.map(lambda leaf: np.broadcast_to(leaf[-1:], (count, *leaf.shape[1:])), self.conditions)

    def scores(self, x: Any, t: int, cond: Any) -> Array:
        """The scores of one batch at one timestep, on all devices."""
        return evaluate(self.score, self.spread_state, *self.batch(x, t, cond), self.mesh)

    def batch(self, x: Any, t: int, cond: Any) -> tuple[Array, Array, Any]:
        """The arguments of one batch, each device with its share."""
        arrays = (jnp.asarray(x), jnp.full(self.plan.batch, t, jnp.int32), jax.tree.map(jnp.asarray, cond))
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
        """Share of the noise in the network's output, see `jaxmem.first_step`."""
        schedule = self.model.schedule
        return first_step.noise_share(self.model.prediction, scores, x, schedule.alpha[t], schedule.sigma[t])

    def check(self, values: Any, points: np.ndarray, t: int, what: str = "score") -> None:
        """Refuse values that are not finite, and name the prompt; the points are the leading axis of ``values``."""
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
        """Record the unit that the body computes and saves: first its row, to which the body may add, then its cost."""
        start = time.perf_counter()
        counted = {"evaluations": evaluations, "products": products}
        row: dict[str, Any] = {"key": key, **counted}
        yield row
        self.run.append(row)
        seconds = time.perf_counter() - start
        self.run.cost({"stage": stage, "key": key, **counted, "seconds": seconds, "bytes": memory})


def starting_noise(seed: int, noises: int, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the starting noises: noise j with ``fold_in(key(seed), j)``, the same for every prompt."""
    keys = [jax.random.fold_in(jax.random.key(seed), j) for j in range(noises)]
    return np.stack([np.asarray(jax.random.normal(key, shape, jnp.float32)) for key in keys])
