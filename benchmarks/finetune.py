"""What a finished `jaxmem reproduce finetune` has found, as the table of its page.

    jaxmem reproduce finetune --out runs/finetune
    python benchmarks/finetune.py runs/finetune

The run's metrics are kept in results/finetune.json, without what nobody reads there.
"""

import json
import sys
from typing import Any

from counting import RESULTS
from exact_jacobian import environment
from page import update_page

from jaxmem.runs.directory import Run

NAMES = {"full": "all weights", "full-ema": "averaged weights", "lora": "LoRA"}
LOOKS = ("denoising-error", "denoising-gain", "trace", "tangent-count")
CAPTIONS = ("wen-1", "tangent-count")
WORDS = ("reproduced", "isolated", "no sign")


def main(directory: str) -> None:
    run = Run.read(directory)
    if run.manifest.get("experiment") != "finetune" or not run.finished:
        sys.exit(f"{directory}: expected a finished run of finetune")
    metrics = run.metrics()
    checkpoints = {
        way: {step: _kept(found) for step, found in steps.items()}
        for way, steps in metrics["audits"]["checkpoints"].items()
    }
    result = {
        "environment": environment(),
        "minutes": {name: round(seconds / 60, 1) for name, seconds in metrics["wall_seconds"].items()},
        "config": run.manifest["config"],
        "checkpoints": checkpoints,
        "first_reproduced": {
            way: _first(sweep["first_reproduced"].values()) for way, sweep in metrics["audits"]["sweeps"].items()
        },
        "first_returned": metrics["first_returned"],
        "advice": {way: sweep["advice"]["reason"] for way, sweep in metrics["audits"]["sweeps"].items()},
    }
    (RESULTS / "finetune.json").write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    update_page("fine-tune", "fine-tune", page_section(result))


def _kept(found: dict[str, Any]) -> dict[str, Any]:
    """Of one checkpoint what the page says; names of detectors without their timestep."""
    rates = {place: _areas(found[place]) for place in ("at_images", "from_captions")}
    return {"verdicts": found["verdicts"], "tangent_count": found["tangent_count"], **rates}


def _areas(rates: dict[str, Any]) -> dict[str, float]:
    return {name.partition("@")[0]: rate["auc"] for name, rate in rates.items()}


def _first(steps: Any) -> int | None:
    return min((step for step in steps if step is not None), default=None)


def page_section(result: dict[str, Any]) -> str:
    """The table of the page."""
    kinds = [f"{kind}: {WORDS[0]} | {WORDS[1]} | {WORDS[2]}" for kind in ("single", "many")]
    names = ["trained", "steps", *kinds, "free directions, single / held out", "error", "gain", "trace"]
    names += ["tangent count", "`wen-1`", "tangent count"]
    lines = ["| " + " | ".join(names) + " |", "|---|" + "--:|" * 14]
    for way, steps in result["checkpoints"].items():
        for step, found in steps.items():
            counts = [str(found["verdicts"][kind][word]["number"]) for kind in ("single", "many") for word in WORDS]
            free = "{single:.1f} / {held out:.1f}".format(**found["tangent_count"])
            areas = [found["at_images"][name] for name in LOOKS] + [found["from_captions"][name] for name in CAPTIONS]
            cells = [NAMES[way], f"{int(step):,}", *counts, free, *(f"{area:.3f}" for area in areas)]
            lines.append("| " + " | ".join(cells) + " |")
    minutes = result["minutes"]
    said = ", ".join(f"{name} {number}" for name, number in minutes.items() if name != "total")
    cpu, cores = result["environment"]["cpu"], result["environment"]["cpus_usable"]
    return "\n".join([*lines, "", f"{minutes['total']} minutes on {cores} cores of an {cpu} ({said})."])


if __name__ == "__main__":
    main(*sys.argv[1:])
