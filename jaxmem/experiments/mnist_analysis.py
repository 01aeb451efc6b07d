"""Numbers of the MNIST experiment, from the arrays of its run."""

from collections.abc import Callable
from typing import Any

import numpy as np

from jaxmem.memorization.sharpness import below_bound, positive_count, tangent_count


def _per_class(values: np.ndarray, memorized: np.ndarray, statistics: dict[str, Callable[..., Any]]) -> dict[str, Any]:
    chosen = {"general": values[~memorized], "memorized": values[memorized]}
    return {name: {key: float(f(part)) for key, f in statistics.items()} for name, part in chosen.items()}


def mnist_metrics(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Everything in ``metrics.json`` but the seconds, from the arrays of ``spectra.npz`` alone."""
    from sklearn.metrics import roc_auc_score

    eigenvalues, memorized = arrays["eigenvalues"], np.asarray(arrays["memorized"], bool)
    timesteps = [int(t) for t in arrays["timestep"]]
    spread = {"mean": np.mean, "min": np.min, "max": np.max}

    def table(values: np.ndarray, statistics: Any = spread) -> dict[str, Any]:
        return {str(t): _per_class(values[:, i], memorized, statistics) for i, t in enumerate(timesteps)}

    counts = positive_count(eigenvalues)
    class_of = np.asarray(arrays["sample_label"])
    copied = class_of == np.asarray(arrays["label"])[memorized][0]
    kept = np.zeros(len(class_of), bool)
    kept[arrays["analysed"]] = True
    return {
        "num_samples": {
            "generated": {"general": int((~copied).sum()), "memorized": int(copied.sum())},
            "clearly_new": int((~copied & (arrays["calibrated_l2"] >= arrays["threshold"])).sum()),
            "analysed": {"general": int((~memorized).sum()), "memorized": int(memorized.sum())},
        },
        "positive_count": table(counts),
        "certified_positive_count": table(positive_count(eigenvalues, arrays["noise"])),
        "tangent_count": table(tangent_count(eigenvalues, arrays["sigma"])),
        "auc_positive_count": {str(t): float(roc_auc_score(~memorized, counts[:, i])) for i, t in enumerate(timesteps)},
        "largest_eigenvalue": table(eigenvalues[..., 0]),
        "smallest_eigenvalue": table(eigenvalues[..., -1]),
        "share_below_bound": table(below_bound(eigenvalues, arrays["sigma"], arrays["noise"]), {"mean": np.mean}),
        "asymmetry": table(arrays["asymmetry"], {"mean": np.mean}),
        "nearest_train_distance": {
            "general": float(arrays["nearest_distance"][kept & ~copied].mean()),
            "memorized": float(arrays["nearest_distance"][kept & copied].mean()),
        },
        "calibrated_l2": {
            "general": float(arrays["calibrated_l2"][kept & ~copied].mean()),
            "memorized": float(arrays["calibrated_l2"][kept & copied].mean()),
            "threshold": float(arrays["threshold"]),
        },
        "memorized_are_the_training_image": float(arrays["nearest_is_memorized"][copied].mean()),
        "num_products": int(arrays["num_products"]),
    }
