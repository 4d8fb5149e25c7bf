"""Examples of each command, which its `--help` shows below the options."""

EXAMPLES = {
    "caption": (
        "pgfunc caption photo.jpg",
        "pgfunc caption photo.jpg --box 10,20,200,180",
        "pgfunc caption photos --out captions.jsonl --resume",
    ),
    "ask": (
        "pgfunc ask photo.jpg --prompt 'how many cats are there?'",
        "pgfunc ask questions.csv --out answers.csv",
    ),
    "ocr": (
        "pgfunc ocr receipt.png",
        "pgfunc ocr page1.png page2.png --max-new-tokens 200",
    ),
    "generate": (
        "pgfunc generate photo.jpg --prompt 'caption de'",
        "pgfunc generate photo.jpg --prompt 'caption en' --temperature 0.7 --seed 1",
    ),
    "score": (
        "pgfunc score photo.jpg --prompt 'answer en rain?' --candidate y --candidate n",
        "pgfunc score a.jpg b.jpg --prompt ocr --candidate STOP --candidate SHOP --json",
    ),
    "detect": (
        "pgfunc detect street.jpg 'car ; bus'",
        "pgfunc detect street.jpg --label car --label bus --out boxes.png",
        "pgfunc detect photos cat --out boxes.json --draw drawn",
    ),
    "segment": (
        "pgfunc segment street.jpg car --out masks.png",
        "pgfunc segment photos cat --out masks.jsonl --min-confidence 0.5",
    ),
    "embed": (
        "pgfunc embed photo.jpg --text 'two cats' --json",
        "pgfunc embed photos --out vectors.npy",
    ),
    "classify": (
        "pgfunc classify photo.jpg --label cat --label dog",
        "pgfunc classify photo.jpg --label red --label blue --template 'a {} car'",
    ),
    "demo": (
        "pgfunc demo",
        "pgfunc demo --model google/paligemma2-3b-mix-224 --port 8000",
    ),
    "evaluate": (
        "pgfunc evaluate photos.jsonl --task caption",
        "pgfunc evaluate photos.jsonl --task detect --html worst.html",
        "pgfunc evaluate photos.jsonl --task answer --limit 100 --json",
    ),
    "train": (
        "pgfunc train data.jsonl --out tuned --epochs 3",
        "pgfunc train data.jsonl --out adapter --lora-rank 8 --valid valid.jsonl",
        "pgfunc train data.jsonl --out tuned --freeze 'vision.*' --recompute",
    ),
    "inspect": (
        "pgfunc inspect",
        "pgfunc inspect google/paligemma2-3b-mix-224 --json",
    ),
    "convert": (
        "pgfunc convert google/paligemma2-3b-mix-224 small --quantize int8",
        "pgfunc convert google/paligemma-3b-mix-224-jax paligemma",
    ),
    "merge": (
        "pgfunc merge adapter merged",
        "pgfunc merge adapter merged --model google/paligemma2-3b-mix-224 --force",
    ),
    "compile": (
        "pgfunc compile code",
        "pgfunc compile code --model google/paligemma2-3b-mix-224 --max-new-tokens 200",
    ),
    "bench": (
        "pgfunc bench --no-compile --tokens 16",
        "pgfunc bench --config paligemma-3b-224 --stage decode --quantize int8",
    ),
    "laws": (
        "pgfunc laws",
        "pgfunc laws --law forward-is-pure --examples 100",
        "pgfunc laws --system mymodel:system --deep",
    ),
}  # fmt: skip


def epilog(name: str) -> str:
    """The examples of a command as text for the end of its `--help`: one paragraph for each line."""
    return "\n\n".join(["Examples:", *EXAMPLES[name]])
