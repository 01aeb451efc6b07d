"""What a run found, as a table and a few sentences for the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jaxmem.audit import read_audit
from jaxmem.report.audit_view import AuditView
from jaxmem.report.figures import of_this_version
from jaxmem.runs import Run


def print_summary(directory: Path, figures: list[Path], console: Console) -> None:
    """Print the table of a finished run, what it means in plain words, and where its figures are."""
    run = Run.read(directory)
    metrics, config = run.metrics(), run.manifest["config"]
    printers = {"mnist": _mnist, "toy2d": _toy2d, "generate": _generate, "spectrum": _spectrum, "verbatim": _verbatim}
    with of_this_version(run):
        printers[run.manifest["experiment"]](metrics, config, console)
    _print_warnings(metrics, console)
    minutes = metrics["wall_seconds"]["total"] / 60
    products = f"{metrics['num_products']:,} Jacobian products; " if metrics["num_products"] else ""
    console.print(f"\n{products}{minutes:.1f} minutes in all. Figures:")
    for path in figures:
        console.print(f"  {path}", highlight=False, soft_wrap=True, markup=False)


def _print_warnings(metrics: dict[str, Any], console: Console) -> None:
    """What may be wrong with the model as it was read; runs of other experiments and of before have none."""
    for warning in metrics.get("warnings", ()):
        console.print(f"warning: {warning}", style="bold", highlight=False, markup=False)


def print_audit(directory: Path, console: Console) -> None:
    """Print the most memorized prompts of a finished audit, how well labels agree, and where the results are."""
    run = Run.read(directory)
    view, metrics = AuditView(read_audit(run)), run.metrics()
    shown = [view.detectors[d].name for d in view.leads][:5]
    table = Table(title="The most memorized prompts, in the order of the page: score (rank)")
    table.add_column("prompt", overflow="ellipsis", max_width=60, no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right")
    for n in view.order[:10].tolist():
        row = metrics["prompts"][n]
        cells = [
            "" if row["scores"][name] is None else f"{row['scores'][name]:.4g} ({row['rank'][name]})" for name in shown
        ]
        table.add_row(Text(row["prompt"]), *cells)
    console.print(table)
    for name in shown if metrics["evaluation"] else ():
        areas = []
        for kind, found in metrics["evaluation"][name].items():
            if found["auc"] is not None:
                ends = found["auc_interval"]
                areas.append(f"{kind} {found['auc']:.3f}" + (f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends else ""))
        if areas:
            console.print(f"{name}: AUC against the labels: {'; '.join(areas)}", highlight=False, markup=False)
    _print_warnings(metrics, console)
    console.print(
        f"{metrics['num_evaluations']:,} evaluations, {metrics['num_products']:,} products,"
        f" {metrics['wall_seconds']['total'] / 60:.1f} minutes. One row per prompt:"
    )
    console.print(f"  {directory / 'results.csv'}", highlight=False, soft_wrap=True, markup=False)


def _spread(row: dict[str, float]) -> str:
    return f"{row['mean']:.1f}  ({row['min']:.0f} to {row['max']:.0f})"


def _mnist(metrics: dict[str, Any], config: dict[str, Any], console: Console) -> None:
    general, memorized = f"digit {config['general_digit']}", f"digit {config['memorized_digit']}"
    analysed = metrics["num_samples"]["analysed"]
    table = Table(title="Positive eigenvalues of the Hessian of log p_t, of 784: mean (smallest to largest)")
    columns = ("timestep", f"{general}, general", f"{memorized}, memorized", "AUC", "tangent count, the same two")
    for name in columns:
        table.add_column(name, justify="right")
    for t in reversed(metrics["positive_count"]):
        counts, free = metrics["positive_count"][t], metrics["tangent_count"][t]
        table.add_row(
            t,
            _spread(counts["general"]),
            _spread(counts["memorized"]),
            f"{metrics['auc_positive_count'][t]:.3f}",
            f"{free['general']['mean']:.1f} / {free['memorized']['mean']:.1f}",
        )
    console.print(table)
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
    table = Table(title="Error of the learned Hessian, ‖learned − exact‖ / ‖exact‖, in per cent")
    for name in ("timestep", "memorized path", "general path", "first order only: memorized", "general"):
        table.add_column(name, justify="right")
    sources = (metrics["hessian_rel_error"], metrics["first_order"]["hessian_rel_error"])
    for t in ("900", "500", "300", "200", "100", "50", "20"):
        errors = [source[t][path] for source in sources for path in ("memorized", "general")]
        table.add_row(t, *(f"{error:.1%}".rstrip("%") for error in errors))
    medians = [100 * source["hessian_rel_error_median"] for source in (metrics, metrics["first_order"])]
    table.add_row("median 20–900", f"{medians[0]:.2f}", "", f"{medians[1]:.2f}", "", style="bold")
    console.print(table)
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
    table = Table(title=title)
    for name in ("image", "prompt", "largest", "smallest", "above 0", "asymmetry"):
        table.add_column(name, justify="left" if name == "prompt" else "right")
    for point in metrics["points"]:
        largest = f"{point['largest'][0]:.4g} ± {point['largest_residuals'][0]:.1g}"
        smallest = f"{point['smallest'][-1]:.4g} ± {point['smallest_residuals'][-1]:.1g}"
        words = Text(point["prompt"]) if point["kind"] == "conditional" else Text("(no prompt)", style="italic")
        positive = f"{point['num_positive_ritz_values']} of {point['num_ritz_values']}"
        table.add_row(str(point["image"]), words, largest, smallest, positive, f"{point['asymmetry']:.1%}")
    console.print(table)
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
    table = Table(title="Positive eigenvalues of 256: the model, and exactly the caption's training set")
    table.add_column("t", justify="right")
    for kind in kinds:
        table.add_column(kind, justify="right")
    table.add_column("AUC, matching", justify="right")
    for t, row in metrics["counts"].items():
        cells = [f"{row[kind]['positive'][0]:.1f}, {row[kind]['positive_of_training_set'][0]:.1f}" for kind in kinds]
        table.add_row(t, *cells, f"{metrics['auc']['audit'][f'positive-count@t{t}']['matching']['auc']:.3f}")
    console.print(table)
    for name, found in metrics["earliest"].items():
        times = ", ".join(f"{kind} {'never' if t is None else f't = {t}'}" for kind, t in found.items())
        console.print(f"{name}: AUC 0.95 from {times}", highlight=False)
    console.print(
        f"{metrics['captions_returned']:.0%} of the matching captions return their training image from at least one"
        f" noise; {metrics['matching_returned']:.0%} of the images drawn for them are it."
    )
