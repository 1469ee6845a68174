#!/usr/bin/env bash
# What a GPU tells in forty minutes, the most telling first; runs/gpu_hour/page.md has it.
#
#     benchmarks/gpu_hour.sh                # installs into .venv, if there is none, and runs
#     timeout 600 benchmarks/gpu_hour.sh    # ten minutes of it; the same again goes on
#     benchmarks/gpu_hour.sh --dry          # in tiny sizes, on any machine: does it work?
#
# Every part keeps its figures in a folder, and its output in log.txt. One that failed is tried
# again by the next call.
set -euo pipefail
cd "$(dirname "$0")/.."

case "$*" in
  "") dry= ;;
  --dry) dry=1 ;;
  *) echo "usage: benchmarks/gpu_hour.sh [--dry]" >&2; exit 2 ;;
esac
if [ -z "$dry" ] && ! nvidia-smi -L >/dev/null 2>&1; then
  echo "No GPU here, as nvidia-smi says: run this where there is one, or try it with --dry." >&2
  exit 1
fi
out=${OUT:-runs/gpu_hour${dry:+_dry}}
python=${PYTHON:-.venv/bin/python}
if ! command -v "$python" >/dev/null; then
  python3 -m venv .venv
  .venv/bin/pip install --quiet -e '.[examples]' 'jax[cuda12]'
fi
mkdir -p "$out"
"$python" - >"$out/machine.txt" <<'END'
import importlib.metadata, platform
import jax

devices = jax.devices()
print(f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), Python {platform.python_version()}")
print(", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "flax")))
END
if [ -z "$dry" ] && ! grep -q "(gpu)" "$out/machine.txt"; then
  echo "JAX of $python sees no GPU: pip install 'jax[cuda12]' there, or remove .venv." >&2
  exit 1
fi

trap 'exit 143' INT TERM  # once the program has ended, which has the signal too, and saves

part() {  # its name, and the program with its flags
  local folder=$out/$1 status=0
  shift
  [ ! -e "$folder/done" ] || return 0
  mkdir -p "$folder"
  echo "$folder: $*"
  "$python" -m "$@" >>"$folder/log.txt" 2>&1 || status=$?
  case $status in
    0) touch "$folder/done" ;;
    130 | 143) exit "$status" ;;  # stopped, and saved
    *) echo "$folder: failed, see log.txt" ;;
  esac
  "$python" -m benchmarks.gpu_page "$out"
}

update_cost() {  # the name of the part, a tree
  local optimizers=(adamw2 "adamw2, a cap of rank 32" optax.contrib.muon optax.lamb
    "adamw2, as offered to Optax")
  [ -z "$dry" ] || optimizers=(optax.lamb)
  part "$1" benchmarks.update_cost --trees "$2" --optimizers "${optimizers[@]}" \
    --seconds "${dry:+0.}10" --out "$out/$1/table.json"
}

train() {  # the name of the part, the learning rate, the optimizers; the model, if $model names one
  local name=$1 rate=$2 resume=
  shift 2
  local size=(--preset gpt2-small --steps 300 --batch 64 --accumulate 8 --warmup 30
    --log-every 10 --validate-every 100 --save-every 100)
  if [ -n "$dry" ]; then
    set -- "$1"  # one optimizer is enough
    size=(--preset nano --dtype bfloat16 --steps 2 --batch 2 --sequence-length 16 --warmup 1)
  fi
  [ -z "${model:-}" ] || size+=(--model "$model")
  [ ! -e "$out/$name/run/config.json" ] || resume=--resume
  part "$name" examples.train_gpt "${size[@]}" --growth linear --tau 0.1 --adam-share 0.03 \
    --validation-batches 8 --data "$out/tokens" --out "$out/$name/run" \
    --learning-rate "$rate" --runs "$@" $resume
}

if [ -z "$dry" ]; then
  update_cost 1_update gpt2-small
  update_cost 2_update_layers_apart gpt2-small-unstacked
  part 3_step benchmarks.step_cost --models gpt2-small-0.5M vit-base --seconds 120 \
    --out "$out/3_step/table.json"
else
  update_cost 1_update lora
  part 3_step benchmarks.step_cost --models gpt-nano --seconds 0.1 --out "$out/3_step/table.json"
fi
part tokens benchmarks.python_tokens --out "$out/tokens" ${dry:+--megabytes 1}
# At the rate of the paper, at one that is usual for Muon, and at ten times that of the paper.
train 4_train_paper_rate 6e-4 adamw adamw_warmup adamw2 adamw2_cap
[ -n "$dry" ] || train 5_train_muon 0.02 muon muon_bound
[ -n "$dry" ] || train 6_train_ten_times 6e-3 adamw adamw_warmup adamw2
# A Llama of that size, at ten times the rate of the paper, with QK-norm off and on.
llama=llama-small
[ -z "$dry" ] || llama=llama-nano
[ -n "$dry" ] || model=$llama train 7_llama 6e-3 adamw adamw_warmup adamw2_cap
model=$llama-qk-norm train 8_llama_qk_norm 6e-3 adamw adamw_warmup adamw2_cap

cat "$out/page.md"
