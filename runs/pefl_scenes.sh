#!/usr/bin/env bash
# The claims of RESULTS.md: PeFL against its base on 500 held-out scenes, one training for each seed.
#   bash runs/pefl_scenes.sh              seeds 0 1 2, one after the other (about 30 minutes each on 4 cores)
#   SEEDS="1" bash runs/pefl_scenes.sh    one of them; the summary covers those that are there
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=${OUT:-out/pefl_scenes}
SEEDS=${SEEDS:-0 1 2}
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
REWARD="--preset tiny --lr 5e-4 --warmup 50 --batch_size 64 --wandb off"

# preferences and rewards are made once: what varies with the seed is PeFL (data order, noise, t', coherence model)
[ -f "$OUT/prefs/aesthetic.json" ] || $PY evaluate.py prefs --ckpt assets/base --out "$OUT/prefs" --n 4000 --steps 4,6,8,20
$PY train_reward.py --pairs "$OUT/prefs/aesthetic.json" --out "$OUT/aesthetic" --steps 1500 $REWARD
$PY train_reward.py --pairs "$OUT/prefs/alignment.jsonl" --out "$OUT/alignment" --steps 2500 $REWARD

for seed in $SEEDS; do
    run="$OUT/seed$seed"
    pefl="--base assets/base --aesthetic $OUT/aesthetic --alignment $OUT/alignment --batch_size 32 --lr 1e-4 --warmup 50
          --ema 0.99 --disc_lr 3e-4 --seed $seed --wandb off --save_every 100"
    $PY train_pefl.py $pefl --out "$run/phase1" --phases 20/15/10x400
    $PY train_pefl.py $pefl --out "$run/phase2" --phases 8/6/3x400 --base "$run/phase1"
    $PY evaluate.py compare --ckpt "$run/phase1,assets/base" --steps 20,20 --n 500 --seeds "$seed" --out "$run/quality"
    $PY evaluate.py compare --ckpt "$run/phase2,assets/base" --steps 8,20 --n 500 --seeds "$seed" --out "$run/speed"
    $PY evaluate.py scenes --ckpt "assets/base,$run/phase1,assets/base,$run/phase2" --steps 20,20,8,8 --n 500 \
        --seeds "$seed" --out "$run/judge"
done
