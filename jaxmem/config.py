"""Every configuration: frozen dataclasses of plain values, importable without JAX.

Each class is one flag group of the command line; a run's manifest holds exactly these values.
"""

from dataclasses import dataclass, field, replace
from typing import Any, Literal


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
        _at_least("num_steps", self.num_steps, 1)
        _at_least("batch_size", self.batch_size, 1)
        _at_least("checkpoint_every", self.checkpoint_every, 1)
        _whole_in_range("warmup_steps", self.warmup_steps, 0, self.num_steps)
        _whole_in_range("seed", self.seed, 0, _LAST_SEED)
        for name in ("learning_rate", "gradient_clip", "timestep_power"):
            _positive(name, getattr(self, name))
        _in_range("second_order_weight", self.second_order_weight, 0, 1_000_000)
        _in_range("ema_decay", self.ema_decay, 0, 0.999999)
        _in_range("second_order_start", self.second_order_start, 0, 1)
        if self.second_order not in ("none", "exact", "sliced"):
            raise ValueError(f"second_order: expected 'none', 'exact' or 'sliced', got {self.second_order!r}")
        if self.weighting not in ("eps", "v"):
            raise ValueError(f"weighting: expected 'eps' or 'v', got {self.weighting!r}")


@dataclass(frozen=True)
class Toy2dConfig:
    """The paper's section 5.1: 3,000 Gaussian points and one distant point 100 times."""

    mean: tuple[float, float] = (0.0, 0.0)
    covariance: tuple[tuple[float, float], tuple[float, float]] = ((1.0, 0.4), (0.4, 0.5))
    point: tuple[float, float] = (6.0, 5.0)  # about seven standard deviations from the mean
    num_gaussian: int = 3000  # the paper's
    num_copies: int = 100  # the paper's
    num_samples: int = 5000  # the paper's
    landing_radius: float = 0.3  # a sample this close to the point counts as memorized; no Gaussian draw is
    width: int = 128
    depth: int = 3
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_steps=8000,
            batch_size=512,
            learning_rate=2e-3,
            warmup_steps=200,
            second_order="exact",
            second_order_weight=1.0,
            timestep_power=2.0,
            checkpoint_every=1000,
        )
    )
    # The comparison, at equal steps. Its learning rate from 0.0005, 0.001 and 0.002, three seeds,
    # hessian_rel_error_median: 1.7, 2.2, 3.1 %; 1.3, 1.7, 2.3 %; 1.7, 2.1, 2.3 %.
    first_order_training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_steps=8000,
            batch_size=512,
            learning_rate=1e-3,
            warmup_steps=200,
            timestep_power=2.0,
            checkpoint_every=1000,
        )
    )
    field_timestep: int = 100  # of Figure 2a
    landscape_timestep: int = 50  # of Figure 1
    data_seed: int = 0
    sampling_seed: int = 1

    def __post_init__(self) -> None:
        (a, b), (c, d) = self.covariance
        if not (0 < a < 1e6 and 0 < d < 1e6 and b == c and a * d > b * c):
            raise ValueError(f"covariance: expected a symmetric positive definite 2 × 2 matrix, got {self.covariance}")
        for name in ("num_gaussian", "num_copies", "width", "depth"):
            _at_least(name, getattr(self, name), 1)
        _at_least("num_samples", self.num_samples, 2)  # one memorized and one general path
        for name in ("mean", "point"):
            for value in getattr(self, name):
                _in_range(name, value, -1_000_000, 1_000_000)
        _positive("landing_radius", self.landing_radius)
        for name in ("data_seed", "sampling_seed"):
            _whole_in_range(name, getattr(self, name), 0, _LAST_SEED)
        for name in ("field_timestep", "landscape_timestep"):
            _whole_in_range(name, getattr(self, name), 0, 999)


@dataclass(frozen=True)
class MnistConfig:
    """The paper's section 5.2: many images of one digit, and one image of another many times."""

    general_digit: int = 3  # the paper's
    memorized_digit: int = 9  # the paper's
    num_general_images: int = 3000  # the paper's
    num_copies: int = 30  # the paper's
    data_dir: str | None = None  # the four IDX files; needed for other digits, else they are downloaded
    data_seed: int = 0
    features: tuple[int, ...] = (32, 64)
    num_blocks: tuple[int, ...] = (1, 2)
    embedding: int = 128
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_steps=2800,
            batch_size=32,
            learning_rate=4e-3,
            warmup_steps=100,
            ema_decay=0.998,
            second_order="sliced",
            second_order_weight=3e-3,
            second_order_start=0.85,
            timestep_power=1.5,
            checkpoint_every=200,
        )
    )
    # Share of each batch that is the memorized image; 30 of 3,030 would be 0.01. The two conditional densities are
    # separate targets: the share moves effort between them, not the optimum. With 0.01 and 2,800 steps the gate of the
    # memorized class stayed shut at t = 0 and 1, and rounding-sized positive eigenvalues (130 of 784) stayed with it.
    memorized_share: float = 0.15
    num_ddim_steps: int = 1000  # the paper's
    # Clipping the predicted clean image, as diffusers does by default, keeps the unclipped noise: each of 1,000 steps
    # then adds what was cut off, and threes ended as noise (not with 100 steps, nor with 1,000 unclipped).
    clip: float | None = None
    num_general_samples: int = 48
    num_memorized_samples: int = 24
    sample_batch: int = 24
    sampling_seed: int = 1
    new_threshold: float = 1.4  # calibrated ℓ2 distance from which a sample is clearly new
    num_analysed: int = 24  # of each class
    timesteps: tuple[int, ...] = (0, 1, 20, 50, 100, 200, 500)
    analysis_batch: int = 8  # samples per unit of work
    points: int = 1  # Jacobians in one compiled call
    chunk: int = 56  # columns of a Jacobian taken together

    def __post_init__(self) -> None:
        stride = 1000 // self.num_ddim_steps if 1 <= self.num_ddim_steps <= 1000 else 0
        if not stride:
            raise ValueError(f"num_ddim_steps: expected 1 to 1000, got {self.num_ddim_steps}")
        missed = [t for t in self.timesteps if not (0 <= t < stride * self.num_ddim_steps and t % stride == 0)]
        if missed or not self.timesteps or list(self.timesteps) != sorted(set(self.timesteps)):
            raise ValueError(
                f"timesteps: expected ascending timesteps that {self.num_ddim_steps} DDIM steps visit (multiples of"
                f" {stride or 1} below {stride * self.num_ddim_steps}), got {self.timesteps}"
            )
        # The calibrated distance divides by the mean of the 50 nearest training images.
        _at_least("num_general_images", self.num_general_images, 49)
        if not 1 <= len(self.features) <= 2 or any(f < 8 or f % 8 for f in self.features):
            raise ValueError(f"features: expected one or two multiples of 8 (28 folds twice), got {self.features}")
        if len(self.num_blocks) != len(self.features) or min(self.num_blocks) < 1:
            raise ValueError(
                f"num_blocks: expected {len(self.features)} numbers of at least 1, one per level of features,"
                f" got {self.num_blocks}"
            )
        for name in ("num_copies", "sample_batch", "num_analysed", "analysis_batch", "points", "chunk", "embedding"):
            _at_least(name, getattr(self, name), 1)
        for name in ("data_seed", "sampling_seed"):
            _whole_in_range(name, getattr(self, name), 0, _LAST_SEED)
        _in_range("new_threshold", self.new_threshold, 0, 2)  # the distance is at most 1/0.5
        if self.clip is not None:
            _positive("clip", self.clip)
        _in_range("memorized_share", self.memorized_share, 0, 1)
        _at_least("num_general_samples", self.num_general_samples, self.num_analysed)
        _at_least("num_memorized_samples", self.num_memorized_samples, self.num_analysed)


@dataclass(frozen=True)
class AutoencoderConfig:
    """How the autoencoder of a small latent diffusion model is trained."""

    num_steps: int = 1500
    batch_size: int = 64
    learning_rate: float = 2e-3  # the peak
    seed: int = 0

    def __post_init__(self) -> None:
        _at_least("num_steps", self.num_steps, 1)
        _at_least("batch_size", self.batch_size, 1)
        _positive("learning_rate", self.learning_rate)
        _whole_in_range("seed", self.seed, 0, _LAST_SEED)


@dataclass(frozen=True)
class FilesConfig:
    """How a model's files are read, where they are not clear or not known."""

    ignore_setting: tuple[str, ...] = ()
    """Names of settings that are refused and, as you know, cannot change what the model computes. Recorded."""
    prediction_type: Literal["epsilon", "v_prediction", "sample"] | None = None
    """What the network predicts, in place of what the scheduler's file says. Recorded."""


@dataclass(frozen=True)
class GenerateConfig:
    """Images of prompts by guided DDIM sampling."""

    prompt: tuple[str, ...]  # one or more; each is one image
    negative_prompt: str = ""  # what guidance leads away from
    guidance: float = 7.5  # diffusers' default
    ddim_steps: int = 50  # diffusers' default, and the paper's
    seed: int = 0  # of the starting noise: image i starts from fold_in(key(seed), i)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("prompt: expected at least one text, got none")
        for text in (*self.prompt, self.negative_prompt):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise ValueError(f"prompt: expected text in UTF-8, got other bytes in {text!r}") from None
        _in_range("guidance", self.guidance, 1, 1000)  # 1 is no guidance; below, diffusers turns it off
        _whole_in_range("ddim_steps", self.ddim_steps, 1, 1000)
        _whole_in_range("seed", self.seed, 0, _LAST_SEED)


@dataclass(frozen=True)
class SpectrumConfig(GenerateConfig):
    """Extreme eigenvalues of the Hessian of log p_t(x_t | prompt), at the x_t of guided DDIM sampling."""

    timestep: int | None = None  # one that the DDIM steps visit; by default the first, where x_t is the noise itself
    unconditional: bool = False  # also of log p_t(x_t), without a prompt, at the same points
    method: Literal["arnoldi", "lanczos"] = "arnoldi"  # of J, one product a step; of its symmetric part, two
    num_steps: int = 20  # Krylov steps
    batch: int = 1  # points whose products go through the network together

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.method not in ("arnoldi", "lanczos"):
            raise ValueError(f"method: expected 'arnoldi' or 'lanczos', got {self.method!r}")
        _at_least("num_steps", self.num_steps, 1)
        _at_least("batch", self.batch, 1)
        if self.timestep is not None:
            _whole_in_range("timestep", self.timestep, 0, 999)


@dataclass(frozen=True)
class AuditConfig:
    """How each prompt is looked at: from the same starting noises, along guided DDIM sampling."""

    noises: int = 4
    """Starting noises, the same for all prompts: noise j is drawn with fold_in(key(seed), j). Wen et al. took 4."""
    ddim_steps: int = 50  # diffusers' default, and the paper's
    steps_run: int | None = None
    """How many of these steps are made, from the first; by default all, and only then there is an image."""
    guidance: float | None = None
    """By default diffusers' 7.5; 1 is none, and the default without a MODEL: the shipped one was examined so."""
    seed: int = 0
    timesteps: tuple[int, ...] = ()
    """Timesteps of spectra, that the steps visit. By default the first; for exact ones also near 481, 281 and 41."""
    method: Literal["auto", "eigh", "lanczos", "none"] = "auto"
    """Of spectra. By default all eigenvalues (eigh) of latents of up to 2,048 numbers, else Ritz values (lanczos)."""
    num_steps: int = 20
    """Steps of Lanczos, two products each."""
    count_budget: int | None = None
    """Products per spectrum for an estimate of its positive count (jaxmem.count_positive), from d + 1 on for the exact
    one, through a file in the run's folder; by default neither."""
    directions: int | None = None
    """Directions decoded for the most and the least memorized point; by default 3 for exact spectra, else 0."""
    batch: int | None = None
    """Points that go through the network together; by default 16, or 1 of latents of more than 2,048 numbers."""

    def __post_init__(self) -> None:
        for name in ("noises", "num_steps"):
            _at_least(name, getattr(self, name), 1)
        for name in ("batch", "count_budget"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if self.directions is not None:
            _whole_in_range("directions", self.directions, 0, 16)
        _whole_in_range("ddim_steps", self.ddim_steps, 1, 1000)
        if self.steps_run is not None:
            _whole_in_range("steps_run", self.steps_run, 1, self.ddim_steps)
        if self.guidance is not None:
            _in_range("guidance", self.guidance, 1, 1000)  # 1 is no guidance; below, diffusers turns it off
        _whole_in_range("seed", self.seed, 0, _LAST_SEED)
        if not isinstance(self.timesteps, tuple | list):
            raise ValueError(f"timesteps: expected a list of them, got {self.timesteps!r}")
        for timestep in self.timesteps:
            _whole_in_range("timesteps", timestep, 0, 999)
        if len(set(self.timesteps)) != len(self.timesteps):
            raise ValueError(f"timesteps: expected each once, got {self.timesteps}")
        if self.method not in ("auto", "eigh", "lanczos", "none"):
            raise ValueError(f"method: expected 'auto', 'eigh', 'lanczos' or 'none', got {self.method!r}")


@dataclass(frozen=True)
class VerbatimConfig:
    """A small Stable Diffusion that memorized some of its captions: the paper's section 5.3 on digits."""

    data_dir: str | None = None  # the four IDX files of MNIST; by default they are downloaded
    data_seed: int = 0
    autoencoder: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    training: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_steps=5000,
            batch_size=48,
            learning_rate=1.5e-3,
            warmup_steps=200,
            second_order="sliced",
            second_order_weight=3e-3,  # as for MNIST's single digits
            second_order_start=0.9,
            weighting="v",
            timestep_power=1.25,
            checkpoint_every=100,
        )
    )
    # The trained weights once more, most of it at small timesteps: a fifth of these examples have t ≤ 1, 0.7 % of the
    # training's. After the training alone tangent counts told single images less surely at t = 1: AUC 0.91.
    refinement: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_steps=600,
            batch_size=48,
            learning_rate=5e-4,
            warmup_steps=50,
            ema_decay=0.99,
            weighting="v",
            timestep_power=4.0,
            checkpoint_every=100,
            seed=1,
        )
    )
    # Of each batch. As in a web-scale training set, memorized captions are those whose images come again and again.
    matching_share: float = 0.2
    template_share: float = 0.25
    no_caption_share: float = 0.1  # trained without its caption, for guidance; Ho and Salimans 2022 use 0.1 to 0.2
    # Without guidance: spectra are of log p_t(x | caption), and only then are its own samples where they are taken.
    # Guidance 7.5, Stable Diffusion's, leads to peaks: with it one general sample in eight of a first model had no
    # positive eigenvalue at t = 281, without it none.
    audit: AuditConfig = field(
        default_factory=lambda: AuditConfig(noises=4, guidance=1.0, timesteps=(981, 481, 281, 41))
    )
    # One noise, but spectra at all of the 50 steps: from when on does a statistic tell memorized captions?
    course: AuditConfig = field(
        default_factory=lambda: AuditConfig(
            noises=1, guidance=1.0, timesteps=tuple(range(981, 0, -20)), directions=0, seed=1
        )
    )

    def __post_init__(self) -> None:
        _whole_in_range("data_seed", self.data_seed, 0, _LAST_SEED)
        for name in ("matching_share", "template_share", "no_caption_share"):
            _in_range(name, getattr(self, name), 0, 1)
        _in_range("matching_share + template_share", self.matching_share + self.template_share, 0, 1)


def _whole(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}: expected a whole number, got {value!r}")


def _at_least(name: str, value: int, low: int) -> None:
    _whole(name, value)
    if not value >= low:
        raise ValueError(f"{name}: expected at least {low}, got {value}")


_LAST_SEED = 2**32 - 1  # what a JAX key takes without 64-bit mode


def _positive(name: str, value: float) -> None:
    if not 0 < value <= 1_000_000:
        raise ValueError(f"{name}: expected more than 0 and at most 1,000,000, got {value}")


def _whole_in_range(name: str, value: int, low: int, high: int) -> None:
    _whole(name, value)
    _in_range(name, value, low, high)


def _in_range(name: str, value: int | float, low: int | float, high: int | float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: expected {low} to {high}, got {value}")


# The sizes of the paper. Training is longer than on two cores; the paper states neither steps nor network.
TOY2D_PRESETS = {
    "small": Toy2dConfig(),
    "paper": Toy2dConfig(
        training=replace(Toy2dConfig().training, num_steps=30_000),
        first_order_training=replace(Toy2dConfig().first_order_training, num_steps=30_000),
    ),
}
# The paper takes Arnoldi to the end, 16,384 products a spectrum. Lanczos with fewer shows both ends of it, and the
# count comes from `count_positive` with 6 % of d, whose error is known (docs/benchmarks.md).
SD_PRESETS = {
    "small": AuditConfig(noises=1, method="lanczos", num_steps=20, batch=1, timesteps=()),
    "paper": AuditConfig(
        noises=3, method="lanczos", num_steps=100, count_budget=983, timesteps=(981, 781, 581, 381, 181, 81, 21, 1)
    ),
}
MNIST_PRESETS = {
    "small": MnistConfig(),
    "paper": MnistConfig(
        features=(64, 128),
        num_blocks=(2, 3),
        training=replace(MnistConfig().training, num_steps=30_000, batch_size=128),
        num_general_samples=10_000,
        num_memorized_samples=2000,
        num_analysed=2000,
        sample_batch=250,
        timesteps=(0, 1, 20, *range(50, 1000, 50)),
        analysis_batch=50,
    ),
}
