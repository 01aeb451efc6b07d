"""What a run found, as a table and a few sentences for the terminal."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxmem.audit import read_audit
from jaxmem.report.audit.summary import shown_evaluation
from jaxmem.report.audit.view import AuditView
from jaxmem.report.figures import of_this_version
from jaxmem.runs.directory import Run
from jaxmem.terminal import visible

_NARROWEST = 20  # of a column of prompts: what is narrower says nothing
_LONGEST = 60  # characters of a prompt


def print_summary(directory: Path, figures: list[Path], console: Console, words: Callable[[str], str] = str) -> None:
    """Print the table of a finished run, what it means in plain words, and where its figures are.

    ``words`` puts a warning into those of whoever reads it.
    """
    run = Run.read(directory)
    metrics, config = run.metrics(), run.manifest["config"]
    from jaxmem.report.finetune_terminal import print_finetune  # which prints by `print_table`

    printers = {"mnist": _mnist, "toy2d": _toy2d, "generate": _generate, "spectrum": _spectrum, "verbatim": _verbatim}
    printers |= {"finetune": print_finetune, "dimension": _dimension}
    with of_this_version(run):
        printers[run.manifest["experiment"]](metrics, config, console)
    _print_warnings(metrics, console, words)
    minutes = metrics["wall_seconds"]["total"] / 60
    products = f"{metrics['num_products']:,} Jacobian products; " if metrics["num_products"] else ""
    console.print(f"\n{products}{minutes:.1f} minutes in all. Figures:")
    for path in figures:
        print_path(path, console)


def _print_warnings(metrics: dict[str, Any], console: Console, words: Callable[[str], str]) -> None:
    """What may be wrong with the model as it was read; runs of other experiments and of before have none."""
    for warning in metrics.get("warnings", ()):
        console.print(f"warning: {words(warning)}", style="bold", highlight=False, markup=False)


def print_audit(directory: Path, console: Console, words: Callable[[str], str] = str) -> None:
    """Print the most memorized prompts of a finished audit, how well labels agree, and where the results are."""
    run = Run.read(directory)
    view, metrics = AuditView(read_audit(run)), run.metrics()
    shown = [view.detectors[d].name for d in view.leads][:5]
    rows = []
    for n in view.order[:10].tolist():
        row = metrics["prompts"][n]
        numbers = [
            "" if row["scores"][name] is None else f"{row['scores'][name]:.4g} ({row['rank'][name]})" for name in shown
        ]
        rows.append([row["prompt"], *numbers])
    title = "The most memorized prompts, in the order of the page: score (rank)"
    print_table(title, ["prompt", *shown], rows, console, words="prompt")
    listing, listed = view.listing, int(view.listing.listed.sum())
    if listing.level is not None:
        console.print(
            f"{listed} of {len(view.prompts)} stand out from {listing.num_reference} reference prompts by all measures"
            f" together (p ≤ {listing.level}); by chance at most {listing.by_chance:.2g} would on average",
            highlight=False,
        )
    evaluation, _ = shown_evaluation(metrics)
    for name in shown:
        areas = []
        for kind, found in evaluation.get(name, {}).items():
            if found["auc"] is not None:
                ends = found["auc_interval"]
                areas.append(
                    f"{visible(kind)} {found['auc']:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else "")
                )
        if areas:
            console.print(f"{name}: AUC against the labels: {'; '.join(areas)}", highlight=False, markup=False)
    _print_warnings(metrics, console, words)
    if training := metrics.get("training"):
        said = ", ".join(f"{number} {word}" for word, number in training["verdicts"].items())
        console.print(f"Training images: {said}. One row per image:", highlight=False)
        print_path(directory / "images.csv", console)
    console.print(
        f"{metrics['num_evaluations']:,} evaluations, {metrics['num_products']:,} products,"
        f" {metrics['wall_seconds']['total'] / 60:.1f} minutes. One row per prompt:"
    )
    print_path(directory / "results.csv", console)


def print_path(path: Path, console: Console) -> None:
    """Print where a file is."""
    console.print(f"  {visible(str(path))}", highlight=False, soft_wrap=True, markup=False)


def print_table(
    title: str, names: Sequence[str], rows: Sequence[Sequence[str]], console: Console, words: str = ""
) -> None:
    """Print a table whose numbers are whole at any width; the column ``words`` has texts of others and gives way.

    Where the widest line of numbers does not fit, headers and then cells go over several lines; where that is not
    enough, every row is a list.
    """
    texts = names.index(words) if words else -1
    cells = [[visible(cell) for cell in row] for row in rows]
    for narrow in (False, True):
        widths = [_width(name, [row[i] for row in cells], narrow) for i, name in enumerate(names)]
        left = console.width - sum(w for i, w in enumerate(widths) if i != texts) - 2 * len(names)  # spaces between
        longest = 0 if texts < 0 else max([cell_len(words), *(cell_len(row[texts]) for row in cells)])
        if left >= min(_NARROWEST, longest):
            if texts >= 0:
                widths[texts] = min(left, longest, _LONGEST)
            break
    else:
        _print_list(title, names, cells, texts, console)
        return
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=True, show_edge=False, padding=(0, 1, 0, 0))
    for i, (name, width) in enumerate(zip(names, widths, strict=True)):
        justify: Any = "left" if i == texts else "right"
        table.add_column(
            Text(_broken(name, width)), justify=justify, width=width, overflow="fold", vertical="top", no_wrap=False
        )
    for row in cells:
        shown = [Text(cell) for cell in row]
        if texts >= 0:
            shown[texts].truncate(_LONGEST, overflow="ellipsis")
        table.add_row(*shown)
    console.print(table)


def _print_list(title: str, names: Sequence[str], rows: Sequence[Sequence[str]], texts: int, console: Console) -> None:
    """Each row as a line of its text, and its numbers with their names below it."""
    console.print(title, highlight=False, markup=False)
    for row in rows:
        first = texts if texts >= 0 else 0
        head = Text(row[first] if texts >= 0 else f"{names[0]} {row[0]}")
        head.truncate(_LONGEST, overflow="ellipsis")
        console.print(head, overflow="fold")
        for i, (name, cell) in enumerate(zip(names, row, strict=True)):
            if i != first and cell:
                console.print(Text(f"  {name}: {cell}"), overflow="fold")


def _width(name: str, cells: Sequence[str], narrow: bool) -> int:
    """Of a column of numbers: of its longest cell, or part of it between spaces, and of the parts of its header."""
    parts = [part for cell in cells for part in (cell.split() if narrow else [cell])]
    return max(cell_len(part) for part in [*parts, *_pieces(name)])


def _pieces(name: str) -> list[str]:
    """Where a header may be broken: at spaces, after hyphens, before the timestep."""
    return re.findall(r" ?(?:@?[^\s@-]+-?|[@-]+)", name)


def _broken(name: str, width: int) -> str:
    lines = [""]
    for piece in _pieces(name):
        if lines[-1] and cell_len(lines[-1] + piece) > width:
            lines.append("")
        lines[-1] += piece if lines[-1] else piece.lstrip()
    return "\n".join(lines)


def _spread(row: dict[str, float]) -> str:
    return f"{row['mean']:.1f}  ({row['min']:.0f} to {row['max']:.0f})"


def _mnist(metrics: dict[str, Any], config: dict[str, Any], console: Console) -> None:
    general, memorized = f"digit {config['general_digit']}", f"digit {config['memorized_digit']}"
    analysed = metrics["num_samples"]["analysed"]
    names = ["timestep", f"{general}, general", f"{memorized}, memorized", "AUC", "tangent count, the same two"]
    rows = []
    for t in reversed(metrics["positive_count"]):
        counts, free = metrics["positive_count"][t], metrics["tangent_count"][t]
        rows.append(
            [
                t,
                _spread(counts["general"]),
                _spread(counts["memorized"]),
                f"{metrics['auc_positive_count'][t]:.3f}",
                f"{free['general']['mean']:.1f} / {free['memorized']['mean']:.1f}",
            ]
        )
    title = "Positive eigenvalues of the Hessian of log p_t, of 784: mean (smallest to largest)"
    print_table(title, names, rows, console)
    copies = metrics["memorized_are_the_training_image"]
    distance, last = metrics["nearest_train_distance"], next(iter(metrics["positive_count"]))
    first = metrics["positive_count"][last]
    console.print(
        "A positive eigenvalue is a direction in which the density curves upwards: the sample can move along it and"
        f" become more likely. At t = {last} the {analysed['general']} new samples of {general} have"
        f" {first['general']['mean']:.1f} such directions on average, the {analysed['memorized']} samples of"
        f" {memorized} {first['memorized']['mean']:.1f}: {_verdict(metrics, last, memorized)}"
    )
    console.print(
        "AUC is the chance that a general sample has more positive eigenvalues than a memorized one. Check by distance:"
        f" for {copies:.0%} of the samples of {memorized} the nearest training image is the memorized one,"
        f" {distance['memorized']:.2f} away on average; the analysed samples of {general} are"
        f" {distance['general']:.2f} from theirs."
    )


def _verdict(metrics: dict[str, Any], t: str, memorized: str) -> str:
    """What the counts at one timestep say, in the words of the three things that can happen, and a fourth."""
    mean = {name: row["mean"] for name, row in metrics["positive_count"][t].items()}
    auc = metrics["auc_positive_count"][t]
    if mean["memorized"] > 0.5:
        return f"the samples of {memorized} are not on an isolated peak; by this measure the model did not memorize it."
    if auc < 0.9:
        return (
            f"too few to tell the general samples from those of {memorized} (AUC {auc:.3f}), so this count says nothing"
            " about memorization here."
        )
    if metrics["memorized_are_the_training_image"] < 0.9:
        return (
            f"the samples of {memorized} sit on an isolated peak, yet their nearest training image is mostly not the"
            " repeated one: look at the samples (Figure 3) before concluding anything."
        )
    return (
        "they sit on an isolated peak, on the one training image the model memorized. The count alone tells the two"
        f" apart with an AUC of {auc:.3f}."
    )


def _toy2d(metrics: dict[str, Any], config: dict[str, Any], console: Console) -> None:
    share = config["num_copies"] / (config["num_copies"] + config["num_gaussian"])
    names = ["timestep", "memorized path", "general path", "first order only: memorized", "general"]
    sources = (metrics["hessian_rel_error"], metrics["first_order"]["hessian_rel_error"])
    rows = []
    for t in ("900", "500", "300", "200", "100", "50", "20"):
        errors = [source[t][path] for source in sources for path in ("memorized", "general")]
        rows.append([t, *(f"{error:.1%}".rstrip("%") for error in errors)])
    medians = [100 * source["hessian_rel_error_median"] for source in (metrics, metrics["first_order"])]
    rows.append(["median 20–900", f"{medians[0]:.2f}", "", f"{medians[1]:.2f}", ""])
    print_table("Error of the learned Hessian, ‖learned − exact‖ / ‖exact‖, in per cent", names, rows, console)
    console.print(
        f"{metrics['memorized_fraction']:.1%} of {config['num_samples']:,} samples landed on the duplicated point,"
        f" which is {share:.1%} of the data. On the path to it the exact Hessian falls to −I/σ²: a sharp isolated peak;"
        f" the learned one is {metrics['hessian_rel_error']['20']['memorized']:.0%} off at t = 20. On the path to the"
        " Gaussian the exact eigenvalues stay near those of the Gaussian."
    )


def _generate(metrics: dict[str, Any], config: dict[str, Any], console: Console) -> None:
    count = len(metrics["prompts"])
    console.print(
        f"{count} image{'s' if count > 1 else ''} by {config['ddim_steps']} DDIM steps with guidance"
        f" {config['guidance']:g}, seed {config['seed']}."
    )


def _spectrum(metrics: dict[str, Any], config: dict[str, Any], console: Console) -> None:
    title = (
        f"Ritz values of the Hessian of log p_t at t = {metrics['timestep']} (sigma {metrics['sigma']:.4f}),"
        f" {metrics['method']}, dimension {metrics['dimension']:,}; ± is the residual"
    )
    rows = []
    for point in metrics["points"]:
        largest = f"{point['largest'][0]:.4g} ± {point['largest_residuals'][0]:.1g}"
        smallest = f"{point['smallest'][-1]:.4g} ± {point['smallest_residuals'][-1]:.1g}"
        words = point["prompt"] if point["kind"] == "conditional" else "(no prompt)"
        positive = f"{point['num_positive_ritz_values']} of {point['num_ritz_values']}"
        rows.append([str(point["image"]), words, largest, smallest, positive, f"{point['asymmetry']:.1%}"])
    names = ["image", "prompt", "largest", "smallest", "above 0", "asymmetry"]
    print_table(title, names, rows, console, words="prompt")
    exact = (
        "of the symmetric part ½(J + Jᵀ), which has at least as many positive eigenvalues as Ritz values above 0"
        if config["method"] == "lanczos"
        else "of J itself, which is not exactly symmetric: to bound the number of positive eigenvalues use lanczos"
    )
    console.print(
        f"They are {exact}. A true Hessian has no eigenvalue below -1/sigma² = {metrics['lower_bound']:.4g}; a learned"
        " one may. 'Above 0' leaves out what rounding could have made; asymmetry is that of"
        f" {metrics['asymmetry_of']}."
    )


def _verbatim(metrics: dict[str, Any], config: dict[str, Any], console: Console) -> None:  # noqa: ARG001
    kinds = ("none", "template", "matching")
    rows = []
    for t, row in metrics["counts"].items():
        cells = [f"{row[kind]['positive'][0]:.1f}, {row[kind]['positive_of_training_set'][0]:.1f}" for kind in kinds]
        rows.append([t, *cells, f"{metrics['auc']['audit'][f'positive-count@t{t}']['matching']['auc']:.3f}"])
    title = "Positive eigenvalues of 256: the model, and exactly the caption's training set"
    print_table(title, ["t", *kinds, "AUC, matching"], rows, console)
    for name, found in metrics["earliest"].items():
        times = ", ".join(f"{kind} {'never' if t is None else f't = {t}'}" for kind, t in found.items())
        console.print(f"{name}: AUC 0.95 from {times}", highlight=False)
    console.print(
        f"{metrics['captions_returned']:.0%} of the matching captions return their training image from at least one"
        f" noise; {metrics['matching_returned']:.0%} of the images drawn for them are it."
    )


def _dimension(metrics: dict[str, Any], config: dict[str, Any], console: Console) -> None:  # noqa: ARG001
    """Print mean and spread of every estimator on every manifold."""
    estimators = list(dict.fromkeys(row["estimator"] for row in metrics["table"]))
    rows: dict[str, list[str]] = {}
    for row in metrics["table"]:
        begun = rows.setdefault(row["manifold"], [row["manifold"], str(row["dimension"])])
        begun.append(f"{row['mean']:.2f} ± {row['spread']:.2f}")
    print_table("Local dimension", ["manifold", "true", *estimators], list(rows.values()), console)
