"""What an audit found, read from its run, finished or not."""

from typing import Any, NamedTuple

import numpy as np

from jaxmem.audit.plan import Plan
from jaxmem.audit.scores import Raw, costs, count_intervals, detector_scores
from jaxmem.memorization.registry import AuditMethod, Detector
from jaxmem.prompts import Prompt
from jaxmem.runs.directory import Run

FIRST_STEP = "first-step"  #: key of the row with what the first step says of the model


class Directions(NamedTuple):
    """Top eigenvectors of the most and the least memorized point, as pictures."""

    point: np.ndarray  #: (2, 2) (prompt, noise): the most memorized, the least memorized
    timestep: int
    eigenvalues: np.ndarray  #: (2, k)
    base: np.ndarray  #: (2, h, w, 3) uint8: the decoded posterior mean of x_0 at x_t
    moved: np.ndarray  #: (2, k, 2, h, w, 3) uint8: the same after moving x_t by −a v and by +a v
    amplitude: float  #: a


class AuditResult(NamedTuple):
    """N prompts, M noises, S sampling steps, K timesteps of spectra, L eigenvalues, D detectors; NaN where not done."""

    prompts: list[Prompt]  #: N
    detectors: tuple[Detector, ...]  #: D, those that ran
    scores: np.ndarray  #: (N, M, D) float64; ``Detector.memorized_is`` says which end is memorized
    timesteps: np.ndarray  #: (S,) visited, descending
    sigma: np.ndarray  #: (S,)
    eps_difference: np.ndarray  #: (N, M, S) ‖eps_c − eps_u‖
    spectral_timesteps: np.ndarray  #: (K,) descending, among ``timesteps``
    eigenvalues: np.ndarray  #: (N, M, K, L) descending: all of the symmetric part, or Ritz values; L = 0 for "none"
    noise: np.ndarray  #: (N, M, K) what rounding can have moved an eigenvalue by, measured
    method: AuditMethod
    images: np.ndarray | None  #: (N, M, h, w, 3) uint8, zeros where ``sampled`` is False; None if there is not one
    sampled: np.ndarray  #: (N, M) bool: the image is there
    directions: Directions | None
    costs: list[dict[str, Any]]  #: of each detector: evaluations, products, seconds, bytes; see `jaxmem.audit.scores`
    metrics: dict[str, Any] | None  #: of a finished run
    manifest: dict[str, Any]
    reference: list[Prompt]  #: R, which ranks are compared with
    reference_scores: np.ndarray  #: (R, M, D)
    intervals: dict[str, np.ndarray]  #: (N, M, 2) 95 % intervals of counts that were estimated, by their detector
    warnings: tuple[str, ...] = ()  #: what may be wrong with the model as it was read, see `read_warnings`

    @property
    def spectral_sigma(self) -> np.ndarray:
        """(K,) the standard deviation of the noise at the timesteps of spectra."""
        return self.sigma[np.searchsorted(-self.timesteps, -self.spectral_timesteps)]


def read_audit(run: Run) -> AuditResult:
    """The results of an audit's run, also of one that is not finished.

    Images are read as a whole: 0.8 MB per point of Stable Diffusion.

    Raises:
        ValueError: it is another experiment's run, or a file of it is damaged.
    """
    if run.manifest.get("experiment") != "audit":
        raise ValueError(
            f"{run.directory}: expected the run of an audit, got {run.manifest.get('experiment')!r} as the experiment"
            f" of its manifest"
        )
    plan = Plan.from_manifest(run.manifest.get("plan") or {})
    prompts = _prompts(run, plan)
    raw = _read_raw(run, plan)
    detectors, scores = detector_scores(plan, raw)
    n, m = plan.num_prompts, plan.noises

    def audited(array: np.ndarray) -> np.ndarray:
        return array.reshape(n + plan.num_reference, m, *array.shape[1:])[:n]

    return AuditResult(
        prompts=prompts[:n],
        detectors=detectors,
        scores=scores[:n],
        timesteps=np.array(plan.timesteps),
        sigma=np.array(plan.sigma),
        eps_difference=audited(raw.eps_difference),
        spectral_timesteps=np.array(plan.spectral_timesteps, int),
        eigenvalues=audited(raw.eigenvalues),
        noise=audited(raw.noise),
        method=plan.method,
        images=None if raw.images is None else audited(raw.images),
        sampled=audited(raw.sampled),
        directions=_directions(run),
        costs=costs(plan, run, detectors, scores),
        metrics=run.metrics() if run.finished else None,
        manifest=run.manifest,
        reference=prompts[n:],
        reference_scores=scores[n:],
        intervals={name: audited(ends) for name, ends in count_intervals(plan, raw).items()},
        warnings=read_warnings(run),
    )


def read_warnings(run: Run) -> tuple[str, ...]:
    """What may be wrong with an audited model: what its files gave rise to, then what its first step contradicts."""
    row = next((row for row in run.rows() if row["key"] == FIRST_STEP), {})
    return tuple(row.get("warnings", ()))


def _prompts(run: Run, plan: Plan) -> list[Prompt]:
    """The audited prompts, then those of the reference."""
    try:
        rows = run.manifest["config"]["prompts"]
        prompts = [Prompt(row["prompt"], row["label"], row["category"]) for row in rows]
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{run.directory}: expected prompts with label and category in the config of manifest.json, got none"
            f" ({type(error).__name__}: {error}); restore it, or run the audit again in a new folder"
        ) from None
    if len(prompts) != plan.num_prompts + plan.num_reference:
        raise ValueError(
            f"{run.directory}: expected {plan.num_prompts + plan.num_reference} prompts in manifest.json, as in its"
            f" plan, got {len(prompts)}; restore it, or run the audit again in a new folder"
        )
    return prompts


def _read_raw(run: Run, plan: Plan) -> Raw:
    def gather(unit: str, shape: tuple[int, ...], array: str = "") -> Any:
        """The arrays of all batches whose unit is done, by default named as the unit; ``{:05d}`` is the batch."""
        out = np.full((plan.num_points, *shape), np.nan)
        for number in plan.batches():
            if run.done(unit.format(number)):
                name = (array or unit).format(number)
                found, expected = run.load(name), (len(plan.points(number)), *shape)
                if found.shape != expected:
                    raise ValueError(
                        f"{run.directory}: expected an array of shape {expected} in arrays/{name}.npy, got"
                        f" {found.shape}; the run is damaged, start it again in a new folder"
                    )
                out[plan.points(number)] = found
        return out

    eps = [np.full((plan.num_points, len(plan.timesteps)), np.nan)]
    if plan.has_pairs:
        eps = [
            gather(f"path-{{:05d}}-{i:03d}", (len(steps),), f"eps-{{:05d}}-{i:03d}")
            for i, steps in enumerate(plan.segments)
        ]
    first = "path-{:05d}-000"
    evolution = np.full(plan.num_points, np.nan)
    if plan.has_pairs and len(plan.timesteps) >= 3:
        evolution = gather(first, (), "evolution-{:05d}")
    width = plan.num_eigenvalues
    tables = np.full((plan.num_points, len(plan.spectral_timesteps), width + 1), np.nan)
    counts = np.full((plan.num_points, len(plan.spectral_timesteps), 9), np.nan)
    for k, t in enumerate(plan.spectral_timesteps):
        if plan.method != "none":
            tables[:, k] = gather(f"spectrum-{{:05d}}-{t:04d}", (width + 1,))
        for point in range(plan.num_points if plan.count_budget is not None else 0):
            if run.done(key := f"count-{point:06d}-{t:04d}"):
                counts[point, k] = run.load(key)
    images, sampled = _images(run, plan)
    return Raw(
        eps_difference=np.concatenate(eps, 1),
        jeon=gather("jeon-{:05d}", ()),
        evolution=evolution,
        anisotropy=gather("anisotropy-{:05d}", ()),
        eigenvalues=tables[..., :width],
        noise=tables[..., width],
        counts=counts,
        images=images,
        sampled=sampled,
    )


def read_points(run: Run) -> np.ndarray:
    r"""The latents x_t at which spectra were taken, (N, M, K, \*latent), NaN where sampling has not come there."""
    plan = Plan.from_manifest(run.manifest.get("plan") or {})
    x = np.full((plan.num_points, len(plan.spectral_timesteps), *plan.latent_shape), np.nan, np.float32)
    for number in plan.batches():
        for k, t in enumerate(plan.spectral_timesteps):
            segment = next(i for i, steps in enumerate(plan.segments) if plan.timesteps.index(t) in steps)
            if run.done(f"path-{number:05d}-{segment:03d}"):
                x[plan.points(number), k] = run.load(f"at-{number:05d}-{t:04d}")
    return x.reshape(-1, plan.noises, *x.shape[1:])[: plan.num_prompts]


def _images(run: Run, plan: Plan) -> tuple[np.ndarray | None, np.ndarray]:
    images, sampled = None, np.zeros(plan.num_points, bool)
    for number in plan.batches():
        if run.done(f"image-{number:05d}"):
            found, points = run.load(f"image-{number:05d}"), plan.points(number)
            if images is None:
                images = np.zeros((plan.num_points, *found.shape[1:]), np.uint8)
            images[points], sampled[points] = found, True
    return images, sampled


def _directions(run: Run) -> Directions | None:
    if not run.done("directions"):
        return None
    row = next(row for row in run.rows() if row["key"] == "directions")
    return Directions(
        point=np.array(row["point"]),
        timestep=row["timestep"],
        eigenvalues=run.load("directions-eigenvalues"),
        base=run.load("directions-base"),
        moved=run.load("directions-moved"),
        amplitude=row["amplitude"],
    )
