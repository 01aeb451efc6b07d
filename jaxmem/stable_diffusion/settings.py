"""Reading a JSON object of settings strictly: every field is used, neutral or inert, or it is an error.

What cannot change the function is passed over by a rule, not by being unknown. A setting is inert

- if its name begins with an underscore: diffusers and transformers write these for themselves and make no argument of
  them;
- if it is unknown and null: whatever it is, it was not set;
- if its name speaks of dropout and its value is a share: dropout is for training;
- if it is listed with its reason, in `TRAINING` for every part or where the part is read;
- if it is at the value that changes nothing, where 1 and 1.0 are the same and 1 and true are not.

Anything else is refused, unless the user names it (`Reading.ignore_settings`).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

#: About training, whatever the part: name and reason.
TRAINING = {
    "gradient_checkpointing": "recomputes activations in the backward pass, to save memory",
    # what diffusers' EMAModel.save_pretrained writes beside the averaged weights
    "decay": "of the average of weights, which is in the file",
    "min_decay": "of the average of weights",
    "optimization_step": "how often the average of weights was updated",
    "update_after_step": "when the average of weights began",
    "use_ema_warmup": "how the average of weights began",
    "inv_gamma": "how the average of weights began",
    "power": "how the average of weights began",
}


@dataclass
class Reading:
    """What the user decided about a model's files, and what reading them has to say to the user."""

    ignore_settings: tuple[str, ...] = ()  #: names; a setting that would be refused is read as if it were not there
    prediction_type: str | None = None  #: in place of the scheduler file's, in diffusers' words
    unet: Path | None = None  #: the folder of another UNet, read in place of the model's
    clip_skip: int = 0  #: layers at the end of the text encoder that are left out
    height: int | None = None  #: of pictures, in pixels; by default that of the UNet's settings
    width: int | None = None  #: of pictures, in pixels; by default that of the UNet's settings
    parameters: str = "float32"  #: in what type the network's are kept, or "bfloat16"
    given: frozenset[Path] = frozenset()  #: files that are put into the model, with links followed
    chosen: dict[str, Any] = field(default_factory=dict)  #: what became part of the model beside its files, by name
    ignored: dict[str, str] = field(default_factory=dict)  #: what was ignored by request: file and name, and the value
    warnings: list[str] = field(default_factory=list)  #: what may be wrong with the model as it was read
    notes: list[str] = field(default_factory=list)  #: what is as it should be and may surprise

    def ignore(self, where: str, name: str, value: Any) -> None:
        """Record a setting that is ignored by request."""
        self.ignored[f"{where}: {name}"] = f"{value!r:.80}"

    def finish(self) -> list[str]:
        """The warnings, with those about decisions, when everything is read."""
        for name, value in self.ignored.items():
            self.warnings.append(
                f"{name} = {value} is ignored, as asked; if it changes what the model computes, all numbers are of"
                f" another model"
            )
        unused = [name for name in self.ignore_settings if not any(key.endswith(f": {name}") for key in self.ignored)]
        if unused:
            self.notes.append(f"ignore_settings: nothing was refused for {', '.join(unused)}, nothing is ignored")
        self.warnings[:] = dict.fromkeys(self.warnings)  # a folder that diffusers opens is read twice
        return self.warnings

    @property
    def decisions(self) -> dict[str, Any]:
        """What the user decided and had an effect, for a run's manifest; empty without."""
        found: dict[str, Any] = {"ignored_settings": dict(self.ignored)} if self.ignored else {}
        found |= {"prediction_type": self.prediction_type} if self.prediction_type else {}
        found |= {"clip_skip": self.clip_skip} if self.clip_skip else {}
        found |= {"parameters": self.parameters} if self.parameters != "float32" else {}
        return found | self.chosen


def as_list(name: str, values: Any) -> tuple[Any, ...]:
    """An argument that is a list of texts or paths; one alone would be taken for its letters."""
    if isinstance(values, str | Path):
        raise ValueError(f"{name}: expected a list, got one text; write [{str(values)!r}]")
    return tuple(values)


class SettingsReader:
    """Takes fields out of a config and collects what is wrong with them."""

    def __init__(
        self,
        config: Mapping[str, Any],
        where: str,
        class_name: str | tuple[str, ...],
        reading: Reading | None = None,
        other_class: str = "",  # what to do about another class
    ) -> None:
        self.config, self.where = dict(config), where
        self.reading = Reading() if reading is None else reading
        self.problems: list[str] = []
        self._refused: list[str] = []  # names whose problem goes away with the setting
        self.seen: set[str] = set()
        names = (class_name,) if isinstance(class_name, str) else class_name
        found = self.config.get("_class_name", names[0])
        if found not in names:
            self.problems.append(f"_class_name: expected {' or '.join(names)}, got {found!r}{other_class}")

    def take(self, name: str, default: Any, check: Callable[[Any], bool], expected: str) -> Any:
        self.seen.add(name)
        value = self.config.get(name, default)
        if check(value):
            return value
        self.refuse(name, f"expected {expected}, got {value!r}", removable=name in self.config and check(default))
        return default

    def refuse(self, name: str, problem: str, *, removable: bool = True) -> None:
        """A problem of one setting, unless the user ignores it; ``removable``: is there a value to go on with?"""
        if removable and name in self.reading.ignore_settings:
            self.reading.ignore(self.where, name, self.config.get(name))
            return
        self.problems.append(f"{name}: {problem}")
        if removable:
            self._refused.append(name)

    def size(self, name: str, default: Any) -> Any:
        """A whole number, at least 1."""
        return self.take(name, default, is_size, "a whole number of at least 1")

    def sizes(self, name: str, default: Any) -> tuple[int, ...]:
        return tuple(self.take(name, default, are_sizes, "a list of whole numbers of at least 1"))

    def number(self, name: str, default: float | int, low: float | int, high: float | int) -> float | int:
        return self.take(name, default, lambda v: is_number(v) and low <= v <= high, f"a number from {low} to {high}")

    def flag(self, name: str, default: bool) -> bool:
        return self.take(name, default, is_flag, "true or false")

    def choice(self, name: str, default: Any, allowed: Iterable[Any]) -> Any:
        allowed = tuple(allowed)
        return self.take(name, default, partial(_is_one_of, allowed), either(allowed))

    def neutral(self, **values: Any) -> None:
        """Fields that must be absent or at the given value; a tuple lists several."""
        for name, value in values.items():
            allowed = value if isinstance(value, tuple) else (value,)
            self.choice(name, allowed[0], allowed)

    def inert(self, *names: str) -> None:
        """Fields that cannot change the function, whatever they say."""
        self.seen.update(names)

    def require(self, condition: Any, problem: str) -> None:
        if not condition:
            self.problems.append(problem)

    def finish(self) -> None:
        """Raise one ValueError for everything found."""
        for name in sorted(self.config.keys() - self.seen):
            if not _is_inert(name, self.config[name]):
                self.refuse(name, f"not known, got {self.config[name]!r}")
        if self.problems:
            listed = "\n  ".join(self.problems)
            remedy = (
                f"\nCorrect the file. Where a setting cannot change what the model computes, load without it:"
                f" `ignore_settings={list(dict.fromkeys(self._refused))!r}`"
            )
            raise ValueError(
                f"{self.where}: {len(self.problems)} setting{'s' if len(self.problems) > 1 else ''} that jaxmem does"
                f" not support:\n  {listed}{remedy if self._refused else ''}"
            )


def _is_inert(name: str, value: Any) -> bool:
    """The rule of this module's head for a setting that the part does not know."""
    dropout = "dropout" in name.lower() and is_number(value) and 0 <= value <= 1
    return name.startswith("_") or value is None or dropout or name in TRAINING


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def is_none_or(check: Callable[[Any], bool], value: Any) -> bool:
    return value is None or check(value)


def is_size(value: Any) -> bool:
    return is_whole(value) and value >= 1


def are_sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(is_size, value))


def _is_one_of(allowed: tuple[Any, ...], value: Any) -> bool:
    # 1 == True and 1 == 1.0 in Python; only the second holds in a config
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed)


def either(values: tuple[Any, ...]) -> str:
    return " or ".join(map(repr, values))


def is_before(version: Any, limit: tuple[int, int]) -> bool:
    """Whether a config says that an older diffusers wrote it; absent versions say nothing."""
    numbers = str(version or "").split(".")[:2]
    return len(numbers) == 2 and all(number.isdigit() for number in numbers) and tuple(map(int, numbers)) < limit
