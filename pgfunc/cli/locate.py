"""Commands that find objects in pictures: detect (boxes) and segment (boxes and masks)."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import pgfunc as pg
from pgfunc.cli import options
from pgfunc.cli.inputs import Inputs, check_inputs, expand, is_folder, is_table, names_pictures
from pgfunc.cli.options import OnError, app, of_model, optional, without_option
from pgfunc.cli.results import is_coco, is_results
from pgfunc.cli.running import exit_if, results_output
from pgfunc.cli.text import prefix_of
from pgfunc.errors import PromptError
from pgfunc.names import MASKS, TASKS

Targets = Annotated[
    list[str],
    typer.Argument(
        help=f"{options.PICTURES} Then what to look for, such as 'cat ; bus'.",
        metavar="IMAGE... WHAT",
        show_default=False,
    ),
]
Labels = Annotated[
    list[str] | None, optional("--label", help="Something to look for, in place of WHAT. Repeat it for several.")
]
PromptText = Annotated[
    str | None, optional("--prompt", help="What to look for as one text, in place of WHAT: 'cat ; bus'.")
]
of_drawing = partial(optional, rich_help_panel="Drawing")
Out = Annotated[
    Path | None,
    options.of_output(
        "--out",
        show_default=False,
        help="Write the picture with the objects drawn on it, such as boxes.png; several pictures: a folder, as "
        "--draw. Or write a row for each picture, in place of text: .jsonl, .csv, .parquet; or all objects: .json, as "
        "COCO has them.",
    ),
]
Draw = Annotated[
    Path | None,
    of_drawing(
        "--draw",
        help="Folder for the pictures with the objects drawn on them; each has the format of its picture, or PNG if "
        "that format is unusual.",
    ),
]
Font = Annotated[
    Path | None, of_drawing("--font", help="Font file for the labels in the drawing. Default: fonts of the system.")
]
Confidence = Annotated[bool, of_drawing("--confidence", help="Draw the confidence beside each label.")]
MinConfidence = Annotated[
    float, typer.Option("--min-confidence", help="Leave out objects below this confidence, from 0 to 1.")
]
Coco = Annotated[
    Path | None,
    options.of_output(
        "--coco", show_default=False, help="Write the objects of all pictures to this file, as COCO JSON."
    ),
]
Masks = Annotated[
    Path | None, of_model("--masks", help=f"File of the mask decoder. Default: {MASKS} in the model's folder.")
]


def add_object_command(name: str, help: str) -> None:
    """Add a command that finds objects in each picture. Only `segment` has --masks."""

    def command(
        targets: Targets,
        label: Labels = None,
        prompt: PromptText = None,
        min_confidence: MinConfidence = 0.0,
        out: Out = None,
        draw: Draw = None,
        font: Font = None,
        confidence: Confidence = False,
        coco_file: Coco = None,
        masks: Masks = None,
        model: options.ModelName = None,
        adapter: options.Adapter = None,
        max_new_tokens: options.MaxNewTokens = 512,  # some 60 boxes, or 20 masks
        temperature: options.Temperature = 0.0,
        top_k: options.TopK = None,
        top_p: options.TopP = None,
        min_p: options.MinP = None,
        seed: options.Seed = 0,
        device: options.Device = None,
        dtype: options.Dtype = None,
        quantize: options.Quantize = None,
        config: options.Config = None,
        tokenizer: options.Tokenizer = None,
        batch: options.Batch = None,
        ray: options.Ray = None,
        ray_workers: options.RayWorkers = None,
        resume: options.Resume = False,
        on_error: options.WhenBroken = OnError.skip,
        as_json: options.Json = False,
    ) -> None:
        inputs, label_text = split_targets(name, targets, label, prompt)
        asked = partial(prefix_of, name, TASKS[name], label_text)
        check_inputs(inputs, asked)
        file = out if is_results(out, objects=True) else None
        output = results_output(
            inputs, [model, adapter, config, tokenizer], file, resume, on_error, as_json, objects=True
        )
        from pgfunc.checkpoint import shipped
        from pgfunc.cli.answering import Query
        from pgfunc.cli.drawings import check_coco, drawing_paths
        from pgfunc.cli.finding import Drawing, Finding, find_all, mask_decoder_path
        from pgfunc.cli.machines import Loading, completer
        from pgfunc.objects import fonts
        from pgfunc.sample import Settings

        read = [*inputs.arguments, model or shipped(), adapter, masks, config, tokenizer, font]
        drawings = drawing_paths(inputs, None if file else out, draw, read)
        if coco_file:
            check_coco(coco_file, inputs, read, drawings)
        fonts.candidates(font)  # raises SettingError if it is not a font
        Settings(temperature, top_k, top_p, min_p)  # raises SettingError for a value outside its range
        pg.detect.check_confidence(min_confidence)
        decoder = mask_decoder_path(masks, model) if name == "segment" else None
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
                                    "top_p": top_p, "min_p": min_p, "seed": seed}  # fmt: skip
        drawing = Drawing(drawings, font, confidence) if drawings else None
        with completer(
            Loading(model, dtype, device, config, tokenizer, quantize, adapter), ray, ray_workers
        ) as backend:
            masks_on = backend.model.params.projector.device if backend.here else "cpu"
            vq = pg.segment.load(decoder, masks_on) if decoder else None
            finding = Finding(Query(backend, asked, None, sampling, batch), vq, min_confidence, drawing, is_coco(file))
            exit_if(find_all(finding, inputs, output, coco_file))

    app.command(name, help=help)(command if name == "segment" else without_option(command, "masks"))


def split_targets(
    command: str, targets: list[str], labels: list[str] | None, prompt: str | None
) -> tuple[Inputs, str | None]:
    """The pictures, and what to look for: the last argument, --label or --prompt; None if tables say it.

    Raises PromptError if there is nothing to look for, or it is given twice; ImageError if a picture does not exist.
    """
    if labels and prompt:
        raise PromptError("--label and --prompt both say what to look for; give one of them")
    if labels or prompt:
        option, label_text = ("--label", pg.detect.join_labels(labels)) if labels else ("--prompt", prompt or "")
        if not names_pictures(targets[-1]):
            raise PromptError(
                f"{targets[-1]}: no such file; {option} already says what to look for: {label_text!r:.80}"
            )
        return expand(targets), label_text
    if all(map(is_table, targets)):
        return expand(targets), None
    *images, label_text = targets
    if not images or not label_text.strip() or (names_pictures(label_text) and not is_folder(label_text)):
        raise PromptError(f"{command} needs to know what to look for: pgfunc {command} photo.jpg 'cat'")
    words = [image for image in images if not names_pictures(image) and not Path(image).suffix]
    if words:
        several = " ".join(f"--label {shlex.quote(word)}" for word in [*words, label_text])
        raise PromptError(f"{words[0]}: no such file; to look for several things: {several:.200}")
    return expand(images), label_text


add_object_command("detect", "Find objects in each picture, with a box in pixels and a confidence for each.")
add_object_command("segment", "Find objects in each picture, with a box, a mask and a confidence for each.")
