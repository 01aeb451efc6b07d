import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import command_environment, interruptible
from killing import signal_when

from jaxmem import cli
from jaxmem.config import MNIST_PRESETS, TOY2D_PRESETS

ROOT = Path(__file__).parent.parent
ENVIRONMENT = command_environment()
COMMANDS = (
    [],
    ["reproduce"],
    ["reproduce", "toy2d"],
    ["reproduce", "mnist"],
    ["generate"],
    ["spectrum"],
    ["reproduce", "verbatim"],
    ["reproduce", "finetune"],
    ["reproduce", "dimension"],
    ["reproduce", "sd"],
    ["audit"],
    ["figures"],
    ["report"],
    ["compare"],
)
TINY = [
    *("--num-general-images", "60", "--num-copies", "5", "--features", "8", "16", "--num-blocks", "1", "1"),
    *("--embedding", "16", "--num-ddim-steps", "10", "--timesteps", "0", "200", "--num-general-samples", "2"),
    *("--num-memorized-samples", "2", "--sample-batch", "2", "--num-analysed", "2", "--new-threshold", "0"),
    *("--analysis-batch", "2", "--chunk", "112", "--training.num-steps", "40", "--training.warmup-steps", "5"),
    *("--training.batch-size", "8", "--training.checkpoint-every", "10"),
]


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "jaxmem", *arguments], env=ENVIRONMENT, capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert len(text) > 200
    assert text.splitlines()[2][0].isupper()  # a sentence, not an empty description


def test_help_and_version_do_not_load_jax():
    script = (
        "import sys, jaxmem.cli as c\ntry: c.main(sys.argv[1:])\nexcept SystemExit: pass\nprint('jax' in sys.modules)"
    )
    helps = ["--help"], ["reproduce", "mnist", "--help"], ["spectrum", "--help"], ["compare", "--help"]
    for arguments in (*helps, ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], env=ENVIRONMENT, capture_output=True, text=True, check=True
        )
        assert done.stdout.strip().endswith("False"), arguments


def test_version_is_the_packages():
    import jaxmem

    assert run("--version").stdout.strip() == f"jaxmem {jaxmem.__version__}"
    # What is installed is what this tree says: make venv-test installs it again where pyproject.toml has changed.
    assert f'version = "{jaxmem.__version__}"' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.parametrize(("experiment", "presets"), [("toy2d", TOY2D_PRESETS), ("mnist", MNIST_PRESETS)])
@pytest.mark.parametrize("preset", ["small", "paper"])
@pytest.mark.parametrize("form", ["{} {}", "{}={}"])
def test_presets_set_defaults_and_flags_change_them(experiment, presets, preset, form):
    chosen = form.format("--preset", preset).split()
    command = cli._parse(["reproduce", experiment, *chosen, "--out", "there", "--training.learning-rate", "0.5"])
    assert command.out == Path("there")
    assert command.config.training.learning_rate == 0.5
    expected = presets[preset]
    assert command.config.training.num_steps == expected.training.num_steps
    assert {**vars(command.config), "training": None} == {**vars(expected), "training": None}


def test_the_last_preset_holds():
    command = cli._parse(["reproduce", "toy2d", "--preset", "paper", "--out", "there", "--preset", "small"])
    assert command.config == TOY2D_PRESETS["small"]


@pytest.mark.parametrize("preset", ["small", "paper"])
def test_the_networks_of_the_presets_exist(preset):
    import jax

    from jaxmem.experiments.mnist import score_network

    shapes = jax.eval_shape(lambda: score_network(MNIST_PRESETS[preset])[1])
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) > 300_000


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["figures", "nowhere"], "nowhere: expected a run directory"),
        (
            ["reproduce", "toy2d", "--out", "{out}", "--training.num-steps", "0"],
            "jaxmem: --training.num-steps: expected at least 1",
        ),
        (["reproduce", "mnist", "--out", "{out}", "--timesteps", "5", "1"], "jaxmem: --timesteps: expected ascending"),
        (["reproduce", "mnist", "--out", "{out}", "--memorized-digit", "3"], "memorized_digit"),
        (
            ["reproduce", "mnist", "--out", "{out}", "--features", "32", "60"],
            "jaxmem: --features: expected one or two multiples",
        ),
        (
            ["reproduce", "mnist", "--out", "{out}", "--training.learning-rate", "inf"],
            "jaxmem: --training.learning-rate: expected more",
        ),
        (["reproduce", "mnist", "--out", "{out}", "--general-digit", "4", "--data-dir", "{out}"], "train-images-idx3"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(arguments, match, tmp_path):
    out = tmp_path / "run"
    done = run(*(a.format(out=out) for a in arguments))
    assert done.returncode == 2
    assert match in done.stderr
    assert "Traceback" not in done.stderr
    assert not out.exists()


def test_programs_of_another_processor_are_kept_apart(tmp_path):
    """As on a cluster, where machines share a home."""
    places = []
    for i, flags in enumerate(("fma avx2", "fma avx2 avx512f", "fma avx2")):
        described = tmp_path / f"cpuinfo-{i}"
        described.write_text(f"processor : 0\nmodel name : same\nflags\t\t: {flags}\nbogomips : {i}\n")
        places.append(cli._processor(described))
    assert places[0] == places[2] != places[1]
    assert cli._processor(tmp_path / "missing") == cli._processor(tmp_path / "missing") != places[0]


def test_unknown_flags_are_refused():
    done = run("reproduce", "toy2d", "--out", "x", "--sharpness", "3")
    assert done.returncode == 2
    assert "--sharpness" in done.stderr + done.stdout


@pytest.mark.slow  # fast: test_one_prompt.py, test_audit.py and test_training.py kill theirs
def test_interrupt_kill_and_resume_end_in_the_same_run(tmp_path):
    command = [sys.executable, "-m", "jaxmem", "reproduce", "mnist", *TINY, "--out"]
    for sent, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        with subprocess.Popen(
            interruptible([*command[3:], str(tmp_path / "a")]), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        ) as p:
            signal_when(p, lambda: list((tmp_path / "a" / "checkpoints").glob("step-*")), sent)
            _, errors = p.communicate()
        assert p.returncode == code, errors
        if sent == signal.SIGINT:
            assert "the same command continues the run" in errors
            assert "Traceback" not in errors
    done = run("reproduce", "mnist", *TINY, "--out", str(tmp_path / "a"), check=True)
    assert "A positive eigenvalue is a direction in which the density curves upwards" in done.stdout
    assert len(list((tmp_path / "a" / "figures").glob("*.png"))) == 4
    run("reproduce", "mnist", *TINY, "--out", str(tmp_path / "b"), check=True)
    resumed, whole = ((tmp_path / name / "spectra.npz").read_bytes() for name in "ab")
    assert resumed == whole
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    assert manifest["experiment"] == "mnist"
    assert str(ROOT) not in json.dumps(manifest)
    redrawn = run("figures", str(tmp_path / "a"), check=True)
    assert "figure5_counts.png" in redrawn.stdout


def test_an_interruption_within_a_callback_of_the_garbage_collector_is_not_lost(tmp_path):
    """Python only reports what is raised there, and JAX has such a callback."""
    script = (
        "import gc, signal, sys, time\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also where tests run with interrupts off
        "from jaxmem import cli\n"
        "def interrupted(phase, info):\n"
        "    if phase == 'start': raise KeyboardInterrupt\n"
        "def command():\n"
        "    gc.callbacks.append(interrupted); gc.collect(); gc.callbacks.clear()\n"
        # Short sleeps: a signal that comes just before a system call does not end it, Python sees it after the call.
        "    for _ in range(400): time.sleep(0.1)\n"
        "cli._parse = lambda arguments: command\n"
        "sys.exit(cli.main(['any']))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=command_environment(), capture_output=True, text=True, timeout=50
    )
    assert done.returncode == 130, done.stderr
    assert "Interrupted. Nothing finished is lost" in done.stderr
