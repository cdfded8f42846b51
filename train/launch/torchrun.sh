#!/bin/bash
# fastmae under torchrun: all GPUs of one machine, or of several.
#
#   one machine       ./torchrun.sh --recipe reference-l --data SHARDS --out RUN
#   several, on each  NNODES=4 HEAD=node001 ./torchrun.sh --recipe reference-l --data SHARDS --out RUN
#
# SHARDS and RUN must be the same folders on all machines. HEAD is the name of one of them, which the others can reach at
# PORT; two runs that share it need a JOB and a PORT each. These settings may be changed here or given as variables:
NNODES=${NNODES:-1}
PORT=${PORT:-29400}
JOB=${JOB:-fastmae}
NPROC=${NPROC:-gpu}                 # processes a machine: a number, or one for each GPU
MAX_RESTARTS=${MAX_RESTARTS:-3}     # times that all processes start again after one has failed; they resume from --out
PYTHON=${PYTHON:-python}

set -eu

# Threads of torch's on the CPU, for each process; the loader's workers are processes and need the other cores.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# CHANGE, if NCCL or gloo pick the wrong network between machines; `ip -br addr` lists the names.
# export NCCL_SOCKET_IFNAME=eth0 GLOO_SOCKET_IFNAME=eth0

# torchrun passes these signals on, and waits so many seconds for the checkpoint before it kills (its default is 30). Older
# versions of torch know only some of this, and ignore the rest.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2
export PET_SHUTDOWN_TIMEOUT=${PET_SHUTDOWN_TIMEOUT:-120}

if [ "$NNODES" = 1 ]; then
    rendezvous=(--standalone)
else
    rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-id "$JOB"
                --rdzv-endpoint "${HEAD:?is not set: the name of one of the machines, the same on all}:$PORT")
fi

# exec, so that a signal to this script reaches torchrun.
exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$NPROC" \
    --max-restarts "$MAX_RESTARTS" --monitor-interval 1 -m fastmae.train pretrain "$@"
