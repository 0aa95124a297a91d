#!/usr/bin/env bash
# The inpainting base that ships in assets/base: text to image first, so that captions are learned, then inpainting; both from
# scratch on scenes. Its averaged weights are stored in bf16.
#   bash runs/base.sh     about 30 minutes on 4 quiet cores (2 ranks of 2 threads); the same command resumes
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=${OUT:-out/base}
export OMP_NUM_THREADS=2 GOMP_SPINCOUNT=10000 OMP_WAIT_POLICY=ACTIVE
TRAIN="$PY -m torch.distributed.run --standalone --nproc_per_node=2 train_omni.py --data scenes --batch_size 64 --lr 1e-3
    --shift 1.5 --warmup 200 --sample_every 500 --save_every 250 --wandb off"

$TRAIN --stage base --preset tiny --image_size 32 --t_shift 4 --t_weight 2 --lr_schedule constant --steps 1300 --out "$OUT/t2i"
$TRAIN --stage inpaint --init "$OUT/t2i" --t_shift 3 --t_weight 1 --steps 2700 --out "$OUT/inpaint"
$PY runs/ship.py assets/base "bash runs/base.sh" "$OUT/t2i" "$OUT/inpaint"
