"""The paper's experiments, and their sizes."""

from dataclasses import dataclass, field, replace

from jaxmem.config.checks import LAST_SEED, at_least, in_range, positive, whole_in_range
from jaxmem.config.models import AuditConfig
from jaxmem.config.training import AutoencoderConfig, TrainingConfig


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
            at_least(name, getattr(self, name), 1)
        at_least("num_samples", self.num_samples, 2)  # one memorized and one general path
        for name in ("mean", "point"):
            for value in getattr(self, name):
                in_range(name, value, -1_000_000, 1_000_000)
        positive("landing_radius", self.landing_radius)
        for name in ("data_seed", "sampling_seed"):
            whole_in_range(name, getattr(self, name), 0, LAST_SEED)
        for name in ("field_timestep", "landscape_timestep"):
            whole_in_range(name, getattr(self, name), 0, 999)


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
        at_least("num_general_images", self.num_general_images, 49)
        if not 1 <= len(self.features) <= 2 or any(f < 8 or f % 8 for f in self.features):
            raise ValueError(f"features: expected one or two multiples of 8 (28 folds twice), got {self.features}")
        if len(self.num_blocks) != len(self.features) or min(self.num_blocks) < 1:
            raise ValueError(
                f"num_blocks: expected {len(self.features)} numbers of at least 1, one per level of features,"
                f" got {self.num_blocks}"
            )
        for name in ("num_copies", "sample_batch", "num_analysed", "analysis_batch", "points", "chunk", "embedding"):
            at_least(name, getattr(self, name), 1)
        for name in ("data_seed", "sampling_seed"):
            whole_in_range(name, getattr(self, name), 0, LAST_SEED)
        in_range("new_threshold", self.new_threshold, 0, 2)  # the distance is at most 1/0.5
        if self.clip is not None:
            positive("clip", self.clip)
        in_range("memorized_share", self.memorized_share, 0, 1)
        at_least("num_general_samples", self.num_general_samples, self.num_analysed)
        at_least("num_memorized_samples", self.num_memorized_samples, self.num_analysed)


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
        whole_in_range("data_seed", self.data_seed, 0, LAST_SEED)
        for name in ("matching_share", "template_share", "no_caption_share"):
            in_range(name, getattr(self, name), 0, 1)
        in_range("matching_share + template_share", self.matching_share + self.template_share, 0, 1)


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
