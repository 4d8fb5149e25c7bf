"""COCO's JSON: pycocotools reads exactly the boxes and masks that were written."""

import contextlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pycocotools import mask as reference
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from pgfunc.objects import coco, segment
from pgfunc.objects.detect import Box, Detection
from pgfunc.objects.segment import Segment

# pycocotools 2.0.11 uses an old protocol of numpy
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def mask(width: int, height: int, seed: int, density: float = 0.5) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random((height, width)) < density)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 99), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]))
def test_run_lengths_are_those_of_pycocotools(width, height, seed, density):
    original = mask(width, height, seed, density)
    encoded = coco.rle(original)
    expected = reference.encode(np.asfortranarray(original.numpy().astype(np.uint8)))
    assert encoded["size"] == expected["size"]
    assert encoded["counts"].encode() == expected["counts"]
    assert np.array_equal(reference.decode(encoded).astype(bool), original.numpy())
    counts = coco.run_lengths(original)
    assert sum(counts) == width * height
    assert all(counts[1:])


def test_long_runs_need_several_characters():
    original = torch.zeros(3000, 2000, dtype=torch.bool)
    original[1000:2500, 700:1900] = True
    assert np.array_equal(reference.decode(coco.rle(original)).astype(bool), original.numpy())


PICTURES = [
    coco.Picture("a.png", 40, 30, [
        segment.from_mask("dog", mask(40, 30, 1, 0.1))._replace(confidence=0.75),
        Segment("cat", Box(1.5, 2.25, 20, 30), mask(40, 30, 2)),
    ]),
    coco.Picture("empty.png", 9, 9, []),
    coco.Picture("b.png", 50, 20, [Segment("cat", Box(0, 0, 20, 50), torch.ones(20, 50, dtype=torch.bool))]),
]  # fmt: skip


def loaded(path) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):  # it prints
        return COCO(path)


@pytest.fixture
def truth(tmp_path) -> COCO:
    (tmp_path / "all.json").write_text(json.dumps(coco.dataset(PICTURES)))
    return loaded(str(tmp_path / "all.json"))


def test_a_dataset_loads_in_pycocotools(truth):
    assert [image["file_name"] for image in truth.loadImgs([1, 2, 3])] == ["a.png", "empty.png", "b.png"]
    assert {category["name"]: category["id"] for category in truth.loadCats(truth.getCatIds())} == {"cat": 1, "dog": 2}
    dog, cat, whole = truth.loadAnns([1, 2, 3])
    assert [annotation["image_id"] for annotation in (dog, cat, whole)] == [1, 1, 3]
    assert [annotation["category_id"] for annotation in (dog, cat, whole)] == [2, 1, 1]
    assert cat["bbox"] == [2.25, 1.5, 27.75, 18.5]
    assert (dog["score"], cat["score"]) == (0.75, 1.0)
    for annotation, picture, index in ((dog, 0, 0), (cat, 0, 1), (whole, 2, 0)):
        expected = PICTURES[picture].objects[index].mask.numpy()
        assert np.array_equal(truth.annToMask(annotation).astype(bool), expected)
        assert annotation["area"] == expected.sum()


def evaluated(truth: COCO, results: list, kind: str) -> float:
    """The average precision that pycocotools computes; kind: "bbox" or "segm"."""
    with contextlib.redirect_stdout(io.StringIO()):
        done = COCOeval(truth, truth.loadRes(results), kind)
        done.evaluate()
        done.accumulate()
        done.summarize()
    return done.stats[0]


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_annotations_evaluated_against_themselves_have_full_precision(truth, kind):
    ids = {"cat": 1, "dog": 2}
    results = [entry for id, p in enumerate(PICTURES, 1) for entry in coco.annotations(p.objects, id, ids)]
    assert evaluated(truth, results, kind) == pytest.approx(1)
    swapped = [entry | {"category_id": 3 - entry["category_id"]} for entry in results]
    assert evaluated(truth, swapped, kind) < 0.5


def test_boxes_without_masks_are_annotations_without_segmentation(truth):
    detections = [Detection(item.label, item.box, 0.5) for item in PICTURES[0].objects]
    results = coco.annotations(detections, 1, {"cat": 1, "dog": 2})
    assert "segmentation" not in results[0]
    assert results[1]["area"] == pytest.approx(27.75 * 18.5)
    assert evaluated(truth, results, "bbox") > 0.5


def test_the_package_does_not_import_pycocotools():
    code = "import sys, pgfunc.cli; sys.exit('pycocotools' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
