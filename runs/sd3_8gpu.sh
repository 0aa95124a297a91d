#!/usr/bin/env bash
# EditNet and PeFL on SD3-medium, on one machine with 8 GPUs of 80 GB (runs/slurm.sh: on several, with preemption).
#   SD3=sd3_medium.safetensors EDITS=omniedit:DIR bash runs/sd3_8gpu.sh editnet
#   SD3=sd3_medium.safetensors PICTURES=DIR REWARD=imagereward:ImageReward.pt,vocab.txt VGG=vgg16.pth bash runs/sd3_8gpu.sh pefl
# SD3: one file with VAE and encoders, or a diffusers folder. TOKENIZERS=DIR where they do not come with it. The same command
# resumes; what is cached is not cached again. DRY=1 counts EditNet's memory instead.
#
# None of this has run on 8 GPUs, or on SD3's published weights. NOT MEASURED: every batch size, learning rate and number of
# steps below. The memory of a GPU is counted by runs/memory.py, on tensors without data, as the CPU runs it (agreement with measured
# CPU runs: tests/test_memory.py; CUDA's context, NCCL's buffers and cuDNN's workspace come on top):
#   EditNet, 1024x1024, every block recomputed: 19 GiB at 4 pictures a GPU, 26 at 8; every second block: 46 at 4; none: 43 at 2
#   EditNet, 512x512: 19 GiB at 16 with every block recomputed, 45 at 8 with none
#   PeFL, 512x512, everything recomputed, ImageReward and VGG16: 21 GiB at 2 pictures, 23 at 4; 1024x1024: 23 at 1, 28 at 2
set -euo pipefail
cd "$(dirname "$0")/.."
PY=${PYTHON:-python}
OUT=${OUT:-out/sd3}
: "${SD3:?give SD3=FILE or FOLDER of its weights}"
# LAUNCH is torchrun's part of the command: runs/slurm.sh gives another one. Workers get 300 s to save after SIGTERM, not 30.
LAUNCH=${LAUNCH:-"$PY -m torch.distributed.run --standalone --nproc_per_node=8 --shutdown-timeout=300 --"}
[ -z "${TOKENIZERS:-}" ] || TOKENS="--tokenizers $TOKENIZERS"

case ${1:-} in
    editnet)
        : "${EDITS:?give EDITS=PRESET:PATH, pairs in a published form}"
        # text features and latents once, so that neither T5 (9.5 GB) nor the VAE's encoder stands beside the transformer
        [ -n "${DRY:-}" ] || $LAUNCH make_cache.py --base "$SD3" --data "$EDITS" --edits True --image_size 1024 --aspects True \
            ${TOKENS:-} --out "$OUT/edit_cache"
        if [ -n "${DRY:-}" ]; then TRAIN="$PY runs/memory.py omni --ranks 8"; else TRAIN="$LAUNCH train_omni.py"; fi
        $TRAIN --stage edit --init "$SD3" --data "$EDITS" --cache "$OUT/edit_cache" ${TOKENS:-} \
            --image_size 1024 --aspects True --fsdp True --checkpointing 1 --batch_size 8 --accum 2 \
            --lr 1e-5 --warmup 500 --lr_schedule constant --steps 20000 --ema 0.9999 --t_density logit_normal --t_shift 3 --t_weight 0 \
            --sample_every 1000 --save_every 500 --out "$OUT/editnet" ;;
    pefl)
        [ -z "${DRY:-}" ] || { echo "error: DRY: counts EditNet alone: leave it out, or run runs/memory.py pefl" >&2; exit 2; }
        : "${PICTURES:?give PICTURES=FOLDER or .parquet}" "${REWARD:?give REWARD=imagereward:PATH,PATH}" "${VGG:?give VGG=FILE}"
        # without latents: PeFL masks pictures anew in every epoch
        $LAUNCH make_cache.py --base "$SD3" --data "$PICTURES" --split all --latents False ${TOKENS:-} --out "$OUT/picture_cache"
        # SD3 has no mask input: it learns to read masks first
        $LAUNCH train_omni.py --stage inpaint --init "$SD3" --data "$PICTURES" --cache "$OUT/picture_cache" ${TOKENS:-} \
            --image_size 512 --fsdp True --checkpointing 1 --batch_size 16 --lr 1e-5 --warmup 500 --lr_schedule constant \
            --steps 10000 --ema 0.9999 --t_density logit_normal --t_shift 3 --t_weight 0 --save_every 500 --out "$OUT/inpaint"
        # the paper's settings (Sec. 4.1) but for the number of steps, on which it is silent, and for --start, --hold and the
        # weight, with which PeFL helped the small model and without which it did not (RESULTS.md, C1). The coherence model is the small
        # default (rewards.CoherenceConfig); --disc_init FOLDER of a trained reward gives it that one's image tower
        $LAUNCH train_pefl.py --base "$OUT/inpaint" --data "$PICTURES" --cache "$OUT/picture_cache" ${TOKENS:-} \
            --alignment "$REWARD" --vgg "$VGG" --image_size 512 --fsdp True --checkpointing 1 --batch_size 4 --accum 2 \
            --start noise --hold known --w_alignment 0.001 --phases 20/15/10x2000,8/6/3x2000 --save_every 200 --out "$OUT/pefl" ;;
    *) echo "error: ${1:-nothing}: say editnet or pefl" >&2; exit 2 ;;
esac
