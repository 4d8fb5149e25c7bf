"""Answer one prompt about one picture, with the flags of the classic PaliGemma script.

    python examples/inference.py --prompt "caption en" --image_file_path examples/images/scene.png

`--model_path` is a folder in Hugging Face layout or a hub id; the default is the shipped checkpoint.
"""

import argparse

import pgfunc as pg
from pgfunc.errors import PgfuncError


def switch(text: str) -> bool:
    """Parse the value of a flag: `--do_sample`, `--do_sample True` or `--do_sample False`."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"expected True or False, found {text}")
    return text.lower() == "true"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_path")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--image_file_path", required=True)
    parser.add_argument("--max_tokens_to_generate", type=int, default=100)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--do_sample", type=switch, nargs="?", const=True, default=False)
    parser.add_argument("--only_cpu", type=switch, nargs="?", const=True, default=False)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    sampling = {"temperature": args.temperature, "top_p": args.top_p} if args.do_sample else {}
    try:
        model = pg.load(args.model_path, device="cpu" if args.only_cpu else None)
        pieces = pg.stream(model, args.image_file_path, args.prompt, args.max_tokens_to_generate, **sampling)
        for piece in pieces:
            print(piece, end="", flush=True)
        print()
    except PgfuncError as error:
        raise SystemExit(f"inference.py: {error}") from error


if __name__ == "__main__":
    main()
