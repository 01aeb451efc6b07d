"""Reading a JSON object of settings strictly: every field is used, neutral or ignored by name, or it is an error."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

_IGNORED = {"_class_name", "_diffusers_version", "_name_or_path", "_commit_hash", "_use_default_values"}


class SettingsReader:
    """Takes fields out of a config and collects what is wrong with them."""

    def __init__(self, config: Mapping[str, Any], where: str, class_name: str | tuple[str, ...]) -> None:
        self.config, self.where = dict(config), where
        self.problems: list[str] = []
        names = (class_name,) if isinstance(class_name, str) else class_name
        found = self.config.get("_class_name", names[0])
        if found not in names:
            self.problems.append(f"_class_name: expected {' or '.join(names)}, got {found!r}")
        self.seen = set(_IGNORED)

    def take(self, name: str, default: Any, check: Callable[[Any], bool], expected: str) -> Any:
        self.seen.add(name)
        value = self.config.get(name, default)
        if check(value):
            return value
        self.problems.append(f"{name}: expected {expected}, got {value!r}")
        return default

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

    def ignore(self, *names: str) -> None:
        self.seen.update(names)

    def require(self, condition: Any, problem: str) -> None:
        if not condition:
            self.problems.append(problem)

    def finish(self) -> None:
        """Raise one ValueError for everything found."""
        for name in sorted(self.config.keys() - self.seen):
            self.problems.append(f"{name}: not known, got {self.config[name]!r}")
        if self.problems:
            listed = "\n  ".join(self.problems)
            raise ValueError(
                f"{self.where}: {len(self.problems)} setting{'s' if len(self.problems) > 1 else ''} that jaxmem does"
                f" not support; only Stable Diffusion 1.x and 2.x and models of their architecture load:\n  {listed}"
            )


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
