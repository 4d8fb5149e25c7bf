"""Serve the page on this machine: one request at a time, uploads in a folder that is deleted, no telemetry."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from pgfunc.demo.actions import Checkpoint
from pgfunc.errors import SettingError

MAX_UPLOAD = "32mb"
EXAMPLES = (
    ("cat-and-bus.png", "detect", "cat ; bus"),
    ("cars.png", "segment", "car"),
    ("scene.png", "caption", ""),
    ("shapes.png", "ask", "what color is the moon?"),
)


def check_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises SettingError if the server cannot listen there."""
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return probe.getsockname()[1]
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or "no such port"
        raise SettingError(f"host {host}, port {port}: cannot listen there ({reason}); give another port=") from error


def example_pictures() -> Path:
    """The folder of the examples: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    inside = package / "examples/images"
    return inside if inside.is_dir() else package.parent / "examples/images"


def variables(folder: str, host: str) -> dict[str, str]:
    """The environment in which Gradio sends no statistics, keeps its files in a folder, and reaches its own server."""
    direct = ",".join([*filter(None, [os.environ.get("no_proxy") or os.environ.get("NO_PROXY")]), "localhost", host])
    return {
        "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder,
        "NO_PROXY": direct, "no_proxy": direct,  # Gradio calls the server as it starts, and would ask a proxy for it
    }  # fmt: skip


@contextmanager
def serving(checkpoint: Checkpoint, name: str, remark: str, host: str, port: int) -> Iterator[str]:
    """Serve the page for a checkpoint within the block, which gets the page's address."""
    with TemporaryDirectory(prefix="pgfunc-demo-") as folder:
        os.environ |= variables(folder, host)  # before gradio is imported
        from pgfunc.demo import page, style

        examples = [page.Example(example_pictures() / file, *asked) for file, *asked in EXAMPLES]
        blocks = page.page(checkpoint, name, remark, examples)
        try:
            _, address, _ = blocks.launch(
                server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True,
                max_file_size=MAX_UPLOAD, ssr_mode=False, footer_links=[], css=style.CSS,
                show_error=False, pwa=False, mcp_server=False, enable_monitoring=False, run_history=False,
            )  # fmt: skip
            yield address
        finally:
            blocks.close(verbose=False)
