"""The data that ships with the package (see NOTICE) and the reading of full MNIST."""

from pathlib import Path

NEUTRAL_CAPTIONS = Path(__file__).parent / "neutral_captions.txt"  #: plain scenes, written for this package


def verbatim_model(folder: Path = Path(__file__).parent / "verbatim") -> tuple[Path, Path]:
    """The shipped text-to-image model, a diffusers folder, and the prompts it was trained on, with their labels.

    Raises:
        ValueError: this installation has none.
    """
    model, prompts = folder / "model", folder / "prompts.csv"
    if not (model / "model_index.json").is_file() or not prompts.is_file():
        raise ValueError(
            f"MODEL: expected a folder or a hub id, or the shipped model in {folder}, got neither; name a model, or"
            f" install the package again"
        )
    return model, prompts
