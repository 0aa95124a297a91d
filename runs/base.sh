#!/usr/bin/env bash
# The inpainting base that ships in assets/base (or SHIP): text to image first, so that captions are learned, then
# inpainting; both from scratch on scenes. Its averaged weights are stored in bf16.
#   bash runs/base.sh     the same command resumes
#   COMPILE=True bash runs/base.sh     a minute of compilation first, then faster (LOG.md)
# RANKS processes of one thread each: with matrices this small that beats one process of many threads (LOG.md).
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=${OUT:-out/base} T2I=${T2I:-4500} INPAINT=${INPAINT:-2500}
RANKS=${RANKS:-$(nproc)}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
BATCH=$((128 / RANKS))
TRAIN="$PY -m torch.distributed.run --standalone --nproc_per_node=$RANKS train_omni.py --data scenes --batch_size $BATCH
    --lr 1e-3 --muon_lr 3e-3 --text_lr 0.5 --warmup 50 --ema 0.996 --shift 2 --sample_every 500 --save_every 500 --compile ${COMPILE:-False} --wandb off"

$TRAIN --stage base --preset tiny --t_shift 4 --lr_schedule constant --steps "$T2I" --out "$OUT/t2i"
$TRAIN --stage inpaint --init "$OUT/t2i" --t_shift 4 --tasks t2i=9.7,inpaint=6,edit=5,outpaint=5,erase=2 --steps "$INPAINT" --out "$OUT/inpaint"
$PY runs/ship.py "${SHIP:-assets/base}" "bash runs/base.sh" "$OUT/t2i" "$OUT/inpaint"
