#!/usr/bin/env bash
# Test and measure everything that needs a GPU, in one call of less than ten minutes.
#
#   PYTHON=python3 OUT=out/gpu bash bench/gpu.sh
#
# Needs the project's dependencies, pytest and, where there is no network, data/ as preparing shakespeare_char and
# shakespeare elsewhere left it, downloads included. Logs and one summary land in $OUT.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-out/gpu}
RUNS=$(mktemp -d)
trap 'rm -rf "$RUNS"' EXIT
mkdir -p "$OUT"
: > "$OUT/summary.txt"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

timed() {  # name, seconds at most, command ...: run it, keep its output, note its time and how it ended
  local name=$1 limit=$2 started=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
  tail -n 4 "$OUT/$name.log"
  echo "$name: whole process $((SECONDS - started)) s, exit status $status" >> "$OUT/summary.txt"
}

$PYTHON prepare.py shakespeare_char
$PYTHON prepare.py shakespeare
baby="train.py config/shakespeare_char.toml"
timed tests 90 $PYTHON -m pytest -m gpu tests/test_runtime.py tests/test_gpu.py
timed baby-gpt 200 $PYTHON $baby --out_dir="$RUNS/baby-gpt"
timed eager 40 $PYTHON $baby --out_dir="$RUNS/eager" --compile=False --max_steps=200 --eval_every=200
timed torchrun 60 $PYTHON -m torch.distributed.run --standalone --nproc_per_node=gpu $baby \
  --out_dir="$RUNS/torchrun" --compile=False --max_steps=100 --eval_every=100
timed gpt2-124m 130 $PYTHON train.py config/gpt2.toml --out_dir="$RUNS/gpt2-124m" --gradient_accumulation_steps=4 \
  --max_steps=40 --eval_every=40 --warmup_steps=10 --log_every=5
timed sample 40 $PYTHON sample.py "$RUNS/baby-gpt" --num_samples=10 --max_new_tokens=500

$PYTHON - "$RUNS" >> "$OUT/summary.txt" <<'PY'
import json
import pathlib
import sys

import torch

print(torch.cuda.get_device_name(), "torch", torch.__version__)
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/metrics.jsonl")):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    best = min(row["loss"] for row in rows if row["kind"] == "val")
    # intervals between two lines of training loss next to each other hold no evaluation
    pairs = [(a, b) for a, b in zip(rows, rows[1:]) if a["kind"] == b["kind"] == "train"]
    speeds = sorted((b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairs)
    speed = f"{speeds[len(speeds) // 2]:,.0f} tokens/s" if speeds else "no speed"
    print(f"{path.parent.name}: {rows[-1]['step']} steps, {speed}, best validation loss {best:.4f}")
PY
cat "$OUT/summary.txt"
