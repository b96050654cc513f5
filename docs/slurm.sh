#!/bin/bash
#SBATCH --job-name=ribo_nb --nodes=2 --ntasks-per-node=1 --gpus-per-node=4 --cpus-per-task=16 --time=24:00:00
#SBATCH --requeue --open-mode=append
# sbatch docs/slurm.sh cfg_mamba --data datamount/parquet/train.arrow --out datamount/runs/cfg_mamba
#
# One torchrun per node; they find each other at the first node's port. If a process dies, all are started again, up to
# three times, and go on from the last checkpoint; when the job's time is over, submit it again: the same command goes on.
# All nodes see the same folders. Without SLURM, run the torchrun line on every node, with the same head and id; with
# --nnodes=1:2 it also goes on when a node is lost for good.
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # else processes that begin again meet the addresses of the dead (pytorch#135712)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun torchrun --nnodes="$SLURM_NNODES" --nproc-per-node="${PER_NODE:-gpu}" --max-restarts=3 \
     --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:${PORT:-29500}" --no-python ribo_train "$@"
