"""What is said of one training image, by rules that are written down here: reproduced, isolated, no sign, not decided.

*Reproduced*: a generation returns it. The nearest training image of the generation is this one, or a duplicate of it,
and its calibrated ℓ2 distance is at most `COPY`; or, with a descriptor, their similarity is at least `SIMILAR`.

*Isolated*: no generation returned it, but the model's density has a peak of its own there. With enough held-out images,
the image stands out among them: its p-value, of several measures together, is at most the level that their number
allows (`jaxmem.memorization.chance`). Of images that are distributed as the held-out ones are, at most this share is
called isolated. Without held-out images, no direction is free there, from any noise.

*No sign*: both looks were taken, and neither found anything. *Not decided*: a look is missing, or cannot tell.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxmem.memorization.chance import LEVELS, is_beyond, level_of

Word = Literal["reproduced", "isolated", "no sign", "not decided"]
WORDS: tuple[Word, ...] = ("reproduced", "isolated", "no sign", "not decided")
COPY = 0.5  #: calibrated ℓ2 up to which a generation is a copy
SIMILAR = 0.5  #: similarity of descriptors from which it is: SSCD's published threshold, a convention
FEWEST_HELD_OUT = round(1 / max(LEVELS)) - 1  #: of which one image can stand out


class Verdict(NamedTuple):
    """What is said of one training image, and why."""

    word: Word
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Evidence:
    """What is known of one training image; NaN and None where it was not looked at."""

    drawn: int  #: generations from its caption
    copies: int  #: generations, of any prompt, that return it
    foreign: int  #: those of them that come from another prompt than its caption, or from none
    comparable: bool  #: generations were calibrated, or described
    closest: float  #: smallest calibrated ℓ2 of the generations whose nearest training image it is; NaN: there is none
    similarity: float  #: largest similarity of a generation to it
    looked: bool  #: it is among the images that are looked at
    p_value: float  #: of the look at the image, among held-out images
    held_out: int  #: held-out groups that it was compared with
    held_out_given: bool  #: there are held-out images
    free: float  #: largest number of free directions at the image over noises; NaN where it was not counted
    at_least_free: float  #: the same from Ritz values, which find some of them


def judge(found: Evidence) -> Verdict:
    """The verdict on one training image."""
    if found.copies:
        how = f"{found.copies} generations return it" if found.copies > 1 else "1 generation returns it"
        reasons = [how + (f", calibrated ℓ2 {found.closest:.2f}" if found.closest <= COPY else "")]
        if found.similarity >= SIMILAR:
            reasons.append(f"similarity {found.similarity:.2f}")
        if found.foreign:
            reasons.append(f"{found.foreign} of them without its caption")
        return Verdict("reproduced", tuple(reasons))
    isolated, reason = _isolated(found)
    if isolated:
        return Verdict("isolated", (reason,))
    missing = [] if found.drawn else ["nothing was drawn from its caption"]
    if found.drawn and not found.comparable:
        missing.append("too few training images to calibrate distances by; a descriptor would tell")
    if isolated is None:
        missing.append(reason)
    if missing:
        return Verdict("not decided", tuple(missing))
    return Verdict("no sign", (f"none of {found.drawn} generations returns it", reason))


def _isolated(found: Evidence) -> tuple[bool | None, str]:
    """Whether the look at an image found a peak of its own, None if it cannot tell; and why."""
    if not found.looked:
        return None, "it is not among the images that were looked at"
    if found.held_out_given:
        level = level_of(found.held_out)
        if level is None:
            return (
                None,
                f"{found.held_out} held-out images were looked at, and it takes {FEWEST_HELD_OUT} to tell",
            )
        if np.isnan(found.p_value):
            return None, "the look at it is not done"
        return bool(is_beyond(found.p_value, level)), f"p = {found.p_value:.2g} among {found.held_out} held-out images"
    if not np.isnan(found.free):
        return found.free < 0.5, f"{found.free:.0f} free directions at the image"
    if found.at_least_free >= 1:
        return False, f"at least {found.at_least_free:.0f} free directions at the image"
    return None, "without held-out images, only all eigenvalues or exact counts can show that no direction is free"


def copies(
    index: np.ndarray,
    calibrated: np.ndarray,
    similar: np.ndarray,
    similarity: np.ndarray,
) -> np.ndarray:
    """(P,) the training image that each generation returns, -1 where it returns none; by pixels where both say so.

    Args:
        index: nearest training image of each generation.
        calibrated: its calibrated ℓ2.
        similar: most similar training image, by descriptors.
        similarity: how similar it is; NaN without descriptors.
    """
    described = np.where(np.nan_to_num(similarity, nan=-np.inf) >= SIMILAR, similar, -1)
    return np.where(np.nan_to_num(calibrated, nan=np.inf) <= COPY, index, described)
