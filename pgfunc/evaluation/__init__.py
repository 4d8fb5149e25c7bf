"""How good answers are, by the metrics of each task's own field. The metrics are pure functions of answers and truths.

captions    CIDEr-D, BLEU-4, exact match          boxes    COCO AP, recall and precision at one IoU
questions   exact match, VQA accuracy, ANLS       masks    mean IoU, COCO AP of masks
reading     character error rate, exact match

Each module has a function `measure`: answers and references in, metrics and a score per answer out. An answer that is
missing, because its picture could not be read, is None and counts as wrong. `rows` reads the data, `tasks` asks the
model and compares, and `page` shows the worst answers. Needs what `pip install "pgfunc[evaluate]"` installs.
"""
