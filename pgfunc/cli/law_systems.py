"""What `pgfunc laws` checks: the laws and the implementation that its options name. Needs Hypothesis."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.strategies import SearchStrategy

import pgfunc as pg
from pgfunc import laws
from pgfunc.cli.compiled import NO_COMPILER, compiler_errors
from pgfunc.cli.devices import computing_device
from pgfunc.cli.finding import mask_decoder_beside
from pgfunc.errors import SettingError
from pgfunc.laws import LAWS, Law, System
from pgfunc.objects import segment

MOST_COPIED = 2**30  # bytes; laws about parameters copy them for each example, to float64 or to files


def law_named(name: str) -> Law:
    """The law with this name. Raises SettingError if there is none."""
    for law in LAWS:
        if law.name == name:
            return law
    raise SettingError(f"law {name} is not one of {', '.join(law.name for law in LAWS)}")


def from_checkpoint(
    model: str | None, device: str | None, dtype: str | None, quantize: str | None, compile: bool, config: str | None
) -> System:
    """The checkpoint run as the options say, with its tokenizer, and with its mask decoder if it has one."""
    torch_device, mask_decoder = computing_device(device, "check"), mask_decoder_beside(model)
    loaded = pg.load(model, dtype or "float32", torch_device, config, quantize=quantize)
    vq = segment.load(mask_decoder, torch_device) if mask_decoder.exists() else ()
    adapt = laws.compiled if compile else laws.eager
    system = adapt(loaded.params, loaded.cfg, model or "the shipped checkpoint", loaded.tokenizer, vq)
    if compile:
        check_compiler(system)
    return system._replace(params=()) if quantize or pg.tree.nbytes(loaded.params) > MOST_COPIED else system


def check_compiler(system: System) -> None:
    """Take one step first, so that a missing compiler is reported as such and not as a broken law."""
    with compiler_errors(NO_COMPILER):
        prompt = laws.prompt(laws.Rows((1,), (0,), images=0), system.vocab, system.image_size)
        system.decode(prompt.tokens[:, 0], system.prefill(prompt, 1)[1])


def import_system(path: str) -> System | SearchStrategy[System]:
    """The object that `module:object` names: a System, a strategy that draws Systems, or a function that returns one.

    The module is also looked for in the working directory. Raises SettingError if it cannot be imported, or holds
    something else under that name.
    """
    module_name, _, name = path.partition(":")
    if not (module_name and name):
        raise SettingError(f"system is {path!r}, expected module:object")
    sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise SettingError(f"system {path}: {error}") from error
    finally:
        sys.path.remove(str(Path.cwd()))
    if not hasattr(module, name):
        raise SettingError(f"system {path}: the module has no {name}")
    system = getattr(module, name)
    system = system() if callable(system) and not isinstance(system, (System, SearchStrategy)) else system
    if not isinstance(system, (System, SearchStrategy)):
        raise SettingError(f"system {path} is a {type(system).__name__}, expected a pgfunc.laws.System")
    return system


@contextmanager
def temporary_examples() -> Iterator[None]:
    """Keep the files of Hypothesis in a temporary folder; by default it leaves them in the working directory."""
    with TemporaryDirectory() as folder:
        set_hypothesis_home_dir(folder)
        try:
            yield
        finally:
            set_hypothesis_home_dir(None)
