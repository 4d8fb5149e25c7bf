"""An evaluation: rows in, the model's answers, the metrics of the rows' task, and a score per row out."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from importlib.util import find_spec
from typing import NamedTuple

from pgfunc.errors import SettingError
from pgfunc.evaluation import boxes, captions, masks, questions, reading
from pgfunc.evaluation.boxes import Located
from pgfunc.evaluation.metrics import Measured, Metric
from pgfunc.evaluation.rows import OBJECTS, UNKNOWN, Row, Task, truths
from pgfunc.generate import Completion
from pgfunc.many import generate_many
from pgfunc.many.scheduling import Result
from pgfunc.objects import coco, detect, segment, vqvae
from pgfunc.objects.detect import Detection
from pgfunc.objects.segment import Segment
from pgfunc.prompt import Model, tokenizer_of

PACKAGES = ("sacrebleu", "rapidfuzz", "pycocotools", "jinja2")
MAX_TOKENS: dict[Task, int] = {"caption": 64, "answer": 64, "ocr": 64, "detect": 512, "segment": 512}
OF_TEXTS = {"caption": captions.measure, "answer": questions.measure, "ocr": reading.measure}

Watch = Callable[[Iterable[Result]], Iterable[Result]]  # passes results on, for example past a progress bar


class Case(NamedTuple):
    """A row, the model's answer to it or the error in place of one, the size of its picture, and its score."""

    row: Row
    completion: Completion | None
    error: str
    size: tuple[int, int]
    score: float
    perfect: bool  # whether no answer could be better


class Evaluation(NamedTuple):
    """The metrics of a task, and all cases in the order of the rows."""

    task: Task
    metrics: dict[str, Metric]
    cases: list[Case]
    scored: str  # what the scores are


def evaluate(
    model: Model,
    task: Task,
    rows: Sequence[Row],
    vq: vqvae.Params | None = None,
    max_new_tokens: int | None = None,
    watch: Watch = iter,
    workers: int | None = None,
) -> Evaluation:
    """Answer the rows of one task, see `rows.of_task`, and compare the answers with the truth; decoding is greedy.

    `vq`: the mask decoder, for `segment`. `workers`: processes that read pictures, see `generate_many`. Raises
    SettingError if a package is missing or `max_new_tokens` is not positive.
    """
    check_packages()
    vq = vq if task == "segment" else None
    limit = MAX_TOKENS[task] if max_new_tokens is None else max_new_tokens
    results: dict[int, Result] = {}
    located: dict[int, Located] = {}
    asked = ((row.images, row.prefix) for row in rows)
    with closing(generate_many(model, asked, limit, workers=workers)) as stream:
        for result in watch(stream):
            results[result.number] = result
            if task in OBJECTS:
                located[result.number] = compare(model, rows[result.number], result, vq)
    ordered = [results[i] for i in range(len(rows))]
    measured = measure(task, rows, ordered, [located[i] for i in sorted(located)])
    cases = [
        Case(row, result.completion, str(result.error or ""), size_of(result), score, perfect)
        for row, result, score, perfect in zip(rows, ordered, measured.scores, measured.perfect, strict=True)
    ]
    return Evaluation(task, measured.metrics, cases, measured.scored)


def measure(task: Task, rows: Sequence[Row], results: Sequence[Result], located: Sequence[Located]) -> Measured:
    """The metrics and scores of the answers to these rows."""
    if task in OBJECTS:
        return (masks if task == "segment" else boxes).measure(located)
    answers = [result.completion and result.completion.text for result in results]
    return OF_TEXTS[task](answers, [row.references for row in rows])


def compare(model: Model, row: Row, result: Result, vq: vqvae.Params | None) -> Located:
    """The true objects of a row and those of the answer, as COCO's entries."""
    size, read = size_of(result), segment.malformed if vq else detect.malformed
    invalid = result.completion is not None and bool(read(result.completion.text))
    objects = answered(model, result.completion, size, vq)
    true = truths(row, None if result.error else size, vq)
    return Located(*size, coco.labelled(true), coco.labelled(objects), invalid)


def answered(
    model: Model, completion: Completion | None, size: tuple[int, int], vq: vqvae.Params | None
) -> Sequence[Detection | Segment]:
    """The objects in an answer, with their confidence; none without an answer."""
    return [] if completion is None else segment.objects_in(completion, tokenizer_of(model), *size, vq)


def size_of(result: Result) -> tuple[int, int]:
    """The width and the height of the first picture, in which the objects are."""
    return result.sizes[0] if result.sizes and min(result.sizes[0]) > 0 else UNKNOWN


def worst(evaluation: Evaluation, count: int) -> list[Case]:
    """The cases with the lowest scores, the worst first, without perfect answers; errors come before all others."""
    below = [case for case in evaluation.cases if case.error or not case.perfect]
    return sorted(below, key=lambda case: (not case.error, case.score))[:count]


def check_packages() -> None:
    """Raise SettingError if a package of the extra `evaluate` is missing."""
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise SettingError(f"{missing[0]} is not installed: python -m pip install 'pgfunc[evaluate]'")
