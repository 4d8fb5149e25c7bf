"""The Python that repeats what the page did, for a script or a notebook. It states only what is not the default."""

import inspect
from collections.abc import Callable
from typing import Any

import pgfunc as pg
from pgfunc.demo.actions import OBJECTS, Checkpoint, Request, prefix


def snippet(checkpoint: Checkpoint, request: Request, picture: str) -> str:
    """A program that prints the answer to this request about the picture with this path, and draws its objects."""
    lines = ["import pgfunc as pg", "", f"model = pg.load({arguments(pg.load, checkpoint.loading)})"]
    if request.task not in OBJECTS:
        asked = [repr_of(picture), repr_of(prefix(request.task, request.text))]
        call = ", ".join(["model", *asked, *options(pg.generate, request.sampling)])
        return "\n".join([*lines, f"(answer,) = pg.generate({call})", "print(answer.text)", ""])
    call = ["model", repr_of(picture), repr_of(request.text)]
    if request.task == "segment":
        lines.append(f"vq = pg.segment.load({repr_of(checkpoint.masks) if checkpoint.masks else ''})")
        call.append("vq")
    settings = request.sampling | {"min_confidence": request.min_confidence}
    call += options(pg.detect.find, settings)
    return "\n".join([*lines, f"result = pg.{request.task}.find({', '.join(call)})", "print(result.text)",
                      'result.draw().save("drawing.png")  # a notebook shows `result` itself', ""])  # fmt: skip


def arguments(function: Callable[..., Any], values: dict[str, Any]) -> str:
    """These arguments of a function as source, the first one by position."""
    first, *rest = inspect.signature(function).parameters
    source = [repr_of(values[first])] if values.get(first) is not None else []
    return ", ".join([*source, *options(function, {name: values[name] for name in rest if name in values})])


def options(function: Callable[..., Any], values: dict[str, Any]) -> list[str]:
    """The keyword arguments whose values are not the function's defaults, as source."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(function).parameters.items()}
    return [f"{name}={repr_of(value)}" for name, value in values.items() if value != defaults[name]]


def repr_of(value: Any) -> str:
    """A value as source; texts in double quotes if they have none themselves."""
    text = repr(value)
    return f'"{text[1:-1]}"' if text.startswith("'") and '"' not in text else text
