"""`jaxmem generate` and `jaxmem spectrum`: what they compute, write, refuse and continue."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny_diffusion as tiny
from conftest import command_environment, interruptible, optional_import
from flax import nnx
from killing import recorded, signal_when
from rich.console import Console

from jaxmem import cli, score_jacobian
from jaxmem.audit.generate import run_generate, starting_noise
from jaxmem.audit.spectrum import run_spectrum
from jaxmem.config import GenerateConfig, SpectrumConfig
from jaxmem.report.figures import draw
from jaxmem.report.tables import print_summary
from jaxmem.runs import memory
from jaxmem.runs.directory import Run
from jaxmem.spectra.programs import Programs
from jaxmem.stable_diffusion.pipeline import StableDiffusion

ROOT = Path(__file__).parent.parent
PROMPTS = ("the cat", "costs $5 or $6 [bold]")


@pytest.fixture(scope="module")
def folder(torch, diffusers, tmp_path_factory):
    peers = torch, diffusers, optional_import("transformers")
    return tiny.make_pipeline(*peers, tmp_path_factory.mktemp("runs"), **tiny.SMALLEST)[1]


@pytest.fixture(scope="module")
def model(folder):
    return StableDiffusion.load(folder)


def config(**changes):
    return SpectrumConfig(**dict(prompt=PROMPTS, ddim_steps=10, num_steps=6, timestep=501) | changes)


def test_images_are_those_of_the_sampler(model, tmp_path):
    metrics = run_generate(model, GenerateConfig(PROMPTS, negative_prompt="dog", guidance=3.0, ddim_steps=4), tmp_path)
    spectra = Run.read(tmp_path).spectra()
    noise = starting_noise(model, GenerateConfig(PROMPTS))
    path = list(model.path(noise, PROMPTS, guidance=3.0, negative="dog", num_steps=4))
    np.testing.assert_allclose(spectra["latents"], path[-1][1], atol=1e-4)  # alone and together: two programs
    np.testing.assert_array_equal(spectra["images"], model.decode(jnp.asarray(spectra["latents"])))
    assert metrics["prompts"] == list(PROMPTS)
    assert [path.name for path in draw(tmp_path)] == ["images.png", "image-000.png", "image-001.png"]


@pytest.mark.parametrize("method", [pytest.param("arnoldi", marks=pytest.mark.slow), "lanczos"])
def test_all_ritz_values_are_the_exact_spectrum(model, tmp_path, method):
    """As many steps as dimensions: the Ritz values are the eigenvalues of the dense Jacobian, or its symmetric part."""
    metrics = run_spectrum(model, config(prompt=PROMPTS[:1], num_steps=64, method=method), tmp_path)
    spectra = Run.read(tmp_path).spectra()
    x, cond = jnp.asarray(spectra["latents"][0]), model.embed(PROMPTS[:1])[0]
    dense = np.asarray(score_jacobian(model.score, model.state, x, 501, cond).to_dense(), np.float64)
    scale = np.linalg.norm(dense, 2)
    if method == "lanczos":
        exact = np.linalg.eigvalsh((dense + dense.T) / 2)[::-1]
        np.testing.assert_allclose(spectra["eigenvalues"][0], exact, atol=1e-3 * scale)
    else:
        exact = np.linalg.eigvals(dense)
        # A real non-symmetric matrix's eigenvalues move by more than its rounding: the largest, and the trace.
        ours = spectra["eigenvalues"][0]
        assert abs(np.abs(ours).max() - np.abs(exact).max()) < 1e-3 * scale
        assert abs(ours.sum() - np.trace(dense)) < 1e-3 * scale
    point = metrics["points"][0]
    asymmetry = np.linalg.norm(dense - dense.T) / np.linalg.norm(dense)
    # All of it for a whole Krylov space; one random vector's estimate for Lanczos.
    assert point["asymmetry"] == pytest.approx(asymmetry, rel=1e-3 if method == "arnoldi" else 0.3)
    assert metrics["num_products"] == (64 + 2 if method == "arnoldi" else 128 + 3)
    assert metrics["lower_bound"] == pytest.approx(-1 / model.scheduler.schedule.sigma[501] ** 2)


def test_the_point_is_on_the_guided_path(model, tmp_path):
    run_spectrum(model, config(num_steps=2), tmp_path)
    latents = Run.read(tmp_path).spectra()["latents"]
    path = dict(model.path(starting_noise(model, config()), PROMPTS, num_steps=10))
    np.testing.assert_allclose(latents, path[501], atol=1e-4)


def test_batches_give_what_single_points_give(model, tmp_path):
    """Two prompts, each with and without, in batches of 1 and of 3 (the last one filled up)."""
    spectra = []
    for batch in (1, 3):
        run_spectrum(model, config(unconditional=True, method="lanczos", batch=batch), tmp_path / str(batch))
        spectra.append(Run.read(tmp_path / str(batch)).spectra())
    assert spectra[0]["eigenvalues"].shape == (4, 6)
    np.testing.assert_allclose(spectra[0]["eigenvalues"], spectra[1]["eigenvalues"], atol=1e-4)
    assert np.abs(spectra[0]["eigenvalues"][0] - spectra[0]["eigenvalues"][1]).max() > 1e-3  # the prompt matters


def test_memory_is_said_and_refused_before_the_work(folder, model, tmp_path, monkeypatch):
    said, moved = [], []
    run_spectrum(model, config(), tmp_path / "fits", say=said.append, progress=lambda *a: moved.append(a))
    # a network without training is no epsilon network (tests/test_first_step.py)
    assert [line.split(": ")[:2] for line in said[1:]] == [["warning", "prediction_type"]]
    assert said[0].startswith("memory: ")
    assert "for linearisation and products of 1 point(s) at once" in said[0]
    assert moved[-1] == ("products", 12, 12)
    for part in model.components:
        model.network(part)
    monkeypatch.setattr(memory, "available_bytes", lambda: 100_000)  # the Krylov basis alone takes 199,680
    with pytest.raises(ValueError, match=r"the spectrum: needs about .* take a smaller `batch`"):
        run_spectrum(
            model,
            config(batch=4, num_steps=64, unconditional=True),
            tmp_path / "large",
            progress=lambda *a: pytest.fail("work began"),
        )
    with pytest.raises(ValueError, match="the parameters of the model: needs about"):
        run_spectrum(StableDiffusion.load(folder), config(), tmp_path / "larger")


def test_bad_settings_are_named(model, tmp_path):
    with pytest.raises(ValueError, match=r"visit \(1 to 901 in steps of 100\), got 500; the nearest is 501"):
        run_spectrum(model, config(timestep=500), tmp_path)
    with pytest.raises(ValueError, match="prompt: expected text in UTF-8"):
        config(prompt=("\udcff",))
    run_generate(model, GenerateConfig(("a",), negative_prompt="/ugly", ddim_steps=1), tmp_path / "generate")
    with pytest.raises(ValueError, match="num_steps: expected 1 to 64"):
        run_spectrum(model, config(num_steps=65), tmp_path)
    for changes, match in (
        (dict(prompt=()), "prompt: expected at least one text"),
        (dict(batch=0), "batch: expected at least 1"),
        (dict(timestep=1000), "timestep: expected 0 to 999"),
        (dict(guidance=-1.0), "guidance: expected 1 to 1000"),
    ):
        with pytest.raises(ValueError, match=match):
            config(**changes)
    other = config()
    object.__setattr__(other, "method", "eigh")  # the tests' type checks would not let it through
    with pytest.raises(ValueError, match="method: expected 'arnoldi' or 'lanczos', got 'eigh'"):
        other.__post_init__()
    run_spectrum(model, config(num_steps=2), tmp_path / "run")
    with pytest.raises(ValueError, match="num_steps"):
        run_spectrum(model, config(num_steps=3), tmp_path / "run")


@pytest.mark.parametrize(
    ("part", "change", "named"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction"),
        ("unet/config.json", {"attention_head_dim": 8}, "num_heads"),
        ("vae/config.json", {"scaling_factor": 1.0}, "scaling_factor"),
    ],
)
def test_another_model_is_another_run(folder, model, tmp_path, part, change, named):
    shutil.copytree(folder, tmp_path / "model")
    path = tmp_path / "model" / part
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    settings = GenerateConfig(("a",), ddim_steps=2)
    run_generate(model, settings, tmp_path / "run")
    with pytest.raises(ValueError, match=named):
        run_generate(StableDiffusion.load(tmp_path / "model"), settings, tmp_path / "run")


def test_products_that_are_not_finite_leave_the_run_as_it_was(model, tmp_path, monkeypatch):
    multiply, calls = Programs.multiply, []

    def spoilt(self, operators, vectors):
        calls.append(None)
        return multiply(self, operators, vectors) * (np.nan if len(calls) == 3 else 1)

    with monkeypatch.context() as patched:
        patched.setattr(Programs, "multiply", spoilt)
        with pytest.raises(ValueError, match="score: product 3 of image 0 holds NaN or infinity"):
            run_spectrum(model, config(), tmp_path / "run")
    resumed, whole = run_spectrum(model, config(), tmp_path / "run"), run_spectrum(model, config(), tmp_path / "whole")
    assert resumed["points"] == whole["points"]


def test_a_zero_jacobian_is_no_error(model, tmp_path):
    networks = [nnx.merge(*model.components[part].load()) for part in ("unet", "text_encoder", "vae")]
    networks[0].conv_out.weight.set_value(jnp.zeros_like(networks[0].conv_out.weight[...]))
    zero = StableDiffusion.from_modules(*networks, model.tokenizer, model.scheduler)
    metrics = run_spectrum(zero, config(num_steps=3), tmp_path)
    assert [point["asymmetry"] for point in metrics["points"]] == [0, 0]
    print_summary(tmp_path, [Path("x[/y]z")], Console())


def command(folder, out, *more):
    arguments = ["spectrum", str(folder), "--prompt", *PROMPTS, "--unconditional", "--batch", "2", "--ddim-steps", "10"]
    return [
        sys.executable,
        "-m",
        "jaxmem",
        *arguments,
        "--timestep",
        "701",
        "--num-steps",
        "40",
        "--out",
        str(out),
        *more,
    ]


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return command_environment(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def whole_run(folder, environment, tmp_path_factory):
    """A run from start to end in a process of its own, which also fills the cache of compiled programs."""
    out = tmp_path_factory.mktemp("whole") / "run"
    done = subprocess.run(command(folder, out), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Ritz values of the Hessian of log p_t at t = 701" in done.stdout
    assert "costs $5 or $6 [bold]" in done.stdout
    return out


def test_killed_runs_continue_to_the_same_bits(folder, tmp_path, environment, whole_run):
    out = tmp_path / "killed"
    rows = out / "results-0.jsonl"
    for there, kill in (
        (recorded(rows, 1, b"sample-000-0002"), signal.SIGKILL),
        ((out / "krylov" / "000.npz").exists, signal.SIGINT),
        ((out / "krylov" / "001.npz").exists, signal.SIGKILL),
    ):
        process = subprocess.Popen(
            interruptible(command(folder, out)[3:]), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        signal_when(process, there, kill)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == (130 if kill == signal.SIGINT else -9), stderr
    done = subprocess.run(command(folder, out), env=environment, capture_output=True, text=True, check=True)
    assert "sample: 4/4" in done.stderr
    a, b = Run.read(whole_run), Run.read(out)
    assert not (out / "krylov").exists()
    for name, array in a.spectra().items():
        np.testing.assert_array_equal(array, b.spectra()[name])
    assert [row["key"] for row in a.rows()] == [row["key"] for row in b.rows()]
    assert {k: v for k, v in a.metrics().items() if k != "wall_seconds"} == {
        k: v for k, v in b.metrics().items() if k != "wall_seconds"
    }


def test_a_second_start_compiles_nothing(folder, tmp_path, environment, whole_run):
    """Another seed in another process: every program comes from the cache that the first process left."""
    script = """
import sys
from jaxmem import cli
cli._keep_compiled_programs()  # before JAX is imported, as the command line does it
import jax
seen = []
jax.monitoring.register_event_listener(lambda name, **_: seen.append(name))
code = cli.main(sys.argv[1:])
print("COUNTS", code, *(sum(name.endswith(end) for name in seen) for end in ("cache_hits", "cache_misses")))
"""
    arguments = [sys.executable, "-c", script, *command(folder, tmp_path / "second", "--seed", "3")[3:]]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True)
    code, hits, misses = (int(n) for n in done.stdout.split("COUNTS")[1].split())
    assert (code, misses) == (0, 0)
    assert hits > 10


def test_errors_reach_the_terminal_as_one_line(folder, tmp_path, capsys):
    assert cli.main(["generate", str(tmp_path), "--prompt", "a", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert cli.main(["spectrum", str(folder), "--prompt", "a", "--timestep", "3", "--out", str(tmp_path / "out")]) == 2
    assert "the nearest is 1" in capsys.readouterr().err


def test_generate_from_the_command_line(folder, tmp_path, environment):
    arguments = ["generate", str(folder), "--prompt", *PROMPTS, "--ddim-steps", "2", "--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, "-m", "jaxmem", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "2 images by 2 DDIM steps with guidance 7.5, seed 0" in done.stdout
    assert (tmp_path / "out/figures/image-001.png").stat().st_size > 100
    assert json.loads((tmp_path / "out/manifest.json").read_text())["experiment"] == "generate"
    assert str(folder) not in (tmp_path / "out/manifest.json").read_text()  # the model is known by its hash
