"""Where a checkpoint comes from: a file, a folder or the hub.

People also pass a training run's folder, the hub's cache, one file of a folder, or weights in a format that is not
read. `HINTS` recognizes these by the names of their files and says what to do.
"""

import re
from fnmatch import filter as matching
from pathlib import Path

from pgfunc.checkpoint import bigvision
from pgfunc.checkpoint.hf_config import CONFIG, parse_file, read_config
from pgfunc.checkpoint.writing import INDEX, NO_WEIGHTS, SINGLE
from pgfunc.config import PUBLISHED, Config
from pgfunc.errors import CheckpointError, first_line

Source = str | Path | None

ADAPTER = "adapter_config.json"  # written by PEFT
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
# matches names such as google/paligemma-3b-pt-224-jax and paligemma2-10b-ft-docci-448.b16.npz
CONFIG_IN_NAME = re.compile(r"(paligemma2?-(?:3b|10b|28b))-(?:[a-z0-9_]+-)*?(224|448|896)(?![0-9])")

PICKLED = (
    "pickled weights, which are not read because loading them can run code; transformers' "
    "from_pretrained(folder).save_pretrained(folder) writes them as safetensors"
)
# pattern of a file name -> what such a file is, and what to do; the first that matches is used
HINTS = {
    ADAPTER: "a LoRA adapter, not a model; load its base model with adapter=, or merge the two with `pgfunc merge`",
    "snapshots": "a folder of the hub's cache; give the hub id, or one of the folders in snapshots",
    "checkpoint-*": "a training run; give one of its checkpoints",
    "model.*.safetensors*": (
        "a variant of the weights; remove the variant from the name: model.fp16.safetensors becomes model.safetensors"
    ),
    "masks.safetensors": "a mask decoder without a model; use it with --masks and a model",
    "adapter_model.safetensors": "the weights of a LoRA adapter without its adapter_config.json; add that file",
    "run.safetensors": "an unfinished run of `pgfunc train`; the same command continues it",
    "*.safetensors": f"weights under another name; rename them to {SINGLE}, or to shards of {INDEX}",
    "*.gguf": "weights of llama.cpp, which are not read; give the weights that they were converted from",
    **dict.fromkeys(("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"), PICKLED),
    "*.msgpack": "weights of Flax, which are not read; transformers 4 converts them to safetensors",
    "*.h5": "weights of TensorFlow, which are not read; transformers 4 converts them to safetensors",
}


def find(source: Source) -> Path:
    """The file or folder that a source names; a hub id is fetched from the hub."""
    if source is None:
        return shipped()
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    # the name is too long, has a zero byte, or begins with an unknown user
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{str(source)[:80]!r}: not the name of a file or folder ({error})") from error
    if HUB_ID.fullmatch(str(source)):
        return from_hub(str(source))
    raise CheckpointError(f"{source}: no such file or folder, and not a hub id such as google/paligemma2-3b-mix-224")


def shipped() -> Path:
    """The folder of the shipped checkpoint: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "weights" / "tiny", package.parent / "weights" / "tiny"):
        if (folder / CONFIG).exists():
            return folder
    raise CheckpointError(f"{package}: the shipped checkpoint weights/tiny is missing; reinstall pgfunc")


def from_hub(name: str) -> Path:
    """The folder of a hub id, `owner/name` or `owner/name@revision`, in huggingface_hub's cache; fetched if necessary.

    A `.npz` is fetched only from a repository without safetensors, such as those of big_vision's checkpoints.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))

    try:
        folder = fetch("*.json", "*.safetensors")
        return folder if any(folder.glob("*.safetensors")) else fetch("*.npz")
    except GatedRepoError as error:
        raise CheckpointError(
            f"{name}: gated; accept its licence on the hub, and log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder, not in the hub's local cache, and the hub cannot be reached or is switched off"
        ) from error
    except Exception as error:  # the network and the hub raise many types of error
        raise CheckpointError(f"{name}: cannot be fetched from the hub ({first_line(error)})") from error


def npz_in(path: Path) -> Path | None:
    """The path itself if it is a `.npz`, or the `.npz` in a folder without safetensors."""
    if not path.is_dir():
        return path if path.suffix == ".npz" else None
    masks = {*path.glob("vae*.npz")}  # the mask VQ-VAE, which is not a model
    archives = [] if any(path.glob("*.safetensors")) else sorted({*path.glob("*.npz")} - masks)
    if len(archives) > 1:
        raise CheckpointError(f"{path}: holds {', '.join(each.name for each in archives)}; give the path of one")
    return archives[0] if archives else None


def check_model_folder(path: Path) -> None:
    """Raise CheckpointError for a path that is not the folder of a model; the message says what it is instead.

    A folder with weights but without `config.json` passes: reading that file then raises the error.
    """
    if not path.is_dir():
        if (path.parent / CONFIG).exists():
            raise CheckpointError(f"{path}: one file of a checkpoint; give its folder, {path.parent}")
        problem = "neither a folder in Hugging Face layout nor a big_vision .npz"
        raise CheckpointError(f"{path}: {problem}{hint([path.name])}")
    if not (path / CONFIG).exists():
        check_weights(path)


def check_weights(path: Path) -> None:
    """Raise CheckpointError unless a folder has safetensors; the message says what it holds instead."""
    try:
        names = sorted(each.name for each in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not {SINGLE, INDEX} & set(names):
        raise CheckpointError(f"{path}: {NO_WEIGHTS}{hint(names)}")


def hint(names: list[str]) -> str:
    """The end of a message: what files of these names are and what to do; "" if no pattern matches."""
    for pattern, text in HINTS.items():
        if files := matching(names, pattern):
            return f", but {files[0]}: {text}"
    return ""


def named_config(config: str | Path | None, path: Path, source: Source) -> Config:
    """The config of a `.npz`: a published name, a `config.json`, or a folder with one.

    If `config` is None, the published name is read from the name of the source or of the file.
    """
    if config is None and (names := CONFIG_IN_NAME.findall(f"{source}/{path.name}".lower())):
        config = "-".join(names[-1])
    if config is None:
        raise CheckpointError(
            f"{path}: a .npz needs config=, one of {', '.join(PUBLISHED)}, or the path of a config.json"
        )
    if str(config) in PUBLISHED:
        return bigvision.with_padding(path, PUBLISHED[str(config)])
    if not Path(config).exists():
        raise CheckpointError(f"config {config} is neither a file nor one of {', '.join(PUBLISHED)}")
    return read_config(Path(config)) if Path(config).is_dir() else parse_file(Path(config))
