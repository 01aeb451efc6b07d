"""Scores with closed forms: what every numerical method of the library is checked against, at any dimension.

Each oracle is a score by the contract (``score(state, x, t, cond)``, in JAX, at the precision of x) whose ``hessian``
and ``spectrum`` are written down independently, in NumPy at float64, from formulas rather than derivatives. Spectra
are descending. Points are flat vectors of length d. ``cond`` is ignored.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.fft
import scipy.special
from jaxtyping import Array, Float

from jaxmem.diffusion import Schedule


def _scales(schedule: Schedule, t: int) -> tuple[float, float]:
    schedule.check(t)
    return float(schedule.alpha[int(t)]), float(schedule.sigma[int(t)])


def _low_rank_spectrum(shift: float, columns: np.ndarray, core: np.ndarray) -> np.ndarray:
    """Descending eigenvalues of ``shift·I + U C Uᵀ`` (U is d × r) through the r × r problem of U's R factor."""
    size = columns.shape[0]
    triangle = np.asarray(np.linalg.qr(columns, mode="r"))
    few = np.linalg.eigvalsh(triangle @ core @ triangle.T) + shift
    return np.sort(np.concatenate([few, np.full(size - len(few), shift)]))[::-1]


def _weighted_mean(logits: Array, values: Array) -> Array:
    """``softmax(logits) @ values``, both taken relative to the heaviest component.

    Far from the data at small t, logits and component scores are so large that their float32 differences, and above
    all the derivatives of those, would be rounding; relative to the heaviest component they cancel exactly.
    """
    best = jnp.argmax(jax.lax.stop_gradient(logits))
    weights = jax.nn.softmax(logits - logits[best])
    return values[best] + jnp.matmul(weights, values - values[best][None, :], precision="highest")


class GaussianMixture(NamedTuple):
    """Data distribution ``sum_k w_k N(mean_k, variance_k I + F_k F_kᵀ)``; a point mass has variance 0 and F = 0."""

    log_weights: Float[Array, " k"]
    means: Float[Array, "k d"]
    factors: Float[Array, "k d r"]
    variances: Float[Array, " k"]


def gaussian(mean: Any, factor: Any, variance: float = 0.0) -> GaussianMixture:
    """One Gaussian N(mean, variance I + F Fᵀ), with F of shape (d, r): its own Cholesky factor, or a few directions."""
    mean, factor = jnp.asarray(mean), jnp.asarray(factor)
    dtype = jnp.promote_types(jnp.result_type(mean, factor), jnp.float32)  # whole numbers would round the variance
    mean, factor = mean.astype(dtype), factor.astype(dtype)
    return GaussianMixture(jnp.zeros(1, mean.dtype), mean[None], factor[None], jnp.full(1, variance, mean.dtype))


@dataclass(frozen=True)
class GaussianMixtureScore:
    """The score of a noised Gaussian mixture.

    With ``C_k = (alpha² variance_k + sigma²) I + alpha² F_k F_kᵀ`` and responsibilities w_k(x):
    ``s = sum_k w_k s_k`` with ``s_k = -C_k⁻¹ (x - alpha mean_k)``, and
    ``H = sum_k w_k (-C_k⁻¹ + s_k s_kᵀ) - s sᵀ``.
    """

    schedule: Schedule

    def __call__(self, state: GaussianMixture, x: Float[Array, " d"], t: Any, cond: Any = None) -> Float[Array, " d"]:
        alpha, sigma = self.schedule.at(t, x.dtype)

        def component(log_weight: Array, mean: Array, factor: Array, variance: Array) -> tuple[Array, Array]:
            spherical = alpha**2 * variance + sigma**2
            offset = x - alpha * mean
            size, rank = factor.shape
            if rank >= size:
                covariance = spherical * jnp.eye(size, dtype=x.dtype) + alpha**2 * jnp.matmul(
                    factor, factor.T, precision="highest"
                )
                cholesky = jnp.linalg.cholesky(covariance)
                score = -jax.scipy.linalg.cho_solve((cholesky, True), offset)
                log_det = 2 * jnp.sum(jnp.log(jnp.diagonal(cholesky)))
            else:  # Woodbury: nothing of size d × d
                inner = spherical * jnp.eye(rank, dtype=x.dtype) + alpha**2 * jnp.matmul(
                    factor.T, factor, precision="highest"
                )
                cholesky = jnp.linalg.cholesky(inner)
                projected = jnp.matmul(factor.T, offset, precision="highest")
                solved = jax.scipy.linalg.cho_solve((cholesky, True), projected)
                score = -(offset - alpha**2 * jnp.matmul(factor, solved, precision="highest")) / spherical
                log_det = (size - rank) * jnp.log(spherical) + 2 * jnp.sum(jnp.log(jnp.diagonal(cholesky)))
            return log_weight - 0.5 * log_det + 0.5 * jnp.dot(offset, score, precision="highest"), score

        logits, scores = jax.vmap(component)(*state)
        return _weighted_mean(logits, scores)

    def _components(self, state: GaussianMixture, x: Any, t: int) -> tuple[np.ndarray, ...]:
        """Log responsibilities up to a constant, scores (k, d), spherical variances (k), low-rank cores (k, r, r)."""
        alpha, sigma = _scales(self.schedule, t)
        log_weights, means, factors, variances = (np.asarray(part, np.float64) for part in state)
        x, rank = np.asarray(x, np.float64), factors.shape[2]
        spherical = alpha**2 * variances + sigma**2
        gram = alpha**2 * np.einsum("kdr,kds->krs", factors, factors)
        # Woodbury: C⁻¹ = (I - F core Fᵀ) / spherical.
        cores = alpha**2 * np.linalg.inv(gram + spherical[:, None, None] * np.eye(rank))
        offsets = x - alpha * means
        projected = np.einsum("kdr,kd->kr", factors, offsets)
        scores = -(offsets - np.einsum("kdr,krs,ks->kd", factors, cores, projected)) / spherical[:, None]
        log_det = (
            len(x) * np.log(spherical) + np.linalg.slogdet(np.eye(rank) + gram / spherical[:, None, None]).logabsdet
        )
        logits = log_weights - 0.5 * log_det + 0.5 * np.einsum("kd,kd->k", offsets, scores)
        return logits, scores, spherical, cores

    def log_density(self, state: GaussianMixture, x: Any, t: int) -> float:
        """The log density ``log p_t(x)``, float64; the weights are taken as they are (normalise them)."""
        logits = self._components(state, x, t)[0]
        return float(scipy.special.logsumexp(logits) - 0.5 * np.shape(x)[0] * np.log(2 * np.pi))

    def hessian(self, state: GaussianMixture, x: Any, t: int) -> np.ndarray:
        """H at a point, float64, shape (d, d)."""
        logits, scores, spherical, cores = self._components(state, x, t)
        weights = scipy.special.softmax(logits)
        factors = np.asarray(state.factors, np.float64)
        mean_score = weights @ scores
        low_rank = np.einsum("k,kdr,krs,kes->de", weights / spherical, factors, cores, factors)
        outer = np.einsum("k,kd,ke->de", weights, scores, scores) - np.outer(mean_score, mean_score)
        return -np.sum(weights / spherical) * np.eye(len(mean_score)) + low_rank + outer

    def spectrum(self, state: GaussianMixture, x: Any, t: int) -> np.ndarray:
        """Descending eigenvalues at a point, through a problem of size k (r + 1) where that is below d."""
        size, rank, count = np.shape(x)[0], state.factors.shape[2], len(state.log_weights)
        if count * (rank + 1) >= size:
            return np.linalg.eigvalsh(self.hessian(state, x, t))[::-1]
        logits, scores, spherical, cores = self._components(state, x, t)
        weights = scipy.special.softmax(logits)
        factors = np.asarray(state.factors, np.float64)
        columns = np.concatenate([*factors, (scores - weights @ scores).T], axis=1)
        core = np.zeros((columns.shape[1],) * 2)
        for k in range(count):
            block = slice(k * rank, (k + 1) * rank)
            core[block, block] = cores[k] * weights[k] / spherical[k]
        core[count * rank :, count * rank :] = np.diag(weights)
        return _low_rank_spectrum(-np.sum(weights / spherical), columns, core)


@dataclass(frozen=True)
class EmpiricalScore:
    """The score of the noised training set itself: a perfectly memorizing model. The state is the data, shape (N, d).

    With ``w = softmax(-‖x - alpha x_i‖² / 2 sigma²)``: ``s = (alpha sum w_i x_i - x) / sigma²`` and
    ``H = -I / sigma² + (alpha² / sigma⁴) Cov_w(x_i)``, so no eigenvalue is below ``-1/sigma²``.
    """

    schedule: Schedule

    def __call__(
        self, state: Float[Array, "n d"], x: Float[Array, " d"], t: Any, cond: Any = None
    ) -> Float[Array, " d"]:
        alpha, sigma = self.schedule.at(t, x.dtype)
        logits = -jnp.sum((x[None, :] - alpha * state) ** 2, axis=1) / (2 * sigma**2)
        return (alpha * _weighted_mean(logits, state) - x) / sigma**2

    def _weights(self, state: Any, x: Any, t: int) -> tuple[np.ndarray, np.ndarray]:
        alpha, sigma = _scales(self.schedule, t)
        data = np.asarray(state, np.float64)
        if np.shape(x) != data.shape[1:]:
            raise ValueError(f"x: expected shape {data.shape[1:]}, as the data {data.shape} have, got {np.shape(x)}")
        logits = -np.sum((np.asarray(x, np.float64) - alpha * data) ** 2, axis=1) / (2 * sigma**2)
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        return weights, data - weights @ data

    def hessian(self, state: Any, x: Any, t: int) -> np.ndarray:
        """H at a point, float64, shape (d, d)."""
        alpha, sigma = _scales(self.schedule, t)
        weights, centred = self._weights(state, x, t)
        covariance = (centred * weights[:, None]).T @ centred
        return (alpha**2 / sigma**4) * covariance - np.eye(centred.shape[1]) / sigma**2

    def spectrum(self, state: Any, x: Any, t: int) -> np.ndarray:
        """Descending eigenvalues at a point, through the N × N Gram matrix where N is below d."""
        alpha, sigma = _scales(self.schedule, t)
        weights, centred = self._weights(state, x, t)
        half = centred * np.sqrt(weights)[:, None]
        count, size = half.shape
        variances = np.linalg.eigvalsh(half @ half.T if count < size else half.T @ half)
        variances = np.concatenate([np.maximum(variances, 0), np.zeros(size - len(variances))])
        return np.sort(variances * (alpha**2 / sigma**4) - 1 / sigma**2)[::-1]


class Separable(NamedTuple):
    """Independent two-point coordinates ±amplitude_i in a rotated basis: y = DCT(signs · x)."""

    amplitudes: Float[Array, " d"]
    signs: Float[Array, " d"]


@dataclass(frozen=True)
class SeparableScore:
    """Independent mixtures ½δ(m_i) + ½δ(-m_i) per coordinate of ``y = DCT(signs · x)``: any spectrum, at any size.

    ``s_i = (alpha m_i tanh(alpha m_i y_i / sigma²) - y_i) / sigma²`` and
    ``h_i = -1/sigma² + (alpha² m_i² / sigma⁴) sech²(alpha m_i y_i / sigma²)``; at y_i = 0 the sign of h_i is that of
    ``alpha m_i - sigma``. The rotation makes the Jacobian dense and goes through real derivatives.
    """

    schedule: Schedule

    def __call__(self, state: Separable, x: Float[Array, " d"], t: Any, cond: Any = None) -> Float[Array, " d"]:
        alpha, sigma = self.schedule.at(t, x.dtype)
        y = jax.scipy.fft.dct(state.signs * x, norm="ortho")
        pull = alpha * state.amplitudes / sigma**2
        rotated = pull * jnp.tanh(pull * y) - y / sigma**2
        return state.signs * jax.scipy.fft.idct(rotated, norm="ortho")

    def _rotated_curvature(self, state: Separable, x: Any, t: int) -> np.ndarray:
        alpha, sigma = _scales(self.schedule, t)
        amplitudes, signs = (np.asarray(part, np.float64) for part in state)
        y = scipy.fft.dct(signs * np.asarray(x, np.float64), norm="ortho")
        pull = alpha * amplitudes / sigma**2
        # sech² written with exponentials of a negative argument: no overflow far from the ridge.
        decay = np.exp(-2 * np.abs(pull * y))
        return -1 / sigma**2 + pull**2 * 4 * decay / (1 + decay) ** 2

    def hessian(self, state: Separable, x: Any, t: int) -> np.ndarray:
        """H at a point, float64, shape (d, d)."""
        signs = np.asarray(state.signs, np.float64)
        rotation = scipy.fft.dct(np.diag(signs), norm="ortho", axis=0)
        return rotation.T @ (self._rotated_curvature(state, x, t)[:, None] * rotation)

    def spectrum(self, state: Separable, x: Any, t: int) -> np.ndarray:
        """Descending eigenvalues at a point: the curvatures h_i themselves."""
        return np.sort(self._rotated_curvature(state, x, t))[::-1]
