"""A pipeline's scheduler as a schedule, a prediction and a sampler of jaxmem."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from jaxmem.diffusion import FlowSchedule, Prediction, Schedule
from jaxmem.samplers import DDIM, FlowEuler, Sampler
from jaxmem.stable_diffusion.configs import SchedulerConfig
from jaxmem.stable_diffusion.live import check_schedule, config
from jaxmem.stable_diffusion.settings import Reading

FLOW = "FlowMatchEulerDiscreteScheduler"


class Sampling(NamedTuple):
    """What a scheduler says of a model: its forward process, what the network predicts, and how one samples."""

    schedule: Schedule
    prediction: Prediction
    sampler: Callable[[int], Sampler]  #: of a number of steps


def read_scheduler(
    pipeline: Any, reading: Reading, *, flow: bool, in_pixels: bool, set_timesteps: Callable[[Any, int], None]
) -> Sampling:
    """Read the scheduler of a live pipeline.

    Flow matching is sampled by Euler steps at the sigmas that the scheduler itself sets for a number of steps, and
    anything else by DDIM on the table of betas. Pixels are clipped to [-1, 1] at each step where the file says so
    (diffusers' default); latents, which have no such bounds, are not.

    Args:
        pipeline: the pipeline.
        reading: what the user decided.
        flow: the network was trained by flow matching: its timesteps are of another kind.
        in_pixels: the network works on pixels and not on latents.
        set_timesteps: ``set_timesteps(scheduler, steps)`` as the pipeline calls it.

    Raises:
        ValueError: a scheduler of another forward process, or settings that cannot be.
    """
    scheduler = pipeline.scheduler
    name = type(scheduler).__name__
    if flow != (name == FLOW):
        expected = f"{FLOW}, which its network was trained for" if flow else "one of a table of betas"
        raise ValueError(f"scheduler: expected {expected}, for a {type(pipeline).__name__}, got {name}")
    if flow:
        return _flow(scheduler, reading, set_timesteps)
    settings = config(pipeline, "scheduler")
    read = SchedulerConfig.from_diffusers(settings, "scheduler", reading)
    check_schedule(scheduler, read.schedule)
    clip = float(settings.get("clip_sample_range", 1.0)) if in_pixels and settings.get("clip_sample", True) else None
    offset = int(settings.get("steps_offset", 0))

    def ddim(num_steps: int) -> DDIM:
        return DDIM(read.schedule, num_steps, offset, read.final_alpha_one, clip, read.spacing)

    return Sampling(read.schedule, read.prediction, ddim)


def _flow(scheduler: Any, reading: Reading, set_timesteps: Callable[[Any, int], None]) -> Sampling:
    if reading.prediction_type is not None:
        raise ValueError(
            f"prediction_type: expected none for a model of flow matching, which predicts the velocity, got"
            f" {reading.prediction_type!r}; leave it out"
        )
    for setting in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config.get(setting):
            raise ValueError(
                f"scheduler: expected deterministic Euler steps down to 0, got {setting}; take"
                f" FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config, {setting}=False)"
            )
    kept = copy.deepcopy(scheduler)  # what is done to the pipeline's afterwards is another model

    def euler(num_steps: int) -> FlowEuler:
        own = copy.deepcopy(kept)
        set_timesteps(own, num_steps)
        return FlowEuler(tuple(own.sigmas[:-1].double().tolist()))

    return Sampling(FlowSchedule(), "flow", euler)
