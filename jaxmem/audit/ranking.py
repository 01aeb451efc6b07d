"""The order of an audit's prompts, in its page and tables: by one measure of each kind, all together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxmem.audit.scale import JUDGED, UsualScale
from jaxmem.detectors import Detector
from jaxmem.memorization.chance import Listing, list_prompts
from jaxmem.memorization.standing import mean, percentile

if TYPE_CHECKING:
    from jaxmem.audit.result import Audit

MOST_LEADS = 6


class Ranking(NamedTuple):
    """N prompts in order."""

    leads: list[int]  #: the detectors that decide it, see `choose_leads`
    places: np.ndarray  #: (N,) from 0, first by every lead, to 1, last by every one; NaN where nothing was scored
    order: np.ndarray  #: (N,) prompts from the most to the least memorized; those without a score last
    listing: Listing  #: which prompts stand out from the reference by the leads together


def rank_prompts(result: "Audit") -> Ranking:
    """Put the most memorized prompt first, by its mean place by the leads: a way to sort, no probability.

    Scores of a prompt are means over its noises.
    """
    detectors, scores = result.detectors, np.asarray(result.scores, np.float64)
    leads = choose_leads(detectors, usual_scale(result.manifest))
    means = mean(scores, 1)
    # the percentile of a prompt among all: here equal scores share the middle of their places
    among = np.full((len(means), len(leads)), np.nan)
    for i, d in enumerate(leads):
        if (~np.isnan(means[:, d])).any():
            among[:, i] = percentile(means[:, d], means[:, d], memorized_is=detectors[d].memorized_is)
    places = 1 - mean(among, 1) / 100
    # With a noise that is missing the mean of a prompt is not one of the kind of the others.
    reference = np.asarray(result.reference_scores, np.float64).mean(1)
    ends = [detectors[d].memorized_is for d in leads]
    listing = list_prompts(scores.mean(1)[:, leads], reference[:, leads], memorized_is=ends)
    return Ranking(leads, places, np.argsort(places, kind="stable"), listing)  # which puts NaN last


def choose_leads(detectors: Sequence[Detector], scale: UsualScale) -> list[int]:
    """One detector of each statistic, in the order of `Detector.place`.

    Of several timesteps, counts take the one nearest to `JUDGED`, and sums of eigenvalues the largest: there every
    sigma is about 1 and the network has resolved its curvature.
    """
    chosen: dict[str, int] = {}

    def behind(d: int) -> float:
        place = scale.place(detectors[d].timestep or 0)
        return abs(place - JUDGED) if detectors[d].is_count else -place

    for d, detector in enumerate(detectors):
        if behind(d) < behind(chosen.setdefault(detector.statistic, d)):
            chosen[detector.statistic] = d
    order = sorted(chosen, key=lambda name: detectors[chosen[name]].place)
    return [chosen[name] for name in order[:MOST_LEADS]]


def usual_scale(manifest: dict[str, Any]) -> UsualScale:
    """Places of timesteps on the usual scale; runs without them have usual timesteps."""
    plan = manifest.get("plan") or {}
    return UsualScale(dict(zip(plan.get("sampler_timesteps", ()), plan.get("usual_timesteps", ()), strict=False)))
