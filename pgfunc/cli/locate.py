"""Commands whose result is a place in the picture: detect (boxes) and segment (masks)."""

import shlex
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from PIL import Image

import pgfunc as pg
from pgfunc.checkpoint import find, shipped
from pgfunc.checkpoint.conversion import MASKS
from pgfunc.cli import options
from pgfunc.cli.options import (
    app,
    check_file,
    check_pictures,
    each,
    end,
    exists,
    say,
    say_aside,
    say_length,
    to_json,
    unset,
    without,
)
from pgfunc.errors import CheckpointError, PromptError, SettingError, first_line
from pgfunc.files import atomic
from pgfunc.files.atomic import replacing
from pgfunc.files.outputs import check_apart, resolved
from pgfunc.image import open_image
from pgfunc.objects import coco, draw, fonts, vqvae
from pgfunc.objects.detect import Detection, Malformed
from pgfunc.objects.segment import Segment
from pgfunc.prompt import TASKS, tokenizer_of, unmarked
from pgfunc.sample import Settings

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "AVIF")  # of a drawing

Targets = Annotated[list[str], typer.Argument(help="Picture files, and last what to look for: 'cat ; bus'.",
                                              metavar="IMAGE... WHAT", show_default=False)]  # fmt: skip
Labels = Annotated[list[str] | None, unset("--label", help="What to look for, instead of WHAT; give several.")]
Wanted = Annotated[str | None, unset("--prompt", help="The same in one text: 'cat ; bus'.")]
Out = Annotated[Path | None, unset("--out", help="Picture to write, with what was found drawn; for several a folder, "
                                                 "each in its own format or, if that is unusual, PNG.")]  # fmt: skip
Font = Annotated[Path | None, unset("--font", help="Font file for the labels; else those of the system.")]
Confidence = Annotated[bool, typer.Option("--confidence", help="Draw the confidence beside each label.")]
Coco = Annotated[Path | None, unset("--coco", help="Write everything that was found in COCO's JSON.")]


def locating(name: str, about: str) -> None:
    """Add a command that finds objects on each picture; only `segment` knows --masks."""

    def command(
        targets: Targets,
        label: Labels = None,
        prompt: Wanted = None,
        out: Out = None,
        font: Font = None,
        confidence: Confidence = False,
        coco_file: Coco = None,
        masks: Annotated[
            Path | None,
            unset("--masks", help=f"Mask decoder; else {MASKS} in the model's folder."),
        ] = None,
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
        tokenizer: options.Vocabulary = None,
        as_json: options.Json = False,
    ) -> None:
        images, wanted = split(name, targets, label, prompt)
        inputs = [*images, model or shipped(), adapter, masks, config, tokenizer, font]
        drawings = destinations(images, out, inputs)
        if coco_file:
            check_coco(coco_file, inputs, drawings)
        prefix = TASKS[name].format(unmarked(wanted, 1))
        fonts.candidates(font)  # raises for what is no font
        Settings(temperature, top_k, top_p, min_p)  # and for what is out of range
        decoder = decoder_of(masks, model) if name == "segment" else None
        loaded = pg.load(model, dtype, device, config, tokenizer, quantize, adapter=adapter)
        vq = pg.segment.load(decoder, loaded.params.projector.device) if decoder else None
        sampling: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k,
                                    "top_p": top_p, "min_p": min_p, "seed": seed}  # fmt: skip
        unread: list[str] = []
        unwritten: list[str] = []

        def pictures() -> Iterator[coco.Picture]:
            for image, picture in each(images, partial(open_image, side=loaded.cfg.vision.image_size), unread):
                (done,) = pg.generate(loaded, picture, prefix, **sampling)
                found, left_out = read(loaded, done, picture, vq)
                head = {"image": image, "prompt": prefix, "text": done.text, "finish": done.finish}
                report(head, picture, found, left_out, as_json)
                if not as_json:
                    say_length(image, done.finish, max_new_tokens)
                if out:
                    write_picture(draw.objects(picture, found, font, confidence), drawings[image])
                    unwritten.extend(fonts.missing(draw.caption(item), font) for item in found)
                yield coco.Picture(image, *picture.size, found)

        if coco_file:
            write_text(coco_file, to_json(coco.dataset(pictures())))  # ASCII: a file's name need not be text
        else:
            deque(pictures(), maxlen=0)
        if said := "".join(dict.fromkeys("".join(unwritten))):
            say_aside(
                f"no font here has the letters {said:.80}, which are drawn as boxes; --font FILE names one that has"
            )
        end(unread)

    app.command(name, help=about)(command if name == "segment" else without(command, "masks"))


def split(command: str, targets: list[str], labels: list[str] | None, prompt: str | None) -> tuple[list[str], str]:
    """The pictures, which are there, and what to look for on them: the last of the arguments, --label or --prompt."""
    if labels and prompt:
        raise PromptError("--label and --prompt both say what to look for; give one of them")
    if labels or prompt:
        option, wanted = ("--label", pg.detect.wanted(labels)) if labels else ("--prompt", prompt or "")
        if not exists(targets[-1]):
            raise PromptError(f"{targets[-1]}: no such file; {option} already says what to look for: {wanted!r:.80}")
        check_pictures(targets)
        return targets, wanted
    *images, wanted = targets
    if not images or not wanted.strip() or is_file(wanted):
        raise PromptError(f"{command} needs to know what to look for: pgfunc {command} photo.jpg 'cat'")
    words = [image for image in images if not exists(image) and not Path(image).suffix]
    if words:
        several = " ".join(f"--label {shlex.quote(word)}" for word in [*words, wanted])
        raise PromptError(f"{words[0]}: no such file; to look for several things: {several:.200}")
    check_pictures(images)
    return images, wanted


def is_file(name: str) -> bool:
    """Whether a file has this name."""
    return exists(name) and Path(name).is_file()


def destinations(images: list[str], out: Path | None, inputs: Sequence[str | Path | None]) -> dict[str, Path]:
    """Where the drawing of each picture goes; checked before anything runs, as is that it replaces nothing read."""
    if out is None:
        return {}
    if len(images) == 1 and not out.is_dir():
        if Image.registered_extensions().get(out.suffix.lower()) not in Image.SAVE:
            raise SettingError(f"--out {out}: not a kind of picture that can be written; end the name in .png or .jpg")
        paths = {images[0]: out}
    else:
        if out.exists() and not out.is_dir():
            raise SettingError(f"--out {out}: is a file; several pictures need a folder")
        paths = {image: out / drawing(image) for image in images}
    check_apart(paths.values(), inputs, "--out")
    for image, path in paths.items():
        if list(paths.values()).count(path) > 1:
            raise SettingError(f"--out {out}: {image} and another picture would both be {path}")
    if not out.is_dir():
        check_file(out)
    return paths


def drawing(image: str) -> str:
    """The name of a picture's drawing: its own, where its format is one that holds a drawing."""
    kind = Image.registered_extensions().get(Path(image).suffix.lower())
    return Path(image).name if kind in FORMATS and kind in Image.SAVE else f"{Path(image).stem}.png"


def check_coco(path: Path, inputs: Sequence[str | Path | None], drawings: Mapping[str, Path]) -> None:
    """Raise SettingError for a --coco that cannot be made, or would replace what is read or drawn."""
    check_file(path)
    check_apart([path], inputs, "--coco")
    if resolved(path) in map(resolved, drawings.values()):
        raise SettingError(f"--coco {path}: is the picture that --out writes; give another name")


def decoder_of(masks: Path | None, model: str | None) -> Path:
    """The file of the mask decoder."""
    path = masks or beside(model)
    if not masks and not path.exists():
        raise CheckpointError(f"{path}: missing; give a mask decoder with --masks, such as Google's vae-oid.npz")
    return path


def beside(model: str | None) -> Path:
    """Where the mask decoder of a model lies, if it has one."""
    folder = find(model)
    return (folder if folder.is_dir() else folder.parent) / MASKS


def read(
    model: pg.Model, done: pg.Completion, picture: Image.Image, vq: vqvae.Params | None
) -> tuple[Sequence[Detection | Segment], list[Malformed]]:
    """What the model wrote, as objects with their confidence, and what of it is none."""
    vocabulary = tokenizer_of(model)
    if vq is None:
        return pg.detect.with_confidence(done, vocabulary, *picture.size), pg.detect.malformed(done.text)
    return pg.segment.with_confidence(done, vocabulary, *picture.size, vq), pg.segment.malformed(done.text)


def report(
    head: dict[str, Any], picture: Image.Image, found: Sequence[Detection | Segment], left_out: list[Malformed],
    as_json: bool,
) -> None:  # fmt: skip
    """Print a line an object, or one JSON object a picture; what is malformed goes to standard error."""
    image = head["image"]
    size = {"width": picture.width, "height": picture.height}
    objects = {"objects": [as_dict(item) for item in found], "malformed": [item._asdict() for item in left_out]}
    lines = [line(item) for item in found] or ["nothing found"]
    say(head | size | objects, as_json, *(f"{image}: {text}" for text in lines))
    if not as_json:
        for piece, reason in left_out:
            say_aside(f"{image}: left out {piece!r:.80}: {reason}")


def as_dict(item: Detection | Segment) -> dict[str, Any]:
    """An object for JSON: its box in pixels, its mask in COCO's run lengths."""
    mask = {"mask": coco.rle(item.mask)} if isinstance(item, Segment) else {}
    return {"label": item.label, "box": item.box._asdict(), "confidence": item.confidence} | mask


def line(item: Detection | Segment) -> str:
    """An object for people."""
    ymin, xmin, ymax, xmax = item.box
    box = f"x {xmin:.1f}..{xmax:.1f}, y {ymin:.1f}..{ymax:.1f}"
    pixels = f"\t{int(item.mask.count_nonzero())} pixels" if isinstance(item, Segment) else ""
    label = " ".join(item.label.split())  # a line an object, whatever the model wrote
    return f"{label}\t{box}{pixels}" + ("" if item.confidence is None else f"\tconfidence {item.confidence:.2f}")


def write_picture(picture: Image.Image, path: Path) -> None:
    """Save a picture, in the folder that it may need for several."""
    try:
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as file:
            picture.save(file, Image.registered_extensions()[path.suffix.lower()])
    except (OSError, ValueError, KeyError) as error:
        raise SettingError(f"{path}: cannot be written ({first_line(error)})") from error


def write_text(path: Path, text: str) -> None:
    """Write a file."""
    try:
        atomic.write_text(path, text)
    except OSError as error:
        raise SettingError(f"{path}: cannot be written ({first_line(error)})") from error


locating("detect", "Find objects: boxes in pixels, with a confidence each.")
locating("segment", "Find objects and their masks.")
