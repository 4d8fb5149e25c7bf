"""Rows with their pictures, read ahead of the model: worker processes decode and resize, and a thread fetches.

A row is (picture or list of pictures, prefix), as for `pgfunc.generate`. Rows come out in the order in which they went
in, and at most `ahead` of them wait, so memory does not depend on their number. Rows that name the same file, and are
near one another, share one `Picture`: it is read once, and encoded once. Nothing here knows the model.
"""

import multiprocessing
import queue
import warnings
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from os import PathLike
from threading import Event, Thread
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pgfunc import image
from pgfunc.config import Config
from pgfunc.errors import ImageError, PgfuncError, PromptError, first_line
from pgfunc.prompt import Row, as_rows

Content = tuple[np.ndarray, tuple[int, int]] | ImageError  # levels and size

POLL = 0.1  # seconds between two looks at whether the reader was closed


@dataclass(slots=True, eq=False)
class Picture:
    """A picture that rows share. It is filled in steps: its levels or an error when it was read, then its tokens."""

    levels: np.ndarray | None = None  # uint8 [y x 3]
    size: tuple[int, int] = (0, 0)  # width and height of the picture itself, in pixels
    error: PgfuncError | None = None
    tokens: Tensor | None = None  # [p d], when it is encoded; the levels are then forgotten


class Request(NamedTuple):
    """A row with its index in the stream (`number`), and the pictures that it needs. `error`: why it is no row."""

    number: int
    given: Any
    row: Row | None
    pictures: tuple[Picture, ...]
    error: PgfuncError | None = None


class Files(Dataset):
    """What a worker process does: the levels and the size of each of some pictures, or why it cannot be read."""

    def __init__(self, cfg: Config):
        self.cfg = cfg

    def __getitem__(self, sources: Sequence[image.Source]) -> list[Content]:
        return [self.read(source) for source in sources]

    def read(self, source: image.Source) -> Content:
        try:
            return image.square(source, self.cfg)
        except ImageError as error:
            return ImageError(str(error))  # without its cause, which may not travel between processes
        except Exception as error:  # one picture must not end the run: it may need more memory than there is
            return ImageError(f"{image.name_of(source)}: cannot be read as a picture ({first_line(error)})")


class Reader:
    """Reads rows ahead in a thread and in worker processes. Close it, or the thread waits for ever."""

    def __init__(self, rows: Iterable[Any], cfg: Config, ahead: int, workers: int):
        self._queue: queue.Queue[Request | Exception | None] = queue.Queue(max(1, ahead // 2))
        self._asked: queue.SimpleQueue[tuple[Request, list[Picture]]] = queue.SimpleQueue()
        self._near: OrderedDict[Any, Picture] = OrderedDict()  # the pictures of the last rows, by file name
        self._ahead, self._closed = ahead, Event()
        self._files = Files(cfg)
        self._loaded = load(self._files, self._sources(rows), ahead // 2, workers)
        Thread(target=self._fetch, daemon=True).start()

    def get(self, timeout: float | None = None) -> Request | None:
        """The next row; None after the last. Raises queue.Empty if there is none in so many seconds (None: ever)."""
        request = self._queue.get(timeout != 0, timeout)
        if request is None:
            self._queue.put(None)  # for the next call
        if isinstance(request, Exception):
            raise request
        return request

    def close(self) -> None:
        """Stop reading."""
        self._closed.set()

    def _sources(self, rows: Iterable[Any]) -> Iterator[list[image.Source]]:
        """For each row, the pictures that were not read for one of the rows before it."""
        for index, given in enumerate(rows):
            row, error = as_row(given)
            new: dict[int, tuple[Picture, image.Source]] = {}
            pictures = tuple(self._picture(source, new) for source in row.images) if row else ()
            self._asked.put((Request(index, given, row, pictures, error), [picture for picture, _ in new.values()]))
            yield [source for _, source in new.values()]
            if self._closed.is_set():
                return

    def _picture(self, source: image.Source, new: dict[int, tuple[Picture, image.Source]]) -> Picture:
        """The picture of a source. Only those that have a name are shared: others may be changed between two rows."""
        key = str(source) if isinstance(source, (str, PathLike)) else None
        picture = self._near.get(key) if key else None
        if picture is None:
            picture = Picture()
            if isinstance(source, (str, PathLike, bytes)):
                new[id(picture)] = picture, source
            else:  # it is decoded, and may be changed when the caller is asked for the next row
                fill(picture, self._files.read(source))
        if key:
            self._near[key] = picture
            self._near.move_to_end(key)
            if len(self._near) > self._ahead:
                self._near.popitem(last=False)
        return picture

    def _fetch(self) -> None:
        """Put rows into the queue when their pictures have come from the workers."""
        try:
            for read in self._loaded:
                request, pictures = self._asked.get()
                for picture, content in zip(pictures, read, strict=True):
                    fill(picture, content)
                if not self._put(request):
                    return
            self._put(None)
        except Exception as error:  # of the caller's iterator, or a worker that died
            self._put(error)
        finally:
            self._loaded = iter(())  # ends the workers

    def _put(self, item: Request | Exception | None) -> bool:
        """Wait for room in the queue. Returns False if the reader was closed."""
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=POLL)
                return True
            except queue.Full:
                continue
        return False


def load(files: Files, wanted: Iterable[Any], ahead: int, workers: int) -> Iterator[Any]:
    """The items of `files` that are wanted, in order; `workers` processes load `ahead` of them in advance.

    The processes are forked, where that is possible: they begin at once, and import nothing.
    """
    fork = "fork" if workers and "fork" in multiprocessing.get_all_start_methods() else None
    loader = DataLoader(
        files, batch_size=None, sampler=wanted, collate_fn=as_it_is, num_workers=workers,
        prefetch_factor=max(1, ahead // workers) if workers else None, multiprocessing_context=fork,
    )  # fmt: skip
    with warnings.catch_warnings():  # Python warns that a fork copies no threads; the workers need none
        warnings.simplefilter("ignore", DeprecationWarning)
        return iter(loader)


def as_row(given: Any) -> tuple[Row | None, PgfuncError | None]:
    """The row that was given as (pictures, prefix), or the error that it is."""
    try:
        pictures, prefix = given
        (row,) = as_rows([pictures], prefix)
    except PgfuncError as error:
        return None, error
    except (TypeError, ValueError):
        return None, PromptError(f"a row is {given!r:.60}, expected (picture or list of pictures, prefix)")
    return row, None


def fill(picture: Picture, content: Content) -> None:
    """Store in a picture what was read."""
    if isinstance(content, ImageError):
        picture.error = content
    else:
        picture.levels, picture.size = content


def as_it_is(item: Any) -> Any:
    return item
