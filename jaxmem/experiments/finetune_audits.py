"""Audits of the checkpoints of `jaxmem.experiments.finetune`, of which the truth is known, and what they make of it.

Each is looked at as a user would: some of the images that were trained on, others with the same captions held out, and
one comparison over all.
"""

from pathlib import Path
from typing import Any

import numpy as np
import scipy.stats

from jaxmem.audit import Audit
from jaxmem.audit import audit as run_audit
from jaxmem.audit.training.given import TrainingData
from jaxmem.audit.training.records import WITH
from jaxmem.comparison import Comparison, compare
from jaxmem.config import FinetuneConfig
from jaxmem.data import verbatim_model
from jaxmem.data.finetuning import FineTuningImages
from jaxmem.memorization.evaluation import evaluate
from jaxmem.memorization.verdicts import WORDS
from jaxmem.runs.durable import json_writer, write_atomically
from jaxmem.runs.progress import Progress, Say
from jaxmem.sources.load import load
from jaxmem.training_images import read_training_images
from jaxmem.training_images.duplicates import first_of_groups

AUDITS = "audits"  #: folder of the audits, one for each checkpoint
FEWEST = 2  #: files of each caption, of those trained on and of those held out, that are looked at


def audit_checkpoints(
    config: FinetuneConfig,
    data: FineTuningImages,
    folder: Path,
    checkpoints: dict[str, dict[int, Path]],
    progress: Progress,
    say: Say,
) -> dict[str, Any]:
    """Audit every checkpoint, compare them, and return what they found beside the truth.

    The folder gets ``audits/<way>-checkpoint-<step>/`` with results and page, ``comparison.html`` and
    ``comparison.csv``.
    """
    images = read_training_images(_listing(data, folder, trained=True, number=FEWEST))
    others = read_training_images(_listing(data, folder, trained=False, number=config.held_out_looked_at))
    training = TrainingData(images, others, image_timesteps=config.audit.timesteps, image_noises=config.audit.noises)
    metrics: dict[str, Any] = {}
    runs, series = [], []
    for way, folders in checkpoints.items():
        metrics[way] = {}
        for step, network in folders.items():
            run = folder / AUDITS / f"{way}-checkpoint-{step}"
            say(f"audit of {way}, {step} steps")
            model = load(verbatim_model()[0], unet=network)
            found = run_audit(
                model, config=config.audit, folder=run, training=training, name=run.name, progress=progress
            )
            found.write_page(run / "report.html")
            metrics[way][str(step)] = against_truth(found, data)
            runs.append(run)
            series.append(way)
    comparison = compare(runs, series=series)
    comparison.to_csv(folder / "comparison.csv")
    comparison.write_page(folder / "comparison.html")
    return {"checkpoints": metrics, "sweeps": {way: _sweep(comparison, way) for way in checkpoints}}


def against_truth(found: Audit, data: FineTuningImages) -> dict[str, Any]:
    """Verdicts by kind of caption, and how well each measure tells single images from held-out ones of their captions.

    Files of one image count once.
    """
    training = found.training
    assert training is not None  # it was given
    kinds = {picture.caption: picture.kind for picture in data.pictures}
    kind_of = np.array([kinds[record.captions[0]] for record in training.records])
    held_out = np.array([record.held_out for record in training.records])
    first = np.isin(np.arange(len(kind_of)), first_of_groups(np.array([record.group for record in training.records])))
    words = np.array([verdict.word for verdict in training.verdicts])
    verdicts: dict[str, Any] = {}
    for kind in ("single", "many"):
        chosen = words[(first & ~held_out & (kind_of == kind))[: len(words)]]
        verdicts[kind] = {word: _share(int((chosen == word).sum()), len(chosen)) for word in WORDS}
    look = training.looks[WITH]
    single = first & (kind_of == "single")
    rates = {
        detector.name: evaluate(
            look.scores[single][..., d], ~held_out[single], memorized_is=detector.memorized_is
        )._asdict()
        for d, detector in enumerate(look.detectors)
    }
    tangent = look.column(f"tangent-count@t{look.judged}")
    captions = {prompt.text: n for n, prompt in enumerate(found.prompts)}
    from_captions = _of_captions(found, data, captions)
    return {
        "verdicts": verdicts,
        "at_images": rates,
        "from_captions": from_captions,
        "tangent_count": {
            "single": float(tangent[single & ~held_out].mean()),
            "held out": float(tangent[single & held_out].mean()),
        },
        "whatever": training.whatever._asdict(),
    }


def _share(number: int, total: int) -> dict[str, Any]:
    """A share with its 95 % interval (Clopper and Pearson's)."""
    ends = scipy.stats.binomtest(number, total).proportion_ci(0.95)
    return {"number": number, "of": total, "interval": (float(ends.low), float(ends.high))}


def _of_captions(found: Audit, data: FineTuningImages, captions: dict[str, int]) -> dict[str, Any]:
    """How well the detectors of prompts tell captions of a single image from those of many."""
    chosen = [(captions[text], kind == "single") for kind in ("single", "many") for text in data.captions(kind)]
    rows, labels = (np.array(part) for part in zip(*chosen, strict=True))
    return {
        detector.name: evaluate(found.scores[rows][..., d], labels, memorized_is=detector.memorized_is)._asdict()
        for d, detector in enumerate(found.detectors)
        if not np.isnan(found.scores[rows][..., d]).all()
    }


def _sweep(comparison: Comparison, way: str) -> dict[str, Any]:
    """Of one way of training: by step the images that were reproduced, and what is advised."""
    advice = next(one for one in comparison.advice if one.series == way)
    return {
        "first_reproduced": dict(zip(comparison.images, comparison.first("reproduced", way), strict=True)),
        "advice": advice._asdict(),
    }


def _listing(data: FineTuningImages, folder: Path, *, trained: bool, number: int) -> Path:
    """A file that lists the first files of each caption, in a form that `read_training_images` reads."""
    chosen: dict[str, str] = {}
    taken: dict[str, int] = {}
    for picture in data.pictures:
        if picture.trained is trained and taken.get(picture.caption, 0) < number:
            taken[picture.caption] = taken.get(picture.caption, 0) + 1
            chosen[picture.file] = picture.caption
    path = folder / ("looked-at.json" if trained else "looked-at-held-out.json")
    write_atomically(path, json_writer(chosen))
    return path
