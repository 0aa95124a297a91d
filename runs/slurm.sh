#!/usr/bin/env bash
#SBATCH --job-name=editing
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@600
#SBATCH --output=%x-%j.out
# Any run of these scripts under Slurm with preemption: torchrun on every node, a checkpoint before the job is taken away, and
# the same job in the queue again, which resumes.
#   SD3=... EDITS=... sbatch runs/slurm.sh bash runs/sd3_8gpu.sh editnet
#   sbatch --nodes=1 runs/slurm.sh bash -c '$LAUNCH train_omni.py --stage base --data scenes --out /shared/run'
# OUT must be on a file system that all nodes see: every rank writes its shards there. The command calls torchrun as $LAUNCH.
#
# NOT MEASURED: this has not run under Slurm. Nodes, CPUs and the time above are placeholders. 600 s between signal and end are to
# cover one step and one save: an EditNet on SD3-medium writes about 42 GB (calculated: twice 12.7 of weights, 17 of Adam's state),
# 25 GB of them by one rank; raise it where that is slow. Adding or taking nodes keeps a run going, but is another batch size.
# Measured, on one machine with torch 2.13: torchrun forwards SIGUSR1 only if told to (else it dies and orphans its workers), it
# kills workers 30 s after SIGTERM unless told otherwise, and it exits with 1 even if all workers saved and ended well: so whether
# to go on is decided here, by who asked to stop, and not by the exit code.
set -uo pipefail
[ $# -gt 0 ] || { echo "error: give the command, such as: sbatch runs/slurm.sh bash runs/sd3_8gpu.sh editnet" >&2; exit 2; }
[ -n "${SLURM_JOB_ID:-}" ] || { echo "error: no SLURM_JOB_ID: start this with sbatch" >&2; exit 2; }
cd "${SLURM_SUBMIT_DIR:?}" || exit 2

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
# srun starts one agent a node; its own stop must outlast the save, and SIGUSR1 must pass through it to the workers
export LAUNCH="srun --kill-on-bad-exit=1 ${PYTHON:-python} -m torch.distributed.run --nnodes=$SLURM_NNODES
    --nproc_per_node=${SLURM_GPUS_ON_NODE:-8} --rdzv_backend=c10d --rdzv_endpoint=$head:${PORT:-29500} --rdzv_id=$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    --max-restarts=0 --shutdown-timeout=600 --signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1 --"
export TORCH_NCCL_DUMP_ON_TIMEOUT=1 TORCH_NCCL_TRACE_BUFFER_SIZE=20000  # a hang then says which rank is missing

stopped=""
on_signal() {
    stopped=1
    # only this job's steps get it: a shell between here and srun would die of it
    scancel --signal=USR1 "$SLURM_JOB_ID"
}
trap on_signal USR1 TERM

"$@" &
run=$!
wait "$run"; code=$?
while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done  # a trapped signal ends `wait` early

if [ -n "$stopped" ]; then
    echo "stopped by a signal, in the queue again (restart ${SLURM_RESTART_COUNT:-0})"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
