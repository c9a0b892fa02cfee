#!/usr/bin/env bash
# Run the tests and measurements that need a GPU. Each part has a time limit; together they end within nine minutes.
#
#   NANOGPT=nanoGPT bash bench/gpu.sh                  every part except translate; NANOGPT is a checkout of nanoGPT
#   bash bench/gpu.sh tests sample                     some parts, in this order
#   bash bench/gpu.sh translate                        train and score (BLEU) a translation model, within nine minutes
#
# Parts: tests, versus (nanoGPT's speed), dial (nanoGPT's loss), char and sample (a run of half a minute, and samples
# from it), gpt2 (124M parameters), ddp and fsdp (two processes, which share a GPU if there is only one), translate.
#
# Environment: PYTHON (python), OUT for logs and summary.txt (out/gpu), FLAGS for every training, to rehearse with a
# small model. Needs the project's dependencies and pytest; without a network also data/downloads, and the prepared
# datasets shakespeare_char, shakespeare and multi30k_de_en.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python} OUT=${OUT:-out/gpu} FLAGS=${FLAGS:-}
RUNS=$(mktemp -d)
trap 'rm -rf "$RUNS"' EXIT
mkdir -p "$OUT"
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
summary=$OUT/summary.txt

timed() {  # NAME SECONDS COMMAND...: run the command for at most SECONDS; write its output, time and exit status
  local name=$1 limit=$2 started=$SECONDS status=0
  shift 2
  timeout -k 5 "$limit" "$@" > "$OUT/$name.log" 2>&1 || status=$?
  tail -n 4 "$OUT/$name.log"
  grep -h '^warning: ' "$OUT/$name.log" | sed "s/^/$name: /" | tee -a "$summary"
  echo "$name: exit status $status after $((SECONDS - started)) of $limit s" | tee -a "$summary"
}

training() {  # NAME SECONDS COMMAND...: run a training in $RUNS/NAME, and write its speed and best loss
  local name=$1
  timed "$@" --out_dir="$RUNS/$name" $FLAGS
  $PYTHON - "$RUNS/$name/metrics.jsonl" <<'PY' 2>&1 | tail -n 1 | sed "s/^/$name: /" | tee -a "$summary"
import json
import sys

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
# no evaluation falls between two consecutive rows of training loss; the last two may be read at the same time
pairs = [(a, b) for a, b in zip(rows, rows[1:]) if a["kind"] == b["kind"] == "train" and a["seconds"] < b["seconds"]]
speeds = sorted((b["tokens"] - a["tokens"]) / (b["seconds"] - a["seconds"]) for a, b in pairs)
speed = f"{speeds[len(speeds) // 2]:,.0f} tokens/s" if speeds else "no speed"
mfu = sorted(row["mfu"] for row in rows if "mfu" in row)
used = f"{mfu[len(mfu) // 2]:.1%} MFU, " if mfu else ""
losses = [row["loss"] for row in rows if row["kind"] in ("val", "best")]
print(f"{rows[-1]['step']} steps, {speed}, {used}best validation loss {min(losses, default=float('nan')):.4f}")
PY
}

run_part() {
  local char="train.py --dataset=shakespeare_char" two="-m torch.distributed.run --standalone --nproc_per_node=2"
  local test=data/downloads/multi30k-test_2016_flickr
  case $1 in
    tests) timed tests 100 $PYTHON -m pytest -q -m gpu tests/test_runtime.py tests/test_gpu.py tests/inference ;;
    versus) timed versus 120 $PYTHON bench/versus_nanogpt.py --nanogpt="$NANOGPT" --rows=gpu --runs=1 --results="$OUT/RESULTS.md" ;;
    dial)
      mkdir "$RUNS/dial" && cp -r data/downloads "$RUNS/dial"
      timed dial 155 $PYTHON bench/dial.py --nanogpt="$NANOGPT" --corpora=shakespeare --parts=0.1,0.2 --folder="$RUNS/dial" ;;
    char) training char 40 $PYTHON $char --minutes=0.5 ;;
    sample)
      [ -e "$RUNS/char" ] || run_part char
      timed sample 15 $PYTHON sample.py "$RUNS/char" --device=cuda --num_samples=10 --max_new_tokens=500 ;;
    gpt2) training gpt2 50 $PYTHON train.py config/gpt2.toml --batch_size=40 --gradient_accumulation_steps=12 --max_steps=12 --eval_tokens=10000 --sample_tokens=0 --log_every=1 --compile=True ;;
    ddp) training ddp 20 $PYTHON $two $char --minutes=0.2 --compile=False ;;
    fsdp) training fsdp 20 $PYTHON $two $char --minutes=0.2 --compile=False --parallel=fsdp --activation_checkpointing ;;
    translate)
      training translate 400 $PYTHON train.py config/translate.toml
      timed bleu 140 $PYTHON -m glyphgpt.inference.translate "$RUNS/translate" $test.de.gz --reference=$test.en.gz --out="$OUT/translation.en" ;;
    *) echo "no such part: $1" >&2; return 2 ;;
  esac
}

parts=${*:-tests versus dial char sample gpt2 ddp fsdp}
case " $parts " in *" versus "* | *" dial "*) : "${NANOGPT:?a checkout of nanoGPT}" ;; esac
for dataset in shakespeare_char shakespeare multi30k_de_en; do
  [ -e "data/$dataset/meta.json" ] || $PYTHON prepare.py "$dataset" > "$OUT/prepare.log" 2>&1 || tail -n 1 "$OUT/prepare.log"
done
$PYTHON -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)' 2>&1 | tail -n 1 | tee "$summary"
for part in $parts; do run_part "$part"; done
