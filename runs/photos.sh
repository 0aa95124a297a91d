#!/usr/bin/env bash
# The whole chain on your own pictures, starting from the embedded base: inpainting, preferences, rewards, PeFL.
#   bash runs/photos.sh PATH OUT                  PATH: a folder of pictures, captioned or not, or parquet (README)
#   STEPS=300 PEFL=20/15/10x50 bash runs/photos.sh PATH OUT     a short one; in a third of PEFL's first phase the
#                                                     coherence model learns alone
set -euo pipefail
DATA=$(realpath "${1:?usage: bash runs/photos.sh PATH OUT}")
OUT=$(realpath -m "${2:?usage: bash runs/photos.sh PATH OUT}")
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
BASE=${BASE:-assets/base}
STEPS=${STEPS:-3000} REWARD_STEPS=${REWARD_STEPS:-500} PEFL=${PEFL:-20/15/10x230,8/6/3x150} N=${N:-1000}
one=${PEFL%%,*}
ALONE=${ALONE:-$((${one##*x} / 3))}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
REWARD="--preset tiny --steps $REWARD_STEPS --lr 5e-4 --warmup 50 --batch_size 64 --noise 0.3 --wandb off"

$PY train_omni.py --stage inpaint --init "$BASE" --data "$DATA" --lr 5e-4 --muon_lr 1e-3 --warmup 100 --steps "$STEPS" \
    --sample_every 500 --save_every 500 --wandb off --out "$OUT/inpaint"
$PY make_prefs.py --data "$DATA" --ckpt "$OUT/inpaint" --n "$N" --steps 4,6,8,20 --out "$OUT/prefs"
$PY train_reward.py --pairs "$OUT/prefs/aesthetic.json" --out "$OUT/aesthetic" $REWARD
pefl="--base $OUT/inpaint --aesthetic $OUT/aesthetic"
if [ -s "$OUT/prefs/alignment.jsonl" ]; then  # pictures without captions have no alignment to learn
    $PY train_reward.py --pairs "$OUT/prefs/alignment.jsonl" --out "$OUT/alignment" $REWARD
    pefl="$pefl --alignment $OUT/alignment"
fi
$PY train_pefl.py $pefl --data "$DATA" --phases "$PEFL" --batch_size 32 --lr 2e-5 --warmup 20 --ema 0.98 \
    --start noise --hold known --disc_init "$OUT/aesthetic" --disc_first "$ALONE" --disc_lr 3e-4 --reward_noise 0.2 \
    --eta 0.05 --w_aesthetic 0.001 --w_alignment 0.001 --w_coherence 0.1 --adversarial_from 1 --sample_every 50 --save_every 50 --wandb off --out "$OUT/pefl"
echo "sheets: $OUT/inpaint/images and $OUT/pefl/images"
