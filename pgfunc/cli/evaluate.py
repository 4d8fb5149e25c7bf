"""The command that measures: evaluate. The packages that it needs are imported when it runs."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from tqdm import tqdm

from pgfunc.cli import options
from pgfunc.cli.options import app, optional, print_note, print_result
from pgfunc.errors import SettingError, escape_controls

if TYPE_CHECKING:
    from pgfunc.evaluation.rows import Row, Task
    from pgfunc.evaluation.tasks import Evaluation

WORST = 20  # cases on the page
TITLES = {
    "cider": "CIDEr-D", "bleu4": "BLEU-4", "exact": "exact match", "vqa_accuracy": "VQA accuracy", "anls": "ANLS",
    "cer": "character error rate ↓", "ap": "AP, COCO", "ap50": "AP at IoU 0.50",
    "ap75": "AP at IoU 0.75",
    "recall": "recall: objects found, IoU > 0.5", "precision": "precision: boxes that are correct",
    "invalid": "answers with invalid parts ↓", "mean_iou": "mean IoU of masks",
    "mask_ap": "mask AP, COCO", "mask_ap50": "mask AP at IoU 0.50", "mask_ap75": "mask AP at IoU 0.75",
}  # fmt: skip


@app.command()
def evaluate(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="JSON Lines file: lines have image, prefix, and suffix or objects."),
    ],
    task: Annotated[
        str | None,
        optional("--task", help="caption, answer, ocr, detect or segment. Default: the task that the prefixes name."),
    ] = None,
    images: Annotated[
        Path | None, optional("--images", help="Folder of the pictures. Default: the folder of DATA.")
    ] = None,
    limit: Annotated[
        int | None, optional("--limit", metavar="N", help="Evaluate only the first N lines of the task.")
    ] = None,
    html: Annotated[
        Path | None,
        optional("--html", help=f"Write the {WORST} worst cases to this file, as a page with the pictures."),
    ] = None,
    masks: Annotated[
        Path | None, optional("--masks", help="File of the mask decoder. Default: as for `pgfunc segment`.")
    ] = None,
    model: options.ModelName = None,
    adapter: options.Adapter = None,
    max_new_tokens: Annotated[
        int | None,
        options.of_decoding(
            "--max-new-tokens",
            show_default=False,
            help="Largest number of tokens in an answer. Default: 64, or 512 for detect and segment.",
        ),
    ] = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    config: options.Config = None,
    tokenizer: options.Tokenizer = None,
    as_json: options.Json = False,
) -> None:
    """Compare the model's answers with the truth, by the metrics of the task's own field; decoding is greedy.

    A picture that cannot be read is named and counts as a wrong answer.
    """
    import pgfunc as pg
    from pgfunc.checkpoint import shipped
    from pgfunc.cli.drawings import write_text
    from pgfunc.cli.finding import mask_decoder_path
    from pgfunc.evaluation import page, tasks

    tasks.check_packages()
    chosen, rows = read_rows(data, task, images, limit)
    if html:
        check_page(html, rows, [data, model or shipped(), adapter, masks, config, tokenizer])
    decoder = mask_decoder_path(masks, model) if chosen == "segment" else None
    loaded = pg.load(model, dtype, device, config, tokenizer, quantize, adapter=adapter)
    vq = pg.segment.load(decoder, loaded.params.projector.device) if decoder else None

    def watch(results: Any) -> Any:
        return tqdm(results, total=len(rows), desc=chosen, unit="line", leave=False, disable=None)

    done = tasks.evaluate(loaded, chosen, rows, vq, max_new_tokens, watch)
    source = {"data": str(data), "model": model or "the shipped checkpoint"}
    if html:
        title = f"{source['model']} on {data}"
        write_text(html, page.render(done, tasks.worst(done, WORST), title, table_rows(done), vq))
    if as_json:
        print_result(source | as_dict(done), True)
    else:
        print_table(done)
    failed = [case for case in done.cases if case.error]
    for case in failed:
        print_note(f"{case.row.where}: {case.error}")
    if failed:
        raise typer.Exit(1)


def read_rows(data: Path, name: str | None, images: Path | None, limit: int | None) -> "tuple[Task, list[Row]]":
    """The task, and its rows in the file. Prints a note if rows of other tasks are left out."""
    from pgfunc.evaluation.rows import as_task, of_task, only_task, read

    if limit is not None and limit < 1:
        raise SettingError(f"--limit is {limit}, expected 1 or more")
    task = None if name is None else as_task(name)
    rows = read(data, images)
    task = task or only_task(rows)
    chosen = of_task(rows, task)
    if len(chosen) < len(rows):
        print_note(f"{data}: {len(rows) - len(chosen)} lines of other tasks are left out")
    return task, chosen[:limit]


def check_page(html: Path, rows: "Sequence[Row]", inputs: Sequence[str | Path | None]) -> None:
    """Raise SettingError if the page cannot be written, or would replace an input or a picture."""
    from pgfunc.files.outputs import check_apart

    options.check_file(html)
    check_apart([html], [*inputs, *{path for row in rows for path in row.images}], "--html")


def as_dict(done: "Evaluation") -> dict[str, Any]:
    """An evaluation for JSON: the metrics, and for every line the answer and its score."""
    return {
        "task": done.task,
        "metrics": {name: metric._asdict() for name, metric in done.metrics.items()},
        "score": done.scored,
        "cases": [
            {
                "line": case.row.where,
                "images": [str(path) for path in case.row.images],
                "prompt": case.row.prefix,
                "answer": case.completion and case.completion.text,
                "score": case.score,
                "error": case.error or None,
            }
            for case in done.cases
        ],
    }


def table_rows(done: "Evaluation") -> list[tuple[str, str, str, str]]:
    """The metrics for people: name, value, interval, and what was counted."""
    return [
        (
            TITLES[name],
            "–" if metric.value is None else f"{metric.value:.3f}",
            "–" if metric.low is None else f"{metric.low:.3f} – {metric.high:.3f}",
            f"{metric.counted} {metric.unit}",
        )
        for name, metric in done.metrics.items()
    ]


def print_table(done: "Evaluation") -> None:
    """Print the metrics as a table for people."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("metric", "value", "95% interval", "of"):
        table.add_column(name, justify="left" if name in ("metric", "of") else "right", no_wrap=name != "metric")
    for row in table_rows(done):
        table.add_row(*row)
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, markup=False)
    print(escape_controls(f"{done.task}: {len(done.cases)} lines"))
    console.print(table)
    kinds = {metric.interval for metric in done.metrics.values()} - {""}
    texts = {"Wilson": "Wilson's for shares of answers", "bootstrap": "bootstrap over the lines for other ratios"}
    if kinds:
        print(f"Intervals: {'; '.join(texts[kind] for kind in sorted(kinds))}. ↓: lower is better.")
