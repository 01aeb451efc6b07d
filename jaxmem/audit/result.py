"""What an audit found, read from its run, finished or not."""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.audit import store
from jaxmem.audit.ranking import Ranking, rank_prompts
from jaxmem.audit.scores import compute_scores, costs
from jaxmem.audit.summary import table_columns, write_table
from jaxmem.audit.training.found import TrainingFound, read_training
from jaxmem.audit.whole import Whole, merge_kept, read_whole
from jaxmem.detectors import Detector, choose
from jaxmem.detectors.evidence import AuditMethod
from jaxmem.extras import require_package
from jaxmem.memorization.evaluation import Evaluation, evaluate_categories
from jaxmem.prompts import Prompt
from jaxmem.runs.directory import Run


@dataclass(frozen=True)
class Directions:
    """Top eigenvectors of the most and the least memorized point, as pictures."""

    point: np.ndarray  #: (2, 2) (prompt, noise): the most memorized, the least memorized
    timestep: int
    eigenvalues: np.ndarray  #: (2, k)
    base: np.ndarray  #: (2, h, w, 3) uint8: the decoded posterior mean of x_0 at x_t
    moved: np.ndarray  #: (2, k, 2, h, w, 3) uint8: the same after moving x_t by −a v and by +a v
    amplitude: float  #: a


@dataclass(frozen=True)
class Finding:
    """What one detector found: N prompts, M noises."""

    detector: Detector
    scores: np.ndarray  #: (N, M) float64, NaN where not done; ``detector.memorized_is`` says which end is memorized
    intervals: np.ndarray | None  #: (N, M, 2) ends of 95 % intervals, of counts that were estimated
    reference_scores: np.ndarray  #: (R, M) of the neutral prompts
    labels: tuple[bool | None, ...]  #: N
    categories: tuple[str | None, ...]  #: N

    @cached_property
    def evaluations(self) -> dict[str, Evaluation]:
        """How well the scores agree with the labels: of ``"all"`` and of each memorized category against the rest.

        Every point with a score is an example. Fields are None where there are too few.
        """
        return evaluate_categories(self.scores, self.labels, self.categories, memorized_is=self.detector.memorized_is)

    @property
    def evaluation(self) -> Evaluation:
        """That of all labelled prompts, such as ``evaluation.auc``."""
        return self.evaluations["all"]


@dataclass(frozen=True)
class Audit:
    """N prompts, M noises, S sampling steps, K timesteps of spectra, L eigenvalues, D detectors; NaN where not done.

    ``audit["jeon"]`` is what one detector found; of detectors of spectra the name ends in the timestep, such as
    ``audit["positive-count@t281"]``.
    """

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
    truncated: list[bool]  #: N: the prompt has more tokens than the model reads
    training: TrainingFound | None = None  #: what was found about training images, if some were given
    warnings: tuple[str, ...] = ()  #: what may be wrong with the model as it was read, see `read_warnings`

    def __getitem__(self, name: str) -> Finding:
        """What one detector found.

        Raises:
            KeyError: no such detector ran.
        """
        names = [detector.name for detector in self.detectors]
        if name not in names:
            raise KeyError(f"expected one of the detectors that ran ({', '.join(names)}), got {name!r}")
        d = names.index(name)
        return Finding(
            self.detectors[d],
            self.scores[..., d],
            self.intervals.get(name),
            self.reference_scores[..., d],
            tuple(prompt.label for prompt in self.prompts),
            tuple(prompt.category for prompt in self.prompts),
        )

    @cached_property
    def ranking(self) -> Ranking:
        """The order of the prompts on the page and in tables, and which stand out from the reference."""
        return rank_prompts(self)

    @property
    def spectral_sigma(self) -> np.ndarray:
        """(K,) the standard deviation of the noise at the timesteps of spectra."""
        return self.sigma[np.searchsorted(-self.timesteps, -self.spectral_timesteps)]

    def to_dataframe(self) -> Any:
        """One row per prompt in the order of the page, as a pandas DataFrame: see `jaxmem.audit.summary.table_columns`.

        Raises:
            MissingExtra: pandas is not installed.
        """
        require_package("pandas", "Audit.to_dataframe")
        import pandas

        return pandas.DataFrame(table_columns(self))

    def to_csv(self, path: str | Path) -> Path:
        """Write the table of `to_dataframe` as ``results.csv`` is written, and return its path.

        Raises:
            OSError: the file cannot be written; one that was there is as before.
        """
        return write_table(table_columns(self), Path(path))

    def write_page(self, path: str | Path) -> Path:
        """Write the page that `jaxmem report` writes, one HTML file, and return its path.

        Raises:
            OSError: the file cannot be written; one that was there is as before.
        """
        from jaxmem.report.audit.page import write_page

        return write_page(self, Path(path))


def read_audit(folder: str | Path | Run, detectors: Iterable[Detector] = ()) -> Audit:
    """The results of an audit's run, also of one that is not finished, with its extensions that are.

    Images are read as a whole: 0.8 MB per point of Stable Diffusion.

    Args:
        folder: of the run.
        detectors: entries of your own that ran in it and are not registered.

    Raises:
        ValueError: it is another experiment's run, a detector of it is not known here, or a file of it is damaged.
    """
    run = folder if isinstance(folder, Run) else Run.read(folder)
    if run.manifest.get("experiment") != "audit":
        raise ValueError(
            f"{run.directory}: expected the run of an audit, got {run.manifest.get('experiment')!r} as the experiment"
            f" of its manifest"
        )
    return read_parts(read_whole(run), detectors)


def read_parts(whole: Whole, detectors: Iterable[Detector] = ()) -> Audit:
    """The results of an audit in parts, as `read_audit`."""
    run, plan = whole.run, whole.plan
    prompts, truncated = _prompts(whole)
    entries = _entries(whole, detectors)
    kept = merge_kept(whole, entries)
    found = compute_scores(plan, kept, entries)
    n, m = plan.num_prompts, plan.noises

    def nested(array: np.ndarray) -> np.ndarray:
        return array.reshape(n + plan.num_reference, m, *array.shape[1:])

    scores = nested(found.values)
    return Audit(
        prompts=prompts[:n],
        detectors=found.detectors,
        scores=scores[:n],
        timesteps=np.array(plan.timesteps),
        sigma=np.array(plan.sigma),
        eps_difference=nested(kept.eps_difference)[:n],
        spectral_timesteps=np.array(plan.spectral_timesteps, int),
        eigenvalues=nested(kept.eigenvalues)[:n],
        noise=nested(kept.noise)[:n],
        method=plan.method,
        images=None if kept.images is None else nested(kept.images)[:n],
        sampled=nested(kept.sampled)[:n],
        directions=_directions(whole),
        costs=costs(plan, run.directory, whole.costs(), found),
        metrics=run.metrics() if run.finished else None,
        manifest=whole.manifest,
        reference=prompts[n:],
        reference_scores=scores[n:],
        intervals={name: nested(ends)[:n] for name, ends in found.intervals.items()},
        truncated=truncated[:n],
        training=read_training(whole, prompts, entries, kept.images),
        warnings=read_warnings(run),
    )


def read_warnings(run: Run) -> tuple[str, ...]:
    """What may be wrong with an audited model: what its files gave rise to, then what its first step contradicts."""
    row = next((row for row in run.rows() if row["key"] == store.FIRST_STEP), {})
    return tuple(row.get("warnings", ()))


def _entries(whole: Whole, given: Iterable[Detector]) -> tuple[Detector, ...]:
    """The entries of the detectors that an audit's manifest names."""
    run, manifest = whole.run, whole.manifest
    names = manifest.get("detectors")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{run.directory}: expected a list of detectors in manifest.json, got {names!r:.60}; restore it, or run the"
            f" audit again in a new folder"
        )
    own = {detector.name: detector for detector in given}
    known = {detector.name for detector in choose(None)} | own.keys()
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"{run.directory}: expected detectors that are known here, got {', '.join(unknown)} in manifest.json;"
            f" a command knows those of the package alone: in Python, make them known by"
            f" `jaxmem.detectors.register`, or give them to `read_audit`, whose result writes the page"
        )
    entries = choose([own.get(name) or name for name in names])
    there = manifest.get("evidence") or {}
    for entry in entries:
        if there.get(entry.name, entry.identity) != entry.identity:
            raise ValueError(
                f"{run.directory}: expected {there[entry.name]} for the detector {entry.name!r}, got {entry.identity};"
                f" register the entry that ran, or give it to `read_audit`"
            )
    return entries


def _prompts(whole: Whole) -> tuple[list[Prompt], list[bool]]:
    """The audited prompts, then those of the reference; and whether each has too many tokens."""
    run, plan = whole.run, whole.plan
    try:
        rows = whole.manifest["config"]["prompts"]
        prompts = [Prompt(row["prompt"], row["label"], row["category"]) for row in rows]
        truncated = [bool(row["truncated"]) for row in rows]
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
    return prompts, truncated


def read_points(run: Run) -> np.ndarray:
    r"""The latents x_t at which spectra were taken, (N, M, K, \*latent), NaN where sampling has not come there."""
    whole = read_whole(run)
    plan = whole.plan
    x = np.full((plan.num_points, len(plan.spectral_timesteps), *plan.latent_shape), np.nan, np.float32)
    for part in whole.full:
        for k, t in enumerate(plan.spectral_timesteps):
            for batch in part.plan.batches():
                if part.run.done(store.path(batch, store.segment_of(plan, t))):
                    points = part.points[part.plan.points(batch)]
                    x[points, k] = store.latents(part.run, part.plan, batch, t)
    return x.reshape(-1, plan.noises, *x.shape[1:])[: plan.num_prompts]


def _directions(whole: Whole) -> Directions | None:
    if whole.directions is None:
        return None
    run, row = whole.directions
    return Directions(
        point=np.array(row["point"]),
        timestep=row["timestep"],
        amplitude=row["amplitude"],
        **run.load(store.DIRECTIONS, "eigenvalues", "base", "moved"),
    )
