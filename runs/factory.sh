#!/usr/bin/env bash
# The data half: pairs by OmniEdit's seven specialists and UltraEdit's regions, scored, the best refined, packed.
#   bash runs/factory.sh OUT                     on scenes, judged by their truth
#   DATA=requests.jsonl BASE=sd3_inpaint EDITOR=sd3_editnet JUDGE=http://HOST/v1 JUDGE_MODEL=NAME bash runs/factory.sh OUT
# Every command goes on after a kill; RUN="torchrun --nproc_per_node=8 --" shares each out. Pairs that wait for more of the
# stage before are made when the same command is given again.
set -euo pipefail
OUT=$(realpath -m "${1:?usage: bash runs/factory.sh OUT}")
cd "$(dirname "$0")/.."
RUN=${RUN:-${PYTHON:-python}}
DATA=${DATA:-scenes} BASE=${BASE:-assets/base} EDITOR=${EDITOR:-assets/editnet} N=${N:-7000} TRIES=${TRIES:-4}
JUDGE=${JUDGE:-truth} JUDGE_MODEL=${JUDGE_MODEL:-}
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
judge="--judge $JUDGE --judge_model=$JUDGE_MODEL"

# 1) seven specialists, several tries each; an addition is its removal backwards. --behind False: assets/base has learned to
#    erase by a prompt of its own; a model that has not is told what is behind
$RUN make_edits.py specialist --data "$DATA" --ckpt "$BASE" --editor "$EDITOR" --n "$N" --tries "$TRIES" --steps 10 --solver dpm \
    --behind "${BEHIND:-False}" \
    --tasks swap,remove,add,attribute,background,environment,style --out "$OUT/made"
# 2) regions: soft masks, alternating blend
$RUN make_edits.py region --data "$DATA" --ckpt "$BASE" --n $((N / 7)) --tries "$TRIES" --steps 10 --out "$OUT/regions"
# 3) scores, and what 9 of 10 keeps
for part in made regions; do
    $RUN make_edits.py score --data "$OUT/$part" $judge --out "$OUT/$part.scored"
done
$RUN make_edits.py pack --data "$OUT/made.scored,$OUT/regions.scored" --out "$OUT/pairs"
# 4) the same pairs refined, scored anew, packed. On 64 pixels -4.649 would redraw everything (RESULTS.md)
$RUN make_edits.py refine --data "$OUT/made.scored" --ckpt "$BASE" --logsnr "${LOGSNR:-0}" --steps "${STEPS:-10,8}" --out "$OUT/refined"
$RUN make_edits.py score --data "$OUT/refined" $judge --out "$OUT/refined.scored"
$RUN make_edits.py pack --data "$OUT/refined.scored" --out "$OUT/refined.pairs"
${PYTHON:-python} data.py check "omniedit:$OUT/pairs" --out "$OUT/pairs.png"
echo "pairs: --data omniedit:$OUT/pairs and omniedit:$OUT/refined.pairs; sheets: $OUT/*/sheet.png"
