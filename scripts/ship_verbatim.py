"""Put the model and the captions of a finished `jaxmem reproduce verbatim` where the package ships them.

python scripts/ship_verbatim.py runs/verbatim

Needs the MNIST files (JAXMEM_DATA, or they are downloaded): what is shipped is of the images of this version.
"""

import csv
import json
import re
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jaxmem.config import VerbatimConfig
from jaxmem.data.captions import CATEGORIES, NUM_UNIQUE, captioned_digits, general_captions, unique_captions
from jaxmem.data.mnist import load_mnist
from jaxmem.runs.directory import Run
from jaxmem.runs.durable import as_json
from jaxmem.runs.identity import fingerprint
from jaxmem.stable_diffusion.pipeline import StableDiffusion

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "jaxmem" / "data" / "verbatim"
RESULTS = ROOT / "benchmarks" / "results" / "verbatim.json"
FIGURES = ("figure6", "course", "returned")
LIMIT = 5_000_000  # bytes
PROMISED = ("positive-count@t281", "positive-count@t41", "tangent-count@t281", "tangent-count@t41", "wen-1", "jeon")
ENOUGH = 0.99


def main(directory: str) -> None:
    run = Run.read(directory)
    if run.manifest.get("experiment") != "verbatim" or not run.finished:
        sys.exit(f"{directory}: expected a finished run of verbatim")
    wanted = as_json({name: value for name, value in asdict(VerbatimConfig()).items() if name != "data_dir"}, "config")
    if run.manifest["config"] != wanted:
        sys.exit(f"{directory}: expected a run of the default configuration, got another one")
    captions = general_captions() + unique_captions()
    if tuple(run.manifest["data"]["text"]) != captions:
        sys.exit(f"{directory}: expected a run of the captions of this version, got others")
    images = captioned_digits(load_mnist(None), VerbatimConfig().data_seed).images
    if run.manifest["data"]["images"] != fingerprint(images):
        sys.exit(f"{directory}: expected a run of the images of this version, got others")
    source = run.directory / "model"
    size = sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    if size > LIMIT:
        sys.exit(f"{source}: expected at most {LIMIT:,} bytes, got {size:,}")
    StableDiffusion.load(source)
    metrics = run.metrics()
    section = page_section(metrics)  # before anything is replaced: an older run lacks some of it
    shutil.rmtree(TARGET, ignore_errors=True)
    shutil.copytree(source, TARGET / "model")
    kinds = [name for name in CATEGORIES for _ in range(NUM_UNIQUE)]
    with open(TARGET / "prompts.csv", "w", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["prompt", "label", "category"])
        for text, kind in zip(captions, kinds, strict=True):
            writer.writerow([text, int(kind != "none"), kind])
    print(f"{TARGET}: {size:,} bytes")
    RESULTS.write_text(json.dumps(metrics, indent=1) + "\n")
    for name in FIGURES:
        shutil.copy(run.directory / "figures" / f"{name}.png", ROOT / "docs" / "figures" / f"verbatim_{name}.png")
    page = ROOT / "docs" / "shipped-model.md"
    begin, end = "<!-- verbatim -->\n", "<!-- /verbatim -->"
    text = page.read_text(encoding="utf-8")
    page.write_text(re.sub(f"{begin}.*{end}", lambda _: begin + section + end, text, flags=re.DOTALL), encoding="utf-8")


def page_section(metrics: dict[str, Any]) -> str:
    """These metrics as the page of the shipped model shows them."""
    counts, audit = metrics["counts"], metrics["auc"]["audit"]

    def mean(found: Any) -> str:
        value, (low, high) = found
        return f"{value:.1f} ({low:.1f} to {high:.1f})"

    def area(name: str, kind: str) -> str:
        found = audit[name][kind]
        low, high = found["auc_interval"]
        rate = "not estimable" if found["tpr_at_1"] is None else f"{found['tpr_at_1']:.2f}"
        return f"{found['auc']:.3f} ({low:.3f} to {high:.3f}) | {rate}"

    def distance(kind: str) -> str:
        found = metrics["distance"][kind]
        return f"{found['median']:.1f} and {found['largest']:.1f}"

    lines = [
        "Number of positive eigenvalues among 256: mean over 30 captions and four noises, with its 95 % interval. In",
        "italics, the exact number for the caption's own training set at the same points:",
        "",
        "| t | general captions | templates | single images | AUC, single images | AUC, templates |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for t, row in counts.items():
        cells = [
            f"{mean(row[kind]['positive'])}, *{row[kind]['positive_of_training_set'][0]:.1f}*"
            for kind in ("none", "template", "matching")
        ]
        areas = [f"{audit[f'positive-count@t{t}'][kind]['auc']:.3f}" for kind in ("matching", "template")]
        lines.append(f"| {t} | {' | '.join([*cells, *areas])} |")
    first = max(map(int, counts))
    names = {
        "wen-1": "‖ε_c − ε_u‖ at the first step (Wen et al. 2024)",
        "jeon": "‖H_c s_Δ − H_u s_Δ‖ at the first step (Jeon et al. 2025)",
        "score-evolution": "change of s_Δ over the first steps",
        "anisotropy": "anisotropy (2026)",
        f"largest-sum@t{first}": f"sum of the five largest eigenvalues at the first step, t = {first}",
        f"tangent-count@t{first}": f"tangent count, t = {first}",
        "tangent-count@t281": "tangent count, t = 281",
        "positive-count@t281": "positive count, t = 281",
        "tiled-l2": "tiled ℓ2 between four images",
    }
    below = ", ".join(f"{share:.0%} at t = {at}" for at, share in metrics["share_below_bound"].items())
    lowest = ", ".join(f"{ratio - 1:.0%} at t = {at}" for at, ratio in metrics["lowest_over_bound"].items())
    t = min(map(int, counts))
    template, matching = (
        [counts[str(t)][kind][statistic + of][0] for of in ("", "_of_training_set")]
        for kind, statistic in (("template", "positive"), ("matching", "tangent"))
    )
    if template[0] > template[1] and matching[0] > matching[1]:
        lines += [
            "",
            f"At t = {t} the learned density is less sharp than the training data: templates have {template[0]:.1f}"
            f" positive eigenvalues on average and their training sets {template[1]:.1f}; single images have"
            f" {matching[0]:.1f} tangent directions and their training sets {matching[1]:.1f}.",
        ]
    if short := fallen_short(metrics):
        found = ", ".join(f"{name} ({area:.4f})" for name, area in short.items())
        lines += ["", f"Below an AUC of {ENOUGH} against single images: {found}."]
    negatives = audit["wen-1"]["matching"]["num_negative"]
    found = {"matching": "single images", "template": "templates"}
    lines += [
        "",
        "Earliest timestep at which a statistic reaches an AUC of 0.95 (one noise, spectra at all 50 steps):",
        "",
        "| statistic | single images | templates |",
        "|---|--:|--:|",
        *(
            f"| `{name}` | {' | '.join('never' if row[kind] is None else str(row[kind]) for kind in found)} |"
            for name, row in metrics["earliest"].items()
        ),
        "",
        f"Against the general captions, {negatives} negatives (30 captions, four noises); 95 % intervals resample"
        " captions:",
        "",
        "| detector | single images: AUC | TPR at FPR ≤ 1 % | templates: AUC | TPR at FPR ≤ 1 % |",
        "|---|--:|--:|--:|--:|",
        *(
            f"| {title} | {area(name, 'matching')} | {area(name, 'template')} |"
            for name, title in names.items()
            if name in audit
        ),
        "",
        f"{metrics['captions_returned']:.0%} of the single-image captions return their image from at least one noise."
        f" {metrics['matching_returned']:.0%} of all images drawn for them are that image: no other of the"
        f" {metrics['num_images']:,} training images is nearer. Distance to the nearest training image (median and"
        f" largest, ‖·‖₂ of grey values in [-1, 1]): single images {distance('matching')}, templates"
        f" {distance('template')}, general captions {distance('none')}.",
        "",
        "Distance between the images of two general captions (median): from the same noise"
        f" {metrics['apart']['one_noise']:.1f}, from two noises {metrics['apart']['two_noises']:.1f}.",
        "",
        f"No true eigenvalue lies below −1/σ². Of the learned ones, {below} do; the lowest exceeds the bound by"
        f" {lowest}.",
        "",
    ]
    return "\n".join(lines)


def fallen_short(metrics: dict[str, Any]) -> dict[str, float]:
    """AUC against single images below `ENOUGH`, of promised detectors and of both counts at all steps from 281 on."""
    audit, course = metrics["auc"]["audit"], metrics["auc"]["course"]
    late = [name for name in course if "-count@t" in name and int(name.partition("@t")[2]) <= 281]
    areas = {f"{name}, one noise": course[name]["matching"]["auc"] for name in late}
    areas |= {name: audit[name]["matching"]["auc"] for name in PROMISED}
    return {name: area for name, area in areas.items() if area < ENOUGH}


if __name__ == "__main__":
    main(sys.argv[1])
