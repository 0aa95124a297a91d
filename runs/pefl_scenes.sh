#!/usr/bin/env bash
# The claims of RESULTS.md: PeFL against its base on 500 held-out scenes for each task, PeFL trained with three seeds.
#   bash runs/pefl_scenes.sh      hours on 2 plain cores (not yet run on the 64x64 models); what is done is not done again
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=${OUT:-out/pefl_scenes}
SEEDS=${SEEDS:-0 1 2}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
REWARD="--lr 5e-4 --warmup 50 --dropout 0 --batch_size 64 --noise 0.3 --eval_every 500 --wandb off"

# 1) preferences and rewards, once: what varies with the seed is PeFL (data order, noise, t', coherence model)
[ -f "$OUT/prefs/results.json" ] || $PY make_prefs.py --ckpt assets/base --n 4000 --steps 4,6,8,20 --out "$OUT/prefs"
[ -f "$OUT/captions/results.json" ] ||
    $PY make_prefs.py --ckpt assets/base --n 0 --captions 20000 --offset 500000 --out "$OUT/captions"
$PY train_reward.py --pairs "$OUT/prefs/aesthetic.json" --preset tiny --steps 1000 --augment 2 --out "$OUT/aesthetic" $REWARD &
$PY train_reward.py --pairs "$OUT/captions/alignment.jsonl" --preset tiny-p16 --steps 2000 --val_fraction 0.05 \
    --out "$OUT/alignment" $REWARD &
for job in $(jobs -p); do wait "$job"; done  # a plain wait hides a failure

# 2) PeFL, the seeds side by side: 300 steps of the coherence model alone, 400 of phase 1, 250 of phase 2
for seed in $SEEDS; do
    $PY train_pefl.py --base assets/base --aesthetic "$OUT/aesthetic" --alignment "$OUT/alignment" \
        --phases 20/15/10x700,8/6/3x250 --adversarial_from 1 --p_global 0 --batch_size 32 --lr 1e-5 --warmup 20 --ema 0.995 \
        --disc_init "$OUT/aesthetic" --disc_first 300 --disc_lr 3e-4 --reward_noise 0.2 \
        --eta 0.05 --w_aesthetic 0.0003 --w_alignment 0.0003 --w_coherence 0.1 \
        --seed "$seed" --sample_every 350 --save_every 350 --wandb off --out "$OUT/seed$seed" &
done
# ... and a control: the base trained on with flow matching, on as many pictures and masks
$PY train_omni.py --init assets/base --stage inpaint --t_shift 3 --lr 1e-5 --warmup 20 --ema 0.995 \
    --lr_schedule constant --batch_size 32 --steps 650 --sample_every 0 --wandb off --out "$OUT/control" &
for job in $(jobs -p); do wait "$job"; done  # a plain wait hides a failure

# 3) the judge: every model on the same scenes, masks and noise; and paired counts against the base at 20 steps
export OMP_NUM_THREADS=$(nproc)
ckpts="assets/base,$OUT/control" steps="20,20"
for seed in $SEEDS; do ckpts="$ckpts,$OUT/seed$seed/step_00000700" steps="$steps,20"; done
ckpts="$ckpts,assets/base,$OUT/control" steps="$steps,8,8"
for seed in $SEEDS; do ckpts="$ckpts,$OUT/seed$seed/step_00000950" steps="$steps,8"; done
$PY evaluate.py scenes --ckpt "$ckpts" --steps "$steps" --n 500 --save "$OUT/pictures" --out "$OUT/judge" |
    tee "$OUT/judge.txt"
saved() { echo "$OUT/pictures/$(echo "$1" | tr / _)"; }
for seed in $SEEDS; do
    for against in "seed$seed/step_00000700@20" "seed$seed/step_00000950@8"; do
        $PY evaluate.py compare --ckpt "$(saved "$OUT/$against"),$(saved assets/base@20)" --n 500 \
            --out "$OUT/compare/$(echo "$against" | tr / _)"
    done
done | tee "$OUT/compare.txt"

# 4) how well a fresh coherence model, trained alike for 300 steps, tells real pixels from generated ones at the seam: of the
#    base (the seeds' own first 300 steps) and of what PeFL made of it
export OMP_NUM_THREADS=1
for seed in $SEEDS; do
    $PY train_pefl.py --base "$OUT/seed$seed/step_00000700" --aesthetic "$OUT/aesthetic" --phases 20/15/10x300 --p_global 0 --batch_size 32 \
        --disc_init "$OUT/aesthetic" --disc_first 300 --disc_lr 3e-4 --reward_noise 0.2 --seed "$seed" --sample_every 0 \
        --wandb off --out "$OUT/after$seed" &
done
for job in $(jobs -p); do wait "$job"; done
$PY - "$OUT" $SEEDS <<'PYTHON'
import json, sys
for run in ("seed", "after"):
    for seed in sys.argv[2:]:
        rows = [json.loads(line) for line in open(f"{sys.argv[1]}/{run}{seed}/metrics.jsonl")]
        seam = [r["coherence/seam"] for r in rows if "coherence/seam" in r and 200 < r["step"] <= 300]
        print(f"{run}{seed}: coherence/seam {sum(seam) / len(seam):.3f} in steps 200 to 300")
PYTHON
