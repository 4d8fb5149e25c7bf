"""What the page does: a request about a picture becomes an answer, which grows. Knows nothing of browsers."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from einops import repeat

import pgfunc as pg
from pgfunc.errors import PromptError
from pgfunc.names import TASKS
from pgfunc.objects.boxes import Box
from pgfunc.objects.masks import Segment
from pgfunc.objects.result import Result
from pgfunc.objects.vqvae import Params as MaskDecoder
from pgfunc.prompt import unmarked

OBJECTS = ("detect", "segment")  # the tasks whose answer is drawn
FREE = "free"  # the task whose text is the whole prefix
NEEDS = {
    "ask": "a question, such as: what color is the car?",
    "detect": "what to look for, such as: cat ; bus",
    "segment": "what to look for, such as: cat ; bus",
    FREE: "a prefix, such as: caption en",
}


class Checkpoint(NamedTuple):
    """A model in memory, and the arguments that load it again."""

    model: pg.Model
    loading: dict[str, Any]  # of pg.load
    mask_decoder: MaskDecoder | None = None  # None: the model cannot segment
    masks: str | None = None  # the argument of pg.segment.load


class Request(NamedTuple):
    """What is asked about a picture."""

    picture: Path
    task: str  # a key of TASKS, or FREE
    text: str
    sampling: dict[str, Any]  # the settings of pg.generate
    min_confidence: float = 0.0


class Answer(NamedTuple):
    """What is known of an answer so far."""

    text: str
    finish: str | None = None  # None: the text is still growing
    result: Result | None = None  # of the tasks in OBJECTS


def tasks(checkpoint: Checkpoint) -> list[str]:
    """The tasks that can be asked of a checkpoint."""
    return [task for task in (*TASKS, FREE) if task != "segment" or checkpoint.mask_decoder is not None]


def answers(checkpoint: Checkpoint, request: Request) -> Iterator[Answer]:
    """The answer as it grows: text piece by piece, objects all at once. Raises a PgfuncError for a user's mistake."""
    check(request)
    picture, task, text, sampling, least = request
    if task not in OBJECTS:
        yield from growing(pg.stream(checkpoint.model, picture, prefix(task, text), **sampling))
        return
    find: dict[str, Any] = {"min_confidence": least} | sampling
    if task == "detect":
        result = pg.detect.find(checkpoint.model, picture, text, **find)
    elif checkpoint.mask_decoder is None:
        raise PromptError("segment needs a mask decoder; start the demo with --masks FILE")
    else:
        result = pg.segment.find(checkpoint.model, picture, text, checkpoint.mask_decoder, **find)
    yield Answer(result.text, result.finish, result)


def check(request: Request) -> None:
    """Raise PromptError if a task lacks its text."""
    if request.task in NEEDS and not request.text.strip():
        raise PromptError(f"{request.task} needs {NEEDS[request.task]}")


def full_prefix(request: Request) -> str:
    """What the model is asked, whatever the task."""
    task, text = request.task, request.text
    return pg.detect.ask(task, text) if task in OBJECTS else prefix(task, text)


def prefix(task: str, text: str) -> str:
    """The prefix of a task whose answer is a text."""
    return text if task == FREE else TASKS[task].format(unmarked(text, 1))


def growing(pieces: Any) -> Iterator[Answer]:
    """The answers that a stream of pieces makes; the last one has the finish."""
    text = ""
    while True:
        try:
            text += next(pieces)
        except StopIteration as stop:
            yield Answer(text, stop.value)
            return
        yield Answer(text)


def magnified(result: Result, side: int = 640) -> Result:
    """The result on a larger picture, by a whole factor, so that labels are sharp: at least `side` wide or high."""
    factor = -(-side // max(result.picture.size))
    if factor == 1:
        return result
    objects = [item._replace(box=Box(*(edge * factor for edge in item.box))) for item in result.objects]
    if objects and isinstance(objects[0], Segment):
        objects = [item._replace(mask=repeat(item.mask, "y x -> (y a) (x b)", a=factor, b=factor)) for item in objects]
    picture = result.picture.resize((result.picture.width * factor, result.picture.height * factor))
    return result._replace(objects=objects, picture=picture)


def notes(request: Request, answer: Answer) -> list[str]:
    """What may surprise about an answer, one line each."""
    lines = [f"left out {piece!r:.80}: {reason}" for piece, reason in answer.result.malformed] if answer.result else []
    if answer.finish == "length":
        lines.append(f"stopped at {request.sampling['max_new_tokens']} tokens, perhaps too early")
    return lines
