"""How networks are trained."""

from dataclasses import dataclass
from typing import Literal

from jaxmem.config.checks import LAST_SEED, at_least, in_range, positive, whole_in_range


@dataclass(frozen=True)
class TrainingConfig:
    """How a score network is trained: Adam with warm-up and cosine decay to zero, an average of the parameters."""

    num_steps: int = 4000
    batch_size: int = 64
    learning_rate: float = 2e-3  # the peak
    warmup_steps: int = 100
    gradient_clip: float = 1.0  # on the global norm
    ema_decay: float = 0.999  # of the parameter average; rises to this from 0.1 over the first steps
    second_order: Literal["none", "exact", "sliced"] = "none"
    second_order_weight: float = 0.1  # the paper states none
    second_order_start: float = 0.0  # fraction of the steps before the second-order loss joins
    weighting: Literal["eps", "v"] = "eps"  # of both losses: as the error of the noise, or 1/alpha² of it, that of v
    timestep_power: float = 1.0  # t = T u^power with u uniform: above 1, more small timesteps
    checkpoint_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("num_steps", self.num_steps, 1)
        at_least("batch_size", self.batch_size, 1)
        at_least("checkpoint_every", self.checkpoint_every, 1)
        whole_in_range("warmup_steps", self.warmup_steps, 0, self.num_steps)
        whole_in_range("seed", self.seed, 0, LAST_SEED)
        for name in ("learning_rate", "gradient_clip", "timestep_power"):
            positive(name, getattr(self, name))
        in_range("second_order_weight", self.second_order_weight, 0, 1_000_000)
        in_range("ema_decay", self.ema_decay, 0, 0.999999)
        in_range("second_order_start", self.second_order_start, 0, 1)
        if self.second_order not in ("none", "exact", "sliced"):
            raise ValueError(f"second_order: expected 'none', 'exact' or 'sliced', got {self.second_order!r}")
        if self.weighting not in ("eps", "v"):
            raise ValueError(f"weighting: expected 'eps' or 'v', got {self.weighting!r}")


@dataclass(frozen=True)
class AutoencoderConfig:
    """How the autoencoder of a small latent diffusion model is trained."""

    num_steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3  # the peak
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("num_steps", self.num_steps, 1)
        at_least("batch_size", self.batch_size, 1)
        positive("learning_rate", self.learning_rate)
        whole_in_range("seed", self.seed, 0, LAST_SEED)
