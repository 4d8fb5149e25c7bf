"""Where the rows of a command are completed: in this process, or with --ray by the actors of a Ray cluster."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pgfunc as pg
from pgfunc.errors import DeviceError, SettingError, first_line
from pgfunc.many import distributed
from pgfunc.many.distributed import Loading

LOCAL = "local"
PATIENCE = 10.0  # seconds to wait for the answer of a cluster
# in the words of Ray's documentation: no statistics to its makers, no messages of its processes here, no logs but fatal
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS_SKIP_REGEX": ".", "RAY_BACKEND_LOG_LEVEL": "fatal"}


class Completer(NamedTuple):
    """A model, and what completes rows by it."""

    model: pg.Model  # with --ray it has shapes and a tokenizer, but no numbers
    rows: Callable[..., Iterator[pg.Result]]  # as `pg.generate_many` without the model
    here: bool  # in this process


@contextmanager
def completer(loading: Loading, address: str | None, actors: int | None) -> Iterator[Completer]:
    """What completes rows with the model: this process, or for the block the Ray cluster at the address.

    Raises the errors of `pg.load`; SettingError; and DeviceError if the cluster cannot be reached.
    """
    if address is None:
        if actors is not None:
            raise SettingError("--ray-workers needs --ray: local, or the address of a cluster")
        model = loading.load()
        yield Completer(model, partial(pg.generate_many, model), True)
        return
    if find_spec("ray") is None:
        raise SettingError("--ray needs Ray, which is not installed: python -m pip install 'pgfunc[ray]'")
    model = loading.load("meta")  # reads headers only: a model that cannot be loaded ends the command here
    with connected(address):
        yield Completer(model, partial(distributed.generate_many, loading, actors=actors), False)


@contextmanager
def connected(address: str) -> Iterator[None]:
    """A connection to the Ray cluster at the address, or for the block to one that is started on this machine."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    try:
        check_reachable(address)
        with without_stderr():
            import ray  # pyright: ignore[reportMissingImports]
            import ray.data  # pyright: ignore[reportMissingImports]

            settings: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **settings)
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        raise DeviceError(f"--ray {address}: no cluster answers there ({first_line(error)})") from error
    try:
        quiet_data()
        yield
    finally:
        ray.shutdown()


def check_reachable(address: str) -> None:
    """Raise OSError or OverflowError if nothing answers at host:port. Ray itself would try for ten minutes and more."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), PATIENCE).close()


def quiet_data() -> None:
    """Let Ray Data print nothing; its log file, which is in /tmp/ray, has everything."""
    import ray.data  # pyright: ignore[reportMissingImports]

    ray.data.DataContext.get_current().enable_progress_bars = False
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # that of the terminal, not that of the file
            handler.setLevel(logging.CRITICAL + 1)


@contextmanager
def without_stderr() -> Iterator[None]:
    """Discard what the block writes to standard error, also outside Python: Ray reports its own log level there."""
    try:
        kept = os.dup(2)
    except OSError:  # standard error is closed
        yield
        return
    try:
        with Path(os.devnull).open("w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
