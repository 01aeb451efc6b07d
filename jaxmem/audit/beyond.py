"""What a call asks for beyond an audit that is there, which its manifest describes: prompts, noises, detectors."""

from dataclasses import replace
from typing import Any

from jaxmem.audit.settle import Call


def restrict(call: Call, manifest: dict[str, Any]) -> Call | None:
    """The part of a call that an audit with this manifest has, in its order; None if the audit has something else."""
    try:
        texts, number = [row["prompt"] for row in manifest["config"]["prompts"]], manifest["plan"]["num_prompts"]
        noises, names = manifest["config"]["noises"], manifest["detectors"]
    except (KeyError, TypeError):  # damaged: whoever compares all fields names it
        return None
    prompts = {one.text: one for one in [*call.prompts, *call.neutral]}
    entries = {one.name: one for one in call.entries}
    audited = {one.text for one in call.prompts}
    all_there = audited.issuperset(texts[:number]) and prompts.keys() >= set(texts)
    if not all_there or noises > call.config.noises or not entries.keys() >= set(names):
        return None
    return call._replace(
        prompts=[prompts[text] for text in texts[:number]],
        neutral=[prompts[text] for text in texts[number:]],
        config=replace(call.config, noises=noises),
        entries=tuple(entries[name] for name in names),
        chosen=False,
    )


def next_call(call: Call, manifest: dict[str, Any]) -> Call | None:
    """What to extend an audit to next; None where it has all."""
    base = restrict(call, manifest)
    if base is None:
        return None
    prompts = _added(base.prompts, call.prompts)
    neutral = [one for one in _added(base.neutral, call.neutral) if one not in prompts]
    if len(prompts) > len(base.prompts) or len(neutral) != len(base.neutral):
        return base._replace(prompts=prompts, neutral=neutral)
    if call.config.noises > base.config.noises:
        return base._replace(config=call.config)
    entries = tuple(_added(list(base.entries), list(call.entries)))
    return base._replace(entries=entries) if len(entries) > len(base.entries) else None


def _added(there: list[Any], wanted: list[Any]) -> list[Any]:
    """What is there, then what is wanted beside it."""
    return there + [one for one in wanted if one not in there]


def more_than(call: Call, manifest: dict[str, Any]) -> tuple[str, ...]:
    """What a call asks for beyond an audit, in words."""
    config, detectors = manifest["config"], manifest["detectors"]
    there = {row["prompt"] for row in config["prompts"]}
    prompts = sum(one.text not in there for one in [*call.prompts, *call.neutral])
    counted = {
        "prompt": prompts,
        "noise": call.config.noises - config["noises"],
        "detector": len(call.entries) - len(detectors),
    }
    return tuple(f"{number} {what}{'s' if number > 1 else ''}" for what, number in counted.items() if number)
