"""Where a checkpoint comes from: a file, a folder, the hub.

People also give a training run's folder, the hub's cache, one file of a folder, or weights of another format. `KINDS`
knows these by the names of their files, and says what to do.
"""

import re
from fnmatch import filter as matching
from pathlib import Path

from pgfunc.checkpoint import bigvision
from pgfunc.checkpoint.hf import INDEX, SINGLE
from pgfunc.checkpoint.hf_config import CONFIG, parse_file, read_config
from pgfunc.config import PUBLISHED, Config
from pgfunc.errors import CheckpointError, first_line

Source = str | Path | None

ADAPTER = "adapter_config.json"  # of PEFT
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w./-]+)?")
# as in the names google/paligemma-3b-pt-224-jax and paligemma2-10b-ft-docci-448.b16.npz
NAMED = re.compile(r"(paligemma2?-(?:3b|10b|28b))-(?:[a-z0-9_]+-)*?(224|448|896)(?![0-9])")

PICKLED = (
    "pickled weights, which are not read, for loading them may run code; transformers' "
    "from_pretrained(folder).save_pretrained(folder) writes them as safetensors"
)
KINDS = {
    ADAPTER: "a LoRA adapter, not a model; `pgfunc merge` makes one of it and its base, and adapter= takes it",
    "snapshots": "a folder of the hub's cache; give the hub id, or one of the folders in snapshots",
    "checkpoint-*": "a training run; give one of its checkpoints",
    "model.*.safetensors*": "a variant of the weights; give it the names without the variant",
    "masks.safetensors": "a mask decoder alone; --masks takes it beside a model",
    "adapter_model.safetensors": "the weights of a LoRA adapter, whose adapter_config.json is missing",
    "run.safetensors": "an unfinished run of `pgfunc train`; the same command goes on",
    "*.safetensors": f"weights under another name; call them {SINGLE}, or shards of {INDEX}",
    "*.gguf": "weights of llama.cpp, which are not read; give those that they were made from",
    **dict.fromkeys(("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl"), PICKLED),
    "*.msgpack": "weights of Flax, which are not read; transformers 4 makes safetensors of them",
    "*.h5": "weights of TensorFlow, which are not read; transformers 4 makes safetensors of them",
}


def find(source: Source) -> Path:
    """The file or folder that a source names, fetched from the hub when it is a hub id."""
    if source is None:
        return shipped()
    try:
        path = Path(source).expanduser()
        if path.exists():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, or with a zero in it; no such user
        raise CheckpointError(f"{str(source)[:80]!r}: not the name of a file or folder ({error})") from error
    if HUB_ID.fullmatch(str(source)):
        return from_hub(str(source))
    raise CheckpointError(f"{source}: no such file or folder, and not a hub id such as google/paligemma2-3b-mix-224")


def shipped() -> Path:
    """The checkpoint that comes with the package: inside an installed one, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    for folder in (package / "weights" / "tiny", package.parent / "weights" / "tiny"):
        if (folder / CONFIG).exists():
            return folder
    raise CheckpointError(f"{package}: the shipped checkpoint weights/tiny is missing; reinstall pgfunc")


def from_hub(name: str) -> Path:
    """The folder of a hub id, `owner/name` or `owner/name@revision`, in huggingface_hub's cache; fetched if need be.

    A `.npz` is fetched only from a repository without safetensors, as those of big_vision's checkpoints are.
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
            f"{name}: gated; accept its licence on the hub and log in with `hf auth login`"
        ) from error
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such folder, not in the hub's local cache, and the hub cannot be reached or is switched off"
        ) from error
    except Exception as error:  # the network and the hub raise what they like
        raise CheckpointError(f"{name}: the hub says {first_line(error)}") from error


def npz_in(path: Path) -> Path | None:
    """The `.npz` that a path is, or that a folder without safetensors holds."""
    if not path.is_dir():
        return path if path.suffix == ".npz" else None
    found = [] if any(path.glob("*.safetensors")) else sorted({*path.glob("*.npz")} - {*path.glob("vae*.npz")})  # masks
    if len(found) > 1:
        raise CheckpointError(f"{path}: holds {', '.join(each.name for each in found)}; give the path of one")
    return found[0] if found else None


def check_folder(path: Path) -> None:
    """Raise CheckpointError for what is no folder of a model in Hugging Face layout, saying what it is."""
    if not path.is_dir():
        if (path.parent / CONFIG).exists():
            raise CheckpointError(f"{path}: one file of a checkpoint; give its folder, {path.parent}")
        said = "neither a folder in Hugging Face layout nor a big_vision .npz"
        raise CheckpointError(f"{path}: {said}{kind_of([path.name])}")
    if not (path / CONFIG).exists():
        check_weights(path)


def check_weights(path: Path) -> None:
    """Raise CheckpointError for a folder without weights that are read, saying what it holds instead."""
    try:
        names = sorted(each.name for each in path.iterdir())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if not {SINGLE, INDEX} & set(names):
        raise CheckpointError(f"{path}: holds neither {SINGLE} nor {INDEX}{kind_of(names)}")


def kind_of(names: list[str]) -> str:
    """What files of these names are, and what to do with them, as the end of a sentence; "" where they say nothing."""
    for pattern, said in KINDS.items():
        if found := matching(names, pattern):
            return f", but {found[0]}: {said}"
    return ""


def named_config(config: str | Path | None, path: Path, source: Source) -> Config:
    """The config of a `.npz`: a published one by name, that in a `config.json`, or that of a folder with one.

    Where none is given it is the published one that the name of the source, or of the file, says.
    """
    if config is None and (named := NAMED.findall(f"{source}/{path.name}".lower())):
        config = "-".join(named[-1])
    if config is None:
        raise CheckpointError(
            f"{path}: a .npz needs config=, one of {', '.join(PUBLISHED)}, or the path of a config.json"
        )
    if str(config) in PUBLISHED:
        return bigvision.padded(path, PUBLISHED[str(config)])
    if not Path(config).exists():
        raise CheckpointError(f"config {config} is neither a file nor one of {', '.join(PUBLISHED)}")
    return read_config(Path(config)) if Path(config).is_dir() else parse_file(Path(config))
