"""The page: a picture and a question on the left, the answer on the right. It lays out what `actions` computes."""

from collections.abc import Awaitable, Callable, Iterator, Sequence
from filecmp import cmp
from functools import partial
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr

from pgfunc.demo.actions import FREE, NEEDS, OBJECTS, Answer, Checkpoint, Request, answers, magnified, notes, tasks
from pgfunc.demo.attention import heat, tokens
from pgfunc.demo.snippet import snippet
from pgfunc.demo.style import NAME_PICTURES
from pgfunc.errors import PgfuncError, PromptError
from pgfunc.objects import draw
from pgfunc.objects.masks import Segment
from pgfunc.objects.result import Result

NAMES = {"caption": "Caption", "ask": "Ask", "ocr": "Read text", "detect": "Detect", "segment": "Segment",
         FREE: "Free prompt"}  # fmt: skip
TEXT_LABELS = {"ask": "Question", "detect": "What to look for", "segment": "What to look for", FREE: "Prefix"}
MAX_NEW_TOKENS = {True: 512, False: 64}  # whether objects are asked for
QUEUE = 16  # requests that wait for the model
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "seed")
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}  # of events that do not run the model


class Example(NamedTuple):
    """A picture and what to ask about it."""

    picture: Path
    task: str
    text: str


def page(checkpoint: Checkpoint, name: str, remark: str, examples: Sequence[Example]) -> gr.Blocks:
    """The page for a checkpoint. `name` and `remark` tell people which one it is, and what it can do."""
    with gr.Blocks(title="pgfunc demo", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
        gr.HTML(f"<h1>pgfunc demo</h1><p>Checkpoint: <code>{escape(name)}</code>{escape(remark)}</p>", elem_id="title")
        with gr.Row():
            with gr.Column(scale=4):
                inputs, run, stop = asking(checkpoint, examples)
            with gr.Column(scale=5):
                outputs = [*answering(), *looking(checkpoint)]
        respond_to = partial(respond, checkpoint, [example.picture for example in examples])
        running = gr.on(
            [run.click, inputs[2].submit], respond_to, inputs, outputs, concurrency_id="model", concurrency_limit=1,
            show_progress="minimal", api_visibility="private",
        )  # fmt: skip
        running.then(None, js=NAME_PICTURES, **QUIET)
        stop.click(None, cancels=[running], **QUIET)
    return blocks.queue(max_size=QUEUE, api_open=False)


def asking(checkpoint: Checkpoint, examples: Sequence[Example]) -> tuple[list[Any], gr.Button, gr.Button]:
    """The left side. Returns the inputs of `respond`, and the buttons that run it and stop it."""
    picture = gr.Image(label="Picture", elem_id="picture", type="filepath", image_mode=None, height=300,
                       sources=["upload", "clipboard"], buttons=["fullscreen"])  # fmt: skip
    picture.preprocess = lambda payload: payload and payload.path  # `image` reads it, and says in one line what fails
    picture.async_move_resource_to_block_cache = partial(from_here, picture.async_move_resource_to_block_cache)
    task = gr.Radio([(NAMES[name], name) for name in tasks(checkpoint)], value="caption", label="Task")
    text = gr.Textbox(label="Question", visible=False, max_lines=1)
    with gr.Row():
        run, stop = gr.Button("Run", variant="primary"), gr.Button("Stop")
    with gr.Accordion("Settings", open=False):
        least, *sampling = settings()
    task.change(change_task, task, [text, least, sampling[0]], **QUIET)
    asked = [example for example in examples if example.task in tasks(checkpoint)]
    gr.Examples(
        [[str(example.picture), example.task, example.text] for example in asked], [picture, task, text],
        example_labels=[f"{NAMES[example.task]} {example.text}".strip() for example in asked], label="Examples",
        api_visibility="private",
    )  # fmt: skip
    return [picture, task, text, least, *sampling], run, stop


async def from_here(move: Callable[..., Awaitable[Any]], url_or_file_path: Any) -> Any:
    """Gradio's step that takes a picture in, but not from an address, which only a forged request can name."""
    if str(url_or_file_path).startswith(("http:", "https:")):
        raise gr.Error("the demo fetches nothing from elsewhere; upload the picture", print_exception=False)
    return await move(url_or_file_path)


def settings() -> list[Any]:
    """The least confidence, and the settings of the sampler in the order of SETTINGS."""
    least = gr.Slider(0, 1, 0, step=0.01, label="Least confidence of an object", visible=False)
    with gr.Row():
        limit = gr.Number(MAX_NEW_TOKENS[False], label="Largest number of tokens", precision=0)
        seed = gr.Number(0, label="Seed", precision=0)
    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature", info="0 always takes the most probable token.")
    with gr.Row():
        filters = [
            gr.Number(0, label="Top-k", precision=0, info="0 keeps all.", min_width=100),
            gr.Number(1, label="Top-p", step=0.05, info="1 keeps all.", min_width=100),
            gr.Number(0, label="Min-p", step=0.01, info="0 keeps all.", min_width=100),
        ]
    return [least, limit, temperature, *filters, seed]


def change_task(task: str) -> list[Any]:
    """The text box, the least confidence and the number of tokens for a task."""
    example = NEEDS.get(task, "").partition(": ")[2]
    return [
        gr.update(visible=task in NEEDS, label=TEXT_LABELS.get(task, ""), placeholder=example),
        gr.update(visible=task in OBJECTS),
        gr.update(value=MAX_NEW_TOKENS[task in OBJECTS]),
    ]


def answering() -> list[Any]:
    """The right side: the outputs of `respond`."""
    return [
        gr.Textbox(label="Answer", lines=2, max_lines=6, interactive=False),
        gr.HTML(elem_id="status", visible=False),
        gr.Image(label="Drawing", elem_id="drawing", format="png", height=400, interactive=False, visible=False,
                 buttons=["download", "fullscreen"]),
        gr.HTML(elem_id="legend", visible=False),
        gr.Code(label="The same in Python", language="python", interactive=False, visible=False, wrap_lines=True,
                show_line_numbers=False),
    ]  # fmt: skip


def looking(checkpoint: Checkpoint) -> list[Any]:
    """The attention over the picture, below the answer: more outputs of `respond`, which fills in the tokens."""
    layers, asked = checkpoint.model.cfg.text.layers, gr.State(None)
    with gr.Accordion("Attention over the picture", open=False, visible=False) as panel:
        token = gr.Radio([], label="Token of the answer", info="Where did the model look as it wrote this token?")
        layer = gr.Slider(0, layers - 1, layers // 2, step=1, label="Layer", info="The mean of its heads is shown.")
        view = gr.Image(
            elem_id="attention", show_label=False, format="png", interactive=False, visible=False, buttons=[]
        )
    looked = gr.on(
        [token.change, layer.change], partial(look, checkpoint), [asked, token, layer], view, concurrency_id="model",
        trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    looked.then(None, js=NAME_PICTURES, **QUIET)
    return [panel, token, asked]


def look(checkpoint: Checkpoint, asked: tuple[Request, str] | None, token: int | None, layer: int) -> Any:
    """The attention of a token of the answer to what was asked; nothing if none is chosen."""
    return showing(None if asked is None or token is None else heat(checkpoint, *asked, token, layer))


def respond(checkpoint: Checkpoint, examples: Sequence[Path], *inputs: Any) -> Iterator[list[Any]]:
    """The outputs for these inputs, as the answer grows. A user's mistake is one line in the place of the status."""
    try:
        request = as_request(inputs)
        yield ["", *[showing(None)] * 4, *seen([], None)]
        for answer in answers(checkpoint, request):
            yield shown(checkpoint, request, answer, examples)
    except PgfuncError as error:
        message = str(error)
        if inputs[0]:
            message = message.replace(f"{Path(inputs[0]).parent}/", "")  # people know only the name of their file
        yield ["", showing(line(message, "alert")), *[showing(None)] * 3, *seen([], None)]


def as_request(inputs: Sequence[Any]) -> Request:
    """The request that the values of the inputs make. Raises PromptError if there is no picture."""
    picture, task, text, least, limit, temperature, top_k, top_p, min_p, seed = inputs
    if not picture:
        raise PromptError("there is no picture yet; upload one, paste one, or choose an example")
    values = (limit, temperature, top_k or None, None if top_p == 1 else top_p, min_p or None, seed)
    return Request(Path(picture), task, text or "", dict(zip(SETTINGS, values, strict=True)), least)


def shown(checkpoint: Checkpoint, request: Request, answer: Answer, examples: Sequence[Path]) -> list[Any]:
    """The outputs for an answer: while it grows only its text, at the end everything."""
    if answer.finish is None:
        return [answer.text, *[gr.skip()] * 7]
    result = answer.result
    remarks = "".join(line(note, "status") for note in notes(request, answer))
    objects = [magnified(result).draw(), legend(result)] if result else [None, None]
    code = snippet(checkpoint, request, path_of(request.picture, examples))
    looks = seen(tokens(checkpoint, answer.text), (request, answer.text))
    return [answer.text, *map(showing, [remarks, *objects, code]), *looks]


def seen(words: Sequence[str], asked: tuple[Request, str] | None) -> list[Any]:
    """The outputs of `looking`: the tokens to choose from, and the answer that they are of."""
    choices = [(word, i) for i, word in enumerate(words)]
    return [gr.update(visible=bool(words)), gr.update(choices=choices, value=None), asked]


def showing(value: Any) -> Any:
    """A component with this value; it is hidden if there is none."""
    return gr.update(value=value, visible=bool(value))


def path_of(picture: Path, examples: Sequence[Path]) -> str:
    """The path of a picture for a script that runs in this folder; an uploaded one has only a name."""
    for example in examples:
        if example.name == picture.name and cmp(example, picture, shallow=False):
            return str(example.relative_to(Path.cwd()) if example.is_relative_to(Path.cwd()) else example)
    return picture.name


def line(text: str, role: str) -> str:
    """A line that screen readers announce."""
    return f'<p role="{role}">{escape(text)}</p>'


def legend(result: Result) -> str:
    """A table of the objects, in the colors of the drawing."""
    if not result.objects:
        return line("nothing found", "status")
    columns = ["", "object", "confidence", "x", "y", *(["mask"] if isinstance(result.objects[0], Segment) else [])]
    head = "".join(f'<th scope="col">{column}</th>' for column in columns)
    rows = "".join(map(row, result.objects, draw.colors_of(result.objects)))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def row(item: Any, color: draw.Color) -> str:
    """An object as a row of the legend."""
    ymin, xmin, ymax, xmax = item.box
    cells = [
        draw.caption(item), "unknown" if item.confidence is None else f"{item.confidence:.0%}",
        f"{xmin:.0f} to {xmax:.0f}", f"{ymin:.0f} to {ymax:.0f}",
    ]  # fmt: skip
    if isinstance(item, Segment):
        cells.append(f"{int(item.mask.count_nonzero())} pixels")
    swatch = f'<td><span class="swatch" style="background: rgb{color}"></span></td>'
    return f"<tr>{swatch}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"
