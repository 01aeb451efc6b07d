"""An audit's results made up from a known answer, in the shapes of a small model."""

from dataclasses import asdict, replace

import numpy as np

from jaxmem.audit import Audit, Directions, read_audit, store
from jaxmem.audit.plan import Plan
from jaxmem.audit.summary import summary_metrics
from jaxmem.detectors import Counts, CountsAt, Eigenvalues, EpsDifferences, Setting, SpectrumAt, choose, columns
from jaxmem.memorization.evaluation import evaluate_categories
from jaxmem.memorization.sharpness import positive_count, tangent_count
from jaxmem.prompts import Prompt
from jaxmem.runs.directory import Run

CATEGORIES = {"none": (False, 9), "template verbatim": (True, 2), "matching verbatim": (True, 0)}
HOSTILE = "<script>alert(1)</script> & \"quotes\" 'single' $x^2$ {{ 7 * 7 }}"
SPECTRAL = (981, 481, 281, 41)


def audit(
    per_category=6, noises=3, size=48, side=32, method="eigh", labels=True, images=True, reference=40, steps=50, seed=0
):
    """A finished audit in which matching prompts have no free direction and general ones nine of ``size``."""
    rng = np.random.default_rng(seed)
    timesteps = np.arange(981, 0, -20)[:steps]
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    sigma = np.sqrt(1 - np.cumprod(1 - betas))[timesteps]
    spectral = np.array([t for t in SPECTRAL if t in timesteps] if method != "none" else [], int)
    prompts, free = [], []
    for name, (label, count) in CATEGORIES.items():
        for i in range(per_category):
            text = HOSTILE if (i, name) == (0, "matching verbatim") else f"a {name} picture of the number {i}"
            prompts.append(Prompt(text, label if labels else None, name if labels else None))
            free.append(count)
    n = len(prompts)
    neutral = [Prompt(f"neutral caption {i}") for i in range(reference)]
    free = np.array([*free, *[9] * reference])  # reference prompts come last
    points = (len(free), noises)
    length = size if method == "eigh" else min(size, 10)
    # few directions show through the noise at first, all of them in the end
    visible = np.linspace(0, 1, 4)[4 - len(spectral) :, None].round()
    scaled = -1 + 0.1 * rng.random((*points, len(spectral), length))
    opened = np.arange(length) < free[:, None, None, None] * visible
    scaled = np.sort(np.where(opened, -0.3 + 0.5 * rng.random(scaled.shape), scaled), -1)[..., ::-1]
    values = scaled / sigma[np.searchsorted(-timesteps, -spectral)][:, None] ** 2
    strength = np.where(free == 0, 1, np.where(free == 2, 0.4, 0))[:, None]
    difference = (1 + 8 * strength[..., None]) * np.exp(0.3 * rng.normal(size=(*points, 1)))
    difference = difference * np.linspace(1, 0.5, len(timesteps))
    pictures = np.stack([[_picture(rng, side, f, i) for _ in range(noises)] for i, f in enumerate(free)])
    noise, sampled = np.full(values.shape[:3], 1e-4), np.full(points, images)
    names = ["wen-1", "wen-5", "wen-all", "jeon", "score-evolution", "anisotropy", "tiled-l2"]
    setting = Setting(
        timesteps=tuple(timesteps.tolist()), sampler_timesteps=tuple(range(981, 0, -20)),
        spectral_timesteps=tuple(spectral.tolist()), method=method, num_eigenvalues=length, noises=noises,
        with_images=images, image_sides=(side, side),
    )  # fmt: skip
    chosen = columns(choose([*names, "positive-count", "tangent-count", "largest-sum"]), setting)
    columns_ = {
        "jeon": 0.1 + 50 * strength * rng.random(points) + 0.1 * rng.random(points),
        "score-evolution": 1 + strength * rng.random(points) + 0.5 * rng.random(points),
        "anisotropy": 1 + strength + 0.2 * rng.random(points),
    }
    scores = np.full((*points, len(chosen)), np.nan)
    for d, detector in enumerate(chosen):
        if detector.name in columns_:
            scores[..., d] = columns_[detector.name]
        for i, j in np.ndindex(points):
            if detector.name == "tiled-l2":
                scores[i, :, d] = detector.score(pictures[i])
            elif isinstance(detector.needs, EpsDifferences):
                scores[i, j, d] = detector.score(difference[i, j, : detector.steps])
            elif isinstance(detector.needs, Eigenvalues | Counts):
                k, level = spectral.tolist().index(detector.timestep), sigma[timesteps == detector.timestep][0]
                found = [int(positive_count(values[i, j, k], 1e-4)), int(tangent_count(values[i, j, k], level))]
                scores[i, j, d] = detector.score(
                    SpectrumAt(values[i, j, k], 1e-4, level, detector.timestep)
                    if isinstance(detector.needs, Eigenvalues)
                    else CountsAt(found[0], (found[0],) * 2, found[1], (found[1],) * 2, level, detector.timestep)
                )
    manifest = {
        "format": 2,
        "config": {
            "prompts": [p._asdict() for p in [*prompts, *neutral]],
            "seed": 7,
            "ddim_steps": 50,
        },
        "plan": {"guidance": 7.5},
        "experiment": "audit",
        "model": {"sha256": "5f" * 32, "unet": {"channels": [32, 64], "cross_attention_dim": 64}},
        "dtype": "float32",
        "versions": {"jaxmem": "0.1.0", "jax": "0.10.1", "python": "3.11.2"},
        "device": {"kind": "cpu", "count": 1},
    }
    costs = [
        {"detector": d.name, "evaluations": 9 * n, "products": 48 * n, "seconds": 61.5, "bytes": 123_456}
        for d in chosen
    ]
    flags, names = [p.label for p in prompts], [p.category for p in prompts]
    evaluation = {
        d.name: {
            name: found._asdict()
            for name, found in evaluate_categories(
                scores[:n, :, i], flags, names, memorized_is=d.memorized_is, num_resamples=20
            ).items()
        }
        for i, d in enumerate(chosen if labels else [])
    }
    metrics = {
        "prompts": [{"prompt": p.text, "truncated": i == 1} for i, p in enumerate(prompts)],
        "evaluation": evaluation,
        "num_products": 1234,
        "model": "the synthetic one",
        "share_below_bound": {"981": 0.0, "41": 0.125},
        "wall_seconds": {"total": 754.0},
    }
    most, least = n - 1, 0
    base = np.stack([pictures[most, 0], pictures[least, 0]])
    pushed = base[:, None, None] + 90 * np.array([0.05, 1]).reshape(2, 1, 1, 1, 1, 1) * rng.normal(
        size=(2, 3, 2, side, side, 3)
    )
    directions = Directions(
        np.array([[most, 0], [least, 0]]), 41, np.stack([values[most, 0, -1, :3], values[least, 0, -1, :3]]),
        base, np.clip(pushed, 0, 255).astype(np.uint8), 0.8,
    ) if method == "eigh" and images else None  # fmt: skip
    return Audit(
        prompts, chosen, scores[:n], timesteps, sigma, difference[:n], spectral, values[:n], noise[:n], method,
        pictures[:n] if images else None, sampled[:n], directions, costs, metrics, manifest, neutral, scores[n:], {},
        [i == 1 for i in range(n)],
    )  # fmt: skip


def write_run(folder, seed=0):
    """The run of an audit of four prompts × two noises in two batches, without spectra, with made-up numbers."""
    rng = np.random.default_rng(seed)
    steps = dict(ddim_steps=2, guidance=7.5, timesteps=(501, 1), sigma=(0.85, 0.041))
    steps |= dict(spectral_timesteps=(), sampler_timesteps=(501, 1))
    plan = Plan(
        num_prompts=4, num_reference=0, noises=2, batch=4, **steps, method="none", num_steps=20, count_budget=None,
        directions=0, latent_shape=(8, 8, 4),
    )  # fmt: skip
    texts = [("the cat", True), (HOSTILE, False), ("the dog", False), ("a bird", None)]
    prompts = [
        {"prompt": text, "label": label, "category": None, "truncated": text == "the dog"} for text, label in texts
    ]
    run = Run.open(
        folder, {"prompts": prompts, "seed": 7}, experiment="audit", model={"sha256": "5f" * 32}, plan=asdict(plan),
        detectors=["wen-1", "wen-all", "jeon", "tiled-l2"],
    )  # fmt: skip
    for number in plan.batches():
        units = {
            store.path(number, 0): {"norms": rng.random((4, 2))},
            store.products(number): {store.score_of("jeon"): rng.random(4)},
            store.image(number): {"images": rng.integers(0, 256, (4, 16, 16, 3), np.uint8)},
        }
        for key, arrays in units.items():
            run.save(key, **arrays)
            run.append({"key": key})
    metrics = summary_metrics(read_audit(run))
    run.finalise(metrics | {"num_products": 8, "wall_seconds": {"total": 3.0}}, {})
    return folder


def partial(result, done):
    """The same audit when only the first ``done`` prompts were through, and of the next one noise."""
    there = np.zeros(result.scores.shape[:2], bool)
    there[:done] = True
    there[done, :1] = True

    def cut(array):
        return np.where(there.reshape(there.shape + (1,) * (array.ndim - 2)), array, np.nan)

    return replace(
        result,
        scores=cut(result.scores), eps_difference=cut(result.eps_difference), eigenvalues=cut(result.eigenvalues),
        noise=cut(result.noise), sampled=there & result.sampled, directions=None, metrics=None,
        reference_scores=np.full_like(result.reference_scores, np.nan),
    )  # fmt: skip


def _picture(rng, side, free, i):
    y, x = np.mgrid[:side, :side] / side
    across, down = 0.5 + (0.25 * rng.normal(size=2) if free > 2 else np.zeros(2))
    blob = np.exp(-((x - across) ** 2 + (y - down) ** 2) / (0.02 + 0.01 * (i % 4)))
    colour = np.array([[0.9, 0.5, 0.2], [0.3, 0.7, 0.9], [0.8, 0.8, 0.4]])[i % 3]
    return (255 * blob[..., None] * colour).astype(np.uint8)
