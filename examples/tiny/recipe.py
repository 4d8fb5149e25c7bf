"""Sizes and lengths of the shipped checkpoint's training, and of the small run that checks the pipeline on a CPU."""

from dataclasses import dataclass
from typing import Literal

from pgfunc.config import Config, SiglipConfig, SiglipTextConfig, TextConfig, VisionConfig

Position = Literal["learned", "rope2d"]
STAGES = ("masks", "contrast", "speak", "align")


@dataclass(frozen=True)
class Plan:
    """A stage: the number of updates, the scenes of each, and the learning rate."""

    steps: int
    scenes: int
    peak: float
    warmup: int
    weight_decay: float = 0.02


@dataclass(frozen=True)
class Recipe:
    model: Config
    siglip: SiglipConfig
    prompts: int  # prompts for each scene, in the stage `speak`
    width: int  # text tokens of a row, including padding
    plans: dict[str, Plan]

    @property
    def side(self) -> int:
        return self.model.vision.image_size


def recipe(vision: VisionConfig, text: TextConfig, caption: SiglipTextConfig, plans: dict[str, Plan]) -> Recipe:
    return Recipe(Config(vision, text, image=text.vocab), SiglipConfig(vision, caption), 4, 64, plans)


def full(position: Position = "learned") -> Recipe:
    """The shipped checkpoint: 7.9 million parameters, trained on one GPU."""
    return recipe(
        VisionConfig(width=192, layers=8, heads=3, hidden=768, image_size=224, patch=14, position=position),
        TextConfig(vocab=3200, padding=64, width=256, layers=6, heads=4, kv_heads=1, head_dim=64, hidden=512,
                   query_scale=64**-0.5),
        SiglipTextConfig(vocab=2048, width=192, layers=4, heads=3, hidden=768, out=192),
        {
            "masks": Plan(steps=3000, scenes=128, peak=1e-3, warmup=200),
            "contrast": Plan(steps=2000, scenes=1024, peak=1e-3, warmup=200),
            "speak": Plan(steps=12000, scenes=256, peak=1.2e-3, warmup=300),
            "align": Plan(steps=600, scenes=1024, peak=1e-3, warmup=100),
        },
    )  # fmt: skip


def small(position: Position = "learned") -> Recipe:
    """A few steps of every stage, in seconds: it learns nothing, but runs every line."""
    plan = Plan(steps=4, scenes=4, peak=1e-3, warmup=1)
    return recipe(
        VisionConfig(width=32, layers=2, heads=2, hidden=32, image_size=224, patch=28, position=position),
        TextConfig(vocab=3200, padding=64, width=32, layers=2, heads=2, kv_heads=1, head_dim=16, hidden=32,
                   query_scale=0.25),
        SiglipTextConfig(vocab=2048, width=32, layers=1, heads=2, hidden=32, out=32),
        dict.fromkeys(STAGES, plan),
    )  # fmt: skip
