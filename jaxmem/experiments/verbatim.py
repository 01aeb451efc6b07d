"""The paper's section 5.3 on digits: a small Stable Diffusion that memorized some captions, trained from nothing.

Three categories of captions as in the paper (`jaxmem.data.captions`), an autoencoder, a CLIP text encoder and a UNet of
Stable Diffusion's architecture at small size, exported in diffusers' layout. Then the audit (`jaxmem.audit`) of all its
captions, beside which stands the exact spectrum that each caption's own training set has.
"""

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxmem.audit import audit as run_audit
from jaxmem.audit import read_audit
from jaxmem.config import VerbatimConfig
from jaxmem.data.captions import CaptionedImages, captioned_digits
from jaxmem.data.mnist import load_mnist
from jaxmem.diffusion import NoiseSchedule
from jaxmem.experiments.autoencoder import encode_all, standardise, train_autoencoder
from jaxmem.experiments.verbatim_analysis import (
    apart,
    areas,
    areas_over_time,
    compare,
    distances,
    earliest,
    lowest_over_bound,
    mean_counts,
)
from jaxmem.prompts import NO_PROMPT, Prompt
from jaxmem.runs.directory import Run
from jaxmem.runs.identity import fingerprint
from jaxmem.runs.progress import Progress, Say, quiet, silent
from jaxmem.runs.stages import save_losses, timed, wall_seconds
from jaxmem.score import NetworkScore, bind
from jaxmem.stable_diffusion.configs import SchedulerConfig, TextEncoderConfig, UNetConfig, VAEConfig
from jaxmem.stable_diffusion.pipeline import StableDiffusion
from jaxmem.stable_diffusion.text_encoder import TextEncoder
from jaxmem.stable_diffusion.tokenizer import byte_tokenizer
from jaxmem.stable_diffusion.unet import UNet
from jaxmem.training import train

# Latents of 8 × 8 × 4, so d = 256. Weights of all parts: 2.15 million, 4.3 MB in half precision.
AUTOENCODER = VAEConfig(
    sample_size=32, block_out_channels=(16, 32, 32), layers_per_block=1, norm_num_groups=8, scaling_factor=1.0
)
TEXT_ENCODER = TextEncoderConfig(
    vocab_size=514, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
)
UNET = UNetConfig(
    sample_size=8,
    block_out_channels=(64, 80),
    down_attention=(True, False),
    up_attention=(True, False),
    layers_per_block=1,
    cross_attention_dim=64,
    num_heads=(4, 4),
    norm_num_groups=16,
    use_linear_projection=True,
)
# v, as Stable Diffusion 2 has it: where the noise is all, the scores with a caption and without differ by alpha times
# what the network's outputs do, so that its errors do not drown the difference in which the detectors of the first
# step look.
SCHEDULER = SchedulerConfig(NoiseSchedule.stable_diffusion(), "v")


@dataclass(frozen=True)
class PromptedScore:
    """The score of a latent with its caption's tokens as condition: UNet and text encoder as one, to be trained."""

    unet: NetworkScore
    text_encoder: nnx.GraphDef

    def __call__(
        self, state: Any, x: Float[Array, "*shape"], t: Any, cond: Int[Array, " tokens"]
    ) -> Float[Array, "*shape"]:
        embedding = nnx.merge(self.text_encoder, state["text_encoder"])(cond)
        return self.unet(state["unet"], x, t, embedding)


def train_model(
    config: VerbatimConfig, data: CaptionedImages, run: Run, progress: Progress = silent
) -> StableDiffusion:
    """Train all parts and return the model, float32; resumes from the run's checkpoints.

    Raises:
        ValueError: a damaged checkpoint, or a loss that is not finite.
    """
    checkpoints = run.directory / "checkpoints"
    with timed(run, "train the autoencoder"):
        vae_graphdef, vae_state = train_autoencoder(
            AUTOENCODER,
            config.autoencoder,
            data.images,
            folder=checkpoints / "autoencoder",
            progress=progress,
        )
        vae_state, latents = standardise(vae_graphdef, vae_state, encode_all(vae_graphdef, vae_state, data.images))

    unet_score, unet_state = bind(
        UNet(UNET, rngs=nnx.Rngs(config.training.seed)), SCHEDULER.schedule, SCHEDULER.prediction
    )
    text_graphdef, text_state = nnx.split(TextEncoder(TEXT_ENCODER, rngs=nnx.Rngs(config.training.seed + 1)))
    state = {"unet": unet_state, "text_encoder": text_state}
    tokenizer = byte_tokenizer()
    tokens = np.asarray(tokenizer([*data.captions, ""], padding="max_length", max_length=77).input_ids, np.int32)
    # All images once with their caption, and once without.
    caption = np.concatenate([data.caption, np.full(len(latents), len(data.captions))])
    examples = jnp.asarray(np.concatenate([latents, latents]), jnp.float32), jnp.asarray(tokens[caption])
    probabilities = jnp.asarray(_probabilities(config, data))
    for name, stage, recipe, option in (
        ("diffusion", "train the diffusion model", config.training, "training"),
        ("refinement", "refine its small timesteps", config.refinement, "refinement"),
    ):
        with timed(run, stage):
            result = train(
                PromptedScore(unet_score, text_graphdef),
                state,
                examples,
                SCHEDULER.schedule,
                recipe,
                probabilities=probabilities,
                folder=checkpoints / name,
                progress=lambda _, step, total, stage=stage: progress(stage, step, total),  # type: ignore[misc]
                name=option,
            )
            save_losses(run, f"losses-{name}", result.losses)
        state = result.state
    return StableDiffusion.from_modules(
        nnx.merge(unet_score.graphdef, state["unet"]),
        nnx.merge(text_graphdef, state["text_encoder"]),
        nnx.merge(vae_graphdef, vae_state),
        tokenizer,
        SCHEDULER,
    )


def _probabilities(config: VerbatimConfig, data: CaptionedImages) -> np.ndarray:
    """Of each image with its caption, then of each without: a category has its share, and in it captions are equal."""
    shares = {"matching": config.matching_share, "template": config.template_share}
    shares["none"] = 1 - sum(shares.values())
    per_category = {name: data.categories.count(name) for name in shares}
    sizes = np.bincount(data.caption)
    each = np.array([shares[name] / per_category[name] for name in data.categories]) / sizes
    each = each[data.caption]
    return np.concatenate([(1 - config.no_caption_share) * each, config.no_caption_share * each]).astype(np.float32)


def run_verbatim(config: VerbatimConfig, out: Path, progress: Progress = silent, say: Say = quiet) -> dict[str, Any]:
    """Train the model, export it, audit all its captions and the empty one; return the metrics.

    The run's folder gets ``model/`` (diffusers' layout, half precision: what is audited is what was exported), and
    the audits ``audit/`` (few timesteps, several noises) and ``course/`` (many timesteps), each with its report.

    Raises:
        ValueError: ``out`` holds another run, MNIST is not there, or a training failed.
        OSError: the folder cannot be written; the same call continues.
    """
    data = captioned_digits(load_mnist(config.data_dir), config.data_seed)
    identity = {name: value for name, value in asdict(config).items() if name != "data_dir"}
    run = Run.open(
        out,
        identity,
        experiment="verbatim",
        data={"images": fingerprint(data.images), "captions": fingerprint(data.caption), "text": data.captions},
        architecture={
            "vae": asdict(AUTOENCODER),
            "text_encoder": asdict(TEXT_ENCODER),
            "unet": asdict(UNET),
            "prediction": SCHEDULER.prediction,
        },
        dtype="float32",
    )
    if run.finished:
        return run.metrics()
    folder = run.directory / "model"
    if not folder.exists():
        export_model(train_model(config, data, run, progress), folder)
    model = StableDiffusion.load(folder)
    prompts = [*labelled_captions(data), NO_PROMPT]
    for name, settings in (("audit", config.audit), ("course", config.course)):
        with timed(run, name):
            run_audit(
                model, prompts, settings, folder=run.directory / name, name="verbatim", progress=progress, say=say
            )
    audit, course = (Run.read(run.directory / name) for name in ("audit", "course"))
    with timed(run, "compare with the training set"):
        arrays = compare(model, data, audit, progress)
    found, over_time = read_audit(audit), areas_over_time(read_audit(course))
    metrics = {
        "counts": mean_counts(found, arrays, data.categories),
        "matching_returned": arrays["returned"].mean(),
        "captions_returned": arrays["returned"].any(axis=1).mean(),  # from one noise at least
        "distance": distances(arrays["distance"], data.categories),
        "apart": apart(found, data.categories),
        "share_below_bound": audit.metrics()["share_below_bound"],
        "lowest_over_bound": lowest_over_bound(found),
        "num_images": len(data.images),
        "num_parameters": sum(component.float32_bytes // 4 for component in model.components.values()),
        "num_products": audit.metrics()["num_products"] + course.metrics()["num_products"],
        "auc": {name: areas(folder) for name, folder in (("audit", audit), ("course", course))},
        "course": over_time,
        "earliest": earliest(over_time),
        "wall_seconds": wall_seconds(run),
    }
    run.finalise(metrics, arrays)
    return run.metrics()


def labelled_captions(data: CaptionedImages) -> list[Prompt]:
    """The captions as prompts: memorized or not, and their category."""
    return [Prompt(text, kind != "none", kind) for text, kind in zip(data.captions, data.categories, strict=True)]


def export_model(model: StableDiffusion, folder: Path) -> None:
    """Write the model in half precision; the folder is there when all of it is."""
    partial = folder.with_name(f"{folder.name}.partial")
    if partial.exists():
        shutil.rmtree(partial)
    model.export(partial, np.float16)
    partial.rename(folder)
