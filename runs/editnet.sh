#!/usr/bin/env bash
# The claims about instruction editors (RESULTS.md), on scenes: which architecture, whether regions help, whether aspect ratios
# have to be trained, and what feedback adds. What made pairs are worth, and how to weigh them, is runs/pairs.sh.
#   bash runs/editnet.sh                                       all of it: hours on 4 cores, less than one on a GPU
#   PARTS=variants SEEDS=0 STEPS=600 bash runs/editnet.sh      a part of it
#   JUDGE=0 bash runs/editnet.sh                               the trainings without the evaluations
#   PARTS=variants ARMS="editnet textcontrol" bash runs/editnet.sh         these editors alone
#   STEPS="1400 900 4500" bash runs/editnet.sh ship            trains assets/editnet (or SHIP) anew: two hours on 2 cores with bf16
# What is done already is not done again; a run that was cut resumes.
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=${OUT:-out/editnet}
PARTS=${PARTS:-variants wiring frozen_text region aspects pefl} SEEDS=${SEEDS:-0 1 2} STEPS=${STEPS:-1200} N=${N:-300}
PEFL_REWARDS=${PEFL_REWARDS:-out/pefl_scenes}  # aesthetic and alignment rewards of runs/pefl_scenes.sh
SAMPLER="--steps 10 --solver dpm --guidance 3 --image_guidance 1.5"  # of the judge: guided, as editors are used
JOBS=${JOBS:-$(nproc)}  # trainings side by side
EVERY="editnet cached controlnet textcontrol concat attend masked attend_masked ft_editnet ft_controlnet ft_textcontrol freeform aspects pefl"
ARMS=${ARMS:-$EVERY}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
RECIPE="--stage edit --lr 1e-3 --muon_lr 3e-3 --t_shift 4 --text_lr 0.5 --wandb off"
# constant rate, averaged weights: a run can go on to more steps
SHORT="$RECIPE --init assets/base --batch_size 32 --warmup 100 --lr_schedule constant --ema 0.997"

if [ "${1:-}" = ship ]; then  # as many stages as STEPS has numbers: in each the rate goes to zero, and the next one goes on
    export OMP_NUM_THREADS=1
    RANKS=${RANKS:-$(nproc)}  # of one thread each
    runs=() init=assets/base
    for steps in $STEPS; do
        seed=${#runs[@]} run=$OUT/ship$((${#runs[@]} + 1))
        $PY -m torch.distributed.run --standalone --nproc_per_node="$RANKS" train_omni.py $RECIPE --data scenes \
            --batch_size $((64 / RANKS)) --warmup $((seed ? 20 : 50)) --ema 0.997 --compile "${COMPILE:-False}" \
            --sample_every 500 --save_every 500 --steps "$steps" --init "$init" --seed "$seed" --out "$run"
        runs+=("$run") init=$run
    done
    exec $PY runs/ship.py "${SHIP:-assets/editnet}" "STEPS=\"$STEPS\" bash runs/editnet.sh ship" "${runs[@]}"
elif [ -n "${1:-}" ]; then
    echo "error: $1: the only word is ship" >&2; exit 2
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

spawn() {  # COMMAND: in the background, JOBS at a time; a job that fails ends the script, at the latest in finish
    if [ "$(jobs -rp | wc -l)" -ge "$JOBS" ]; then wait -n; fi
    "$@" & pids+=($!)
}
wanted() { case " $ARMS " in *" $1 "*) ;; *) return 1 ;; esac; }
finish() { for pid in "${pids[@]}"; do wait "$pid"; done; pids=(); }  # bash remembers how each one ended
train() {  # NAME FLAGS: of the present seed; parts share editnet
    local name=$1; shift
    wanted "$name" || return 0
    case " $begun " in *" $name$seed "*) return ;; esac
    begun="$begun $name$seed"
    spawn $PY train_omni.py $SHORT --data scenes --steps "$STEPS" --sample_every "${SHEETS:-$STEPS}" --seed "$seed" "$@" --out "$OUT/$name$seed"
}
judge() {  # OUT-NAME FLAGS -- NAMES: all seeds of the named runs on the same held-out edits
    local name=$1 flags=() ckpts=""; shift
    while [ "$1" != -- ]; do flags+=("$1"); shift; done; shift
    for run in "$@"; do
        if wanted "$run"; then for seed in $SEEDS; do ckpts="$ckpts,$OUT/$run$seed"; done; fi
    done
    [ -n "$ckpts" ] || return 0
    OMP_NUM_THREADS=$JOBS $PY evaluate.py edits --ckpt "${ckpts#,}" $SAMPLER --n "$N" "${flags[@]}" \
        --save "$OUT/pictures" --out "$OUT/judge_$name" | tee "$OUT/judge_$name.txt"
}

pids=() begun=""
for part in $PARTS; do
    case $part in
        variants | wiring | frozen_text | region | aspects | pefl) ;;
        *) echo "error: PARTS: $part: use variants, wiring, frozen_text, region, aspects, pefl" >&2; exit 2 ;;
    esac
done
for arm in $ARMS; do
    case " $EVERY " in
        *" $arm "*) ;;
        *) echo "error: ARMS: $arm: use $EVERY" >&2; exit 2 ;;
    esac
done
mkdir -p "$OUT"
for seed in $SEEDS; do
    for part in $PARTS; do
        case $part in
            variants)  # paper Table 7, Fig. 10 and 11; and the cached form
                train editnet; train cached --fixed_source True; train controlnet --variant controlnet
                train textcontrol --variant textcontrol; train concat --variant concat ;;
            wiring)  # whether source tokens' own output is added, and how they begin: each way, and both ways
                train editnet; train attend --variant attend; train masked --source_start masked
                train attend_masked --variant attend --source_start masked ;;
            frozen_text)  # the text encoder as it is, as in the paper: only the branch can change what the base reads
                train ft_editnet --text_lr 0; train ft_controlnet --variant controlnet --text_lr 0
                train ft_textcontrol --variant textcontrol --text_lr 0 ;;
            region) train editnet; train freeform --p_region 0 ;;  # UltraEdit: region data helps free-form editing
            aspects) train editnet; train aspects --aspects True ;;  # paper Sec. 5.1
            pefl) train editnet ;;
        esac
    done
done
finish
for part in $PARTS; do
    if [ "$part" = pefl ] && wanted pefl; then
        for seed in $SEEDS; do
            spawn $PY train_pefl.py --base "$OUT/editnet$seed" --aesthetic "$PEFL_REWARDS/aesthetic" \
                --alignment "$PEFL_REWARDS/alignment" --phases 20/15/10x400 --adversarial_from 1 --batch_size 32 --lr 1e-5 --warmup 20 --ema 0.995 \
                --disc_init "$PEFL_REWARDS/aesthetic" --disc_first 200 --disc_lr 3e-4 --reward_noise 0.2 \
                --eta 0.05 --w_aesthetic 0.001 --w_alignment 0.001 --w_coherence 0.1 \
                --seed "$seed" --wandb off --out "$OUT/pefl$seed"
        done
        finish
    fi
    [ "${JUDGE:-1}" = 1 ] || continue
    case $part in
        variants) judge variants -- editnet cached controlnet textcontrol concat
            $PY evaluate.py t2i --ckpt "assets/base$(for run in editnet concat; do
                if wanted $run; then for s in $SEEDS; do echo -n ",$OUT/$run$s"; done; fi; done)" \
                --n "$N" --out "$OUT/judge_t2i" | tee "$OUT/judge_t2i.txt" ;;
        wiring) judge wiring -- editnet attend masked attend_masked ;;
        frozen_text) judge frozen_text -- ft_editnet ft_controlnet ft_textcontrol ;;
        region) judge region -- editnet freeform ;;
        aspects) judge aspects --aspects 9:16,2:3,1:1,3:2,16:9 -- editnet aspects ;;
        pefl) judge pefl -- editnet pefl ;;
    esac
done
