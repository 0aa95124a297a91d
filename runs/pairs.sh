#!/usr/bin/env bash
# What made pairs are worth to the editor that is trained on them, on scenes, whose truth the judge knows (RESULTS.md):
# OmniEdit's importance weights (Table 6) and generative data refinement (CosXL-Edit, Fig. 2).
#   bash runs/pairs.sh                                        all of it: some 9 hours on 2 plain cores
#   PARTS=weights SEEDS=0 STEPS=400 REQUESTS=2100 JUDGED=1050 READS=800 N=60 bash runs/pairs.sh     a part of it, smaller
#   JUDGE=0 bash runs/pairs.sh                                the sets and trainings without the evaluations
#   ARMS="plain scorer raw refined unpaired" bash runs/pairs.sh          these editors alone
# weights: EditNets on the REQUESTS as the specialists drew them, one try each: all alike (plain), weighed by the truth's scores
#   (truth) and by a distilled scorer's (scorer); and on the exact pairs of the same requests (exact).
# refine: concat editors, as in the paper, on the same rows (raw), redrawn with one noise for both pictures (refined), with two
#   (unpaired), redrawn and filtered by the judge (filtered: the paper filters by CLIP), and on exact pairs (exactly).
# What is done already is not done again; a run that was cut resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=${OUT:-out/pairs}
PARTS=${PARTS:-weights refine} SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-1200}
REQUESTS=${REQUESTS:-7000}  # a seventh of each task; a removal is also an addition backwards
JUDGED=${JUDGED:-2100} READS=${READS:-1500}  # other requests, which teach the scorer, and its steps
LOGSNR=${LOGSNR:-0}  # -4.649, the paper's for 128 x 128 latents, draws 64 pixels anew (RESULTS.md)
N=${N:-300} SCALES=${SCALES:-1 1.5 2.5}  # held-out pairs of each task; image guidance of the curves
JOBS=${JOBS:-$(nproc)}  # processes side by side
EVERY="plain truth scorer exact raw refined unpaired filtered exactly"
ARMS=${ARMS:-$EVERY}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
for part in $PARTS; do
    case $part in
        weights | refine) ;;
        *) echo "error: PARTS: $part: use weights, refine" >&2; exit 2 ;;
    esac
done
for arm in $ARMS; do
    case " $EVERY " in
        *" $arm "*) ;;
        *) echo "error: ARMS: $arm: use $EVERY" >&2; exit 2 ;;
    esac
done
wanted() { case " $ARMS " in *" $1 "*) ;; *) return 1 ;; esac; }

pids=()
spawn() {  # COMMAND: in the background, JOBS at a time; a job that fails ends the script, at the latest in finish
    if [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; then wait -n; fi
    "$@" & pids+=($!)
}
finish() { for pid in "${pids[@]}"; do wait "$pid"; done; pids=(); }  # bash remembers how each one ended
make() {  # what draws many pictures, on a rank for each core
    if [ "$JOBS" = 1 ]; then $PY make_edits.py "$@"
    else $PY -m torch.distributed.run --standalone --nproc_per_node="$JOBS" -- make_edits.py "$@"; fi
}
score() { $PY make_edits.py score --data "$OUT/$1" --out "$OUT/$2.scored" "${@:3}"; }  # SET, its scored form, flags
# SET, least score, share held out, another name
pack() { $PY make_edits.py pack --data "$OUT/$1.scored" --min_score "${2:-None}" --dev "${3:-0.05}" --out "$OUT/${4:-$1}.pairs"; }
train() {  # NAME FLAGS: of the present seed
    local name=$1; shift
    wanted "$name" || return 0
    spawn $PY train_omni.py --stage edit --init assets/base --lr 1e-3 --muon_lr 3e-3 --t_shift 4 --text_lr 0.5 --batch_size 32 \
        --warmup 100 --lr_schedule constant --ema 0.997 --steps "$STEPS" --sample_every "${SHEETS:-$STEPS}" --seed "$seed" --wandb off "$@" \
        --out "$OUT/$name$seed"
}
judge() {  # OUT-NAME FLAGS -- NAMES: all seeds of those of them that are wanted, on the same held-out edits
    local name=$1 flags=() ckpts=""; shift
    while [ "$1" != -- ]; do flags+=("$1"); shift; done; shift
    for run in "$@"; do
        if wanted "$run"; then for seed in $SEEDS; do ckpts="$ckpts,$OUT/$run$seed"; done; fi
    done
    OMP_NUM_THREADS=$JOBS $PY evaluate.py edits --ckpt "${ckpts#,}" --steps 10 --solver dpm --guidance 3 --n "$N" "${flags[@]}" \
        --out "$OUT/judge_$name" | tee "$OUT/judge_$name.txt"
}

# 1) the pairs, by all seven specialists, and their truth
mkdir -p "$OUT"
specialists="--tries 1 --steps 10 --solver dpm --behind False --editor assets/editnet --batch_size 64
    --tasks swap,remove,add,attribute,background,environment,style"
make specialist --n "$REQUESTS" $specialists --out "$OUT/made"
score made made
pack made
$PY make_pack.py scenes --edits True --limit "$REQUESTS" --out "$OUT/truth.pairs"  # of the same requests

# 2) a scorer, distilled from the scores of other requests, and what it makes of these
case " $PARTS " in *" weights "*)
    make specialist --n "$JUDGED" --offset "$((REQUESTS / 7))" $specialists --seed 1 --out "$OUT/judged"
    score judged judged
    pack judged None 0.2
    $PY train_scorer.py --data "omniedit:$OUT/judged.pairs" --aspects False --steps "$READS" --wandb off --out "$OUT/scorer"
    score made guessed --judge "scorer:$OUT/scorer"
    pack guessed ;;
esac

# 3) the same pairs, redrawn
case " $PARTS " in *" refine "*)
    for kind in refined unpaired; do
        make refine --data "$OUT/made.scored" --logsnr "$LOGSNR" --steps 6,4 --guidance 1 --batch_size 64 \
            --same_noise "$([ $kind = refined ] && echo True || echo False)" --out "$OUT/$kind"
        score $kind $kind
        pack $kind
    done
    if wanted filtered; then pack refined 9 0.05 filtered; fi ;;
esac

# 4) editors
for seed in $SEEDS; do
    for part in $PARTS; do
        case $part in
            weights)
                train plain --data "omniedit:$OUT/made.pairs" --weighting none
                train truth --data "omniedit:$OUT/made.pairs"
                train scorer --data "omniedit:$OUT/guessed.pairs"
                train exact --data "$OUT/truth.pairs" ;;
            refine)
                train raw --variant concat --data "omniedit:$OUT/made.pairs" --weighting none
                for kind in refined unpaired filtered; do
                    train $kind --variant concat --data "omniedit:$OUT/$kind.pairs" --weighting none
                done
                train exactly --variant concat --data "$OUT/truth.pairs" ;;
        esac
    done
done
finish

# 5) the tables; with image guidance what is kept rises and what is done falls
[ "${JUDGE:-1}" = 1 ] || exit 0
for part in $PARTS; do
    case $part in
        weights) judge weights --image_guidance 1.5 --save "$OUT/pictures" -- plain truth scorer exact ;;
        refine)
            for scale in $SCALES; do  # pictures of one scale are enough to look at
                keep=(); if [ "$scale" = 1.5 ]; then keep=(--save "$OUT/pictures"); fi
                judge "refine_$scale" --image_guidance "$scale" "${keep[@]}" -- raw refined unpaired filtered exactly
            done
            $PY - "$OUT" $SCALES <<'PYTHON'
# CosXL-Edit's Fig. 2 with the truth for a judge: edits done to the right, other facts kept up, a curve for each set of pairs
import sys
from pathlib import Path
import numpy as np
from runs.curves import deviation, plot, table
from runs.table import group_of
(out, *scales), curves = sys.argv[1:], {}
for scale in scales:
    scores = np.load(f"{out}/judge_refine_{scale}/scores.npz")
    seeds = {}  # arm -> [done, kept] of each seed, percent, means over tasks
    for i, name in enumerate(scores["names"].tolist()):
        done, kept = (100 * np.mean([np.nanmean(rows[i]) for key, rows in scores.items() if key.endswith(f"/{metric}")])
                      for metric in ("edit", "kept_share"))
        seeds.setdefault(group_of(name).split("@")[0], []).append((done, kept))
    for arm, points in seeds.items():
        x, y = np.array(points).T
        curves.setdefault(arm, []).append({"image_guidance": float(scale), "x": x.mean(), "y": y.mean(), "x_std": deviation(x),
                                           "y_std": deviation(y)})
names = "edits done, %", "other facts kept, %"
Path(f"{out}/curves_refine.md").write_text(table(curves, *names))
plot(curves, *names).save(f"{out}/curves_refine.png")
PYTHON
            ;;
    esac
done
