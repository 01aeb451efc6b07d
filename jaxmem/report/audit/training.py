"""The part of a page about training images: verdicts, what is near, what the looks at the images say."""

from collections import Counter
from typing import Any, NamedTuple

import numpy as np

from jaxmem.audit.training.found import TrainingFound
from jaxmem.audit.training.records import WITH, WITHOUT
from jaxmem.detectors import EpsDifferences, HessianProducts, ScorePairs, StartPairs
from jaxmem.memorization import verdicts
from jaxmem.memorization.chance import level_of
from jaxmem.memorization.verdicts import WORDS, Verdict
from jaxmem.report.audit.pictures import thumbnail

MOST_ROWS = 400  # images in the table; images.csv has all
_COMPARES = EpsDifferences, HessianProducts, ScorePairs, StartPairs  # evidence that compares with and without prompt


class ImageRow(NamedTuple):
    """One training image in the table."""

    name: str
    caption: str
    picture: str  #: data URI; empty where images are not shown
    nearest: str  #: the generation nearest to it, among those whose nearest image it is; empty without one
    prompt: str | None  #: of that generation, where it is not the caption
    verdict: Verdict
    closest: float
    similarity: float
    p_value: float
    free: float
    free_without: float
    error: float
    duplicates: int  #: other training images of its group


class TrainingView:
    """What a page says of training images."""

    def __init__(self, found: TrainingFound) -> None:
        self.found = found
        self.records = [record for record in found.records if not record.held_out]
        self.number = len(self.records)
        self.held_out = len(found.records) - self.number
        self.counts = {word: sum(one.word == word for one in found.verdicts) for word in WORDS}
        self.sizes = Counter(record.group for record in self.records)
        self.rules = verdicts
        self.level = level_of(found.evidence[0].held_out)
        self.has_similarity = any(np.isfinite(one.similarity) for one in found.evidence)
        self.generated = found.nearest is not None

    @property
    def enough_held_out(self) -> bool:
        """Whether there are as many held-out images as the rule of isolation needs."""
        return self.level is not None

    def rows(self) -> list[ImageRow]:
        """The images, the worst verdict first, and in it the closest."""
        found = self.found
        with_captions, without = found.looks.get(WITH), found.looks.get(WITHOUT)

        def mean(look: Any, name: str, i: int) -> float:
            return float("nan") if look is None else float(look.column(f"{name}@t{look.judged}")[i].mean())

        def key(i: int) -> tuple[int, float, float]:
            one = found.evidence[i]
            return WORDS.index(found.verdicts[i].word), np.nan_to_num(one.closest, nan=9.0), one.p_value

        rows = []
        for i in sorted(range(self.number), key=key)[:MOST_ROWS]:
            record, one = self.records[i], found.evidence[i]
            point = self._nearest_point(i)
            text = None if point is None else found.prompts[point // found.noises].text
            drawn = "" if point is None or found.images is None else thumbnail(found.images[point])
            rows.append(
                ImageRow(
                    name=record.name,
                    caption=record.captions[0] if record.captions else "",
                    picture="" if found.thumbnails is None else thumbnail(found.thumbnails[i]),
                    nearest=drawn,
                    prompt=None if text in (record.captions or ("",)) else text,
                    verdict=found.verdicts[i],
                    closest=one.closest,
                    similarity=one.similarity,
                    p_value=one.p_value,
                    free=mean(with_captions, "tangent-count", i),
                    free_without=mean(without, "tangent-count", i),
                    error=mean(with_captions, "denoising-error", i),
                    duplicates=self.sizes[record.group] - 1,
                )
            )
        return rows

    def _nearest_point(self, i: int) -> int | None:
        """The generation that is the closest to an image, of those that return it or have it as nearest image."""
        nearest = self.found.nearest
        if nearest is None:
            return None
        group = np.array([record.group for record in self.found.records])
        own = (nearest.index >= 0) & (group[nearest.index] == self.records[i].group)
        by_pixels = np.where(own, np.nan_to_num(nearest.calibrated, nan=9.0), np.inf)
        if own.any():
            return int(by_pixels.argmin())
        similar = (nearest.similar >= 0) & (group[nearest.similar] == self.records[i].group)
        return int(np.where(similar, nearest.similarity, -np.inf).argmax()) if similar.any() else None

    def duplicates(self) -> list[list[str]]:
        """Names of the images of each group that has several."""
        groups: dict[int, list[str]] = {}
        for record in self.records:
            groups.setdefault(record.group, []).append(record.name)
        return [names for names in groups.values() if len(names) > 1]

    def rates(self) -> list[tuple[str, Any, dict[str, Any]]]:
        """By look and detector: how well it tells training images from held-out ones."""
        named = {WITH: "with its caption", WITHOUT: "without a caption"}
        return [
            (named[look], detector, self.found.evaluations[look][detector.name]._asdict())
            for look, there in self.found.looks.items()
            for detector in there.detectors
            if detector.name in self.found.evaluations.get(look, {})
        ]


def blind(detectors: Any) -> list[str]:
    """Titles of the detectors that compare scores with and without a prompt: blind where the prompt does not matter."""
    return list(dict.fromkeys(one.title for one in detectors if isinstance(one.needs, _COMPARES)))


def template_values(found: TrainingFound | None, detectors: Any) -> dict[str, Any]:
    """What the templates need to show it."""
    if found is None:
        return {"training": None}
    view = TrainingView(found)
    look = found.looks.get(WITH)
    titles = [
        detector.title.partition(", t = ")[0]
        for detector in (() if look is None else look.detectors)
        if detector.statistic in found.statistics
    ]
    return {
        "training": view,
        "whatever": found.whatever,
        "blind": blind(detectors),
        "image_rows": view.rows(),
        "image_groups": view.duplicates(),
        "image_rates": view.rates(),
        "leads": list(dict.fromkeys(titles)),
        "look_timesteps": () if look is None else look.timesteps,
        "judged": None if look is None else look.judged,
        "look_noises": 1 if look is None else look.scores.shape[1],
        "has_without": WITHOUT in found.looks,
        "shows_images": found.thumbnails is not None,
    }
