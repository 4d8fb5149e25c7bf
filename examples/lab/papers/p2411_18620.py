"""How does the picture reach the answer? Attention knockout between image, question and last token.

Paper: Zhang, Yadav, Han, Shutova, "Cross-modal Information Flow in Multimodal Large Language Models", CVPR 2025,
arXiv 2411.18620. Its abstract: image -> question in lower and middle layers, then question -> last in higher ones. The
six pairs and the lens are reproduced on colour questions. The setting differs: 6 layers in windows of 2 (40, of 9), two
shapes, not GQA, and a bidirectional prefix: the image reads the question. The lens applies the final norm. Here (100
scenes, seed 0) the paper's route is not used: without image -> question, in any window, nothing changes. The question
goes to the last token and to the image in layers 0 and 1 (-1.00, -0.55), the image to the last token in layers 2 to 5,
first from the object (-0.68; as many random tokens 0.00), then from the others (-0.42). If the image does not see "what
color is the star?", 0.44 are right, about a guess between two shapes; without any text, 0.00. Arrows: information.
"""

import torch
from torch import Tensor

from examples.lab import asking, common
from pgfunc import lab

WINDOWS = range(2), range(2, 4), range(4, 6)
ADDED = "-  (not in the paper)"
LENS = "probability of the answer by the lens at Last, from layer 0's input to the output"
PAPER = {  # keys -> queries; numbers of LLaVA-1.5-13b, 40 layers, all as reported by others
    "Question -> Last": "about -0.30 in layers 15-25 of 40",
    "Image -> Last": "about -0.05",
    "Last -> Last": "about 0",
    "Image -> Question": "about -0.60 in layers 0-4, -0.21 near layer 10",
    "Object -> Question": "acts in the second stage, near layer 10",
    "Others -> Question": "act in the first stage, layers 0-4",
    "Question -> Image": ADDED,
    "Object -> Last": ADDED,
    "Others -> Last": ADDED,
    "Random -> Last": ADDED,
    LENS: "rises in layers 15-20 (lower case) and 25-40 (upper case)",
}


def measure(batch: asking.Batch) -> dict[str, Tensor]:
    """The relative change of the answer's probability for each pair and window; accuracies after longer knockouts."""
    values, before = {LENS: asking.lens_at_last(batch)}, asking.answer(batch, {}, layer=6).probability
    for pair in [name for name in PAPER if "->" in name]:
        after = [asking.knockout(batch, pair, layers).probability for layers in WINDOWS]
        values[pair] = torch.stack(after, 1) / before[:, None] - 1
    image, question = batch.places["Image"], batch.places["Question"]
    asked, back = lab.block(image, question), lab.block(question, image)
    controls = {
        "Question -> Image in all layers: right": {"language.*.mask": asked},
        "the same and Image -> Question: right": {"language.*.mask": asked, "language.?.mask": back},
        "all text -> Image in all layers: right": {"language.*.mask": lab.block(image, ~image)},
    }
    return values | {name: asking.answer(batch, changes).right for name, changes in controls.items()}


def main(arguments: list[str] | None = None) -> dict:
    return asking.reproduce(common.options(__doc__, arguments), PAPER, (measure, asking.colour))


if __name__ == "__main__":
    main()
