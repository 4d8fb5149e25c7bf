"""What detect and segment do with each picture: they find objects, print them and draw them."""

from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

import pgfunc as pg
from pgfunc.checkpoint import find
from pgfunc.cli.drawings import write_picture, write_text
from pgfunc.cli.options import exit_if_skipped, note_if_cut_off, print_note, print_result, read_each, to_json
from pgfunc.errors import CheckpointError
from pgfunc.image import open_image
from pgfunc.names import MASKS
from pgfunc.objects import coco, draw, fonts, vqvae
from pgfunc.objects.detect import Detection, Malformed
from pgfunc.objects.segment import Segment
from pgfunc.prompt import tokenizer_of


class Query(NamedTuple):
    """What the model is asked about each picture: the prefix, and how to decode the answer."""

    model: pg.Model
    mask_decoder: vqvae.Params | None  # None: the objects have boxes only
    prefix: str
    sampling: dict[str, Any]


class Output(NamedTuple):
    """What is printed and drawn for each picture."""

    as_json: bool
    drawings: dict[str, Path]  # picture -> file of its drawing
    font: Path | None
    confidence: bool


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
    for image, picture in read_each(images, partial(open_image, side=query.model.cfg.vision.image_size), skipped):
        (answer,) = pg.generate(query.model, picture, query.prefix, **query.sampling)
        objects, malformed = parse(query, answer, picture)
        source = {"image": image, "prompt": query.prefix, "text": answer.text, "finish": answer.finish}
        print_objects(source, picture, objects, malformed, output.as_json)
        if not output.as_json:
            note_if_cut_off(image, answer.finish, query.sampling["max_new_tokens"])
        if output.drawings:
            write_picture(draw.objects(picture, objects, output.font, output.confidence), output.drawings[image])
            missing_letters.extend(fonts.missing(draw.caption(item), output.font) for item in objects)
        yield coco.Picture(image, *picture.size, objects)


def parse(
    query: Query, answer: pg.Completion, picture: Image.Image
) -> tuple[Sequence[Detection | Segment], list[Malformed]]:
    """The objects in an answer, with their confidence, and the parts of the answer that are not objects."""
    tokenizer = tokenizer_of(query.model)
    if query.mask_decoder is None:
        return pg.detect.with_confidence(answer, tokenizer, *picture.size), pg.detect.malformed(answer.text)
    segments = pg.segment.with_confidence(answer, tokenizer, *picture.size, query.mask_decoder)
    return segments, pg.segment.malformed(answer.text)


def print_objects(
    source: dict[str, Any], picture: Image.Image, objects: Sequence[Detection | Segment], malformed: list[Malformed],
    as_json: bool,
) -> None:  # fmt: skip
    """Print one line per object, or one JSON object per picture. Without JSON, malformed parts become notes."""
    image = source["image"]
    size = {"width": picture.width, "height": picture.height}
    fields = {"objects": [as_dict(item) for item in objects], "malformed": [item._asdict() for item in malformed]}
    lines = [as_line(item) for item in objects] or ["nothing found"]
    print_result(source | size | fields, as_json, *(f"{image}: {line}" for line in lines))
    if not as_json:
        for piece, reason in malformed:
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
