"""An audit's results made up from a known answer, in the shapes of a small model."""

from typing import Any, NamedTuple

import numpy as np


class Prompt(NamedTuple):
    text: str
    label: bool | None = None
    category: str | None = None


class Detector(NamedTuple):
    name: str
    title: str
    formula: str
    paper: str
    memorized_is: str
    as_released: str
    on_trajectory: bool
    is_count: bool
    statistic: str
    number: int | None = None
    timestep: int | None = None


class Directions(NamedTuple):
    point: np.ndarray
    timestep: int
    eigenvalues: np.ndarray
    base: np.ndarray
    moved: np.ndarray
    amplitude: float


class AuditResult(NamedTuple):
    prompts: list
    detectors: tuple
    scores: np.ndarray
    timesteps: np.ndarray
    sigma: np.ndarray
    eps_difference: np.ndarray
    spectral_timesteps: np.ndarray
    eigenvalues: np.ndarray
    noise: np.ndarray
    method: str
    images: Any
    sampled: np.ndarray
    directions: Any
    costs: list
    metrics: Any
    manifest: dict


CATEGORIES = {"none": (False, 9), "template verbatim": (True, 2), "matching verbatim": (True, 0)}
HOSTILE = "<script>alert(1)</script> & \"quotes\" 'single' $x^2$ {{ 7 * 7 }}"
SPECTRAL = (981, 481, 281, 41)


def detectors(timesteps=SPECTRAL, method="eigh"):
    points = [
        Detector("wen-1", "Score difference, first step", "‖ε_c − ε_u‖₂", "Wen et al., ICLR 2024", "high", "", True, False, "wen", 1),
        Detector("wen-all", "Score difference, all 50 steps", "mean of ‖ε_c − ε_u‖₂ over 50 steps", "Wen et al., ICLR 2024", "high", "", True, False, "wen", 50),
        Detector("jeon", "Hessian difference, first step", "‖H_c s_Δ − H_u s_Δ‖₂", "Jeon et al., ICML 2025", "high", "not squared (the paper squares)", True, False, "jeon"),
        Detector("anisotropy", "Norm and anisotropy", "‖ε_c − ε_u‖₂ + 2 mean cos(ε_u, ε_c − ε_u)", "Asthana and Belagiannis, ICLR 2026", "high", "", False, False, "anisotropy"),
        Detector("tiled-l2", "Tiled distance between generations", "mean over pairs of max over tiles of √(Σ(a − b)²/n)", "Carlini et al., USENIX Security 2023", "low", "", True, False, "tiled-l2"),
    ]  # fmt: skip
    spectral = {
        "positive-count": ("Positive eigenvalues", "#{λ > 0}", True),
        "tangent-count": ("Tangent directions", "#{λ > −1/(2σ²)}", True),
        "largest-sum": ("Sum of the 5 largest eigenvalues", "λ₁ + … + λ₅", False),
    }
    for t in timesteps:
        for name, (title, formula, is_count) in spectral.items():
            if method == "eigh" or not is_count:
                points.append(
                    Detector(f"{name}@t{t}", f"{title}, t = {t}", formula, "the paper reproduced here", "low", "", True, is_count, name, None, t)
                )  # fmt: skip
    return tuple(points)


def audit(per_category=6, noises=3, size=48, side=32, method="eigh", labels=True, images=True, reference=True, seed=0):
    """A finished audit in which matching prompts have no free direction and general ones nine of ``size``."""
    rng = np.random.default_rng(seed)
    timesteps = np.arange(981, 0, -20)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    sigma = np.sqrt(1 - np.cumprod(1 - betas))[timesteps]
    spectral = np.array(SPECTRAL) if method != "none" else np.zeros(0, int)
    prompts, free = [], []
    for name, (label, count) in CATEGORIES.items():
        for i in range(per_category):
            text = HOSTILE if (i, name) == (0, "matching verbatim") else f"a {name} picture of the number {i}"
            prompts.append(Prompt(text, label if labels else None, name if labels else None))
            free.append(count)
    n, free, length = len(prompts), np.array(free), size if method == "eigh" else min(size, 10)
    level = np.linspace(0.05, 1, max(len(spectral), 1))[:, None]  # of what is visible through the noise
    scaled = -1 + 0.1 * rng.random((n, noises, len(spectral), length))
    opened = np.arange(length) < free[:, None, None, None] * level.round()
    scaled = np.where(opened, -0.3 + 0.5 * rng.random(scaled.shape), scaled)
    scaled = np.sort(scaled, -1)[..., ::-1]
    places = np.array([np.flatnonzero(timesteps == t)[0] for t in spectral], int)
    values = scaled / sigma[places][:, None] ** 2
    memorized = np.array([bool(count == 0) + 0.4 * (count == 2) for count in free])
    difference = (1 + 8 * memorized[:, None, None]) * np.exp(0.3 * rng.normal(size=(n, noises, 1)))
    difference = difference * np.linspace(1, 0.5, len(timesteps))
    chosen = detectors(spectral, method)
    columns = {
        "wen-1": difference[:, :, 0],
        "wen-all": difference.mean(-1),
        "jeon": 0.1 + 50 * memorized[:, None] * rng.random((n, noises)),
        "anisotropy": 1 + memorized[:, None] + 0.2 * rng.random((n, noises)),
        "tiled-l2": 0.4 - 0.3 * memorized[:, None] + 0.02 * rng.random((n, noises)),
    }
    for k, t in enumerate(spectral):
        columns[f"positive-count@t{t}"] = (scaled[:, :, k] > 0).sum(-1).astype(float)
        columns[f"tangent-count@t{t}"] = (scaled[:, :, k] > -0.5).sum(-1).astype(float)
        columns[f"largest-sum@t{t}"] = values[:, :, k, :5].sum(-1)
    scores = np.stack([columns[d.name] for d in chosen], -1)
    manifest = {
        "format": 1,
        "config": {"prompt": [p.text for p in prompts], "seed": 7, "guidance": 7.5, "ddim_steps": 50},
        "experiment": "audit",
        "model": {"sha256": "5f" * 32, "unet": {"channels": [32, 64], "cross_attention_dim": 64}},
        "dtype": "float32",
        "versions": {"jaxmem": "0.1.0", "jax": "0.10.1", "python": "3.11.2"},
        "device": {"kind": "cpu", "count": 1},
    }
    costs = [
        {"detector": d.name, "evaluations": 100 * n, "products": 0 if "wen" in d.name else 48 * n, "seconds": 61.5, "bytes": 123_456}
        for d in chosen
    ]  # fmt: skip
    one = {"auc": 0.997, "auc_interval": [0.981, 1.0], "tpr_at_1": None, "tpr_at_3": 0.944, "tpr_intervals": {"tpr_at_3": [0.87, 1.0]}, "num_positive": 36, "num_negative": 18}  # fmt: skip
    metrics = {
        "prompts": [
            {
                "prompt": p.text,
                "percentile": {d.name: float(100 * memorized[i]) if reference else None for d in chosen},
                "truncated": i == 1,
            }
            for i, p in enumerate(prompts)
        ],
        "evaluation": {d.name: {g: one for g in ("all", "template verbatim", "matching verbatim")} for d in chosen}
        if labels
        else {},
        "num_products": 1234,
        "wall_seconds": {"total": 754.0},
    }
    pictures = np.stack([[_picture(rng, side, free[i], i) for _ in range(noises)] for i in range(n)])
    most, least = n - 1, 0
    base = np.stack([pictures[most, 0], pictures[least, 0]])
    moved = np.clip(base[:, None, None] + 90 * rng.normal(size=(2, 3, 2, side, side, 3)) * np.array([0.05, 1])[:, None, None, None, None, None], 0, 255)  # fmt: skip
    directions = Directions(
        np.array([[most, 0], [least, 0]]), 41, np.stack([values[most, 0, -1, :3], values[least, 0, -1, :3]]),
        base, moved.astype(np.uint8), 0.8,
    ) if method == "eigh" and images else None  # fmt: skip
    return AuditResult(
        prompts, chosen, scores, timesteps, sigma, difference, spectral, values, np.full(values.shape[:3], 1e-4),
        method, pictures if images else None, np.full((n, noises), images), directions, costs, metrics, manifest,
    )  # fmt: skip


def _picture(rng, side, free, i):
    y, x = np.mgrid[:side, :side] / side
    centre = 0.5 + (0.25 * rng.normal(size=2) if free > 2 else 0)
    blob = np.exp(-((x - np.atleast_1d(centre)[0]) ** 2 + (y - np.atleast_1d(centre)[-1]) ** 2) / (0.02 + 0.01 * (i % 4)))
    colour = np.array([[0.9, 0.5, 0.2], [0.3, 0.7, 0.9], [0.8, 0.8, 0.4]])[i % 3]
    return (255 * blob[..., None] * colour).astype(np.uint8)
