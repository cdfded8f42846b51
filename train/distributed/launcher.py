"""Which process of how many this is, from the variables that a launcher sets: torchrun, or Slurm's srun.

Sources, each the list of variables that a launcher gives its processes: torchrun, "Environment Variables"; DeepSpeed,
``launcher/launch.py`` (LOCAL_SIZE); Slurm, srun(1), "OUTPUT ENVIRONMENT VARIABLES"; of mpirun, which is refused: Open MPI,
"Environment variables set for MPI applications" (PMIX_* too), and MPICH's Hydra, Intel MPI and HPE PALS, which set PMI_*.

With variables of several launchers, the innermost one counts: torchrun is started inside steps and jobs, and mpirun starts its
daemons through srun, so that their step's variables are not those of the processes.
"""

import itertools
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from fastmae.cores import affinity_cores, cpu_quota
from fastmae.errors import InputError

_PORTS = range(10000, 30000)  # above the services, below the ports that Linux gives to connections (from 32768 on)
_STEP = 7919  # ports between two steps of a job; a prime, so that only jobs far apart could share one
_PORT = 29500  # torchrun's, where there is no job id
_HOSTS = 65536  # most names of a list, as Slurm's own
_DIGITS = "[0-9]{1,18}"
_ENTRY = rf"(?:[^\s,\[\]]|\[{_DIGITS}(?:-{_DIGITS})?(?:,{_DIGITS}(?:-{_DIGITS})?)*\])+"
_TASKS = rf"({_DIGITS})(?:\(x({_DIGITS})\))?"


@dataclass(frozen=True, kw_only=True)
class RankInfo:
    """What a launcher gives a process: its rank, the world size, and where rank 0 listens."""

    rank: int = 0
    size: int = 1
    local_rank: int | None = 0
    """Among the processes of this machine; None if the launcher does not give it: counted at the rendezvous."""
    local_size: int | None = 1
    """Processes on this machine; None as above."""
    address: str | None = None
    """Where the process of rank 0 listens; None in a run of one."""
    port: int | None = None
    source: str = field(default="", compare=False)
    """The variables that address and port come from."""
    hosts: tuple[str, ...] = field(default=(), compare=False)
    """The node of each rank, as far as the launcher gives it; else empty."""
    launcher: str = "none"
    """none, torchrun (or whatever sets its variables) or slurm."""
    is_elastic: bool = field(default=False, compare=False)
    """Started by torchrun's own agent."""
    has_agent_store: bool = field(default=False, compare=False)
    """Whether that agent keeps a store at ``address`` and ``port``."""


class _Names(NamedTuple):
    """The variables of a launcher."""

    rank: str
    size: str
    local_rank: str
    local_size: str


_TORCHRUN = _Names("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
_DEEPSPEED = _TORCHRUN._replace(local_size="LOCAL_SIZE")
_MPI = (("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))  # PMIX_RANK comes without a size


def read_launcher(environ: Mapping[str, str] = os.environ) -> RankInfo:
    """This process's rank. Without a launcher, or in a Slurm shell or batch script outside a step: a run of one.

    Operators and services set RANK and WORLD_SIZE without LOCAL_WORLD_SIZE, or without LOCAL_RANK as well: what is missing is
    None, to be counted at the rendezvous. WORLD_SIZE=1 alone, left over in an environment, is no launcher's. Under srun
    MASTER_ADDR and MASTER_PORT, if set, are where rank 0 listens. Raises InputError, which names the variable, if some are
    missing, no numbers, or contradict each other, and for a process of mpirun's, which names torchrun.
    """
    if _any(environ, _TORCHRUN.rank) or environ.get(_TORCHRUN.size, "") not in ("", "1"):
        return _torchrun(environ)
    is_step = _any(environ, "SLURM_STEP_NUM_TASKS")
    step = environ.get("SLURM_PROCID"), environ.get("SLURM_STEP_NUM_TASKS")
    for rank, size in _MPI:
        is_of_step = is_step and (environ.get(rank), environ.get(size)) == step  # srun's pmi plugins set these as well
        if _any(environ, rank, size) and environ.get(size) != "1" and not is_of_step:
            raise _mpirun(size, environ)
    if _any(environ, "PMIX_RANK") and not is_step and not _any(environ, *(size for _, size in _MPI)):
        raise _mpirun("PMIX_RANK", environ)
    return _slurm(environ) if is_step else RankInfo()


def _mpirun(name: str, environ: Mapping[str, str]) -> InputError:
    return InputError(
        f"{name}={environ.get(name, '')}: mpirun gives no address of rank 0; start the run with torchrun "
        "(torchrun --nproc-per-node 8 -m fastmae.train ...) or srun: docs/launch.md"
    )


def default_workers(local_ranks: int | None = None) -> int:
    """Loader processes for each of the training processes on this machine, whose number the launcher gives by default."""
    cores, info = affinity_cores(), read_launcher()
    ranks = max(1, info.local_size if local_ranks is None else local_ranks)
    is_bound = local_ranks is None and info.launcher == "slurm" and cores < int(os.environ.get("SLURM_CPUS_ON_NODE", 0))
    share = cores if is_bound else cores // ranks  # srun has bound the task to its own share already
    if (quota := cpu_quota()) is not None:  # which all processes of a container share
        share = min(share, math.ceil(quota) // ranks)
    return max(1, share - 1)


def node_names(text: str) -> list[str]:
    """The names of a list in Slurm's form: ``node[08-10,12],gpu5`` is node08, node09, node10, node12, gpu5.

    A name may hold several brackets; the last runs fastest. Raises InputError on what is no such list.
    """
    if not re.fullmatch(rf"{_ENTRY}(?:,{_ENTRY})*", text):
        raise InputError(f"a list of nodes looks like node[001-003,007],gpu5, got {text!r}")
    names = []
    for entry in re.findall(_ENTRY, text):
        parts = [_numbers(part, text) if part.startswith("[") else [part] for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", entry)]
        if len(names) + math.prod(map(len, parts)) > _HOSTS:
            raise InputError(f"a list of nodes has at most {_HOSTS} names, got {text!r}")
        names += map("".join, itertools.product(*parts))
    return names


def _numbers(bracket: str, text: str) -> list[str]:
    """01, 02, 03, 7 of "[01-03,7]"."""
    numbers = []
    for item in bracket[1:-1].split(","):
        first, _, last = item.partition("-")
        count = int(last or first) - int(first) + 1
        if not 1 <= count <= _HOSTS:
            raise InputError(f"a range of nodes must be ascending, with at most {_HOSTS} names, got {item} in {text!r}")
        numbers += (f"{number:0{len(first)}}" for number in range(int(first), int(first) + count))
    return numbers


def _torchrun(environ: Mapping[str, str]) -> RankInfo:
    names = _TORCHRUN
    if not _any(environ, names.local_size) and _any(environ, names.local_rank) and _any(environ, _DEEPSPEED.local_size):
        names = _DEEPSPEED
    info = replace(
        _read(environ, names, countable=not _any(environ, names.local_size)),
        is_elastic=_any(environ, "TORCHELASTIC_RUN_ID"),
        has_agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )
    if info.size == 1:  # needs no address, whatever is left over of one
        return replace(info, local_rank=0, local_size=1)
    address, port = _text(environ, "MASTER_ADDR", names.size), _number(environ, "MASTER_PORT", "MASTER_ADDR")
    return _at(info, (address, "MASTER_ADDR"), (port, "MASTER_PORT"))


def _slurm(environ: Mapping[str, str]) -> RankInfo:
    rank, size = _number(environ, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), _number(environ, "SLURM_STEP_NUM_TASKS")
    tasks = _tasks_per_node(_text(environ, "SLURM_STEP_TASKS_PER_NODE", "SLURM_STEP_NUM_TASKS"))
    node = _number(environ, "SLURM_NODEID", "SLURM_STEP_NUM_TASKS") if len(set(tasks)) > 1 else 0
    if node >= len(tasks) or sum(tasks) != size:
        raise InputError(
            f"SLURM_STEP_TASKS_PER_NODE={environ['SLURM_STEP_TASKS_PER_NODE']} does not fit SLURM_STEP_NUM_TASKS={size}"
            f"{f' and SLURM_NODEID={node}' if node else ''}"
        )
    names = _Names("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE")
    local_rank = _number(environ, "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS")
    info = _checked(RankInfo(rank=rank, size=size, local_rank=local_rank, local_size=tasks[node], launcher="slurm"), names)
    nodes = _slurm_nodes(environ, are_needed=len(tasks) > 1 and not _any(environ, "MASTER_ADDR"))
    is_block = environ.get("SLURM_DISTRIBUTION", "block").startswith("block") and len(nodes) == len(tasks)
    hosts = tuple(itertools.chain(*map(itertools.repeat, nodes, tasks))) if is_block else ()
    if _any(environ, "MASTER_ADDR"):
        address = environ["MASTER_ADDR"], "MASTER_ADDR"
    elif len(tasks) == 1:
        address = "127.0.0.1", "one node by SLURM_STEP_TASKS_PER_NODE"
    else:
        address = nodes[0], "SLURM_STEP_NODELIST"
    step = _number(environ, "SLURM_STEP_ID") if _any(environ, "SLURM_STEP_ID") else 0
    return _at(replace(info, hosts=hosts), address, _port(environ, step))


def _slurm_nodes(environ: Mapping[str, str], *, are_needed: bool) -> list[str]:
    """The nodes of the step; none if they cannot be read and are not needed."""
    if not are_needed and not _any(environ, "SLURM_STEP_NODELIST"):
        return []
    text = _text(environ, "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS")
    try:
        return node_names(text)
    except InputError as error:
        if are_needed:
            raise InputError(f"SLURM_STEP_NODELIST: {error}") from None
        return []


def _tasks_per_node(text: str) -> list[int]:
    """4, 4, 2 of "4(x2),2"."""
    if not re.fullmatch(rf"{_TASKS}(?:,{_TASKS})*", text):
        raise InputError(f"SLURM_STEP_TASKS_PER_NODE looks like 4(x2),2, got {text!r}")
    groups = [(int(tasks), int(nodes or 1)) for tasks, nodes in re.findall(_TASKS, text)]
    if sum(nodes for _, nodes in groups) > _HOSTS:
        raise InputError(f"SLURM_STEP_TASKS_PER_NODE has at most {_HOSTS} nodes, got {text!r}")
    return [tasks for tasks, nodes in groups for _ in range(nodes)]


def _port(environ: Mapping[str, str], step: int) -> tuple[int, str]:
    """MASTER_PORT, or one of the job's own, equal on all machines and different for jobs that share one; and its source."""
    if _any(environ, "MASTER_PORT"):
        return _number(environ, "MASTER_PORT"), "MASTER_PORT"
    if _any(environ, "SLURM_JOB_ID"):
        return _PORTS[(_number(environ, "SLURM_JOB_ID") + step * _STEP) % len(_PORTS)], "SLURM_JOB_ID"
    return _PORT, "the default port"


def _read(environ: Mapping[str, str], names: _Names, countable: bool) -> RankInfo:
    """A rank from four numbers. Of one that is missing, the message names another that is set.

    ``countable``: the number of processes on this machine is missing, and may be; then this one's among them may be too.
    """
    present = next(name for name in names if _any(environ, name))
    may_miss = {names.local_rank, names.local_size} if countable else set()
    numbers = {
        field: None if name in may_miss and not _any(environ, name) else _number(environ, name, present)
        for field, name in names._asdict().items()
    }
    return _checked(RankInfo(**numbers, launcher="torchrun"), names)


def _checked(info: RankInfo, names: _Names) -> RankInfo:
    """Raises InputError on numbers that cannot be true together."""
    locals_below = "size" if info.local_size is None else "local_size"
    for small, large in (("rank", "size"), ("local_rank", locals_below)):
        if getattr(info, small) is not None and getattr(info, small) >= getattr(info, large):
            raise InputError(
                f"{getattr(names, small)}={getattr(info, small)} must be less than "
                f"{getattr(names, large)}={getattr(info, large)}"
            )
    if info.local_size is not None and info.local_size > info.size:
        raise InputError(f"{names.local_size}={info.local_size} must not exceed {names.size}={info.size}")
    return info


def _at(info: RankInfo, address: tuple[str, str], port: tuple[int, str]) -> RankInfo:
    """``info`` with the address and port of rank 0, each given with its source."""
    if not 1 <= port[0] <= 65535:
        raise InputError(f"MASTER_PORT must be between 1 and 65535, got {port[0]}")
    return replace(info, address=address[0], port=port[0], source=f"{address[1]} and {port[1]}")


def _any(environ: Mapping[str, str], *names: str) -> bool:
    """Whether one of them is set, and not to nothing."""
    return any(environ.get(name) for name in names)


def _text(environ: Mapping[str, str], name: str, because: str) -> str:
    if not environ.get(name):
        raise InputError(f"{name} is not set, although {because}={environ.get(because, '')} is; unset both, or set both")
    return environ[name]


def _number(environ: Mapping[str, str], name: str, because: str = "") -> int:
    text = _text(environ, name, because)
    if not re.fullmatch(_DIGITS, text):
        raise InputError(f"{name} must be an integer, not negative, got {text!r}")
    return int(text)
