"""What is said of one prompt, by rules: its generations return training images, it stands out, or there is no sign.

Graded numbers stand beside it. Of training images there are verdicts of their own, `jaxmem.memorization.verdicts`.
"""

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from jaxmem.audit.result import Audit

Word = Literal["returns training images", "stands out", "no sign", "not decided"]


class PromptVerdict(NamedTuple):
    """What is said of one prompt, and why."""

    word: Word
    reasons: tuple[str, ...]


def prompt_verdicts(result: "Audit") -> list[PromptVerdict]:
    """The verdicts of the prompts, in their own order.

    *Returns training images*: a generation is a copy of one (`jaxmem.memorization.verdicts`). *Stands out*: the prompt
    is listed by `jaxmem.memorization.chance`. *Not decided*: neither is known, for want of reference prompts.
    """
    return [_verdict(result, n) for n in range(len(result.prompts))]


def _verdict(result: "Audit", n: int) -> PromptVerdict:
    listing, training, noises = result.ranking.listing, result.training, result.scores.shape[1]
    reasons: list[str] = []
    word: Word = "not decided"
    if listing.level is not None and listing.p[n] == listing.p[n]:
        word = "stands out" if listing.listed[n] else "no sign"
        reasons.append(f"p = {listing.p[n]:.2g} among {listing.num_reference} reference prompts")
    if training is not None and training.nearest is not None:
        points = slice(n * noises, (n + 1) * noises)
        copies = training.copy_of[points]
        found = dict.fromkeys(training.records[i].name for i in copies[copies >= 0].tolist())
        if found:
            shown = ", ".join(list(found)[:3]) + (", …" if len(found) > 3 else "")
            reasons.insert(0, f"{int((copies >= 0).sum())} of {noises} generations return {shown}")
            return PromptVerdict("returns training images", tuple(reasons))
        reasons.append("no generation returns a training image")
    return PromptVerdict(word, tuple(reasons or ("too few reference prompts to say how unusual it is",)))
