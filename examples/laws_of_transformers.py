"""The laws that transformers breaks, on small random checkpoints: `python examples/laws_of_transformers.py`.

It runs with and without `token_type_ids`, which mark the suffix, and with both of its attention implementations.
`examples/notes/laws.md` explains the result. Needs `pip install transformers`.
"""

from dataclasses import replace
from tempfile import TemporaryDirectory

from transformers import PaliGemmaForConditionalGeneration

import pgfunc as pg
from pgfunc import laws
from pgfunc.config import Config, TextConfig, VisionConfig

VISION = VisionConfig(width=24, layers=2, heads=2, hidden=32, image_size=28, patch=14)
GEMMA = TextConfig(
    vocab=64, padding=3, width=16, layers=3, heads=4, kv_heads=2, head_dim=8, hidden=24, query_scale=8**-0.5
)
GEMMA2 = replace(GEMMA, attention_softcap=2.0, final_softcap=3.0, window=5, post_norms=True)
CASES = [(GEMMA, "sdpa"), (GEMMA, "eager"), (GEMMA2, "eager")]  # sdpa ignores softcaps


def system(text: TextConfig, attention: str, marked: bool) -> laws.System:
    """transformers with pgfunc's weights; pgfunc's logits are the reference."""
    cfg = Config(VISION, text, image=64)
    params = laws.parameters(cfg)
    with TemporaryDirectory() as folder:
        pg.save(pg.Model(cfg, params, None), folder)
        model = PaliGemmaForConditionalGeneration.from_pretrained(folder, attn_implementation=attention).eval()
    name = f"{'PaliGemma 2' if text.window else 'PaliGemma'}, {attention}, {'' if marked else 'no '}token_type_ids"
    return laws.transformers(model, cfg, name, marked)._replace(reference=laws.eager(params, cfg).forward)


def main() -> None:
    for text, attention in CASES:
        for marked in (True, False):
            checked = system(text, attention, marked)
            print(checked.name)
            for result in laws.checks(checked, laws.MODEL, examples=20, derandomize=True):
                if result.verdict == "broken":
                    example = result.counterexample.removeprefix(f"{checked.name}: ")
                    print(f"    {result.law.name:34} error {result.worst:7.1e}  {example}")


if __name__ == "__main__":
    main()
