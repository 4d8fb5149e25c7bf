"""A call with wrong types raises one of our errors, whose message is one line that says what was expected.

The calls run in a separate process, because the test process checks the annotations first.
"""

import json
import subprocess
import sys

CODE = """
import json, sys
import numpy as np, torch
from PIL import Image
import pgfunc as pg
from pgfunc.objects import coco, detect, draw, segment, vqvae
from pgfunc.objects.detect import Box, Detection
from pgfunc.errors import PgfuncError
from pgfunc.objects.segment import Segment

done, box, picture, vq = pg.Completion("", [], [], "eos"), Box(0, 0, 1, 1), Image.new("RGB", (4, 4)), vqvae.init()
text, mask = "<loc0000><loc0000><loc0009><loc0009> cat", np.ones((4, 4), bool)
messages = {}
for call in json.load(sys.stdin):
    try:
        eval(call)
        messages[call] = "no error"
    except PgfuncError as error:
        messages[call] = str(error)
    except Exception as error:
        messages[call] = repr(error)
print(json.dumps(messages))
"""

CALLS = {
    "detect.parse(done, 4, 4)": "boxes are read from text, such as the .text of a completion; found Completion(",
    "detect.parse(b'', 4, 4)": "boxes are read from text",
    "detect.parse(None, 4, 4)": "boxes are read from text",
    "segment.parse([text], 4, 4, vq)": "boxes are read from text",
    "detect.malformed(None)": "boxes are read from text",
    "detect.parse(text, '4', 4)": "a picture of '4' x 4 pixels; expected a positive width and height",
    "detect.parse(text, None, 4)": "a picture of None x 4 pixels",
    "detect.parse(text, (4, 4), 4)": "a picture of (4, 4) x 4 pixels",
    "detect.parse(text, float('nan'), 4)": "a picture of nan x 4 pixels",
    "segment.parse('', 0, 4, vq)": "a picture of 0 x 4 pixels",
    "detect.with_confidence(text, None, 4, 4)": "a confidence is read from a Completion and the model's tokenizer",
    "detect.with_confidence(done, None, 4, 4)": "found Completion and NoneType",
    "segment.parse(text, 4, 4, 'masks.safetensors')": "the mask decoder is a str, expected the parameters",
    "segment.encode([torch.ones(4, 4)], [box], None)": "the mask decoder is a NoneType",
    "detect.prefix('cat')": "labels are 'cat', expected a list of what to look for",
    "detect.prefix(None)": "labels are None, expected a list",
    "detect.prefix([3])": "a label is 3, expected text",
    "segment.prefix(['cat'])": "a label is ['cat'], expected text",
    "detect.render(None, 4, 4)": "found None, expected Detection(label, Box(ymin, xmin, ymax, xmax))",
    "detect.render(Detection('cat', box), 4, 4)": "found 'cat', expected Detection(",
    "detect.render([('cat', box)], 4, 4)": "expected Detection(",
    "detect.render([Detection('cat', (0, 0, 1, 1))], 4, 4)": "expected Detection(label, Box(",
    "detect.render([Detection(None, box)], 4, 4)": "expected Detection(label",
    "detect.render([Detection('cat', Box(0, 0, None, 1))], 4, 4)": "is not a box; expected Box(ymin, xmin, ymax, xmax)",
    "detect.region('1,2,3,4', 4, 4)": "'1,2,3,4' is not a box",
    "segment.from_mask('cat', mask)": "a mask is a ndarray, expected a tensor; torch.as_tensor makes one",
    "segment.from_mask('cat', torch.ones(4, 4))": "a mask is float32[4, 4], expected bool[height, width]",
    "segment.from_mask('cat', torch.ones(1, 4, 4).bool())": "a mask is bool[1, 4, 4], expected bool[height, width]",
    "segment.encode([mask], [box], vq)": "a mask is a ndarray",
    "segment.render([Segment('cat', box, mask)], vq)": "a mask is a ndarray",
    "coco.rle(mask)": "a mask is a ndarray",
    "coco.rle(torch.ones(4, 4))": "a mask is float32[4, 4]",
    "coco.annotations([Detection('cat', box)], 1, {'dog': 1})": "category 'cat' has no id; the categories are dog",
    "coco.annotations([('cat', box)], 1, {'cat': 1})": "expected Detection(",
    "draw.objects(None, [])": "the given picture: cannot be read as a picture",
    "draw.objects('no.png', [])": "no.png: no such file",
    "draw.objects(picture, None)": "found None, expected Detection(",
    "draw.objects(picture, ['cat'])": "found 'cat', expected Detection(",
    "draw.objects(picture, [Segment('cat', box, mask)])": "a mask is a ndarray",
    "draw.objects(picture, [Detection('cat', Box(0, 0, 'x', 1))])": "is not a box",
    "draw.objects(picture, [Detection(None, box)])": "expected Detection(label",
    "draw.objects(picture, [], font=3)": "3: cannot be read as a font",
}


def test_a_wrong_type_is_refused_in_one_line():
    command = [sys.executable, "-W", "error", "-c", CODE]
    done = subprocess.run(command, input=json.dumps(list(CALLS)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages = json.loads(done.stdout)
    assert [call for call, expected in CALLS.items() if expected not in messages[call]] == [], messages
    assert all("\n" not in message for message in messages.values())
