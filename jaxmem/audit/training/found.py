"""What an audit found about training images, read from its run, finished or not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from jaxmem.audit import store
from jaxmem.audit.plan import Plan
from jaxmem.audit.scores import compute_scores, read_kept
from jaxmem.audit.training.records import LEADS, WITH, ImageRecord, NearestImages, look_runs, with_leads
from jaxmem.audit.whole import Whole
from jaxmem.detectors import Detector
from jaxmem.memorization.chance import conformal_p
from jaxmem.memorization.evaluation import Evaluation, evaluate
from jaxmem.memorization.sharpness import tangent_count
from jaxmem.memorization.verdicts import WORDS, Evidence, Verdict, copies, judge
from jaxmem.prompts import Prompt
from jaxmem.runs.directory import Run

#: Share of the generations without a caption that return images, from which the prompt does not matter; and how many
#: generations it takes to say so.
WHATEVER, FEWEST_DRAWN = 0.5, 4


@dataclass(frozen=True)
class LookFound:
    """Scores at noised images: I images, M noises, K timesteps, L eigenvalues, D detectors; NaN where not done."""

    detectors: tuple[Detector, ...]  #: D
    scores: np.ndarray  #: (I, M, D)
    timesteps: tuple[int, ...]  #: K, descending
    sigma: tuple[float, ...]  #: K
    eigenvalues: np.ndarray  #: (I, M, K, L)
    judged: int  #: the timestep at which freedom is judged

    @cached_property
    def leads(self) -> list[int]:
        """Detectors that the p-values are made of."""
        return [d for d, detector in enumerate(self.detectors) if detector.statistic in LEADS]

    def column(self, name: str) -> np.ndarray:
        """(I, M) scores of a detector; NaN where it did not run."""
        names = [detector.name for detector in self.detectors]
        return self.scores[..., names.index(name)] if name in names else np.full(self.scores.shape[:2], np.nan)

    @cached_property
    def free(self) -> np.ndarray:
        """(I,) largest number of free directions over the noises; NaN where it was not counted."""
        return self.column(f"tangent-count@t{self.judged}").max(1)

    @cached_property
    def at_least_free(self) -> np.ndarray:
        """(I,) the same from the values that are there, which need not be all; NaN where there are none."""
        k = self.timesteps.index(self.judged)
        values = self.eigenvalues[:, :, k]
        counted = tangent_count(np.nan_to_num(values, nan=-np.inf), np.full(values.shape[:2], self.sigma[k]))
        return np.where(np.isnan(values).all(-1), np.nan, counted).max(1)


class Whatever(NamedTuple):
    """Generations from no prompt and from the reference prompts: what the model gives whatever it is asked for."""

    drawn: int  #: such generations
    copies: int  #: those of them that return a training image
    images: int  #: how many images they return

    @property
    def memorized(self) -> bool:
        """Whether the model gives training images whatever the prompt."""
        return self.drawn >= FEWEST_DRAWN and self.copies >= WHATEVER * self.drawn


@dataclass(frozen=True)
class TrainingFound:
    """What was found about T training images and the held-out ones after them, I in all."""

    records: list[ImageRecord]  #: I
    thumbnails: np.ndarray | None  #: (I, h, w, 3) uint8, where the run keeps them
    looks: Mapping[str, LookFound]  #: ``with-captions`` and, of models with such a score, ``without-captions``
    nearest: NearestImages | None  #: of all generations, those of the reference prompts last
    copy_of: np.ndarray  #: (P,) training image that each generation returns; -1: none
    images: np.ndarray | None  #: (P, h, w, 3) uint8, the generations, zeros where there is none yet
    prompts: list[Prompt]  #: of the generations, the reference prompts last
    num_prompts: int  #: those that are audited; the reference prompts come after them
    noises: int  #: of each prompt
    p_values: Mapping[str, np.ndarray]  #: (T,) by look; NaN where there are no held-out images
    statistics: tuple[str, ...]  #: what the p-values with captions are made of
    evidence: list[Evidence]  #: T

    @cached_property
    def verdicts(self) -> list[Verdict]:
        """T verdicts, see `jaxmem.memorization.verdicts`."""
        return [judge(one) for one in self.evidence]

    @cached_property
    def whatever(self) -> Whatever:
        """What the model gives whatever it is asked."""
        captions = {text for record in self.records if not record.held_out for text in record.captions if text}
        neutral = [
            not prompt.text or (n >= self.num_prompts and prompt.text not in captions)
            for n, prompt in enumerate(self.prompts)
        ]
        foreign = np.repeat(neutral, self.noises)
        there = foreign & (np.full(len(foreign), -1) if self.nearest is None else self.nearest.index >= 0)
        returned = self.copy_of[there & (self.copy_of >= 0)]
        groups = np.array([record.group for record in self.records])
        return Whatever(int(there.sum()), len(returned), len(np.unique(groups[returned])) if len(returned) else 0)

    @cached_property
    def evaluations(self) -> dict[str, dict[str, Evaluation]]:
        """By look and detector: how well its score tells training images from held-out ones.

        A group of duplicates is one example, with the mean of its scores. Empty without held-out images.
        """
        looked = np.array([record.look >= 0 for record in self.records])
        groups = np.array([record.group if record.look >= 0 else -1 for record in self.records])
        held_out = np.array([record.held_out for record in self.records])
        if not (held_out & looked).any():
            return {}
        unique = np.unique(groups[looked])
        labels = np.array([not held_out[groups == group].all() for group in unique])
        found: dict[str, dict[str, Evaluation]] = {}
        for name, look in self.looks.items():
            means = np.stack([look.scores[groups == group].mean(0) for group in unique])
            found[name] = {
                detector.name: evaluate(means[..., d], labels, memorized_is=detector.memorized_is, per="prompt")
                for d, detector in enumerate(look.detectors)
                if not np.isnan(means[..., d]).any()
            }
        return found


def read_training(
    whole: Whole, prompts: Sequence[Prompt], entries: Sequence[Detector], images: np.ndarray | None
) -> TrainingFound | None:
    """What an audit has about training images; None if it was given none, or has not come so far."""
    run, plan = whole.run, whole.plan
    if not run.manifest.get("training") or not run.done(store.TRAINING_IMAGES):
        return None
    row = next(row for row in run.rows() if row["key"] == store.TRAINING_IMAGES)
    records = [ImageRecord(**one | {"captions": tuple(one["captions"])}) for one in row["images"]]
    shown = run.manifest["training"]["show"]
    thumbnails = run.load(store.TRAINING_IMAGES, "thumbnails")["thumbnails"] if shown else None
    looks = {
        there.manifest["config"]["look"]: _read_look(there, with_leads(entries), records) for there in look_runs(run)
    }
    nearest, copy_of = _read_nearest(whole), np.full(plan.num_points, -1)
    if nearest is not None:
        copy_of = copies(nearest.index, nearest.calibrated, nearest.similar, nearest.similarity)
    among = {name: _among(look, records) for name, look in looks.items()}
    evidence = _evidence(records, looks, nearest, copy_of, prompts, plan.noises, among.get(WITH))
    return TrainingFound(
        records=records,
        thumbnails=thumbnails,
        looks=looks,
        nearest=nearest,
        copy_of=copy_of,
        images=images,
        prompts=list(prompts),
        num_prompts=plan.num_prompts,
        noises=plan.noises,
        p_values={name: one.p for name, one in among.items()},
        statistics=among[WITH].statistics if WITH in among else (),
        evidence=evidence,
    )


def training_metrics(found: TrainingFound) -> dict[str, Any]:
    """The metrics of a finished audit about training images."""
    words = [verdict.word for verdict in found.verdicts]
    return {
        "verdicts": {word: words.count(word) for word in WORDS},
        "whatever": found.whatever._asdict() | {"memorized": found.whatever.memorized},
        "evaluation": {
            look: {name: one._asdict() for name, one in rates.items()} for look, rates in found.evaluations.items()
        },
    }


def _read_nearest(whole: Whole) -> NearestImages | None:
    """The nearest images of the points of all parts; None if there is not one."""
    number, parts = whole.plan.num_points, [part for part in whole.full if part.run.done(store.NEAREST)]
    if not parts:
        return None
    found = {name: np.full(number, -1 if name in ("index", "similar") else np.nan) for name in NearestImages._fields}
    for part in parts:
        for name, array in part.run.load(store.NEAREST, *NearestImages._fields).items():
            found[name][part.points] = array
    return NearestImages(**found)


def _read_look(run: Run, entries: Sequence[Detector], records: Sequence[ImageRecord]) -> LookFound:
    plan = Plan.from_manifest(run.manifest.get("plan") or {})
    kept = read_kept(run, plan, entries)
    found = compute_scores(plan, kept, entries)

    places = np.array([record.look for record in records])

    def nested(array: np.ndarray) -> np.ndarray:
        """By image: what was not looked at is NaN, and equal pictures have the same numbers."""
        looked = array.reshape(plan.num_prompts, plan.noises, *array.shape[1:])
        return np.concatenate([looked, np.full_like(looked[:1], np.nan)])[places]

    judged = plan.scale.judged(plan.timesteps)
    return LookFound(
        found.detectors, nested(found.values), plan.timesteps, plan.sigma, nested(kept.eigenvalues), judged
    )


class Among(NamedTuple):
    """Where training images stand among held-out ones."""

    p: np.ndarray  #: (T,) p-values; NaN where an image was not looked at, or there is nothing to compare it with
    reference: int  #: held-out images whose look is done, each group of duplicates once
    statistics: tuple[str, ...]  #: what they are compared by: the leads that every image has


def _among(look: LookFound, records: Sequence[ImageRecord]) -> Among:
    """p-values of training images among the held-out ones, by the leads that all images have whose look is done."""
    held_out = [i for i, record in enumerate(records) if record.held_out and record.look >= 0]
    means = look.scores.mean(1)
    done = np.isfinite(means[:, look.leads]).any(1)
    # A Krylov space that closed early has too few values for some: then nobody is compared by these.
    chosen = [d for d in look.leads if np.isfinite(means[done, d]).all() and done.any()]
    first_of_group = {records[i].group: i for i in reversed(held_out) if done[i]}
    trained = means[[i for i, record in enumerate(records) if not record.held_out]][:, chosen]
    ends = [look.detectors[d].memorized_is for d in chosen]
    p = conformal_p(trained, means[sorted(first_of_group.values())][:, chosen], memorized_is=ends)
    statistics = dict.fromkeys(look.detectors[d].statistic for d in chosen)
    return Among(p, len(first_of_group) if chosen else 0, tuple(statistics))


def _evidence(
    records: Sequence[ImageRecord],
    looks: Mapping[str, LookFound],
    nearest: NearestImages | None,
    copy_of: np.ndarray,
    prompts: Sequence[Prompt],
    noises: int,
    among: Among | None,
) -> list[Evidence]:
    """Gather by training image what its verdict is made of; what returns a duplicate of an image returns it."""
    group = np.array([record.group for record in records])
    texts = np.repeat(np.array([prompt.text for prompt in prompts], object), noises)
    given = any(record.held_out for record in records)
    look = looks.get(WITH)
    found = []
    for i, record in enumerate(records):
        if record.held_out:
            continue
        own = np.isin(texts, list(record.captions or ("",)))
        returned = (copy_of >= 0) & (group[copy_of] == record.group)
        calibrated = similarity = np.array([])
        drawn, comparable = 0, False
        if nearest is not None:
            drawn = int((own & (nearest.index >= 0)).sum())
            comparable = bool(np.isfinite(nearest.calibrated).any() or np.isfinite(nearest.similarity).any())
            calibrated = nearest.calibrated[(nearest.index >= 0) & (group[nearest.index] == record.group)]
            similarity = nearest.similarity[(nearest.similar >= 0) & (group[nearest.similar] == record.group)]
        found.append(
            Evidence(
                drawn=drawn,
                copies=int(returned.sum()),
                foreign=int((returned & ~own).sum()),
                comparable=comparable,
                closest=float(np.nanmin(calibrated, initial=np.inf)) if np.isfinite(calibrated).any() else np.nan,
                similarity=float(similarity.max()) if similarity.size else np.nan,
                looked=record.look >= 0,
                p_value=np.nan if among is None else float(among.p[i]),
                held_out=0 if among is None else among.reference,
                held_out_given=given,
                free=np.nan if look is None else float(look.free[i]),
                at_least_free=np.nan if look is None else float(look.at_least_free[i]),
            )
        )
    return found
