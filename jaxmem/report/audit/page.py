"""One page about an audit: a single file for screen and paper that loads nothing from anywhere."""

import base64
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from jaxmem import __version__
from jaxmem.memorization.evaluation import FEWEST_LABELS
from jaxmem.memorization.standing import mean
from jaxmem.report.audit import figures, training_figures
from jaxmem.report.audit.pictures import Sparkline, data_uri, thumbnail
from jaxmem.report.audit.summary import highlights, page_summary, shown_evaluation
from jaxmem.report.audit.training import template_values
from jaxmem.report.audit.view import AuditView
from jaxmem.runs.directory import Run
from jaxmem.runs.durable import write_atomically

TEMPLATES = Path(__file__).parent / "templates"
MOST_PICTURES = 1200  # thumbnails on one page, about 4 MB of photographs
BLOCK = 8  # detectors in one table, so that paper holds it
SIZE = "@@size-of-this-page@@"


def write_report(run: str | Path | Run, out: str | Path | None = None) -> Path:
    """Write the page of an audit, finished or not, and return its path: ``report.html`` in the run's folder.

    Takes seconds and some megabytes: figures as SVG, and at most 1,200 thumbnails of 112 pixels, of the prompts that
    stand first.

    Raises:
        ValueError: there is no run of an audit in the folder, or its files are damaged.
        OSError: the page cannot be written; one that was there is as before.
    """
    run = run if isinstance(run, Run) else Run.read(run)
    experiment = run.manifest.get("experiment")
    if experiment != "audit":
        raise ValueError(
            f"{run.directory}: expected the run of an audit, got {experiment!r} as the experiment of its manifest;"
            " `jaxmem.report.figures.draw` draws the others"
        )
    from jaxmem.audit import read_audit

    path = Path(out) if out is not None else run.directory / "report.html"
    return write_page(read_audit(run), path)


def write_page(result: Any, path: Path) -> Path:
    """Write the page of an `jaxmem.audit.Audit`, and return its path; writing it again gives the same bytes."""
    page = render(result)
    write_atomically(path, lambda stream: stream.write(page.encode()))
    return path


def render(result: Any, title: str = "Memorization audit") -> str:
    """The page of an `jaxmem.audit.Audit` as text; equal results give equal pages."""
    view = AuditView(result)
    rows, every = _rows(view), list(range(len(view.detectors)))
    evaluation, too_few = shown_evaluation(result.metrics or {})
    page = environment().get_template("report.html").render(
        title=title, version=__version__, size=SIZE, **style_and_script(),
        view=view, result=result, rows=rows, summary=page_summary(view, rows, evaluation) | {"too_few": too_few},
        fewest_labels=FEWEST_LABELS, evaluation=evaluation,
        held_out=(result.metrics or {}).get("held_out", {}) if evaluation else {},
        titles={detector.name: detector.title for detector in view.detectors},
        costs={row["detector"]: row for row in result.costs}, figures=_figures(view), facts=_facts(result.manifest),
        pictured=len(rows) if result.images is None else min(len(rows), MOST_PICTURES),
        highlights=highlights(result), directions=_directions(result),
        rules=_sparkline(view).height(np.array([0.0, -0.5])).tolist() if view.has_spectra else [],
        blocks=figures.balanced(every, BLOCK) if len(every) > len(view.leads) else [], glossary=_glossary(view),
        **template_values(result.training, result.detectors),
    )  # fmt: skip
    return with_size(page)


def with_size(page: str) -> str:
    """The page with its size in place of `SIZE`."""
    return page.replace(SIZE, f"{len(page.encode()) / 1e6:.1f} MB")


def style_and_script() -> dict[str, Any]:
    """What the templates need of the style sheet and the script: their code and, for the policy, its hashes."""
    files = {name: (TEMPLATES / f"page.{name}").read_text(encoding="utf-8") for name in ("css", "js")}
    return {"code": {n: Markup(text) for n, text in files.items()}, "hashes": {n: _hash(t) for n, t in files.items()}}


def _hash(text: str) -> str:
    """Hash of a script or a style sheet, for the content policy of the page, which allows no other."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def environment(*folders: Path) -> Environment:
    """What fills templates: those of these folders, then those of this page."""
    made = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters |= {
        "number": number, "value": value, "amount": amount, "duration": duration, "rate": rate, "interval": interval,
        "together": lambda text: text.replace(" = ", "\u00a0=\u00a0"),
    }  # fmt: skip
    return made


def number(x: Any, digits: int = 3) -> str:
    """A number for people: three digits, a real minus sign, a dash where there is none."""
    if x is None or math.isnan(x):
        return "–"
    if math.isinf(x):
        return "∞" if x > 0 else "−∞"
    x = float(f"{x:.{digits}g}") if abs(x) < 10**digits else x
    size = abs(x)
    if size and not 1e-3 <= size < 1e6:
        mantissa, exponent = f"{x:.{digits - 1}e}".split("e")
        text = f"{mantissa}·10^{int(exponent)}"
    elif float(x).is_integer() or size >= 10 ** (digits - 1):
        text = f"{x:,.0f}"
    else:
        text = f"{x:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"
    return text.replace("-", "−")


def value(x: Any) -> str:
    """A number for sorting, empty where there is none."""
    return "" if x is None or math.isnan(x) else repr(float(x))


def rate(x: Any) -> str:
    """A rate or an area to three decimals."""
    return "–" if x is None or math.isnan(x) else f"{x:.3f}"


def interval(ends: Any) -> str:
    """The two ends of an interval, empty where there is none."""
    return "" if ends is None or None in ends else f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def amount(bytes_: Any) -> str:
    """Bytes in the unit that fits."""
    if bytes_ is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if bytes_ >= size:
            return f"{bytes_ / size:.1f} {unit}"
    return f"{bytes_:.0f} B"


def duration(seconds: Any) -> str:
    """Seconds, minutes or hours, whichever fits."""
    if seconds is None or math.isnan(seconds):
        return "–"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def _sparkline(view: AuditView) -> Sparkline:
    return Sparkline(mean(view.scaled[:, :, view.judged], 1))


def _rows(view: AuditView) -> list[dict[str, Any]]:
    """The prompts in order, with their pictures and the spectrum at the judged timestep."""
    images, sampled = view.result.images, view.result.sampled
    each = 0 if images is None else min(4, max(1, MOST_PICTURES // max(len(view.prompts), 1)))
    spark = _sparkline(view) if view.has_spectra else None
    rows = []
    for place, i in enumerate(view.order.tolist()):
        shown = [] if images is None or place >= MOST_PICTURES else np.flatnonzero(sampled[i])[:each].tolist()
        rows.append(
            {
                "index": i,
                "place": None if np.isnan(view.places[i]) else place + 1,
                "prompt": view.prompts[i],
                "truncated": view.truncated[i],
                "pictures": [(j, thumbnail(images[i, j])) for j in shown],
                "spark": spark.points(mean(view.scaled[i, :, view.judged], 0)) if spark else "",
                "free": float(view.free[i]) if spark else math.nan,
                "flags": int(view.num_flags[i]),
            }
        )
    return rows


def _figures(view: AuditView) -> dict[str, list[tuple[str, str]]]:
    drawers: dict[str, Callable[[AuditView], list[figures.Drawing]]] = {
        "distributions": figures.distributions,
        "roc": figures.roc,
    }
    if view.has_spectra:
        drawers["spectra"] = figures.spectra
    if (view.has_spectra or view.counted) and len(view.result.spectral_timesteps) > 1:
        drawers["counts"] = figures.counts
    if len(view.result.timesteps) > 1 and (~np.isnan(view.result.eps_difference)).any():
        drawers["guidance"] = figures.guidance
    drawn = {name: draw(view) for name, draw in drawers.items()} if (~np.isnan(view.scores)).any() else {}
    if view.result.training is not None:
        drawn["looks"] = training_figures.looks(view.result.training)
    return {name: [(data_uri(d.svg, "svg+xml"), d.alternative) for d in some] for name, some in drawn.items()}


def _directions(result: Any) -> list[dict[str, Any]]:
    """The least memorized point first, with the pictures of each direction."""
    found = result.directions
    if found is None:
        return []
    sides = []
    for side, name in ((1, "least"), (0, "most")):
        prompt, noise = (int(x) for x in found.point[side])
        base = found.base[side].astype(np.float64)
        sides.append(
            {
                "name": name,
                "prompt": result.prompts[prompt],
                "noise": noise,
                "base": thumbnail(found.base[side], 192),
                "moved": [
                    {
                        "eigenvalue": float(found.eigenvalues[side, k]),
                        "pictures": [thumbnail(picture, 192) for picture in found.moved[side, k]],
                        "change": float(np.abs(found.moved[side, k] - base).mean()),
                    }
                    for k in range(found.moved.shape[1])
                ],
            }
        )
    return sides


def _glossary(view: AuditView) -> list[tuple[Any, list[str]]]:
    """Detectors with their names; what is the same at several timesteps is one entry."""
    entries: dict[Any, tuple[Any, list[str]]] = {}
    for detector in view.detectors:
        key = (detector.statistic, detector.formula, detector.source, detector.as_released)
        entries.setdefault(key, (detector, []))[1].append(detector.name)
    return list(entries.values())


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """The manifest as lines of name and value; long lists are left to the file."""
    lines: list[tuple[str, str]] = []

    def add(name: str, item: Any) -> None:
        if isinstance(item, dict):
            for key, inner in item.items():
                add(f"{name} › {key}" if name else str(key), inner)
        elif isinstance(item, list) and (len(item) > 12 or any(isinstance(one, dict) for one in item)):
            lines.append((name, f"{len(item):,} entries, see manifest.json"))
        else:
            lines.append((name, ", ".join(map(str, item)) if isinstance(item, list) else str(item)))

    add("", manifest)
    return lines
