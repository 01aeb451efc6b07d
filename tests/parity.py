"""What two programs of one function may differ by: float64 is the truth, the peer's own float32 error the measure.

Two float32 programs differ by the rounding of both, and how much that is depends on the network, the CPU and the
compiler's flags: no constant is right everywhere. So each is held against the same function in float64,

    error = ‖found − truth‖ / ‖truth‖    (2-norms),

and ours may be off by `MULTIPLE` times the peer's error. That says whether we round as well as the peer. Whether it is
the same function, ours in float64 says, where rounding hides nothing: a wrong epsilon, activation or transposed kernel
gives 1e-7 to 1 there.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

EPS = float(np.finfo(np.float32).eps)

# Rounding errors of different operations are about independent, so norms of errors go with the square roots of the
# numbers of terms that an accumulator sums. One accumulator has √n; vector units spread a sum over 4 lanes (SSE) to 16
# (AVX-512), several of each: up to 64 accumulators, whose errors are √64 = 8 times smaller. The peer may have any of
# them, and so may we.
MULTIPLE = 8

# In float64 everything rounds 2⁻²⁹ times as much as in float32. The bound is 2⁻²³ (EPS) times that of float32, which
# leaves 2⁶ for library functions (exp, erf, sin) that are less exact there, in units of their last digit.
EXACT = EPS


class Row(NamedTuple):
    """One comparison: relative errors against float64."""

    name: str
    ours: float
    peer: float
    exact: float | None  # ours in float64, or not compared
    inputs: float = 0.0  # the truth itself, of inputs and parameters that are one rounding away, or not asked for

    @property
    def bound(self) -> float:
        """The largest error of ours; that of a peer which was lucky counts as one rounding of each entry."""
        return MULTIPLE * max(self.peer, self.inputs, EPS)


def error(found: Any, truth: Any) -> float:
    """``‖found − truth‖ / ‖truth‖``, in float64; of a truth that is zero, ``‖found‖``."""
    found, truth = np.asarray(found), np.asarray(truth)
    if found.shape != truth.shape:
        raise AssertionError(f"expected shape {truth.shape}, got {found.shape}")
    scale = float(np.linalg.norm(truth.astype(np.float64).reshape(-1)))
    return float(np.linalg.norm((found.astype(np.float64) - truth).reshape(-1))) / (scale or 1.0)


def widened(tree: Any) -> Any:
    """A pytree or Flax module with its floating-point arrays in float64; to be called where JAX has it."""
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, widened(state))
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(jnp.result_type(leaf), jnp.floating) else leaf,
        tree,
    )


def in_double(f: Callable[..., Any], *args: Any) -> Any:
    """``f(*args)`` computed in float64, as NumPy arrays."""
    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, f(*map(widened, args)))


def rounded(tree: Any) -> Any:
    """A pytree in float64, each number off by about one rounding of float32: what that changes is the conditioning."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) * (1 + EPS * rng.normal(size=np.shape(leaf))), tree)


class Parity:
    """Compares, and gives the rows to whoever records them (the fixture of that name: pytest's report)."""

    def __init__(self, record: Callable[[Row], None]) -> None:
        self._record = record

    def check(self, name: str, ours: Any, peer: Any, truth: Any, exact: Any = None, *, inputs: Any = None) -> None:
        """Arrays of one shape, or pytrees of them, leaf by leaf: ours, the peer's, the truth, ours in float64.

        ``inputs`` is the truth of inputs and parameters that are one rounding away. It belongs where few numbers decide
        about the error (one timestep's logarithm, multiplied by all the network does): the peer may have rounded those
        few by luck, which no average over an array shows.
        """
        count = len(jax.tree.leaves(truth))
        columns = [
            [None] * count if tree is None else jax.tree.leaves(tree) for tree in (ours, peer, truth, exact, inputs)
        ]
        for mine, theirs, true, double, rounded in zip(*columns, strict=True):
            row = Row(
                name,
                error(mine, true),
                error(theirs, true),
                None if double is None else error(double, true),
                0.0 if rounded is None else error(rounded, true),
            )
            self._record(row)
            # "not <=": NaN fails, too.
            if not row.ours <= row.bound or not (row.exact is None or row.exact <= EXACT * row.bound):
                raise AssertionError(
                    f"{name}: expected to be off float64 by at most {row.bound:.2e} ({MULTIPLE} times the largest of"
                    f" the peer's {row.peer:.2e}, rounded inputs' {row.inputs:.2e} and eps), and in float64 by"
                    f" {EXACT * row.bound:.2e}; got {row.ours:.2e} and, in float64, {row.exact}"
                )

    def functions(self, name: str, ours: Callable[..., Any], peer: Callable[..., Any], *args: Any) -> None:
        """Two JAX functions of the same arguments; the truth is the peer's in float64."""
        self.check(name, ours(*args), peer(*args), in_double(peer, *args), in_double(ours, *args))


def double_module(torch: Any, module: Any) -> Any:
    """A torch module's copy in float64, and its timestep features as well, which diffusers computes in float32."""
    twin = copy.deepcopy(module).double()

    class Exact(torch.nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, timesteps: Any) -> Any:
            inner, half = self.inner, self.inner.num_channels // 2
            exponents = torch.arange(half, dtype=torch.float64) / (half - inner.downscale_freq_shift)
            angles = timesteps.double()[:, None] * inner.scale * 10_000.0**-exponents
            parts = [angles.sin(), angles.cos()]
            return torch.cat(parts[::-1] if inner.flip_sin_to_cos else parts, dim=-1)

    if hasattr(twin, "time_proj"):
        twin.time_proj = Exact(twin.time_proj)
    return twin


def table(runs: dict[str, list[Row]]) -> list[str]:
    """Markdown: of each kind of comparison the largest errors, ours by run, and what `MULTIPLE` bounds."""
    lines = [
        f"| compared | number | peer | {' | '.join(runs)} | ours in float64 | ours / peer, at most |",
        "|---" * (len(runs) + 5) + "|",
    ]
    every = [row for rows in runs.values() for row in rows]
    for name in dict.fromkeys(row.name for row in every):
        same = [row for row in every if row.name == name]
        ours = [max((row.ours for row in rows if row.name == name), default=float("nan")) for rows in runs.values()]
        exact = [row.exact for row in same if row.exact is not None]
        lines.append(
            f"| {name} | {len(same) // len(runs)} | {max(row.peer for row in same):.1e}"
            f" | {' | '.join(f'{largest:.1e}' for largest in ours)} | {f'{max(exact):.1e}' if exact else ''}"
            f" | {max(MULTIPLE * row.ours / row.bound for row in same):.1f} |"
        )
    return lines
