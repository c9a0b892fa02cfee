#!/usr/bin/env bash
# Run every test and measurement that needs a GPU, in less than ten minutes.
#
#   PYTHON=python3 OUT=out/gpu NANOGPT=nanoGPT bash bench/gpu.sh
#   PYTHON=python3 OUT=out/gpu bash bench/gpu.sh translate     trains and scores (BLEU) a translation model instead
#
# NANOGPT is a checkout of nanoGPT. Needs the project's dependencies and pytest. Without a network, it also needs data/
# from a machine on which shakespeare_char, shakespeare and multi30k_de_en were prepared, with data/downloads. Writes
# logs, the table of the GPU rows and summary.txt to $OUT, or to $OUT/translate.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-out/gpu}
[ "${1:-}" = translate ] || : "${NANOGPT:?a checkout of nanoGPT}"
RUNS=$(mktemp -d)
trap 'rm -rf "$RUNS"' EXIT
[ "${1:-}" = translate ] && OUT=$OUT/translate
mkdir -p "$OUT"
: > "$OUT/summary.txt" && : > "$OUT/RESULTS.md"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

timed() {  # NAME SECONDS COMMAND...: run the command for at most SECONDS, log its output, record time and exit status
  local name=$1 limit=$2 started=$SECONDS status=0
  shift 2
  timeout "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
  tail -n 4 "$OUT/$name.log"
  echo "$name: whole process $((SECONDS - started)) s, exit status $status" >> "$OUT/summary.txt"
}

if [ "${1:-}" = translate ]; then
  $PYTHON prepare.py multi30k_de_en
  test=data/downloads/multi30k-test_2016_flickr
  timed train 400 $PYTHON train.py config/translate.toml --out_dir="$RUNS/translate"
  timed translate 170 $PYTHON -m glyphgpt.inference.translate "$RUNS/translate" $test.de.gz --reference=$test.en.gz --out="$OUT/translation.en"
  cat "$OUT/summary.txt"
  exit
fi

$PYTHON prepare.py shakespeare_char
$PYTHON prepare.py shakespeare
char="train.py --dataset=shakespeare_char"
timed tests 80 $PYTHON -m pytest -m gpu tests/test_runtime.py tests/test_gpu.py
timed versus 160 $PYTHON bench/versus_nanogpt.py --nanogpt="$NANOGPT" --rows=gpu --runs=1 --results="$OUT/RESULTS.md"
mkdir "$RUNS/dial" && cp -r data/downloads "$RUNS/dial"
timed dial 240 $PYTHON bench/dial.py --nanogpt="$NANOGPT" --corpora=shakespeare --parts=0.1,0.2,1 --folder="$RUNS/dial"
timed char 40 $PYTHON $char --minutes=0.5 --out_dir="$RUNS/char"
torchrun="-m torch.distributed.run --standalone --nproc_per_node=gpu $char --minutes=0.5 --compile=False"
timed ddp 35 $PYTHON $torchrun --out_dir="$RUNS/ddp"
timed fsdp 35 $PYTHON $torchrun --out_dir="$RUNS/fsdp" --parallel=fsdp --activation_checkpointing  # shards need two GPUs
timed sample 30 $PYTHON sample.py "$RUNS/char" --num_samples=10 --max_new_tokens=500

$PYTHON - "$RUNS" >> "$OUT/summary.txt" <<'PY'
import json
import pathlib
import sys

import torch

print(torch.cuda.get_device_name(), "torch", torch.__version__)
for path in sorted(pathlib.Path(sys.argv[1]).glob("*/metrics.jsonl")):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    losses = {kind: [row["loss"] for row in rows if row["kind"] == kind] for kind in ("val", "best")}
    best = min(losses["best"] or losses["val"])  # on the whole validation split, if it was read
    # no evaluation falls between two consecutive rows of training loss
    pairs = [(a, b) for a, b in zip(rows, rows[1:]) if a["kind"] == b["kind"] == "train"]
    speeds = sorted((b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairs)
    speed = f"{speeds[len(speeds) // 2]:,.0f} tokens/s" if speeds else "no speed"
    print(f"{path.parent.name}: {rows[-1]['step']} steps, {speed}, best validation loss {best:.4f}")
PY
cat "$OUT/summary.txt" "$OUT/RESULTS.md"
