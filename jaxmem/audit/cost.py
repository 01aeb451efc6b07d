"""What an audit will take, before it starts: counted work, seconds by one timed batch, memory by the compiler."""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.audit.plan import Plan
from jaxmem.audit.work import Work, evaluate
from jaxmem.detectors import Detector, HessianProducts, StartPairs
from jaxmem.runs import memory
from jaxmem.spectra.dense import file_bytes, require_host_memory, solve_bytes
from jaxmem.spectra.programs import Programs, compile_programs


class Load(NamedTuple):
    """Counted work: forward passes of the network and products with its Jacobian."""

    evaluations: int
    products: int


def loads(plan: Plan, detectors: Sequence[Detector]) -> dict[str, Load]:
    """Count the work of each stage for these detectors."""
    points, k, setting = plan.num_points, len(plan.spectral_timesteps), plan.setting()
    found = {"sampling": Load(points * len(plan.timesteps), 0)}
    if plan.has_pairs:  # the first score without the prompt is shared by all prompts
        found["sampling"] = Load(points * (2 * len(plan.timesteps) - 1) + plan.noises, 0)
    if any(isinstance(detector.needs, HessianProducts) for detector in detectors):
        found["products"] = Load(2 * points, 2 * points)
    late = {detector.needs.timestep(setting) for detector in detectors if isinstance(detector.needs, StartPairs)}
    if late:
        found["start pairs"] = Load(len(late) * (points + plan.noises), 0)
    if plan.method != "none":
        found["spectra"] = Load(points * k, points * k * plan.products_per_spectrum)
    if plan.count_budget is not None:
        found["counts"] = Load(points * k, points * k * plan.products_per_count)
    if plan.directions:
        found["directions"] = Load(4 + 4 * plan.directions, 2 * plan.products_per_direction)
    return found


class AuditCost(NamedTuple):
    """Cost of an audit, known before it starts; as a text, its lines."""

    evaluations: int  #: forward passes of the network, counted
    products: int  #: products with the Jacobian of its score, counted
    seconds: float  #: from one timed batch of each; decoding, eigenvalue solvers and compilation come on top
    memory_bytes: int  #: beside the parameters, by the compiler's account
    disk_bytes: int  #: of exact counts, while they are taken
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


class Prepared(NamedTuple):
    """Compiled programs, their memory, and the cost of the audit."""

    programs: Programs  #: linearisation and products of one batch
    evaluation_bytes: int  #: of one batch, beside the parameters; also for the next two
    spectrum_bytes: int
    cost: AuditCost
    noise_share: float | None  #: of the outputs that were timed, see `jaxmem.first_step`


def prepare(work: Work, looks: Any = None) -> Prepared:
    """Compile, refuse what does not fit, and time one batch of evaluations and one of products.

    Raises:
        ValueError: too little memory, or a score that is not finite.
    """
    plan, filled = work.plan, work.plan.filled(0)
    x, t, cond = work.batch(work.first(filled), plan.timesteps[0], work.cond(filled))
    compiled = evaluate.lower(work.score, work.spread_state, x, t, cond, work.mesh).compile()
    evaluation_bytes = sum(memory.program_bytes(compiled))
    remedy = "take a smaller `batch`"
    memory.require(evaluation_bytes, f"one evaluation of {plan.batch} point(s)", remedy)
    shapes = (
        jax.ShapeDtypeStruct((plan.batch, *plan.latent_shape), jnp.float32),
        jax.ShapeDtypeStruct((plan.batch,), jnp.int32),
        jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), cond),  # on one device
    )
    programs = compile_programs(work.score, work.model.state, *shapes, symmetric=plan.method == "lanczos")
    spectrum_bytes = _spectrum_bytes(plan, evaluation_bytes, programs)
    memory.require(programs.peak_bytes, f"products of {plan.batch} point(s) together", remedy)
    memory.require(spectrum_bytes, "the spectra", "take `method` lanczos or none, or a smaller `batch` or `num_steps`")
    if count_disk_bytes(plan):
        require_host_memory(plan.size)
    count_bytes = _count_bytes(plan, evaluation_bytes, programs)
    memory.require(count_bytes, "the counts", "take a smaller `count_budget` or `batch`, or no counts")

    def evaluations() -> Any:
        return work.scores(x, plan.timesteps[0], cond)

    first = evaluations()
    work.check(np.asarray(first), filled, plan.timesteps[0])
    points = x, t, cond  # on one device, below
    operators, linearise = _timed(
        lambda: programs.operators(work.model.state, *jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), points))
    )
    vectors = jnp.asarray(np.asarray(first).reshape(plan.batch, -1))
    product = _timed(lambda: programs.forward(operators, vectors))[1] / plan.batch
    evaluation = _timed(evaluations)[1] / plan.batch
    counted = loads(plan, work.detectors) | ({} if looks is None else {"training images": looks.load()})
    seconds = {stage: load.evaluations * evaluation + load.products * product for stage, load in counted.items()}
    if "products" in seconds:
        seconds["products"] += 2 * plan.num_points * max(linearise / plan.batch - evaluation, 0)
    total = Load(*(sum(load[i] for load in counted.values()) for i in (0, 1)))
    peak = max(evaluation_bytes, programs.peak_bytes, spectrum_bytes, count_bytes)
    lines = _lines(plan, total, seconds, (evaluation, product), peak, programs)
    lines += [] if looks is None else looks.lines()
    cost = AuditCost(*total, sum(seconds.values()), peak, count_disk_bytes(plan), tuple(lines))
    return Prepared(programs, evaluation_bytes, spectrum_bytes, cost, work.noise_share(first, x, plan.timesteps[0]))


def _timed(call: Callable[[], Any]) -> tuple[Any, float]:
    """Call twice: the result, and the seconds of the second call; the first loads programs and allocates memory."""
    jax.block_until_ready(call())
    start = time.perf_counter()
    found = jax.block_until_ready(call())
    return found, time.perf_counter() - start


def _spectrum_bytes(plan: Plan, evaluation_bytes: int, programs: Programs) -> int:
    """Memory of spectra: for Lanczos the programs' and the basis, for exact ones counted as in `batch_spectra`."""
    if plan.method == "lanczos":
        # the old basis, the new one, and one in between
        return programs.peak_bytes + 3 * 4 * plan.batch * (plan.num_steps + 1) * plan.size
    if plan.method == "none":
        return 0
    return plan.columns * (2 * evaluation_bytes // plan.batch) + 4 * 4 * plan.size**2


def _count_bytes(plan: Plan, evaluation_bytes: int, programs: Programs) -> int:
    """Memory of `count_positive` for one point: its bases, or the columns of a chunk."""
    if plan.count_budget is None:
        return 0
    if plan.estimates_counts:
        # a third of the steps, up to twice as much for what is deflated, and two bases of the other two thirds
        return programs.peak_bytes + 4 * plan.size * (7 * (plan.count_budget // 2) // 3 + 64)
    return max(plan.columns * (2 * evaluation_bytes // plan.batch), programs.peak_bytes)


def count_disk_bytes(plan: Plan) -> int:
    """Size of the matrix that an exact count keeps in the run's folder until it is done."""
    exact = plan.count_budget is not None and not plan.estimates_counts
    return file_bytes(plan.size, np.float32) if exact else 0


def _lines(
    plan: Plan, work: Load, seconds: dict[str, float], rates: tuple[float, float], peak: int, programs: Programs
) -> list[str]:
    """Lines that say the cost of an audit."""
    reference = f" and {plan.num_reference} reference prompts" if plan.num_reference else ""
    every = len(plan.sampler_timesteps)
    steps = f"{len(plan.timesteps)} of {every}" if not plan.with_images else f"{every}"
    where = f" at t = {', '.join(map(str, plan.spectral_timesteps))}" if plan.spectral_timesteps else ""
    each = {"none": "no spectra", "eigh": f"all {plan.size:,} eigenvalues", "lanczos": f"{plan.num_steps} Ritz values"}
    noises = "1 noise" if plan.noises == 1 else f"{plan.noises} noises"
    total = sum(seconds.values())
    shares = ", ".join(f"{stage} {duration(s)}" for stage, s in sorted(seconds.items(), key=lambda item: -item[1]))
    counted = "; exact spectra as counted" if plan.method == "eigh" else ""
    disk = count_disk_bytes(plan)
    on_disk = [
        f"an exact count: {memory.gigabytes(disk)} of disk in the run's folder while it is taken, and"
        f" {memory.gigabytes(solve_bytes(plan.size))} of memory for its solve"
    ]
    return [
        f"audit: {plan.num_prompts} prompts{reference} × {noises} = {plan.num_points} points, {plan.batch} at once;"
        f" {steps} sampling steps; {each[plan.method]}{where}",
        f"work: {work.evaluations:,} evaluations of the score and {work.products:,} products with its Jacobian"
        f" (counted)",
        f"time: about {duration(total)} ({shares}), {duration(total / (plan.num_prompts + plan.num_reference))} per"
        f" prompt, at {rates[0]:.2g} s an evaluation and {rates[1]:.2g} s a product (measured, one batch of each);"
        f" decoding, eigenvalue solvers and compilation come on top",
        f"memory: {memory.gigabytes(programs.parameter_bytes)} of parameters are there; up to {memory.gigabytes(peak)}"
        f" more (by the compiler{counted}), of {memory.gigabytes(memory.available_bytes())} free",
        *(on_disk if disk else []),
    ]


def duration(seconds: float) -> str:
    """A duration in the unit that fits."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
