"""torch's own ends of a process wait for the watch, unless the user has set them, and a lost process is named on GPUs too."""

import re
import signal
from functools import partial

import pytest
import torch

from fastmae.train.distributed import watch
from fastmae.train.distributed.join import set_nccl_defaults
from tests.support import faults
from tests.support.crew import Crew

DUMP, HEARTBEAT, HANDLING = (
    f"TORCH_NCCL_{name}" for name in ("WAIT_TIMEOUT_DUMP_MILSEC", "HEARTBEAT_TIMEOUT_SEC", "ASYNC_ERROR_HANDLING")
)
STEPS = 2000


@pytest.mark.parametrize("first", [1800.0, 7200.0])
def test_torch_ends_a_process_after_the_watch_would_have(first):
    environ = {}
    set_nccl_defaults(first, False, environ)
    assert 4 * int(environ[DUMP]) / 1000 >= watch._LOST_AT_START + 30  # torch waits for four of them after an error
    assert int(environ[HEARTBEAT]) > first
    assert HANDLING not in environ  # torch's own is 3


def test_what_the_user_has_set_stays():
    given = {DUMP: "1", HEARTBEAT: "2", HANDLING: "1"}
    environ = dict(given)
    set_nccl_defaults(1800.0, False, environ)
    assert environ == given


def test_torchruns_own_error_handling_is_replaced_by_torchs():
    for code, expected in (("1", "3"), ("0", "0"), ("2", "2")):
        environ = {HANDLING: code}
        set_nccl_defaults(1800.0, True, environ)
        assert environ[HANDLING] == expected


def test_a_heartbeat_fits_torchs_milliseconds():
    environ = {}
    set_nccl_defaults(1e9, False, environ)
    assert 1000 * int(environ[HEARTBEAT]) < 2**31


@pytest.mark.gpu
@pytest.mark.cluster
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGKILL, 1), (signal.SIGKILL, 0), (signal.SIGSTOP, 1)])
def test_a_lost_process_on_a_gpu_is_named_before_torch_ends_the_others(number, rank, shard_folder, tmp_path):
    """Two processes, a GPU each; the survivor is inside NCCL's all-reduce, which never ends."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"NCCL gives each process a GPU of its own: two are needed, {torch.cuda.device_count()} is there")
    flags = ("--steps", STEPS, "--device", "cuda", "--compile", "off", "--save-every", STEPS, "--draw-every", STEPS)
    fault = partial(faults.all_of, (partial(faults.slow_steps, 0.1), partial(faults.quick_watch, 8.0)))
    with Crew(2, shard_folder, tmp_path / "run", *flags, fault=fault) as crew:
        crew.wait_for("step 7/", 180)
        crew.send(number, rank)
        assert crew.end(90, (1 - rank,)) == [4], crew.text()
        said = crew.text(1 - rank)
        assert re.search(rf"fastmae: no heartbeat from rank {rank} for \d+ s, after step \d+", said), said
        assert "terminate called" not in said and "Fatal Python error" not in said
