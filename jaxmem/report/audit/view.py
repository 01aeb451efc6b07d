"""What a page tells of an audit: means over noises, ranks, groups of prompts. What is missing stays NaN."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxmem.audit.ranking import Ranking, usual_scale
from jaxmem.audit.scale import JUDGED, UsualScale
from jaxmem.memorization.chance import Listing
from jaxmem.memorization.sharpness import positive_count, tangent_count
from jaxmem.memorization.standing import End, mean, percentile, rank
from jaxmem.report.style import CATEGORIES, GENERAL, MEMORIZED

STRONG, ENOUGH = 99.0, 100  # percentile from which a prompt stands out; in a shorter list it is beyond all of it
MOST_GROUPS = len(CATEGORIES)


class Noun(NamedTuple):
    """Words for a model and for what it was asked for, see `jaxmem.model.Model.condition`."""

    one: str
    many: str  #: empty where there is nothing to ask for
    model: str
    article: str  #: of ``model``
    references: str
    units: str  #: of a move of x


_NOUNS = {
    "prompt": Noun("prompt", "prompts", "text-to-image model", "A", "captions", "latent units"),
    "class": Noun("class", "classes", "class-conditional model", "A", "classes", "units of x"),
    "none": Noun("condition", "", "unconditional model", "An", "samples", "units of x"),
}


@dataclass(frozen=True)
class Group:
    """Prompts that are shown together."""

    name: str
    members: np.ndarray  # (N,) bool
    colour: str
    marker: str


class AuditView:
    """An `jaxmem.audit.Audit` with the numbers that its page shows.

    Scores of a prompt are means over its noises. The ranking is that of `jaxmem.audit.ranking`.
    """

    def __init__(self, result: Any) -> None:
        self.result = result
        self.prompts, self.detectors = result.prompts, result.detectors
        self.scores = mean(np.asarray(result.scores, np.float64), 1)  # (N, D)
        self.truncated = result.truncated

    @cached_property
    def intervals(self) -> dict[int, np.ndarray]:
        """(N, 2) ends of the 95 % intervals of estimated counts, means over noises, by the detector's number."""
        number = {detector.name: d for d, detector in enumerate(self.detectors)}
        return {number[name]: mean(ends, 1) for name, ends in self.result.intervals.items()}

    @cached_property
    def ranks(self) -> np.ndarray:
        """(N, D): 1 is the most memorized by a detector; ties share the best place."""
        return self._each(lambda scores, _, direction: rank(scores, memorized_is=direction))

    def _each(self, judge: Callable[[np.ndarray, int, End], np.ndarray]) -> np.ndarray:
        """Apply ``judge`` to the scores of each detector, its number and its memorized end; shape (N, D)."""
        columns = [judge(self.scores[:, d], d, one.memorized_is) for d, one in enumerate(self.detectors)]
        return np.stack(columns, 1) if columns else self.scores

    @property
    def ranking(self) -> Ranking:
        return self.result.ranking

    @property
    def leads(self) -> list[int]:
        """One detector of each statistic: those of the ranking."""
        return self.ranking.leads

    @property
    def places(self) -> np.ndarray:
        """(N,) from 0, first by every lead, to 1, last by every one; NaN where nothing was scored."""
        return self.ranking.places

    @property
    def listing(self) -> Listing:
        """Which prompts stand out from the reference by the leads together, and how many would by chance."""
        return self.ranking.listing

    @property
    def order(self) -> np.ndarray:
        """Prompts from the most to the least memorized; those without a score last."""
        return self.ranking.order

    @cached_property
    def percentiles(self) -> np.ndarray:
        """(N, D): per cent of the reference prompts that are less memorized; NaN without any."""
        reference = mean(np.asarray(self.result.reference_scores, np.float64), 1)  # (R, D)

        def judge(scores: np.ndarray, d: int, direction: End) -> np.ndarray:
            if not (~np.isnan(reference[:, d])).any():
                return np.full(len(scores), np.nan)
            return percentile(scores, reference[:, d], memorized_is=direction)

        return self._each(judge)

    @cached_property
    def flags(self) -> np.ndarray:
        """(N, D): beyond `STRONG` per cent of the reference list, or beyond all of a short one; False without any."""
        return self.percentiles >= (STRONG if len(self.result.reference) >= ENOUGH else 100)

    @cached_property
    def num_flags(self) -> np.ndarray:
        """(N,): how many leads flag a prompt."""
        return self.flags[:, self.leads].sum(1)

    @property
    def has_reference(self) -> bool:
        return bool((~np.isnan(self.percentiles)).any())

    @cached_property
    def labelled(self) -> np.ndarray:
        """(N,) bool: the prompt list says whether it is memorized."""
        return np.array([prompt.label is not None for prompt in self.prompts])

    @cached_property
    def memorized(self) -> np.ndarray:
        """(N,) bool: labelled as memorized."""
        return np.array([prompt.label is True for prompt in self.prompts])

    @cached_property
    def done(self) -> np.ndarray:
        """(N, M): a detector has a score for this prompt and noise."""
        return ~np.isnan(self.result.scores).all(-1)

    @cached_property
    def groups(self) -> list[Group]:
        """By category where one is given, else by label, else all together; the most memorized last."""
        if any(prompt.category for prompt in self.prompts):
            names = [prompt.category or "no category" for prompt in self.prompts]
            unique = list(dict.fromkeys(names))
            if len(unique) > MOST_GROUPS:
                kept = sorted(unique, key=names.count, reverse=True)[: MOST_GROUPS - 1]
                names = [name if name in kept else "other categories" for name in names]
                unique = [*kept, "other categories"]
            masks = {name: np.array([n == name for n in names]) for name in unique}
            # from the least to the most memorized, by the labels and, where they say the same, by the ranking
            unique.sort(key=lambda name: (self.memorized[masks[name]].mean(), -mean(self.places[masks[name]], 0)))
            colours: tuple[str, ...] = CATEGORIES
            if len(unique) == 3:  # from general over partly to fully memorized
                colours = (GENERAL, CATEGORIES[3], MEMORIZED)
        else:
            words = {
                True: "memorized",
                False: "not memorized",
                None: "no label" if self.labelled.any() else "all prompts",
            }
            names = [words[prompt.label] for prompt in self.prompts]
            unique = sorted(set(names), key=["not memorized", "no label", "all prompts", "memorized"].index)
            colours = tuple(MEMORIZED if name == "memorized" else GENERAL for name in unique)
            if "no label" in unique:
                colours = tuple(CATEGORIES[3] if n == "no label" else c for n, c in zip(unique, colours, strict=True))
        return [
            Group(name, np.array([n == name for n in names]), colours[i], "osD^v<"[i]) for i, name in enumerate(unique)
        ]

    @cached_property
    def spectral_sigma(self) -> np.ndarray:
        """(K,) noise scale of each timestep with a spectrum."""
        places = [int(np.flatnonzero(self.result.timesteps == t)[0]) for t in self.result.spectral_timesteps]
        return np.asarray(self.result.sigma, np.float64)[places]

    @cached_property
    def scaled(self) -> np.ndarray:
        """(N, M, K, L) sigma² times the eigenvalues: -1 is a direction that only the noise fills."""
        return self.result.eigenvalues * self.spectral_sigma[:, None] ** 2

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """(N, M, K) positive and tangent counts; NaN where there is no spectrum, or no exact count in its place."""
        if self.counted:
            return {kind: self._counts_of(f"{kind}-count") for kind in ("positive", "tangent")}
        values = self.result.eigenvalues
        there = ~np.isnan(values).all(-1)
        found = {
            # what rounding could have made is not counted
            "positive": positive_count(values, np.nan_to_num(self.result.noise)),
            "tangent": tangent_count(values, np.broadcast_to(self.spectral_sigma, values.shape[:3])),
        }
        return {name: np.where(there, count, np.nan) for name, count in found.items()}

    @cached_property
    def counted(self) -> bool:
        """Whether exact counts, of more products than there are dimensions, took the place of whole spectra."""
        if (self.plan.get("count_budget") or 0) <= np.prod(self.plan.get("latent_shape") or [np.inf]):
            return False
        return bool((~np.isnan(self._counts_of("tangent-count"))).any())

    def _counts_of(self, statistic: str) -> np.ndarray:
        """(N, M, K) scores of a detector of counts; NaN at timesteps where it did not run."""
        scores, timesteps = self.result.scores, self.result.spectral_timesteps.tolist()
        found = np.full((*scores.shape[:2], len(timesteps)), np.nan)
        for d, detector in enumerate(self.detectors):
            if detector.statistic == statistic:
                found[..., timesteps.index(detector.timestep)] = scores[..., d]
        return found

    @cached_property
    def plan(self) -> dict[str, Any]:
        """What the manifest says of the plan; empty where it says nothing."""
        return self.result.manifest.get("plan") or {}

    @cached_property
    def scale(self) -> UsualScale:
        """Places of timesteps on the usual scale."""
        return usual_scale(self.result.manifest)

    @property
    def unit(self) -> str:
        """What timesteps count, in words; empty for indices of a table."""
        return self.plan.get("unit", "")

    @property
    def late_timestep(self) -> int:
        """Where freedom could be judged best: of the sampler's timesteps the nearest to `JUDGED`."""
        return self.scale.nearest(JUDGED, self.plan.get("sampler_timesteps") or [int(JUDGED)])

    @property
    def noun(self) -> Noun:
        """The words of the page."""
        return _NOUNS[(self.result.manifest.get("model") or {}).get("condition", "prompt")]

    @property
    def without_pairs(self) -> bool:
        """Whether the model has no unconditional score, so that detectors were left out."""
        return not self.plan.get("has_pairs", True)

    @property
    def has_spectra(self) -> bool:
        return self.result.method != "none" and bool((~np.isnan(self.result.eigenvalues)).any())

    @cached_property
    def free(self) -> np.ndarray:
        """(N,) mean tangent count at the `judged` timestep: of Ritz values alone, no more than a lower bound."""
        return mean(self.counts["tangent"][:, :, self.judged], 1)

    @property
    def judged(self) -> int:
        """Which timestep with a spectrum says whether a prompt leaves freedom."""
        timesteps = self.result.spectral_timesteps.tolist()
        return timesteps.index(self.scale.judged(timesteps))

    @property
    def judges(self) -> bool:
        """Whether a spectrum, or an exact count, was taken late enough for a lack of freedom to mean something."""
        return self.exact and self.scale.is_late(int(self.result.spectral_timesteps[self.judged]))

    @cached_property
    def reference_fixed(self) -> tuple[int, int]:
        """How many reference prompts leave no freedom at the `judged` timestep, of how many with all noises."""
        t = int(self.result.spectral_timesteps[self.judged])
        chosen = [d for d, one in enumerate(self.detectors) if (one.statistic, one.timestep) == ("tangent-count", t)]
        counts = self.result.reference_scores[..., chosen[0]] if chosen else np.empty((0, 1))
        counts = counts[~np.isnan(counts).any(1)]
        return int((counts == 0).all(1).sum()), len(counts)

    @property
    def exact(self) -> bool:
        """Whether counts are of all eigenvalues."""
        return self.counted or (self.has_spectra and self.result.method == "eigh")
