"""Which sources are folders and which are of the hub; what is asked of the hub, and what is not."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.hf_api import ModelInfo

from jaxmem.stable_diffusion.hub import find_model, wanted_files

FILES = ["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"]


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """The hub must not be asked; its cache is empty and the current folder is `tmp_path`."""

    def asked(*arguments, **options):
        raise AssertionError(f"the hub was asked: {arguments} {options}")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", asked)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", asked)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", asked)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("socket.getaddrinfo", asked)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A filled cache as the hub's library leaves it."""
    repository = tmp_path / "hub-cache/models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    for file in FILES:
        (snapshot / file).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / file).write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.chdir(tmp_path)
    return snapshot


def info(files):
    return ModelInfo(
        id="owner/name", tags=[], private=False, downloads=0, likes=0, siblings=[{"rfilename": file} for file in files]
    )


@pytest.mark.parametrize(
    "source",
    [
        *("./models/name", "../models/name", "/models/name", "~/models/name", "~nobody-here/name", "/no/such/folder"),
        *("models/private/name", "owner/name/", "owner//name", r"models\name", r"C:\models\name", "C:/models/name"),
        *("owner/name.safetensors", "owner/name.ckpt", "owner/Name.SafeTensors", "name", "a b/c", "-x/y"),
        *("here/name", "here/sub/name"),
        Path("owner/name"),
    ],
    ids=str,
)
def test_what_looks_like_a_path_is_never_looked_up(source, nobody, tmp_path):
    (tmp_path / "here").mkdir()
    with pytest.raises(ValueError, match=r"expected the folder of a diffusers model or a hub id .* no such folder"):
        find_model(source)


@pytest.mark.parametrize(
    ("source", "like"),
    [
        ("models/stable-difusion", "models/stable-diffusion"),
        ("modles/stable-diffusion", "models/stable-diffusion"),
        ("./Models/stable_diffusion", "models/stable-diffusion"),
        ("models/stable-diffusion/v1-4", None),
        ("models/other", None),
        ("stable-diffusion", None),
    ],
)
def test_a_folder_that_is_alike_is_named(source, like, nobody, tmp_path):
    (tmp_path / "models/stable-diffusion").mkdir(parents=True)
    for given in (source, str(tmp_path / source)):
        with pytest.raises(ValueError, match=r"expected (the|a) folder") as caught:
            find_model(given)
        assert ("did you mean" in str(caught.value) or "but there is" in str(caught.value)) == (like is not None)
        assert like is None or like in str(caught.value)


def test_a_typo_that_could_be_an_id_says_how_to_ask_the_hub(nobody, tmp_path):
    (tmp_path / "models/secret-faces").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"there is models/secret-faces, so the hub was not asked; .*another directory"
    ):
        find_model("model/secret-face")


def test_an_owner_that_is_a_folder_here_says_how_to_ask_the_hub(nobody, tmp_path):
    (tmp_path / "owner").mkdir()
    match = (
        r"owner is a folder here, so the hub was not asked: start in another directory to ask the hub for owner/name$"
    )
    with pytest.raises(ValueError, match=match):
        find_model("owner/name")
    with pytest.raises(ValueError, match=r"there is no such folder$"):
        find_model("./owner/name")


def test_the_hub_is_asked_once_and_for_what_is_needed(cache, monkeypatch, tmp_path):
    asked = []

    def model_info(self, name, revision, timeout):
        asked.append((name, revision))
        return info([*FILES, "README.md", "v1-5.ckpt"])

    def snapshot(name, **options):
        asked.append((name, options))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    notes: list[str] = []
    for source, revision in (("owner/name", None), ("owner/name@v1.0", "v1.0"), ("owner/name@refs/pr/3", "refs/pr/3")):
        asked.clear()
        assert find_model(source, notes) == tmp_path  # also where the cache has it: the hub's may be newer
        assert notes == []
        wanted = [("owner/name", {"allow_patterns": patterns, "revision": revision}) for patterns in (FILES[:1], FILES)]
        assert asked == [("owner/name", revision), *wanted]


def test_of_another_class_the_index_alone_is_downloaded(cache, monkeypatch, tmp_path):
    """What else is beside it is no concern of ours: diffusers downloads what the class needs."""
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionXLPipeline"}')
    asked = []

    def snapshot(name, **options):
        asked.append(options["allow_patterns"])
        return str(tmp_path)

    files = [*FILES, "offset_example-lora_1.0.safetensors"]
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, revision, timeout: info(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert find_model("owner/name") == tmp_path
    assert asked == [["model_index.json"]]


def test_a_revision_in_the_cache(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable([]))
    notes: list[str] = []
    assert find_model(f"owner/name@{'0' * 40}", notes) == cache
    assert notes == [
        f"owner/name@{'0' * 40}: hub not reached (ConnectionError); taken from the cache, snapshot 000000000000"
    ]
    with pytest.raises(OSError, match=r"owner/name@v2: no such folder here, the hub cannot be reached"):
        find_model("owner/name@v2")


def test_without_the_unet():
    files = [f"{part}/{name}" for part in ("unet", "vae") for name in ("config.json", "model.safetensors")]
    assert wanted_files(files, with_unet=False) == files[2:]


@pytest.mark.parametrize(
    "files",
    [
        *(["pytorch_lora_weights.safetensors"], [*FILES, "unet/adapter_config.json"], [*FILES, "LORA.SAFETENSORS"]),
        [*FILES, "pytorch_custom_diffusion_weights.bin"],
    ],
)
def test_lora_on_the_hub_is_refused_before_it_is_downloaded(files, nobody, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, revision, timeout: info(files))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: "nowhere")
    match = rf"owner/name: .* got LoRA files .*{files[-1]}[\s\S]*as `lora`:[\s\S]*snapshot_download\('owner/name'"
    with pytest.raises(ValueError, match=match):
        find_model("owner/name")


def unreachable(asked):
    def model_info(self, name, revision, timeout):
        asked.append(timeout)
        raise ConnectionError("no network")

    return model_info


def test_without_network_a_filled_cache_is_taken_after_one_short_request(cache, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable(asked))
    notes: list[str] = []
    assert find_model("owner/name", notes) == cache
    assert notes == ["owner/name: hub not reached (ConnectionError); taken from the cache, snapshot 000000000000"]
    assert len(asked) == 1
    assert 0 < asked[0] <= 3
    with pytest.raises(OSError, match=r"owner/other: no such folder here, the hub cannot be reached .*no network"):
        find_model("owner/other")
    assert len(asked) == 2


def test_offline_by_wish_nothing_is_sent(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)

    def asked(*arguments, **options):
        raise AssertionError("a name was looked up")

    monkeypatch.setattr("socket.getaddrinfo", asked)
    notes: list[str] = []
    assert find_model("owner/name", notes) == cache
    assert notes == ["owner/name: hub not reached (OfflineModeIsEnabled); taken from the cache, snapshot 000000000000"]
    with pytest.raises(OSError, match=r"owner/other: .* cannot be reached or refuses \(OfflineModeIsEnabled"):
        find_model("owner/other")


def test_a_network_that_ends_in_between(cache, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, revision, timeout: info(FILES))

    def snapshot(name, **options):
        raise LocalEntryNotFoundError("gone")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    notes: list[str] = []
    assert find_model("owner/name", notes) == cache
    assert notes == [
        "owner/name: hub not reached (LocalEntryNotFoundError); taken from the cache, snapshot 000000000000"
    ]
    with pytest.raises(OSError, match=r"owner/other: .*LocalEntryNotFoundError: gone"):
        find_model("owner/other")


def test_models_that_the_hub_does_not_have(cache, monkeypatch):
    class NotFound(RepositoryNotFoundError):
        def __init__(self):  # the library's own wants a response of its HTTP library, which changed
            Exception.__init__(self, "404")

    def missing(self, name, revision, timeout):
        raise NotFound

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", missing)
    notes: list[str] = []
    assert find_model("owner/name", notes) == cache  # taken from the hub since
    assert notes == ["owner/name: hub not reached (NotFound); taken from the cache, snapshot 000000000000"]
    with pytest.raises(ValueError, match=r"owner/other: no such folder here and no such model on the hub"):
        find_model("owner/other")


def test_wanted_files_of_a_repository():
    files = [
        *(
            "model_index.json",
            "README.md",
            "v1-5.ckpt",
            "unet/config.json",
            "vae/config.json",
            "text_encoder/config.json",
        ),
        *("unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"),
        *("unet/diffusion_pytorch_model.non_ema.safetensors", "unet/diffusion_pytorch_model.bin"),
        *("vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.safetensors", "tokenizer/vocab.json"),
        *("safety_checker/model.safetensors", "scheduler/scheduler_config.json", "learned_embeds.safetensors"),
        "<new1>.bin",
    ]
    assert sorted(wanted_files(files)) == [
        "<new1>.bin",
        "learned_embeds.safetensors",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
