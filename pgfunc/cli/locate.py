"""Commands that find objects in pictures: detect (boxes) and segment (boxes and masks)."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

import pgfunc as pg
from pgfunc.cli import options
from pgfunc.cli.options import app, check_pictures, may_be_picture, of_model, optional, without_option
from pgfunc.errors import PromptError
from pgfunc.names import MASKS, TASKS

Targets = Annotated[list[str], typer.Argument(help="Pictures, then what to look for, such as 'cat ; bus'.",
                                              metavar="IMAGE... WHAT", show_default=False)]  # fmt: skip
Labels = Annotated[
    list[str] | None, optional("--label", help="Something to look for, in place of WHAT. Repeat it for several.")
]
PromptText = Annotated[
    str | None, optional("--prompt", help="What to look for as one text, in place of WHAT: 'cat ; bus'.")
]
of_drawing = partial(optional, rich_help_panel="Drawing")
Out = Annotated[
    Path | None,
    of_drawing(
        "--out",
        help="Write the picture with the objects drawn on it. For several pictures: a folder, where each drawing has "
        "the format of its picture, or PNG if that format is unusual.",
    ),
]
Font = Annotated[
    Path | None, of_drawing("--font", help="Font file for the labels in the drawing. Default: fonts of the system.")
]
Confidence = Annotated[bool, of_drawing("--confidence", help="Draw the confidence beside each label.")]
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
        out: Out = None,
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
        as_json: options.Json = False,
    ) -> None:
        images, label_text = split_targets(name, targets, label, prompt)
        from pgfunc.checkpoint import shipped
        from pgfunc.cli.drawings import check_coco, drawing_paths
        from pgfunc.cli.finding import Output, Query, find_all, mask_decoder_path
        from pgfunc.objects import fonts
        from pgfunc.prompt import unmarked
        from pgfunc.sample import Settings

        inputs = [*images, model or shipped(), adapter, masks, config, tokenizer, font]
        drawings = drawing_paths(images, out, inputs)
        if coco_file:
            check_coco(coco_file, inputs, drawings)
        prefix = TASKS[name].format(unmarked(label_text, 1))
        fonts.candidates(font)  # raises SettingError if it is not a font
        Settings(temperature, top_k, top_p, min_p)  # raises SettingError for a value outside its range
        decoder = mask_decoder_path(masks, model) if name == "segment" else None
        loaded = pg.load(model, dtype, device, config, tokenizer, quantize, adapter=adapter)
        vq = pg.segment.load(decoder, loaded.params.projector.device) if decoder else None
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
                                    "top_p": top_p, "min_p": min_p, "seed": seed}  # fmt: skip
        query, output = Query(loaded, vq, prefix, sampling), Output(as_json, drawings, font, confidence)
        find_all(query, images, output, coco_file)

    app.command(name, help=help)(command if name == "segment" else without_option(command, "masks"))


def split_targets(
    command: str, targets: list[str], labels: list[str] | None, prompt: str | None
) -> tuple[list[str], str]:
    """The pictures, which exist, and what to look for: the last argument, or --label or --prompt.

    Raises PromptError if there is nothing to look for, or it is given twice; ImageError if a picture does not exist.
    """
    if labels and prompt:
        raise PromptError("--label and --prompt both say what to look for; give one of them")
    if labels or prompt:
        option, label_text = ("--label", pg.detect.join_labels(labels)) if labels else ("--prompt", prompt or "")
        if not may_be_picture(targets[-1]):
            raise PromptError(
                f"{targets[-1]}: no such file; {option} already says what to look for: {label_text!r:.80}"
            )
        check_pictures(targets)
        return targets, label_text
    *images, label_text = targets
    is_file = may_be_picture(label_text) and not Path(label_text).is_dir()
    if not images or not label_text.strip() or is_file:
        raise PromptError(f"{command} needs to know what to look for: pgfunc {command} photo.jpg 'cat'")
    words = [image for image in images if not may_be_picture(image) and not Path(image).suffix]
    if words:
        several = " ".join(f"--label {shlex.quote(word)}" for word in [*words, label_text])
        raise PromptError(f"{words[0]}: no such file; to look for several things: {several:.200}")
    check_pictures(images)
    return images, label_text


add_object_command("detect", "Find objects in each picture, with a box in pixels and a confidence for each.")
add_object_command("segment", "Find objects in each picture, with a box, a mask and a confidence for each.")
