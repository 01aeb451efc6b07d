"""How many captions that a model has never seen an audit lists as memorized, by draws of the reference list.

    python benchmarks/false_listings.py

The shipped model is audited once on captions that it was not trained on: the 60 neutral ones, and the 60 titles ("the
amber river") whose words it knows and that its training set left out. Then 20 of them are drawn as the audited prompts
and others as the reference, 200 times each way, and the rule of the page is applied (`jaxmem.memorization.chance`).
Where both are drawn from one list it promises at most its rate on average. Titles against neutral captions are of
another kind, and it promises nothing.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from counting import RESULTS
from exact_jacobian import environment
from page import update_page

import jaxmem as jm
from jaxmem.audit import Audit
from jaxmem.config import AuditConfig, VerbatimConfig
from jaxmem.data import NEUTRAL_CAPTIONS, verbatim_model
from jaxmem.data.captions import _COLOURS, _THINGS, unique_captions
from jaxmem.memorization.chance import list_prompts
from jaxmem.prompts import read_prompts

AUDITED = 20
#: Name of a setting: the list of the audited prompts, that of the reference, and how many of it.
SETTINGS = {
    "neutral, 19 of them": ("neutral", "neutral", 19),
    "neutral, 40 of them": ("neutral", "neutral", 40),
    "titles, 40 of them": ("titles", "titles", 40),
    "both, 99 of both": ("both", "both", 99),
    "titles, 40 neutral": ("titles", "neutral", 40),
}


def unseen() -> dict[str, list[str]]:
    """Captions that the shipped model was not trained on, by list."""
    titles = [f"the {colour} {thing}" for colour in _COLOURS for thing in _THINGS]
    return {
        "neutral": [prompt.text for prompt in read_prompts(NEUTRAL_CAPTIONS)],
        "titles": [title for title in titles if title not in unique_captions()],
    }


def audited(folder: Path) -> Audit:
    """All captions as the prompts of one audit of the shipped model."""
    config = AuditConfig(noises=1, timesteps=(981, 281), guidance=VerbatimConfig().audit.guidance)
    prompts = [text for texts in unseen().values() for text in texts]
    return jm.audit(jm.load(str(verbatim_model()[0])), prompts, config, folder=folder, say=print)


def listings(result: Audit, draws: int) -> dict[str, Any]:
    """Of each setting the shares that were listed, over the draws."""
    lists, first = {}, 0
    for name, texts in unseen().items():
        lists[name] = np.arange(first, first + len(texts))
        first += len(texts)
    lists["both"] = np.concatenate([lists["neutral"], lists["titles"]])
    leads = result.ranking.leads
    scores = result.scores.mean(1)[:, leads]
    ends = [result.detectors[d].memorized_is for d in leads]
    found = {}
    for setting, (drawn, reference, number) in SETTINGS.items():
        rng, shares, rate, level = np.random.default_rng(0), [], 0.0, None
        for _ in range(draws):
            chosen = rng.permutation(lists[drawn])[:AUDITED]
            rest = np.setdiff1d(lists[reference], chosen)
            listing = list_prompts(scores[chosen], scores[rng.permutation(rest)[:number]], memorized_is=ends)
            shares.append(float(listing.listed.mean()))
            rate, level = listing.rate, listing.level
        found[setting] = {
            "listed": float(np.mean(shares)),
            "standard_error": float(np.std(shares, ddof=1) / np.sqrt(draws)),
            "most": float(np.max(shares)),
            "rate": rate,
            "level": level,
            "same_list": drawn == reference,
        }
    return found


def page_section(result: dict[str, Any]) -> str:
    """The benchmark as the page of benchmarks shows it."""
    lines = [
        f"{AUDITED} captions that the shipped model has never seen, {result['draws']} draws of them and of their"
        f" reference, {len(result['leads'])} measures together:",
        "",
        "| audited, reference | level | promised: at most | listed on average | most in one draw |",
        "|---|--:|--:|--:|--:|",
    ]
    for setting, row in result["settings"].items():
        promised = f"{row['rate']:.1%}" if row["same_list"] else "nothing"
        listed = f"{row['listed']:.1%} ± {row['standard_error']:.1%}"
        lines.append(f"| {setting} | {row['level']:.0%} | {promised} | {listed} | {row['most']:.0%} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--draws", type=int, default=200)
    parser.add_argument("--run", type=Path, default=Path("runs") / "benchmark-false-listings")
    parser.add_argument("--out", type=Path, default=RESULTS, help="a folder")
    arguments = parser.parse_args()
    found = audited(arguments.run)
    result = {
        "what": "captions that the shipped model was not trained on and that the page of an audit lists",
        "environment": environment(),
        "draws": arguments.draws,
        "leads": [found.detectors[d].name for d in found.ranking.leads],
        "settings": listings(found, arguments.draws),
    }
    (arguments.out / "false_listings.json").write_text(json.dumps(result, indent=1) + "\n")
    update_page("benchmarks", "false listings", page_section(result))
    print(page_section(result))


if __name__ == "__main__":
    main()
