#!/usr/bin/env bash
# The inpainting base that ships in assets/base: trained from scratch on scenes, its averaged weights stored in bf16.
#   bash runs/base.sh            train in out/base (about 80 minutes on 4 cores; the same command resumes), then ship
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}

$PY train_omni.py --stage inpaint --data scenes --preset tiny --image_size 32 --out out/base \
    --compile True --batch_size 64 --lr 1e-3 --warmup 300 --shift 1.5 --steps 18000 --wandb off
$PY runs/ship.py out/base assets/base
