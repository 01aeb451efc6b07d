"""Models made of a score that is there: of images by class, or of one density alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxmem.diffusion import Prediction, Schedule
from jaxmem.model import Condition, Model
from jaxmem.prompts import NO_PROMPT, Prompt
from jaxmem.score import Score


@dataclass(frozen=True, eq=False)
class ClassConditional(Model):
    """A model of images whose condition is a class: its prompts are the names of the classes.

    Raises:
        ValueError: no class is named.
    """

    score: Score
    state: Any
    schedule: Schedule
    shape: tuple[int, ...]
    classes: Mapping[str, int]  #: by name the index that the score is given as ``cond``
    prediction: Prediction = "score"
    known: Sequence[Prompt] = field(default=())  #: what `prompts` gives, for instance with labels
    condition: Condition = field(default="class", init=False)

    def __post_init__(self) -> None:
        if not self.classes:
            raise ValueError("classes: expected a name and an index of at least one class, got none")

    def conditions(self, prompts: Sequence[str]) -> np.ndarray:
        """Class indices, int32, shape (n,)."""
        for prompt in prompts:
            if prompt not in self.classes:
                names = ", ".join(map(repr, self.classes))
                raise ValueError(f"prompts: expected names of the classes of this model ({names}), got {prompt!r:.60}")
        return np.array([self.classes[prompt] for prompt in prompts], np.int32)

    def prompts(self) -> list[Prompt]:
        return list(self.known) or [Prompt(name) for name in self.classes]


@dataclass(frozen=True, eq=False)
class Unconditional(Model):
    """A model whose score has no condition (``cond`` is None): its one prompt is the empty one."""

    score: Score
    state: Any
    schedule: Schedule
    shape: tuple[int, ...]
    prediction: Prediction = "score"
    condition: Condition = field(default="none", init=False)

    def conditions(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if prompt:
                raise ValueError(
                    f"prompts: expected the empty one alone, as this model has no condition, got {prompt!r:.60}"
                )

    def prompts(self) -> list[Prompt]:
        return [NO_PROMPT]
