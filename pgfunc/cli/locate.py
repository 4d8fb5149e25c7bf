"""Commands that find objects in pictures: detect (boxes) and segment (boxes and masks)."""

import shlex
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

import pgfunc as pg
from pgfunc.checkpoint import find, shipped
from pgfunc.checkpoint.conversion import MASKS
from pgfunc.cli import options
from pgfunc.cli.drawings import check_coco, drawing_paths, write_picture, write_text
from pgfunc.cli.options import (
    app,
    check_pictures,
    exit_if_skipped,
    note_if_cut_off,
    optional,
    path_exists,
    print_note,
    print_result,
    read_each,
    to_json,
    without_option,
)
from pgfunc.errors import CheckpointError, PromptError
from pgfunc.objects import coco, draw, fonts
from pgfunc.objects.detect import Detection, Result
from pgfunc.objects.segment import Segment
from pgfunc.sample import Settings

Targets = Annotated[list[str], typer.Argument(help="Picture files, then what to look for, such as 'cat ; bus'.",
                                              metavar="IMAGE... WHAT", show_default=False)]  # fmt: skip
Labels = Annotated[
    list[str] | None, optional("--label", help="Something to look for, in place of WHAT. Repeat it for several.")
]
PromptText = Annotated[
    str | None, optional("--prompt", help="What to look for as one text, in place of WHAT: 'cat ; bus'.")
]
Out = Annotated[
    Path | None,
    optional(
        "--out",
        help="Write the picture with the objects drawn on it. For several pictures: a folder, where each drawing has "
        "the format of its picture, or PNG if that format is unusual.",
    ),
]
Font = Annotated[
    Path | None, optional("--font", help="Font file for the labels in the drawing. Default: fonts of the system.")
]
Confidence = Annotated[bool, typer.Option("--confidence", help="Draw the confidence beside each label.")]
Coco = Annotated[Path | None, optional("--coco", help="Write the objects of all pictures to this file, as COCO JSON.")]
Masks = Annotated[
    Path | None, optional("--masks", help=f"File of the mask decoder. Default: {MASKS} in the model's folder.")
]


class Query(NamedTuple):
    """What is asked about each picture."""

    find: Callable[[str], Result]
    max_new_tokens: int


class Output(NamedTuple):
    """What is printed and drawn for each picture."""

    as_json: bool
    drawings: dict[str, Path]  # picture -> file of its drawing
    font: Path | None
    confidence: bool


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
        inputs = [*images, model or shipped(), adapter, masks, config, tokenizer, font]
        drawings = drawing_paths(images, out, inputs)
        if coco_file:
            check_coco(coco_file, inputs, drawings)
        pg.detect.ask(name, label_text)  # raises PromptError if it cannot be asked
        fonts.candidates(font)  # raises SettingError if it is not a font
        Settings(temperature, top_k, top_p, min_p)  # raises SettingError for a value outside its range
        decoder = mask_decoder_path(masks, model) if name == "segment" else None
        loaded = pg.load(model, dtype, device, config, tokenizer, quantize, adapter=adapter)
        asked: dict[str, Any] = {"labels": label_text, "max_new_tokens": max_new_tokens, "temperature": temperature,
                                 "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed}  # fmt: skip
        if decoder:
            asked["vq"] = pg.segment.load(decoder, loaded.params.projector.device)
        query = Query(partial(pg.segment.find if decoder else pg.detect.find, loaded, **asked), max_new_tokens)
        find_all(query, images, Output(as_json, drawings, font, confidence), coco_file)

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
        if not path_exists(targets[-1]):
            raise PromptError(
                f"{targets[-1]}: no such file; {option} already says what to look for: {label_text!r:.80}"
            )
        check_pictures(targets)
        return targets, label_text
    *images, label_text = targets
    if not images or not label_text.strip() or (path_exists(label_text) and Path(label_text).is_file()):
        raise PromptError(f"{command} needs to know what to look for: pgfunc {command} photo.jpg 'cat'")
    words = [image for image in images if not path_exists(image) and not Path(image).suffix]
    if words:
        several = " ".join(f"--label {shlex.quote(word)}" for word in [*words, label_text])
        raise PromptError(f"{words[0]}: no such file; to look for several things: {several:.200}")
    check_pictures(images)
    return images, label_text


def mask_decoder_path(masks: Path | None, model: str | None) -> Path:
    """The file of the mask decoder. Raises CheckpointError if neither --masks nor the model's folder has one."""
    path = masks or mask_decoder_beside(model)
    if not masks and not path.exists():
        raise CheckpointError(f"{path}: missing; give a mask decoder with --masks, such as Google's vae-oid.npz")
    return path


def mask_decoder_beside(model: str | None) -> Path:
    """The path of the mask decoder in a model's folder; the file need not exist."""
    folder = find(model)
    return (folder if folder.is_dir() else folder.parent) / MASKS


def find_all(query: Query, images: Sequence[str], output: Output, coco_file: Path | None) -> None:
    """Find the objects in each picture, print and draw them, and write all of them to the COCO file if there is one."""
    skipped: list[str] = []
    missing_letters: list[str] = []
    pictures = find_each(query, images, output, skipped, missing_letters)
    if coco_file:
        write_text(coco_file, to_json(coco.dataset(pictures)))  # in ASCII: a file name need not be valid Unicode
    else:
        deque(pictures, maxlen=0)
    if letters := "".join(dict.fromkeys("".join(missing_letters))):
        print_note(
            f"no font here has the letters {letters:.80}, which are drawn as boxes; --font FILE names one that has"
        )
    exit_if_skipped(skipped)


def find_each(
    query: Query, images: Sequence[str], output: Output, skipped: list[str], missing_letters: list[str]
) -> Iterator[coco.Picture]:
    """The objects of one picture after the other; each is printed and drawn before it is yielded."""
    for image, result in read_each(images, query.find, skipped):
        print_objects(image, result, output.as_json)
        if not output.as_json:
            note_if_cut_off(image, result.finish, query.max_new_tokens)
        if output.drawings:
            write_picture(result.draw(output.font, output.confidence), output.drawings[image])
            missing_letters.extend(fonts.missing(draw.caption(item), output.font) for item in result.objects)
        yield coco.Picture(image, *result.picture.size, result.objects)


def print_objects(image: str, result: Result, as_json: bool) -> None:
    """Print one line per object, or one JSON object per picture. Without JSON, malformed parts become notes."""
    fields = {
        "image": image, "prompt": result.prompt, "text": result.text, "finish": result.finish,
        "width": result.picture.width, "height": result.picture.height,
        "objects": [as_dict(item) for item in result.objects],
        "malformed": [item._asdict() for item in result.malformed],
    }  # fmt: skip
    lines = [as_line(item) for item in result.objects] or ["nothing found"]
    print_result(fields, as_json, *(f"{image}: {line}" for line in lines))
    if not as_json:
        for piece, reason in result.malformed:
            print_note(f"{image}: left out {piece!r:.80}: {reason}")


def as_dict(item: Detection | Segment) -> dict[str, Any]:
    """An object for JSON: its box in pixels, its mask in COCO's run lengths."""
    mask = {"mask": coco.rle(item.mask)} if isinstance(item, Segment) else {}
    return {"label": item.label, "box": item.box._asdict(), "confidence": item.confidence} | mask


def as_line(item: Detection | Segment) -> str:
    """An object as one line of text."""
    ymin, xmin, ymax, xmax = item.box
    box = f"x {xmin:.1f}..{xmax:.1f}, y {ymin:.1f}..{ymax:.1f}"
    pixels = f"\t{int(item.mask.count_nonzero())} pixels" if isinstance(item, Segment) else ""
    label = " ".join(item.label.split())  # the model may write a label of several lines
    return f"{label}\t{box}{pixels}" + ("" if item.confidence is None else f"\tconfidence {item.confidence:.2f}")


add_object_command("detect", "Find objects in each picture, with a box in pixels and a confidence for each.")
add_object_command("segment", "Find objects in each picture, with a box, a mask and a confidence for each.")
