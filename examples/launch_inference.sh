#!/usr/bin/env bash
# Edit the values and run: bash examples/launch_inference.sh
set -euo pipefail
cd "$(dirname "$0")/.."

MODEL_PATH=weights/tiny
PROMPT="caption en"
IMAGE_FILE_PATH=examples/images/scene.png
MAX_TOKENS_TO_GENERATE=100
TEMPERATURE=0.8
TOP_P=0.9
DO_SAMPLE=False
ONLY_CPU=False

python examples/inference.py \
    --model_path "$MODEL_PATH" \
    --prompt "$PROMPT" \
    --image_file_path "$IMAGE_FILE_PATH" \
    --max_tokens_to_generate "$MAX_TOKENS_TO_GENERATE" \
    --temperature "$TEMPERATURE" \
    --top_p "$TOP_P" \
    --do_sample "$DO_SAMPLE" \
    --only_cpu "$ONLY_CPU"
