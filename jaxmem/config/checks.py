"""Checks of single values, with the messages that all configurations share."""

from typing import Any


def whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")


def at_least(name: str, value: int, low: int) -> None:
    whole(name, value)
    if not value >= low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


LAST_SEED = 2**32 - 1  # what a JAX key takes without 64-bit mode


def positive(name: str, value: float) -> None:
    if not 0 < value <= 1_000_000:
        raise ValueError(f"{name}: expected more than 0 and at most 1,000,000, got {value}")


def whole_in_range(name: str, value: int, low: int, high: int) -> None:
    whole(name, value)
    in_range(name, value, low, high)


def in_range(name: str, value: int | float, low: int | float, high: int | float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")
