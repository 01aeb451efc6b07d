"""The paper's Figures 6 and 7 and those of Appendix A, from an audit whose prompts have categories."""

from pathlib import Path
from typing import Any

import numpy as np

from jaxmem.audit import Audit
from jaxmem.memorization.sharpness import positive_count, tangent_count
from jaxmem.prompts import NO_PROMPT
from jaxmem.report.style import CATEGORIES as COLOURS
from jaxmem.report.style import NEUTRAL, figure, mean_and_range, plain

_APPENDIX = 4  # prompts of a category


def draw(result: Audit, folder: Path, training: np.ndarray | None = None) -> list[Path]:
    """Draw what the audit has spectra for; ``training``, (N, h, w), is an image of each prompt's training set.

    Raises:
        ValueError: no prompt has a category, or no spectrum was taken.
    """
    kinds = categories(result)
    if not kinds or not result.eigenvalues.shape[2] or not result.eigenvalues.shape[3]:
        raise ValueError(
            f"audit: expected prompts with categories and spectra, got {len(kinds)} categories and"
            f" {result.eigenvalues.shape[2]} timesteps with spectra; add a category column, and a `method`"
        )
    made = [folder / "figure6.png", folder / "figure7.png"]
    _figure6(result, kinds, made[0], training)
    _figure7(result, kinds, made[1])
    for number, (kind, members) in enumerate(kinds.items()):
        if kind != NO_PROMPT.category:
            made.append(folder / f"figure{8 + number}.png")
            _appendix(result, members, kind, COLOURS[number % len(COLOURS)], made[-1])
    return made


def categories(result: Audit) -> dict[str, np.ndarray]:
    """Indices of the prompts of each category, in the order they come; "no prompt" last."""
    found: dict[str, list[int]] = {}
    for n, prompt in enumerate(result.prompts):
        if prompt.category is not None:
            found.setdefault(prompt.category, []).append(n)
    if (last := str(NO_PROMPT.category)) in found:
        found[last] = found.pop(last)
    return {kind: np.array(members) for kind, members in found.items()}


def _colour(kind: str, number: int) -> str:
    return NEUTRAL if kind == NO_PROMPT.category else COLOURS[number % len(COLOURS)]


def _picture(axis: Any, image: np.ndarray | None, title: str) -> None:
    axis.set_axis_off()
    if image is not None:
        axis.imshow(image, cmap="gray", interpolation="nearest")
        axis.set_title(title, fontsize=9)


def _what(result: Audit) -> str:
    return "eigenvalue" if result.method == "eigh" else "Ritz value"


def _figure6(result: Audit, kinds: dict[str, np.ndarray], path: Path, training: np.ndarray | None) -> None:
    """Of one prompt per category the images and the sorted spectra, of all the counts over the timesteps."""
    shown = {kind: members for kind, members in kinds.items() if kind != NO_PROMPT.category}
    sigma = result.spectral_sigma
    with figure(path, 11.0, 2.3 * len(shown)) as canvas:
        axes = canvas.subplots(len(shown), 5, width_ratios=(0.8, 0.8, 1.5, 1.5, 1.5), squeeze=False)
        for row, (kind, members) in zip(axes, shown.items(), strict=True):
            example, colour = members[0], _colour(kind, list(kinds).index(kind))
            _picture(row[0], None if training is None else training[example], f"{plain(kind, 24)}:\na training image")
            _picture(row[1], None if result.images is None else result.images[example, 0], "generated")
            for k, t in enumerate(result.spectral_timesteps):
                shade = 0.3 + 0.7 * (k + 1) / len(result.spectral_timesteps)
                values = result.eigenvalues[example, 0, k] * sigma[k] ** 2
                row[2].plot(np.arange(1, len(values) + 1), values, color=colour, alpha=shade, label=f"t = {t}")
            row[2].axhline(0, color="black", lw=0.7)
            row[2].set(xlabel=f"rank of the {_what(result)}", ylabel=f"σ² × {_what(result)}")
            row[2].set_title(plain(result.prompts[example].text, 34), fontsize=9)
            row[2].legend(fontsize=7, frameon=True, framealpha=1, edgecolor="none")  # readable above the line at 0
            for axis, name in ((row[3], "positive"), (row[4], "tangent")):
                counts, label = _over_time(result, members, name)
                mean_and_range(axis, result.spectral_timesteps, counts, color=colour)
                axis.set(xlabel="timestep t", ylabel=label)
                axis.set_title(f"{len(members)} prompts, mean and range", fontsize=9)
        for column in (3, 4):
            top = max(axis.get_ylim()[1] for axis in axes[:, column])
            for axis in axes[:, column]:
                axis.set_ylim(-0.02 * top, max(top, 1))


def _over_time(result: Audit, members: np.ndarray, name: str) -> tuple[np.ndarray, str]:
    """Counts (prompts × noises, timesteps) and what they are: exact, estimates by the audit, or of Ritz values."""
    columns = {
        detector.timestep: d for d, detector in enumerate(result.detectors) if detector.statistic == f"{name}-count"
    }
    if all(t in columns for t in result.spectral_timesteps.tolist()):
        found = result.scores[members][:, :, [columns[t] for t in result.spectral_timesteps.tolist()]]
        return found.reshape(-1, found.shape[2]), f"{name} eigenvalues" + (", estimated" if result.intervals else "")
    sigma = result.spectral_sigma
    values = result.eigenvalues[members].reshape(-1, *result.eigenvalues.shape[2:])
    noise = result.noise[members].reshape(len(values), -1)
    counts = positive_count(values, noise) if name == "positive" else tangent_count(values, sigma)
    return counts, f"{name} Ritz values"


def _figure7(result: Audit, kinds: dict[str, np.ndarray], path: Path) -> None:
    """The first spectra: of all prompts from one noise, and of one prompt per category from three noises."""
    length = result.eigenvalues.shape[3]
    sigma = result.sigma[result.timesteps == result.spectral_timesteps[0]]
    zoom = min(length, max(20, length // 8))
    rank = np.arange(1, length + 1)
    with figure(path, 9.5, 6.4) as canvas:
        axes = canvas.subplots(2, 2)
        for number, (kind, members) in enumerate(kinds.items()):
            colour = _colour(kind, number)
            for axis, most in ((axes[0, 0], length), (axes[0, 1], zoom)):
                for i, n in enumerate(members[:30]):
                    label = f"{plain(kind)} ({min(len(members), 30)})" if i == 0 else None
                    values = sigma**2 * result.eigenvalues[n, 0, 0, :most]
                    axis.plot(rank[:most], values, color=colour, lw=0.7, alpha=0.6, label=label)
            for axis, most in ((axes[1, 0], length), (axes[1, 1], zoom)):
                for j in range(min(3, result.eigenvalues.shape[1])):
                    values = sigma**2 * result.eigenvalues[members[0], j, 0, :most]
                    style = ("-", "--", ":")[j]
                    axis.plot(rank[:most], values, style, color=colour, lw=1.2, label=f"{plain(kind)}, noise {j + 1}")
        shown = min(3, result.eigenvalues.shape[1])
        noises = "one noise" if shown == 1 else f"{('two', 'three')[shown - 2]} noises"
        for row, words in zip(axes, ("all prompts, one noise", f"one prompt per category, {noises}"), strict=True):
            row[0].set_title(f"t = {result.spectral_timesteps[0]}: {words}", fontsize=9)
            row[1].set_title(f"the {zoom} largest", fontsize=9)
            for axis in row:
                axis.set(xlabel=f"rank of the {_what(result)}", ylabel=f"σ² × {_what(result)}")
            handles, labels = row[0].get_legend_handles_labels()
            for handle in handles:
                handle.set_alpha(1)
            row[1].legend(handles, labels, fontsize=7, ncols=1 + (len(labels) > 6))


def _appendix(result: Audit, members: np.ndarray, kind: str, colour: str, path: Path) -> None:
    """Generated images of some prompts of a category and their spectra at the last timestep (Figures 8 to 10)."""
    chosen, t = members[:_APPENDIX], result.spectral_timesteps[-1]
    with figure(path, 2.4 * len(chosen) + 0.4, 3.9) as canvas:
        axes = canvas.subplots(2, len(chosen), squeeze=False, height_ratios=(1, 1.1))
        for (above, below), n in zip(axes.T, chosen, strict=True):
            title = plain(result.prompts[n].text, 26)
            _picture(above, None if result.images is None else result.images[n, 0], title)
            values = result.eigenvalues[n, 0, -1]
            below.plot(np.arange(1, len(values) + 1), values, color=colour)
            below.axhline(0, color="black", lw=0.7)
            below.set(xlabel=f"rank of the {_what(result)}")
            below.set_title(f"t = {t}: {int((values > result.noise[n, 0, -1]).sum())} above 0", fontsize=9)
        axes[1, 0].set_ylabel(f"{_what(result)} (latent units⁻²)")
        canvas.suptitle(plain(kind), fontsize=10)
