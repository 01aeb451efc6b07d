"""The fine-tune whose memorized images are known, and its sizes."""

from dataclasses import dataclass, field

from jaxmem.config.checks import LAST_SEED, at_least, in_range, whole_in_range
from jaxmem.config.models import AuditConfig
from jaxmem.config.training import TrainingConfig


@dataclass(frozen=True)
class FinetuneConfig:
    """The shipped model fine-tuned on images that it has not seen, some of them duplicated."""

    data_dir: str | None = None  # the four IDX files of MNIST; by default they are downloaded
    data_seed: int = 0
    num_single: int = 20  # captions of one image
    copies: int = 40  # files of each of these
    num_many: int = 10  # captions of images that are all different
    images_per_caption: int = 80  # of the latter
    held_out: int = 8  # images for each caption, of either kind, that are not trained on
    # Ho and Salimans 2022 use 0.1 to 0.2, and Stable Diffusion was trained with 0.1. Scripts that drop none leave the
    # empty prompt to chance: it follows the captions as far as they share weights.
    caption_dropout: float = 0.1
    full: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_steps=500,
            batch_size=48,
            learning_rate=1e-3,
            warmup_steps=50,
            ema_decay=0.998,
            weighting="v",
            checkpoint_every=50,
        )
    )
    full_checkpoints: tuple[int, ...] = (50, 100, 200, 350, 500)
    lora: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            num_steps=1000,
            batch_size=48,
            learning_rate=4e-3,
            warmup_steps=50,
            ema_decay=0.998,
            weighting="v",
            checkpoint_every=50,
            seed=1,
        )
    )
    lora_checkpoints: tuple[int, ...] = (200, 500, 1000)
    # Of layers 64 to 80 wide. With 16 the loss ended at 44 after 1,000 steps; with 8 and a rate of 0.005 at 47 after
    # 800; with 8, a rate of 0.02 and batches of 24 at 53 after 1,200.
    lora_rank: int = 16
    sampling_noises: int = 2  # of each caption, to see what it returns
    sampling_seed: int = 1
    ddim_steps: int = 50
    # Of every checkpoint; images are noised at the same timesteps. Late enough to tell one image from others like it.
    audit: AuditConfig = field(
        default_factory=lambda: AuditConfig(noises=1, guidance=1.0, ddim_steps=25, timesteps=(281,), directions=0)
    )
    held_out_looked_at: int = 1  # of each caption

    def __post_init__(self) -> None:
        for name in ("num_single", "copies", "num_many", "images_per_caption", "held_out"):
            at_least(name, getattr(self, name), 1)
        for name in ("lora_rank", "sampling_noises", "ddim_steps", "held_out_looked_at"):
            at_least(name, getattr(self, name), 1)
        for name in ("data_seed", "sampling_seed"):
            whole_in_range(name, getattr(self, name), 0, LAST_SEED)
        # Six colours of each digit: ten captions of a kind take one of them.
        if -(-self.num_single // 10) - (-self.num_many // 10) > 6:
            raise ValueError(
                f"num_single and num_many: expected at most 60 captions in tens, got {self.num_single} and"
                f" {self.num_many}"
            )
        in_range("caption_dropout", self.caption_dropout, 0, 0.9)
        for name in ("full", "lora"):
            _check_steps(name, getattr(self, name), getattr(self, f"{name}_checkpoints"))


def _check_steps(name: str, training: TrainingConfig, steps: tuple[int, ...]) -> None:
    """Checkpoints are kept where a training saves what it continues from, and at its end."""
    every, last = training.checkpoint_every, training.num_steps
    missed = [step for step in steps if step != last and step % every]
    if missed or list(steps) != sorted(set(steps)) or not steps or steps[0] < 1 or steps[-1] != last:
        raise ValueError(
            f"{name}_checkpoints: expected ascending steps, multiples of {every} (`{name}.checkpoint_every`) that end"
            f" with {last} (`{name}.num_steps`), got {steps}"
        )


FINETUNE_PRESETS = {"small": FinetuneConfig()}
