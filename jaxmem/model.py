"""A diffusion model as an audit sees it: conditions of prompts, a score, a sampler, a way from x_0 to pictures.

`Model` is what `jaxmem.audit` needs and no more; `jaxmem.StableDiffusion` is one, `ClassConditional` and
`Unconditional` (`jaxmem.score_models`) make one of a score that is there. `Model` has the example of one written from
nothing.
"""

import hashlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxmem import first_step
from jaxmem.diffusion import FlowSchedule, NoiseSchedule, Prediction, Schedule
from jaxmem.jacobian import ScoreJacobian, score_jacobian
from jaxmem.pictures import from_pictures, to_pictures
from jaxmem.prompts import Prompt
from jaxmem.runs.functions import captured, name_of
from jaxmem.samplers import DDIM, FlowEuler, Sampler, nearest
from jaxmem.sampling import sample_path
from jaxmem.score import Score, with_guidance

Condition = Literal["prompt", "class", "none"]
_absent = object()


class Model(ABC):
    """A diffusion model that can be audited: subclass it, give the attributes and `conditions`.

    Attributes, or properties, that a subclass has to give:

    - ``score``: a hashable function ``(state, x, t, cond) -> ∇ log p_t(x | cond)`` of one example (`jaxmem.score`);
    - ``state``: its parameters, a pytree of arrays;
    - ``schedule``: the `jaxmem.NoiseSchedule` that it was trained with, or `jaxmem.FlowSchedule` for rectified flow;
    - ``shape``: shape of one x, for instance ``(28, 28, 1)``.

    What it may give:

    - ``has_pairs`` (False): ``conditions([""])`` is the absence of a prompt, so that each point has a pair of scores,
      s(x, t, c) and s(x, t). Guidance, and the detectors that compare the two (Wen, Jeon, score evolution, anisotropy),
      need it; without it an audit leaves them out and says so;
    - ``guidance`` (1): scale of classifier-free guidance that an audit takes by default; 1 is none;
    - ``condition`` ("prompt"): what its prompts are, in the words of the report: prompts, classes, or none at all;
    - ``prediction`` ("score"): what the network puts out. Unless it is ``"score"``, the first sampling step
      is checked against it (`jaxmem.first_step`);
    - ``warnings``: what may be wrong with the model as it was read, for the report.

    The methods other than `conditions` have defaults. A whole example, of two kinds of pictures whose score has a
    closed form: one picture again and again, and pictures that vary; without a prompt, either::

        import jax.numpy as jnp
        import jaxmem as jm
        from jaxmem.oracles import GaussianMixture, GaussianMixtureScore

        exact = GaussianMixtureScore(jm.NoiseSchedule())

        def score(state, x, t, cond):  # of one picture; cond has the log weights of the two kinds
            return exact(state._replace(log_weights=cond), x.ravel(), t).reshape(x.shape)

        class TwoKinds(jm.Model):
            schedule, score = exact.schedule, staticmethod(score)
            shape, condition, has_pairs = (4, 4, 1), "class", True
            means, variances = jnp.outer(jnp.array([0.5, -0.5]), jnp.ones(16)), jnp.array([0.0, 0.1])
            state = GaussianMixture(jnp.zeros(2), means, jnp.zeros((2, 16, 1)), variances)
            log_weights = {"copied": (0.0, -99.0), "varied": (-99.0, 0.0), "": (0.0, 0.0)}

            def conditions(self, prompts):
                if unknown := set(prompts) - self.log_weights.keys():
                    raise ValueError(f"prompts: expected copied, varied or none, got {unknown}")
                return jnp.array([self.log_weights[prompt] for prompt in prompts])

        config = jm.AuditConfig(noises=2, ddim_steps=20, timesteps=(50,))
        found = jm.audit(TwoKinds(), ["copied", "varied"], config, folder="runs/two-kinds")
        print(found["tangent-count@t50"].scores)  # directions that are free: none of the copy, all 16 of the others
    """

    score: Score
    state: Any
    schedule: Schedule
    shape: tuple[int, ...]
    has_pairs: bool = False
    guidance: float = 1.0
    condition: Condition = "prompt"
    prediction: Prediction = "score"
    warnings: Sequence[str] = ()

    @abstractmethod
    def conditions(self, prompts: Sequence[str]) -> Any:
        """Conditions of n prompts: a pytree whose leaves have n as leading axis, or None if the score takes none.

        Raises:
            ValueError: a prompt that the model does not know.
        """

    def prompts(self) -> list[Prompt]:
        """Prompts that the model brings with it, audited when no others are given."""
        return []

    def sampler(self, num_steps: int = 50) -> Sampler:
        """The sampler whose timesteps an audit visits: by default DDIM, or FlowEuler of a `jaxmem.FlowSchedule`.

        An audit needs one that evaluates the score once in each step, at the x and t of this step, and draws no noise.
        """
        if isinstance(self.schedule, NoiseSchedule):
            return DDIM(self.schedule, num_steps)
        if isinstance(self.schedule, FlowSchedule):
            return FlowEuler.spaced(num_steps)
        raise ValueError(
            f"model: expected a method `sampler` of a model with a schedule of its own, got"
            f" {type(self.schedule).__name__} and none"
        )

    def decode(self, x: Float[Array, " n *shape"]) -> np.ndarray:
        """Pictures of clean samples x_0, uint8, shape (n, height, width, 3); see `to_pictures` for the default."""
        return to_pictures(x)

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures that `decode` gives and `encode` takes; by default those of x."""
        if len(self.shape) < 2:
            raise ValueError(
                f"model: expected samples of rows and columns, got shape {self.shape}; give a `picture_size`"
            )
        return self.shape[0], self.shape[1]

    def encode(self, images: np.ndarray) -> Float[Array, " n *shape"]:
        """Clean samples x_0 of pictures, uint8, shape (n, height, width, 3); see `from_pictures` for the default.

        An audit of training images needs it (`jaxmem.audit`, ``training``).
        """
        return jnp.asarray(from_pictures(images, self.shape))

    def identity(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Everything of the model that decides an audit's numbers for these prompts, as plain values for the manifest.

        A run continues only with a model of equal identity. By default: the SHA-256 of parameters and of conditions,
        that of no prompt with them where there are pairs; the names of the score, `decode` and `encode`, and the
        SHA-256 of what they carry in closures and defaults; schedule, shape and prediction. The code of a function and
        globals that it reads are not in it: a model that changes there needs another name, or an identity of its own.
        """
        return {
            "score": name_of(self.score),
            "score_sha256": captured(self.score),
            "decode": name_of(self.decode),
            "decode_sha256": captured(self.decode),
            "encode": name_of(self.encode),
            "encode_sha256": captured(self.encode),
            "sha256": fingerprint(self.state),
            "conditions_sha256": fingerprint(self.conditions([*prompts, ""] if self.has_pairs else prompts)),
            "schedule": asdict(self.schedule),  # type: ignore[call-overload]  # a dataclass, as `Schedule` asks
            "shape": list(self.shape),
            "prediction": self.prediction,
            "condition": self.condition,
        }

    def check(self) -> None:
        """Refuse a model whose numbers would be of nothing; called before any work.

        Raises:
            ValueError: parameters that are not finite, or, where they are still to be read, do not fit into memory.
        """
        require_finite((jax.tree_util.keystr(path), leaf) for path, leaf in _leaves(self.state))

    def truncated(self, prompts: Sequence[str]) -> list[bool]:
        """Which prompts the model reads only the beginning of."""
        return [False] * len(prompts)

    def token_rows(self, prompt: str) -> list[slice] | None:  # noqa: ARG002
        """Which rows of the prompt's condition each of its words has; None where conditions are not of tokens."""
        return None

    def contradiction(self, share: float | None) -> str | None:
        """What to tell the user if the first step contradicts ``prediction``; see `jaxmem.first_step`."""
        return first_step.contradiction(self.prediction, share)

    def path(
        self,
        noise: Float[Array, " n *shape"],
        prompts: Sequence[str],
        *,
        guidance: float | None = None,
        num_steps: int = 50,
    ) -> Iterator[tuple[int, Float[Array, " n *shape"]]]:
        """Yield ``(t, x_t)`` of sampling before each step, and ``(-1, x_0)`` at the end.

        The score is ``s(x, t) + guidance (s(x, t, c) - s(x, t))``; without a scale it is that of the model.

        Raises:
            ValueError: guidance of a model that has no pairs of scores.
        """
        scale = self.guidance if guidance is None else guidance
        check_guidance(self, scale)
        if scale == 1:
            score, cond = self.score, self.conditions(prompts)
        else:
            every = self.conditions([*prompts, ""])
            given, absent = (jax.tree.map(lambda leaf, part=part: leaf[part], every) for part in (slice(-1), -1))
            score, cond = with_guidance(self.score, given, scale, absent)
        return sample_path(score, self.state, noise, cond, sampler=self.sampler(num_steps))

    def sample(
        self,
        prompts: Sequence[str],
        *,
        key: Any,
        until: int | None = None,
        guidance: float | None = None,
        num_steps: int = 50,
    ) -> Float[Array, " n *shape"]:
        """One sample per prompt: x_0, or x_t at the timestep ``until``; `decode` makes pictures of x_0.

        Args:
            prompts: n prompts.
            key: random key; sample i starts from standard normal noise of ``fold_in(key, i)``.
            until: a timestep that the steps visit; sampling ends before the step from it.
            guidance: scale of classifier-free guidance, by default the model's.
            num_steps: sampling steps.

        Raises:
            ValueError: a timestep that is not visited, or guidance of a model that has no pairs of scores.
        """
        sampler = self.sampler(num_steps)
        if until is not None and until not in sampler.timesteps:
            raise ValueError(
                f"until: expected a timestep that {num_steps} steps visit, got {until}; the nearest is"
                f" {nearest(sampler.timesteps, [until])[0]}"
            )
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts: expected a list of at least one text, got {prompts!r}; write [prompt]")
        keys = [jax.random.fold_in(key, i) for i in range(len(prompts))]
        noise = jnp.stack([jax.random.normal(one, self.shape, jnp.float32) for one in keys])
        end = -1 if until is None else until
        return next(x for t, x in self.path(noise, prompts, guidance=guidance, num_steps=num_steps) if t == end)

    def hessian(self, x: Float[Array, "*shape"], t: int, prompt: str | None = None) -> ScoreJacobian:
        """``∇² log p_t(x | prompt)`` at one point, as an operator for `jaxmem.spectrum` and the like.

        Without a prompt it is ``∇² log p_t(x)``. It is the Jacobian of the learned score, symmetric only as far as the
        network is: see `jaxmem.score_jacobian`.

        Raises:
            ValueError: x of another shape, a timestep outside the schedule, or no prompt for a model that needs one.
        """
        if jnp.shape(x) != tuple(self.shape):
            raise ValueError(f"x: expected one point of shape {tuple(self.shape)}, got {jnp.shape(x)}")
        self.schedule.check(t)
        cond = jax.tree.map(lambda leaf: jnp.asarray(leaf)[0], self.conditions(["" if prompt is None else prompt]))
        return score_jacobian(self.score, self.state, x, t, cond)


def require_attributes(model: Model) -> None:
    """Refuse a model that lacks what a subclass has to give; properties are not computed."""
    needed = ("score", "state", "schedule", "shape")
    missing = [name for name in needed if inspect.getattr_static(model, name, _absent) is _absent]
    if missing:
        raise ValueError(
            f"model: expected the attributes {', '.join(needed)}, got a {type(model).__name__} without"
            f" {', '.join(missing)}; see jaxmem.Model"
        )


def check_guidance(model: Model, scale: float) -> None:
    """Refuse guidance where there is nothing to lead away from."""
    if scale != 1 and not model.has_pairs:
        raise ValueError(
            f"guidance: expected 1, which is none, for a model without an unconditional score, got {scale:g};"
            f" leave it out"
        )


def fingerprint(tree: Any) -> str:
    """SHA-256 of the names, shapes, types and values of all arrays of a pytree."""
    digest = hashlib.sha256()
    for path, leaf in _leaves(tree):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)}{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def require_finite(parameters: Iterable[tuple[str, Any]]) -> None:
    """Raise a ValueError that names the parameters which hold NaN or infinity."""
    counts = [(name, int((~np.isfinite(np.asarray(array))).sum())) for name, array in parameters]
    bad = [f"{name} ({count:,} entries)" for name, count in counts if count]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ValueError(
            f"model: expected finite parameters, got NaN or infinity in {'; '.join(bad[:3])}{more}; download the"
            f" weights again or take another checkpoint"
        )


def _leaves(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree)[0]
