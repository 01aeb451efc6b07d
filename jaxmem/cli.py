"""The command line: parse, call one function, print. JAX loads only when there is work."""

import hashlib
import io
import os
import platform
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxmem import __version__
from jaxmem.commands.audit import Audit, Figures, Report
from jaxmem.commands.compare import Compare
from jaxmem.commands.flags import in_flags, speaking_of
from jaxmem.commands.models import Generate, Spectrum
from jaxmem.commands.reproduce import Dimension, Finetune, Mnist, PaperFigures, Toy2d, Verbatim
from jaxmem.config import FINETUNE_PRESETS, MNIST_PRESETS, SD_PRESETS, TOY2D_PRESETS, FilesConfig, PartsConfig
from jaxmem.terminal import visible

_COMMANDS = {
    "toy2d": Toy2d,
    "mnist": Mnist,
    "verbatim": Verbatim,
    "finetune": Finetune,
    "dimension": Dimension,
    "sd": PaperFigures,
    "generate": Generate,
    "spectrum": Spectrum,
    "audit": Audit,
    "figures": Figures,
    "report": Report,
    "compare": Compare,
}


def _parse(arguments: Sequence[str]) -> Any:
    preset = _preset(arguments)
    # A preset decides the defaults of all other flags, so it is looked up before they are parsed.
    toy2d = _unfilled(Toy2d, TOY2D_PRESETS, preset, out=tyro.MISSING)
    mnist = _unfilled(Mnist, MNIST_PRESETS, preset, out=tyro.MISSING)
    finetune = _unfilled(Finetune, FINETUNE_PRESETS, preset, out=tyro.MISSING)
    given: dict[str, Any] = {"model": tyro.MISSING, "prompts": tyro.MISSING, "out": None}
    given |= {"files": FilesConfig(), "parts": PartsConfig()}
    paper = _unfilled(PaperFigures, SD_PRESETS, preset, **given, per_category=30, dry_run=False)

    @dataclass(frozen=True)
    class Reproduce:
        """Reproduce an experiment of the paper: train, sample, take spectra, draw its figures."""

        experiment: (
            Annotated[Toy2d, tyro.conf.subcommand("toy2d", default=toy2d)]
            | Annotated[Mnist, tyro.conf.subcommand("mnist", default=mnist)]
            | Annotated[Verbatim, tyro.conf.subcommand("verbatim")]
            | Annotated[Finetune, tyro.conf.subcommand("finetune", default=finetune)]
            | Annotated[Dimension, tyro.conf.subcommand("dimension")]
            | Annotated[PaperFigures, tyro.conf.subcommand("sd", default=paper)]
        )

    command = _parsed(
        tyro.conf.OmitSubcommandPrefixes[  # type: ignore[misc]
            Annotated[Reproduce, tyro.conf.subcommand("reproduce")]
            | Annotated[Generate, tyro.conf.subcommand("generate")]
            | Annotated[Spectrum, tyro.conf.subcommand("spectrum")]
            | Annotated[Audit, tyro.conf.subcommand("audit")]
            | Annotated[Figures, tyro.conf.subcommand("figures")]
            | Annotated[Report, tyro.conf.subcommand("report")]
            | Annotated[Compare, tyro.conf.subcommand("compare")]
        ],
        arguments,
    )
    return command.experiment if isinstance(command, Reproduce) else command


def _parsed(commands: Any, arguments: Sequence[str]) -> Any:
    """The command of these arguments; what a configuration refuses is its ValueError, and not tyro's box around it."""
    shown = _Shown()
    try:
        with redirect_stderr(shown):
            return tyro.cli(
                commands,
                prog="jaxmem",
                args=list(arguments),
                description="Memorization in diffusion models, by the eigenvalues of the Hessian of the learned log"
                " density.",
            )
    except SystemExit as stopped:
        cause = stopped.__context__
        while cause is not None:
            if isinstance(cause, ValueError) and _raised_in(cause).startswith("jaxmem."):
                raise cause from None
            cause = cause.__context__
        sys.stderr.write(shown.getvalue())
        raise


class _Shown(io.StringIO):
    """Standard error, kept back; colours are for a terminal, as they would be there."""

    def isatty(self) -> bool:
        return sys.__stderr__ is not None and sys.__stderr__.isatty()


def _raised_in(error: BaseException) -> str:
    """The module that raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")


def _keep_compiled_programs() -> None:
    """Keep what JAX compiles on disk: the next start of a command finds it (JAX_COMPILATION_CACHE_DIR says where)."""
    # XLA logs an error for each program it loads whose tuning hints are no processor features; it says nothing else
    # there that Python does not raise.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    cache = home / "jaxmem" / "compiled" / _processor()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(cache))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def _processor(described: Path = Path("/proc/cpuinfo")) -> str:
    """A name for the instructions of this processor, of which programs consist; JAX's cache does not tell them apart.

    The machines of a cluster share a home, and a program with instructions that a processor lacks ends the process.
    """
    try:
        lines = described.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux
        lines = []
    features = [line for line in lines if line.lower().startswith(("flags", "features"))][:1] or platform.processor()
    return hashlib.sha256(f"{platform.machine()} {features}".encode()).hexdigest()[:12]


def _unfilled(command: type[Any], presets: dict[str, Any], preset: str, **values: Any) -> Any:
    """A command of a preset with values still to be given: made without ``__init__``, which may check their types."""
    made = object.__new__(command)
    config = presets.get(preset, presets["small"])
    for name, value in {"config": config, "preset": "small", **values}.items():
        object.__setattr__(made, name, value)
    return made


def _preset(arguments: Sequence[str]) -> str:
    found = "small"  # the last one holds, as for every flag
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            found = arguments[i + 1]
        if argument.startswith("--preset="):
            found = argument.removeprefix("--preset=")
    return found


_LINES = "\n"  # a message may have several


def _as_line(message: Any, category: type[Warning], filename: str, lineno: int, line: str | None = None) -> str:  # noqa: ARG001
    """A warning as a command shows it: what it says; of deprecations and the like also where, for developers."""
    text = f"jaxmem: warning: {visible(in_flags(str(message)), keep=_LINES)}\n"
    return text if issubclass(category, UserWarning) else f"{filename}:{lineno}: {category.__name__}: {text}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code: 0 done, 2 bad input, 130 interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if list(arguments) == ["--version"]:
        print(f"jaxmem {__version__}")
        return 0
    with speaking_of(next((_COMMANDS[word] for word in arguments[:2] if word in _COMMANDS), None), arguments):
        return _run(arguments)


def _again_outside(swallowed: Any) -> None:
    """An interruption that came while JAX's callback of the garbage collector ran is swallowed there: once more."""
    if isinstance(swallowed.exc_value, KeyboardInterrupt):
        # Now it would be swallowed here: a tenth of a second later this has returned, on a busy machine, too.
        later = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        later.daemon = True
        later.start()
    else:
        sys.__unraisablehook__(swallowed)


def _run(arguments: Sequence[str]) -> int:
    formatted, unraisable = warnings.formatwarning, sys.unraisablehook
    warnings.formatwarning, sys.unraisablehook = _as_line, _again_outside
    try:
        command = _parse(arguments)
        _keep_compiled_programs()
        command()
    except KeyboardInterrupt:
        print("\nInterrupted. Nothing finished is lost: the same command continues the run.", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0  # the reader of our output has seen enough
    except (ValueError, OSError, ImportError) as error:
        print(f"jaxmem: {visible(in_flags(str(error)), keep=_LINES)}", file=sys.stderr)
        return 2
    finally:
        warnings.formatwarning, sys.unraisablehook = formatted, unraisable
    return 0
