#!/usr/bin/env bash
# Test and measure everything that needs a GPU, in one call of less than ten minutes.
#
#   PYTHON=python3 OUT=out/gpu bash bench/gpu.sh
#
# Needs the project's dependencies and, where there is no network, data/ as preparing shakespeare_char and shakespeare
# elsewhere left it, downloads included. Logs and metrics land in $OUT; the figures are printed last.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-out/gpu}
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1

$PYTHON prepare.py shakespeare_char
$PYTHON prepare.py shakespeare
$PYTHON -m pytest -m gpu 2>&1 | tee "$OUT/tests.log" || echo "GPU TESTS FAILED"

timed() {  # name, command ...: run it, keep its output, remember its seconds
  local name=$1 started=$SECONDS
  shift
  "$@" 2>&1 | tee "$OUT/$name.log" || echo "$name: failed, or ran out of time; see $name.log" >> "$OUT/seconds.txt"
  echo "$name: $((SECONDS - started)) s, whole process" >> "$OUT/seconds.txt"
}
rm -f "$OUT/seconds.txt"
timed baby-gpt timeout 240 $PYTHON train.py config/shakespeare_char.toml --out_dir="$OUT/baby-gpt" --overwrite
timed eager timeout 60 $PYTHON train.py config/shakespeare_char.toml --out_dir="$OUT/eager" --overwrite --compile=False \
  --max_steps=200 --eval_every=200
timed nccl timeout 90 $PYTHON -m torch.distributed.run --standalone --nproc_per_node=gpu train.py \
  config/shakespeare_char.toml --out_dir="$OUT/nccl" --overwrite --compile=False --max_steps=100 --eval_every=100
timed gpt2-124m timeout 150 $PYTHON train.py config/gpt2.toml --out_dir="$OUT/gpt2-124m" --overwrite \
  --gradient_accumulation_steps=4 --max_steps=40 --eval_every=40 --warmup_steps=10 --log_every=5
timed sample $PYTHON sample.py "$OUT/baby-gpt" --num_samples=10 --max_new_tokens=500

echo
$PYTHON - "$OUT" <<'PY'
import json, pathlib, sys
import torch
out = pathlib.Path(sys.argv[1])
print(torch.cuda.get_device_name(), "torch", torch.__version__)
print((out / "seconds.txt").read_text(), end="")
for run in ("baby-gpt", "eager", "nccl", "gpt2-124m"):
    if not (out / run / "metrics.jsonl").exists():
        continue
    rows = [json.loads(line) for line in (out / run / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    best = min(row["loss"] for row in rows if row["kind"] == "val")
    # between the last two evaluations nothing but steps takes time
    later = train[len(train) // 2 :]
    speeds = sorted(
        (b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in zip(later, later[1:])
    )
    print(f"{run}: {speeds[len(speeds) // 2]:,.0f} tokens/s (median of log intervals), best validation loss {best:.4f}")
PY
