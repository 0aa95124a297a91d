#!/usr/bin/env bash
# The claims about feedback (RESULTS.md): PeFL, its arms and its controls on 500 held-out scenes for each task, three seeds.
#   bash runs/pefl_scenes.sh                            some 15 hours on 2 plain cores; what is done is not done again
#   ARMS="pefl noise known" SEEDS=0 N=200 bash runs/pefl_scenes.sh
#   QUICK=1 bash runs/pefl_scenes.sh                    one seed of everything, the demo's numbers of steps: 25 minutes
# Numbers, each a variable: PREFS prompts and CAPTIONS pictures for the rewards, LOOKS and READS steps of theirs, ALONE, ONE and TWO
# steps of the coherence model alone (of phase 1's), of phase 1 and of phase 2.
# Arms, each one flag from pefl: rewardless (L_reg + L_vgg alone), no_aesthetic, no_alignment, no_coherence; noise (stage 2
# starts as sampling does), known (L_reg and L_vgg outside the hole), late (adversarial from phase 2 on), two (two steps of the
# coherence model a step), global (holes of the whole picture, too, as is the default); noise+known is both.
# Trained in fp32 whatever the hardware: in bf16 PeFL of this small model does worse, and its seeds differ more (LOG.md).
# Always beside them: the base, the base with blurred holes, and flow matching on as many pictures (control).
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
if [ "${QUICK:-0}" = 1 ]; then OUT=${OUT:-out/pefl_scenes_quick}; fi  # its runs are no start of the real ones
OUT=${OUT:-out/pefl_scenes}
ARMS=${ARMS:-pefl rewardless no_aesthetic no_alignment no_coherence}
JUDGE=${JUDGE:-judge}  # folder of tables, below OUT
PROBE=${PROBE:-1}  # paired counts and part 4, too
JOBS=${JOBS:-$(nproc)}  # trainings side by side
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "${QUICK:-0}" = 1 ]; then
    SEEDS=${SEEDS:-0} N=${N:-60} PREFS=${PREFS:-240} CAPTIONS=${CAPTIONS:-3000} LOOKS=${LOOKS:-250} READS=${READS:-350}
    ALONE=${ALONE:-24} ONE=${ONE:-60} TWO=${TWO:-24}
    REWARD="--lr 5e-4 --warmup 50 --dropout 0 --batch_size 32 --noise 0.3 --eval_every 0 --wandb off"
    RECIPE="--precision fp32 --batch_size 16 --lr 2e-5 --warmup 10 --ema 0.95" WEIGHT=${WEIGHT:-0.001}
else
    SEEDS=${SEEDS:-0 1 2} N=${N:-500} PREFS=${PREFS:-4000} CAPTIONS=${CAPTIONS:-20000} LOOKS=${LOOKS:-1000} READS=${READS:-2000}
    ALONE=${ALONE:-300} ONE=${ONE:-700} TWO=${TWO:-250}
    REWARD="--lr 5e-4 --warmup 50 --dropout 0 --batch_size 64 --noise 0.3 --eval_every 500 --wandb off"
    RECIPE="--precision fp32 --batch_size 32 --lr 1e-5 --warmup 20 --ema 0.995" WEIGHT=${WEIGHT:-0.001}
fi
HOLES="outpaint=7,edit=7,inpaint=3,erase=3"
# for tests
LOOKS=${STEPS:-$LOOKS} READS=${STEPS:-$READS} ONE=${STEPS:-$ONE} TWO=${STEPS:-$TWO}
SHEETS=${SHEETS:-$ONE}  # steps between a PeFL run's sample sheets
if [ -n "${STEPS:-}" ]; then ALONE=0 PREFS=$((4 * STEPS)) CAPTIONS=$((100 * STEPS)); fi

pids=()
spawn() {  # COMMAND: in the background, JOBS at a time; a job that fails ends the script, at the latest in finish
    if [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; then wait -n; fi
    "$@" & pids+=($!)
}
finish() { for pid in "${pids[@]}"; do wait "$pid"; done; pids=(); }  # bash remembers how each one ended
flags() {  # ARM, or several with + between them -> what differs
    for part in ${1//+/ }; do flag "$part" || return; done
}
flag() {
    case $1 in
        pefl) ;;
        rewardless) echo "--w_aesthetic 0 --w_alignment 0 --w_coherence 0" ;;
        no_aesthetic) echo "--w_aesthetic 0" ;;
        no_alignment) echo "--w_alignment 0" ;;
        no_coherence) echo "--w_coherence 0" ;;
        noise) echo "--start noise" ;;
        known) echo "--hold known" ;;
        late) echo "--adversarial_from 2" ;;
        two) echo "--disc_updates 2" ;;
        global) echo "--tasks t2i=2,$HOLES" ;;
        *) echo "error: ARMS: $1: use pefl, rewardless, no_aesthetic, no_alignment, no_coherence, noise, known, late, two, global" >&2
           return 2 ;;
    esac
}
for arm in $ARMS; do flags "$arm" > /dev/null; done

# 1) preferences and rewards, once: what varies with the seed is PeFL (data order, noise, t', coherence model)
[ -f "$OUT/prefs/results.json" ] || $PY make_prefs.py --ckpt assets/base --n "$PREFS" --steps 4,6,8,20 --out "$OUT/prefs"
[ -f "$OUT/captions/results.json" ] ||
    $PY make_prefs.py --ckpt assets/base --n 0 --captions "$CAPTIONS" --offset 500000 --out "$OUT/captions"
spawn $PY train_reward.py --pairs "$OUT/prefs/aesthetic.json" --preset tiny --steps "$LOOKS" --augment 2 --out "$OUT/aesthetic" $REWARD
spawn $PY train_reward.py --pairs "$OUT/captions/alignment.jsonl" --preset tiny-p16 --steps "$READS" --val_fraction 0.05 \
    --out "$OUT/alignment" $REWARD
finish

# 2) the arms: some steps of the coherence model alone, then phase 1, then phase 2; both ends are kept
for seed in $SEEDS; do
    for arm in $ARMS; do
        spawn $PY train_pefl.py --base assets/base --aesthetic "$OUT/aesthetic" --alignment "$OUT/alignment" \
            --phases "20/15/10x$ONE,8/6/3x$TWO" --adversarial_from 1 --tasks "$HOLES" $RECIPE \
            --disc_init "$OUT/aesthetic" --disc_first "$ALONE" --disc_lr 3e-4 --reward_noise 0.2 \
            --eta 0.05 --w_aesthetic "$WEIGHT" --w_alignment "$WEIGHT" --w_coherence 0.1 $(flags "$arm") \
            --seed "$seed" --sample_every "$SHEETS" --save_every $(((ONE + 1) / 2)) --keep 4 --wandb off --out "$OUT/$arm$seed"
    done
    # ... and a control: the base trained on with flow matching, on as many pictures and masks
    spawn $PY train_omni.py --init assets/base --stage inpaint --t_shift 3 $RECIPE --lr_schedule constant \
        --steps $((ONE + TWO - ALONE)) --seed "$seed" --sample_every 0 --wandb off --out "$OUT/control$seed"
done
finish

# 3) the judge: all on the same scenes, masks and noise; and paired counts against the base at 20 steps. In 20 steps what phase 1
#    made, in 8 steps that, too, as the control of what phase 2 made
export OMP_NUM_THREADS=$(nproc)
first=$(printf "step_%08d" "$ONE") last=$(printf "step_%08d" $((ONE + TWO)))
ckpts="assets/base" steps="20"
for seed in $SEEDS; do ckpts="$ckpts,$OUT/control$seed" steps="$steps,20"; done
for arm in $ARMS; do for seed in $SEEDS; do ckpts="$ckpts,$OUT/$arm$seed/$first" steps="$steps,20"; done; done
ckpts="$ckpts,assets/base" steps="$steps,8"
for seed in $SEEDS; do ckpts="$ckpts,$OUT/control$seed" steps="$steps,8"; done
for arm in $ARMS; do for seed in $SEEDS; do ckpts="$ckpts,$OUT/$arm$seed/$first,$OUT/$arm$seed/$last" steps="$steps,8,8"; done; done
$PY evaluate.py scenes --ckpt "$ckpts" --steps "$steps" --n "$N" --save "$OUT/pictures" --out "$OUT/$JUDGE" |
    tee "$OUT/$JUDGE.txt"
[ "$PROBE" = 1 ] || exit 0
saved() { echo "$OUT/pictures/$(echo "$1" | tr / _)"; }
for arm in $ARMS; do
    for seed in $SEEDS; do
        for against in "$arm$seed/$first@20" "$arm$seed/$last@8"; do
            $PY evaluate.py compare --ckpt "$(saved "$OUT/$against"),$(saved assets/base@20)" --n "$N" \
                --out "$OUT/compare/$(echo "$against" | tr / _)"
        done
    done
done | tee "$OUT/compare_$JUDGE.txt"

# 4) how well a fresh coherence model, trained alike, tells real pixels from generated ones at the seam: of the base (the seeds'
#    own first steps) and of what PeFL made of it
[ "$ALONE" -gt 0 ] || exit 0
export OMP_NUM_THREADS=1
for seed in $SEEDS; do
    [ -d "$OUT/pefl$seed" ] || continue
    spawn $PY train_pefl.py --base "$OUT/pefl$seed/$first" --aesthetic "$OUT/aesthetic" --phases "20/15/10x$ALONE" --tasks "$HOLES" $RECIPE \
        --disc_init "$OUT/aesthetic" --disc_first "$ALONE" --disc_lr 3e-4 --reward_noise 0.2 --seed "$seed" --sample_every 0 \
        --log_every 4 --wandb off --out "$OUT/after$seed"
done
finish
$PY - "$OUT" "$ALONE" $SEEDS <<'PYTHON'
import json, os, sys
out, alone, *seeds = sys.argv[1:]
for run in ("pefl", "after"):
    for seed in seeds:
        if os.path.exists(f"{out}/{run}{seed}/metrics.jsonl"):
            rows = [json.loads(line) for line in open(f"{out}/{run}{seed}/metrics.jsonl")]
            seam = [r["coherence/seam"] for r in rows if "coherence/seam" in r and int(alone) * 2 / 3 < r["step"] <= int(alone)]
            if seam:
                print(f"{run}{seed}: coherence/seam {sum(seam) / len(seam):.3f} in the last third of {alone} steps")
PYTHON
