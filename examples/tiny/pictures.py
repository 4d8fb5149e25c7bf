"""The pictures in `examples/images`: scenes of split S0, in sizes that the model has to resize.

    python -m examples.tiny.pictures

They were picked by their captions and sizes, before the model had seen any; of the six it gets `three.png` wrong.
"""

from pathlib import Path

from examples.tiny import scenes

PICKED = {  # file: index of the scene, pixels of its shorter side
    "scene.png": (1025, 401),  # a yellow moon, a red triangle and a black cross
    "three.png": (1031, 333),  # a red moon, an orange ring and a pink triangle
    "square-and-heart.png": (1028, 203),  # a black square right of a blue heart
    "square-and-ring.png": (1004, 240),  # a green square below an orange ring
    "heart.jpg": (1018, 300),  # a large green heart
    "moon.png": (1011, 251),  # a small red moon
}


def main(folder: Path = Path("examples/images")) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (index, shorter) in PICKED.items():
        scenes.picture(scenes.sample("S0", index), shorter).save(folder / name)


if __name__ == "__main__":
    main()
