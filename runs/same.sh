#!/usr/bin/env bash
# 20 steps of every train script from a fixed seed, on one CPU thread, and what they end with: losses and hashes of tensors.
#   bash runs/same.sh > after.txt        # twice, around a change that must change no number: git stash, bash ..., diff
# Files' names and the order of keys do not count. A run of it takes five minutes on two plain cores.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=${OUT:-$(mktemp -d)}
export OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
own="--precision fp32 --device cpu --workers 0 --wandb off --log_every 1 --sample_every 0"
run() { $PY "$@" >> "$OUT/log" 2>&1 || { tail -5 "$OUT/log" >&2; exit 1; }; }

prefs=make_prefs.py
[ -f "$prefs" ] || prefs="evaluate.py prefs"
run $prefs --ckpt assets/base --n 24 --captions 40 --steps 4 --batch_size 24 --precision fp32 --device cpu --out "$OUT/prefs"
for kind in aesthetic.json alignment.jsonl; do
    run train_reward.py --pairs "$OUT/prefs/$kind" --preset tiny --steps 20 --batch_size 8 --lr 5e-4 --augment 2 --noise 0.3 \
        --eval_every 0 --out "$OUT/${kind%%.*}" ${own/--sample_every 0/}
done
run train_omni.py --stage base --steps 20 --batch_size 8 --warmup 5 --muon_lr 4e-3 $own --out "$OUT/base"
run train_omni.py --stage inpaint --init "$OUT/base" --steps 20 --batch_size 8 --warmup 5 $own --out "$OUT/inpaint"
run train_omni.py --stage edit --init assets/base --steps 20 --batch_size 8 --warmup 5 $own --out "$OUT/edit"
feedback="--aesthetic $OUT/aesthetic --alignment $OUT/alignment --phases 20/15/10x14,8/6/3x6 --batch_size 4 --lr 2e-5 --warmup 5
    --ema 0.95 --reward_noise 0.2 --eta 0.05 --disc_first 4 $own"
run train_pefl.py --base assets/base $feedback --out "$OUT/pefl"
run train_pefl.py --base "$OUT/edit" $feedback --out "$OUT/pefl_edit"

$PY - "$OUT" <<'PY'
import hashlib, json, sys
from pathlib import Path
from safetensors.torch import load_file
out = Path(sys.argv[1])
for name in ("aesthetic", "alignment", "base", "inpaint", "edit", "pefl", "pefl_edit"):
    for line in (out / name / "metrics.jsonl").read_text().splitlines():
        row = {k: v for k, v in json.loads(line).items() if "loss" in k or k in ("step", "lr")}
        print(name, *(f"{k}={v}" for k, v in sorted(row.items())))
    newest = max((out / name).glob("step_*"))
    for file in sorted(newest.glob("*.safetensors")):
        values = [v.contiguous().numpy().tobytes() for _, v in sorted(load_file(file).items())]
        if "optimizer" in file.stem:  # whose keys may be named or numbered
            values = sorted(values)
        print(name, file.stem, hashlib.sha256(b"".join(values)).hexdigest())
PY
