"""An audit settled: its arguments checked, its prompts listed, its plan made, before its run is there."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxmem.audit.plan import ModelFacts, Plan
from jaxmem.audit.steps import require_steps
from jaxmem.audit.training.given import Pictures, TrainingData
from jaxmem.audit.training.look import Looks
from jaxmem.audit.training.look import settle as settle_looks
from jaxmem.audit.work import Work, starting_noise
from jaxmem.config import AuditConfig
from jaxmem.data import NEUTRAL_CAPTIONS
from jaxmem.detectors import Counts, Detector, Eigenvalues, choose, columns, require_evidence
from jaxmem.detectors.evidence import UNPAIRED
from jaxmem.model import Model, fingerprint, require_attributes
from jaxmem.pictures import to_pictures
from jaxmem.prompts import NO_PROMPT, Prompt, as_prompts, merge, read_prompts
from jaxmem.runs.directory import Run
from jaxmem.runs.functions import captured, name_of
from jaxmem.runs.manifest import describe
from jaxmem.runs.origin import Origin
from jaxmem.runs.progress import Progress, Say

NUM_NEUTRAL = 19  #: captions beside training images that no one gave: with them a p-value can be as small as 5 %


class Call(NamedTuple):
    """What an audit is asked for, with what is meant where nothing is said."""

    model: Model
    prompts: list[Prompt]
    neutral: list[Prompt]
    config: AuditConfig
    entries: tuple[Detector, ...]
    chosen: bool  #: the detectors were named, so the audit must have the evidence of each
    training: TrainingData | None


@dataclass(frozen=True)
class Order:
    """An audit that was checked and settled, before its run is there."""

    work: Work  #: without the run
    entries: tuple[Detector, ...]
    looks: Looks | None  #: at training images, where there are any
    sections: dict[str, Any]  #: of the manifest, but that of the model

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """All sections of the manifest that a continued run must have."""
        return {"model": self.work.model.identity(list(self.work.texts))} | self.sections

    @cached_property
    def description(self) -> dict[str, Any]:
        """The same as JSON values, as a run compares it."""
        return describe(self.manifest["config"], {k: v for k, v in self.manifest.items() if k != "config"})

    def open_run(self, folder: str | Path, origin: Origin) -> Run:
        """Begin the run, or continue it."""
        return Run.open(folder, origin=origin, **self.manifest)


def listen(
    model: Model,
    prompts: Iterable[str | Prompt] | None,
    config: AuditConfig | None,
    neutral: Iterable[str | Prompt],
    detectors: Iterable[str | Detector] | None,
    training: TrainingData | None,
) -> Call:
    """Take the arguments of an audit, and check those that depend on no other."""
    if not isinstance(model, Model):
        raise ValueError(
            f"model: expected a jaxmem.Model such as StableDiffusion.load(source) gives, got {type(model).__name__}"
        )
    require_attributes(model)
    if training is not None and not isinstance(training, TrainingData):
        raise ValueError(f"training: expected a jaxmem.TrainingData, got {type(training).__name__}")
    prompts, neutral = _checked(*_listed(model, prompts, neutral, training))
    return Call(model, prompts, neutral, config or AuditConfig(), choose(detectors), detectors is not None, training)


def settle(call: Call, progress: Progress, say: Say, pictures: Pictures | None = None) -> Order:
    """Check what an audit is asked for, and settle what it does.

    Args:
        call: what is asked for.
        progress: told of each stage.
        say: gets what is left out.
        pictures: the training images of the call, where they were read before.
    """
    model, prompts, neutral, training = call.model, call.prompts, call.neutral, call.training
    every, entries = [*prompts, *neutral], call.entries
    config = _without_needless_spectra(call.config, entries)
    devices = jax.local_devices()
    sampler = require_steps(model.sampler(config.ddim_steps), model.shape)
    plan = Plan.of(ModelFacts.of(model, sampler), config, len(prompts), len(neutral), len(devices))
    chosen = columns(entries, plan.setting())
    if call.chosen:
        require_evidence(entries, plan.setting()._replace(at_images=training is not None))
    elif not chosen:  # with pairs there always is a detector
        raise ValueError(
            f"method: expected spectra of a model without an unconditional score, got {plan.method!r} and nothing else"
            f" that a detector looks at; leave `method` out, add a `count_budget`, or take 2 `noises` and all steps"
        )
    if (plan.with_images or plan.directions) and type(model).decode is Model.decode:
        to_pictures(np.zeros((1, *model.shape)))
    model.check()
    if training is not None:
        _check_encoding(model)
    texts = [prompt.text for prompt in every]
    conditions = _conditions(model, texts, len(prompts))
    truncated = model.truncated(texts)
    _say_what_is_missing(truncated, entries, plan, say)
    work = Work(
        run=None,
        plan=plan,
        model=model,
        sampler=sampler,
        conditions=conditions,
        noise=starting_noise(config.seed, plan.noises, model.shape),
        texts=texts,
        seed=config.seed,
        mesh=jax.make_mesh((len(devices),), ("points",), devices=devices) if len(devices) > 1 else None,
        progress=progress,
        detectors=chosen,
    )
    rows = [
        {"prompt": p.text, "label": p.label, "category": p.category, "truncated": bool(cut)}
        for p, cut in zip(every, truncated, strict=True)
    ]
    manifest: dict[str, Any] = {
        "config": asdict(config) | {"guidance": plan.guidance, "prompts": rows},
        "detectors": [detector.name for detector in entries],
        "evidence": {detector.name: detector.identity for detector in entries},
        "experiment": "audit",
        "plan": asdict(plan),
        "sampler": {"name": name_of(type(sampler)), "sha256": captured(partial(type(sampler).step, sampler))},
        "dtype": "float32",
    }
    looks = None
    if training is not None:
        looks = settle_looks(work, entries, pictures or Pictures(training, model, progress))
        look = next(iter(looks.works.values()))
        settled = {"timesteps": look.plan.timesteps, "captions_sha256": fingerprint(look.conditions)}
        manifest["training"] = training.identity | settled
    return Order(work, entries, looks, manifest)


def _listed(
    model: Model,
    prompts: Iterable[str | Prompt] | None,
    neutral: Iterable[str | Prompt],
    training: TrainingData | None,
) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts and the neutral ones that are meant where none are given."""
    listed, neutral = None if prompts is None else as_prompts(prompts), as_prompts(neutral, "neutral")
    if training is None:
        return model.prompts() if listed is None else listed, neutral
    if listed is None:
        listed = training.prompts(model)
        if model.has_pairs and NO_PROMPT not in listed:
            listed.append(NO_PROMPT)
    if not neutral and model.condition == "prompt":
        neutral = [one for one in read_prompts(NEUTRAL_CAPTIONS) if one not in listed][:NUM_NEUTRAL]
    return listed, neutral


def _check_encoding(model: Model) -> None:
    """Refuse a model that makes no samples of pictures, before any work."""
    kind = type(model)
    if kind.decode is not Model.decode and kind.picture_size is Model.picture_size:
        raise ValueError(
            f"training: expected a `picture_size` of a model with a `decode` of its own, got {kind.__name__} without"
        )
    found = np.shape(model.encode(np.zeros((1, *model.picture_size, 3), np.uint8)))
    if found != (1, *model.shape):
        raise ValueError(
            f"training: expected samples of shape {(1, *model.shape)} from the model's `encode`, got {found}"
        )


def _say_what_is_missing(truncated: list[bool], entries: Sequence[Detector], plan: Plan, say: Say) -> None:
    """Tell of prompts that are cut, and of detectors that the model cannot have."""
    if any(truncated):
        say(f"{sum(truncated)} prompt(s) have more tokens than the text encoder takes and are cut, as in diffusers")
    without = [entry.name for entry in entries if entry.needs.missing(plan.setting()) == UNPAIRED]
    if without:
        say(
            f"left out: {', '.join(without)}, which compare scores with and without the prompt; this model has no"
            f" unconditional score"
        )


def _checked(prompts: list[Prompt], neutral: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Refuse prompts that come twice, and a category that is called as the total is."""
    both = {prompt.text for prompt in prompts} & {prompt.text for prompt in neutral}
    if both:
        raise ValueError(
            f"neutral: expected prompts that are not audited, got {len(both)} that are ({min(both)!r:.60}); take them"
            f" out of one of the two lists"
        )
    merge(
        [
            *((f"audited prompt {n + 1}", prompt) for n, prompt in enumerate(prompts)),
            *((f"neutral prompt {n + 1}", prompt) for n, prompt in enumerate(neutral)),
        ],
        "prompts",
    )
    if any(prompt.category == "all" for prompt in prompts):
        raise ValueError("prompts: expected another category than 'all', which is that of the total; rename it")
    return prompts, neutral


def _without_needless_spectra(config: AuditConfig, entries: Iterable[Detector]) -> AuditConfig:
    """``method="auto"`` is "none" where nothing needs spectra and nothing else in the config speaks of them."""
    speaks = config.timesteps or config.directions or config.count_budget is not None
    if config.method != "auto" or speaks or any(isinstance(entry.needs, Counts | Eigenvalues) for entry in entries):
        return config
    return replace(config, method="none")


def _conditions(model: Model, texts: list[str], num_prompts: int) -> Any:
    """Conditions of all prompts, the neutral ones last, and, where there are pairs, of none; checked."""
    number = len(texts) + model.has_pairs
    try:
        conditions = model.conditions([*texts, ""] if model.has_pairs else texts)
    except ValueError:
        if num_prompts == len(texts):
            raise
        try:
            model.conditions(texts[num_prompts:])
        except ValueError as error:
            raise ValueError(f"neutral: {str(error).removeprefix('prompts: ')}") from None
        raise
    # of another number JAX would clamp an index that is too large
    for path, leaf in jax.tree_util.tree_flatten_with_path(conditions)[0]:
        if np.shape(leaf)[:1] != (number,):
            raise ValueError(
                f"model: expected `conditions` of {number} prompts with {number} as leading axis, got shape"
                f" {np.shape(leaf)}{' in ' + jax.tree_util.keystr(path) if path else ''}"
            )
    return conditions
