"""What detect and segment do with each picture: they find objects, print them and draw them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pgfunc as pg
from pgfunc.checkpoint import find
from pgfunc.cli.answering import Query, complete, cut_off
from pgfunc.cli.drawings import Drawings, write_picture, write_text
from pgfunc.cli.inputs import Inputs, Item
from pgfunc.cli.options import print_note, to_json
from pgfunc.cli.running import Outcome, Output, run
from pgfunc.errors import CheckpointError, ImageError
from pgfunc.image import open_image
from pgfunc.names import MASKS
from pgfunc.objects import coco, draw, fonts, vqvae
from pgfunc.objects.boxes import Detection
from pgfunc.objects.detect import Malformed
from pgfunc.objects.masks import Segment
from pgfunc.objects.result import confident
from pgfunc.prompt import tokenizer_of


class Drawing(NamedTuple):
    """How objects are drawn, and where."""

    paths: Drawings
    font: Path | None
    confidence: bool


class Finding(NamedTuple):
    """How objects are read from answers."""

    query: Query
    mask_decoder: vqvae.Params | None  # None: the objects have boxes only
    min_confidence: float
    drawing: Drawing | None
    coco: bool  # records are those of `coco.unnumbered`


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


def find_all(finding: Finding, inputs: Inputs, output: Output, coco_file: Path | None) -> int:
    """Find the objects in each picture; print, write and draw them. Returns the number of errors."""
    pictures: dict[int, dict[str, Any]] = {}  # for --coco, with the run lengths of the masks only

    def keep(item: Item, picture: coco.Picture) -> None:
        if coco_file:
            pictures[item.number] = coco.unnumbered(picture)

    errors = run(inputs, finding.query.asked, lambda items: find_each(finding, inputs, items, keep), output)
    if coco_file:
        in_order = [pictures[number] for number in sorted(pictures)]
        write_text(coco_file, to_json(coco.numbered(in_order)))  # in ASCII: a file name need not be valid Unicode
    return errors


def find_each(
    finding: Finding, inputs: Inputs, items: Iterable[Item], keep: Callable[[Item, coco.Picture], None]
) -> Iterator[Outcome]:
    """The objects in each picture, which are drawn before they are yielded. `keep` also gets them."""
    missing: list[str] = []
    for item, result in complete(finding.query, inputs, items):
        answer = result.completion
        if answer is None:
            yield Outcome(item, {"prompt": finding.query.asked(item)}, error=result.error)
            continue
        (size,) = result.sizes
        objects, malformed = parse(finding, answer, size)
        if finding.drawing:
            try:
                missing += draw_objects(item, objects, finding.drawing, finding.query.model.cfg.vision.image_size)
            except ImageError as error:  # the file has changed since it was read
                yield Outcome(item, {"prompt": finding.query.asked(item)}, error=error)
                continue
        keep(item, coco.Picture(item.image, *size, objects))
        yield outcome(finding, item, answer, size, objects, malformed)
    if letters := "".join(dict.fromkeys("".join(missing))):
        print_note(
            f"no font here has the letters {letters:.80}, which are drawn as boxes; --font FILE names one that has"
        )


def parse(
    finding: Finding, answer: pg.Completion, size: tuple[int, int]
) -> tuple[list[Detection] | list[Segment], list[Malformed]]:
    """The objects in an answer, with their confidence, and the parts of the answer that are not objects."""
    tokenizer, vq = tokenizer_of(finding.query.model), finding.mask_decoder
    objects = pg.segment.objects_in(answer, tokenizer, *size, vq)
    malformed = (pg.segment if vq else pg.detect).malformed(answer.text)
    return confident(objects, finding.min_confidence), malformed


def draw_objects(item: Item, objects: Sequence[Detection | Segment], drawing: Drawing, side: int) -> list[str]:
    """Draw the objects. Returns the letters of the labels that no font has."""
    picture = open_image(item.source, side)
    write_picture(draw.objects(picture, objects, drawing.font, drawing.confidence), drawing.paths(item))
    return ["".join(fonts.missing(draw.caption(each), drawing.font)) for each in objects]


def outcome(
    finding: Finding, item: Item, answer: pg.Completion, size: tuple[int, int],
    objects: Sequence[Detection | Segment], malformed: list[Malformed],
) -> Outcome:  # fmt: skip
    """What was found, as a record and as text."""
    prompt = finding.query.asked(item)
    if finding.coco:
        record = {"prompt": prompt} | coco.unnumbered(coco.Picture(item.image, *size, objects))
    else:
        record = {
            "prompt": prompt, "text": answer.text, "finish": answer.finish, "width": size[0], "height": size[1],
            "objects": [as_dict(each) for each in objects], "malformed": [each._asdict() for each in malformed],
        }  # fmt: skip
    notes = [f"left out {piece!r:.80}: {reason}" for piece, reason in malformed]
    notes += [cut_off(finding.query)] if answer.finish == "length" else []
    return Outcome(item, record, [as_line(each) for each in objects] or ["nothing found"], notes)


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
