"""The shipped model fine-tuned on images that it has not seen: what it then has memorized is known.

Some captions have one image that comes many times, others many different images (`jaxmem.data.finetuning`). The UNet
is trained on all, once with all its weights and once as a LoRA; text encoder and autoencoder stay as they are, as in
diffusers' scripts. Checkpoints are kept in the layouts that these scripts leave, and what each gives back is measured.
"""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmem.config import FinetuneConfig
from jaxmem.data import verbatim_model
from jaxmem.data.finetuning import HELD_OUT, TRAINED, TRUTH, FineTuningImages, fine_tuning_images, write_images
from jaxmem.data.mnist import load_mnist
from jaxmem.experiments.autoencoder import encode_all
from jaxmem.experiments.finetune_analysis import first_returned, see_returned, shares_returned
from jaxmem.experiments.finetune_audits import audit_checkpoints
from jaxmem.experiments.lora import Factors, LoraScore, fused, initial_factors, save_lora
from jaxmem.runs.directory import Run
from jaxmem.runs.identity import fingerprint
from jaxmem.runs.progress import Progress, Say, quiet, silent
from jaxmem.runs.stages import save_losses, timed, wall_seconds
from jaxmem.stable_diffusion import weights
from jaxmem.stable_diffusion.folder import write_network
from jaxmem.stable_diffusion.pipeline import StableDiffusion
from jaxmem.training import Keep, train

#: Where a run keeps checkpoints: ``full/checkpoint-500/unet`` and ``unet_ema``, ``lora/checkpoint-500`` with the file
#: of its factors, and ``lora-fused/checkpoint-500/unet``, the weights with these in it, which need no diffusers.
FULL, LORA, FUSED = "full", "lora", "lora-fused"
AVERAGES = 1  # of the last checkpoints, averaged weights are looked at beside the raw ones


def run_finetune(config: FinetuneConfig, out: Path, progress: Progress = silent, say: Say = quiet) -> dict[str, Any]:
    """Write the images, fine-tune the shipped model in two ways, look at what it gives back; return the metrics.

    The run's folder gets ``data/``, ``held-out/`` and ``truth.csv``, and the checkpoints.

    Raises:
        ValueError: ``out`` holds another run, MNIST is not there, or a training failed.
        OSError: the folder cannot be written; the same call continues.
    """
    data = fine_tuning_images(load_mnist(config.data_dir), config)
    model = StableDiffusion.load(verbatim_model()[0])
    identity = {name: value for name, value in asdict(config).items() if name != "data_dir"}
    run = Run.open(
        out,
        identity,
        experiment="finetune",
        data={"images": fingerprint(data.images), "files": fingerprint(np.array(data.pictures, str))},
        base={"sha256": model.fingerprint(), "unet": asdict(model.unet_config), "prediction": model.prediction},
        dtype="float32",
    )
    if run.finished:
        return run.metrics()
    with timed(run, "write the images"):
        write_images(data, run.directory)
    say(
        f"{TRAINED}: {len(data.trained):,} files, {config.num_single} images of which lie there {config.copies} times;"
        f" {HELD_OUT}: {len(data.pictures) - len(data.trained):,} files; {TRUTH} says which is which"
    )
    train_both(config, model, data, run, progress)
    with timed(run, "see what is returned"):
        folders = checkpoints(config, run.directory)
        arrays = see_returned(config, model, data, folders, progress)
    with timed(run, "audit the checkpoints"):
        audits = audit_checkpoints(config, data, run.directory, folders, progress, say)
    metrics = {
        "audits": audits,
        "returned": {way: shares_returned(arrays, way) for way in folders},
        "first_returned": {way: first_returned(arrays, way) for way in folders},
        "num_images": len(data.images),
        "num_files": len(data.pictures),
        "num_parameters": {FULL: _size(model.state), LORA: _size(_factors(config, model))},
        "num_products": 0,
        "wall_seconds": wall_seconds(run),
    }
    run.finalise(metrics, arrays)
    return run.metrics()


def checkpoints(config: FinetuneConfig, folder: Path) -> dict[str, dict[int, Path]]:
    """The folders of UNets by the way they were trained, ``full``, ``full-ema`` and ``lora``, and by steps."""
    return {
        FULL: {step: folder / FULL / f"checkpoint-{step}/unet" for step in config.full_checkpoints},
        f"{FULL}-ema": {
            step: folder / FULL / f"checkpoint-{step}/unet_ema" for step in config.full_checkpoints[-AVERAGES:]
        },
        LORA: {step: folder / FUSED / f"checkpoint-{step}/unet" for step in config.lora_checkpoints},
    }


def train_both(
    config: FinetuneConfig, model: StableDiffusion, data: FineTuningImages, run: Run, progress: Progress = silent
) -> None:
    """Train all weights, then a LoRA, each from the shipped model; resumes from the run's checkpoints.

    Raises:
        ValueError: a damaged checkpoint, or a loss that is not finite.
    """
    examples, probabilities = _examples(config, model, data)
    base, resume = model.state, run.directory / "resume"

    def keep_full(folder: Path, parameters: Any, average: Any) -> None:
        for name, state in (("unet", parameters), ("unet_ema", average)):
            write_network(folder / name, model.unet_config, state, weights.UNET)

    def keep_lora(folder: Path, parameters: Any, _average: Any) -> None:  # the scripts average all weights alone
        folder.mkdir()
        save_lora(parameters, folder)

    def keep_fused(folder: Path, parameters: Any, _average: Any) -> None:
        write_network(folder / "unet", model.unet_config, fused(base, parameters), weights.UNET)

    ways: tuple[tuple[Any, ...], ...] = (
        (FULL, model.score, base, None, {FULL: keep_full}),
        (LORA, LoraScore(model.score), _factors(config, model), base, {LORA: keep_lora, FUSED: keep_fused}),
    )
    for name, score, state, frozen, writers in ways:
        stage = f"fine-tune, {'all weights' if name == FULL else 'LoRA'}"
        with timed(run, stage):
            result = train(
                score,
                state,
                examples,
                model.scheduler.schedule,
                getattr(config, name),
                probabilities=probabilities,
                frozen=frozen,
                folder=resume / name,
                keep=_keeper(run.directory, getattr(config, f"{name}_checkpoints"), writers),
                progress=lambda _, step, total, stage=stage: progress(stage, step, total),  # type: ignore[misc]
                name=name,
            )
            save_losses(run, f"losses-{name}", result.losses)


def _factors(config: FinetuneConfig, model: StableDiffusion) -> Factors:
    return initial_factors(model.state, config.lora_rank, config.lora.seed)


def _size(state: Any) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def _keeper(directory: Path, steps: tuple[int, ...], writers: dict[str, Callable[[Path, Any, Any], None]]) -> Keep:
    """Writes a checkpoint at each of the steps; its folder is there when all of it is."""

    def keep(step: int, parameters: Any, average: Any) -> None:
        for name, write in writers.items() if step in steps else ():
            folder = directory / name / f"checkpoint-{step}"
            partial = folder.with_name(f"{folder.name}.partial")
            for left_over in (partial, folder):  # of a kill after it was written: it holds the same
                shutil.rmtree(left_over, ignore_errors=True)
            partial.parent.mkdir(exist_ok=True)
            write(partial, parameters, average)
            partial.rename(folder)

    return keep


def _examples(config: FinetuneConfig, model: StableDiffusion, data: FineTuningImages) -> tuple[Any, Any]:
    """Latents and embeddings of all files, first with their captions, then without; and how often each is drawn."""
    captions = [picture.caption for picture in data.trained]
    names = tuple(dict.fromkeys(captions))
    embedded = model.conditions([*names, ""])
    which = np.array([names.index(caption) for caption in captions])
    latents = encode_all(*model.network("vae"), data.images)[[picture.image for picture in data.trained]]
    x0 = jnp.asarray(np.concatenate([latents, latents]))
    cond = jnp.asarray(np.concatenate([embedded[which], np.repeat(embedded[-1:], len(which), 0)]))
    shares = np.repeat([1 - config.caption_dropout, config.caption_dropout], len(which)) / len(which)
    return (x0, cond), jnp.asarray(shares, jnp.float32)
