#!/usr/bin/env bash
# The main job on the embedded dataset: preferences -> two rewards -> PeFL -> a table and a contact sheet.
# At most 12 minutes on 4 cores. The paper's values are the scripts' defaults; those here suit a small pixel model.
#   bash runs/demo.sh                   starts from the base in assets/base
#   bash runs/demo.sh --from-scratch    trains that base first (runs/base.sh)
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=${OUT:-out/demo}
N=${N:-800} REWARD_STEPS=${REWARD_STEPS:-400} ALIGN_STEPS=${ALIGN_STEPS:-600} PEFL=${PEFL:-20/15/10x200,8/6/3x80} EVAL=${EVAL:-100} EDITS=${EDITS:-8}
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
case "${1:-}" in
    "") ;;
    --from-scratch) bash runs/base.sh ;;
    *) echo "error: $1: the only flag is --from-scratch" >&2; exit 2 ;;
esac
REWARD="--lr 5e-4 --warmup 50 --dropout 0 --batch_size 64 --noise 0.3 --eval_every 200 --wandb off"

echo "1/6 preferences: pictures of the base, ranked by the known truth; true and false captions"
[ -f "$OUT/prefs/results.json" ] ||
    $PY evaluate.py prefs --ckpt assets/base --n "$N" --captions 6000 --steps 4,6,8,20 --out "$OUT/prefs"

echo "2/6 aesthetic reward (Eq. 1)"
$PY train_reward.py --pairs "$OUT/prefs/aesthetic.json" --preset tiny --augment 2 --steps "$REWARD_STEPS" --out "$OUT/aesthetic" $REWARD

echo "3/6 alignment reward (Eq. 5)"
$PY train_reward.py --pairs "$OUT/prefs/alignment.jsonl" --preset tiny-p8 --steps "$ALIGN_STEPS" --out "$OUT/alignment" $REWARD

echo "4/6 perceptual feedback learning: phase 1 at T/T1/T2 = 20/15/10, phase 2 at 8/6/3"
$PY train_pefl.py --base assets/base --aesthetic "$OUT/aesthetic" --alignment "$OUT/alignment" --phases "$PEFL" \
    --batch_size 32 --lr 2e-5 --warmup 20 --ema 0.98 --disc_init "$OUT/aesthetic" --disc_first 80 --disc_lr 3e-4 \
    --reward_noise 0.2 --eta 0.05 --w_aesthetic 0.0005 --w_alignment 0.0005 --w_coherence 0.1 \
    --sample_every 50 --save_every 100 --wandb off --out "$OUT/pefl"

echo "5/6 the judge, on held-out scenes: base at 20 steps, PeFL at 20 and at 8"
$PY evaluate.py scenes --ckpt "assets/base,$OUT/pefl,$OUT/pefl" --steps 20,20,8 --n "$EVAL" --out "$OUT/judge"

echo "6/6 edits by instruction, by the EditNet in assets/editnet, on held-out scenes"
$PY evaluate.py edits --ckpt assets/editnet --steps 20 --n "$EDITS" --guidance 3 --image_guidance 1.5 --out "$OUT/edits"
