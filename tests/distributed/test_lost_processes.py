"""Processes that are killed, stopped or stuck, for real: nobody waits for ever, each is named, and nothing good is lost."""

import re
import signal
import time
from functools import partial

import pytest

from tests.support import faults
from tests.support.crew import Crew, run
from tests.support.runs import assert_same_bits, losses
from tests.support.scenes import Scenes

pytestmark = pytest.mark.cluster
STEPS = 30
FLAGS = ("--steps", STEPS, "--blr", "0.05", "--save-every", "5", "--keep", "9")
SLOW = partial(faults.slow_steps, 0.1)
IMPATIENT = partial(faults.all_of, (SLOW, partial(faults.quick_watch, 5.0)))
LAST = f"step-{STEPS:07d}"

scene = Scenes()


def kill(rank, shards, folder, whole):
    """No launcher is there to end the survivor."""
    survivor = 1 - rank
    with Crew(2, shards, folder / "run", *FLAGS, fault=SLOW) as crew:
        crew.wait_for("step 7/")
        began = crew.send(signal.SIGKILL, rank)
        assert crew.end(60, (survivor,)) == [4], crew.text()
        print(f"{time.monotonic() - began:.1f} s from SIGKILL of rank {rank} to the end")
        # Its main thread finds that in a collective, or its watch finds it between two: whichever is first.
        named = rf"fastmae: no heartbeat from rank {rank} for \d+ s, after step \d+(, while |; the others end)"
        assert re.search(named, crew.text(survivor)), crew.text(survivor)
    assert_goes_on_to(whole, shards, folder / "run")


def stop(rank, shards, folder, whole):
    with Crew(2, shards, folder / "run", *FLAGS, fault=IMPATIENT) as crew:
        crew.wait_for("step 7/")
        began = crew.send(signal.SIGSTOP, rank)
        assert crew.end(40, (1 - rank,)) == [4], crew.text()
        print(f"{time.monotonic() - began:.1f} s from SIGSTOP to the end, of which 5 s are patience")
        assert re.search(rf"fastmae: no heartbeat from rank {rank} for \d+ s, after step", crew.text(1 - rank))
        crew.send(signal.SIGCONT, rank)  # and it ends, too, when it wakes up
        assert crew.end(60, (rank,)) == [4], crew.text()
    assert_goes_on_to(whole, shards, folder / "run")


def assert_goes_on_to(whole, shards, out):
    """The next start of the run in ``out`` ends with the bits of the run ``whole``."""
    run(2, shards, out, *FLAGS)
    assert_same_bits(out / LAST, whole / LAST)
    assert losses(out) == losses(whole)


@scene
def a_process_that_never_gives_python_back_is_ended_by_its_watchdog(shards, folder, whole):
    fault = partial(faults.all_of, (partial(faults.hold_interpreter_at, 3, 1), partial(faults.quick_watch, 5.0)))
    with Crew(2, shards, folder / "run", *FLAGS, "--timeout", "12", fault=fault) as crew:
        crew.wait_for("step 2/")
        began = time.monotonic()
        (code,) = crew.end(40, (0,))
        assert code == 4 and re.search(r"fastmae: no heartbeat from rank 1 for \d+ s, after step 2", crew.text(0)), crew.text()
        assert crew.end(60, (1,)) == [-signal.SIGKILL]
        print(f"{time.monotonic() - began:.1f} s to the end, of which 17 s are patience")
        assert re.search(r"Python has not run in it for 1[78] s", crew.text(1)) and "faults.py" in crew.text(1)


@scene
def a_stopped_main_process_is_named_and_the_other_ends(shards, folder, whole):
    stop(0, shards, folder, whole)


@scene
def a_stopped_process_is_named_and_the_main_one_ends(shards, folder, whole):
    stop(1, shards, folder, whole)


@scene
def a_run_that_was_suspended_as_a_whole_for_longer_than_anything_may_take_goes_on(shards, folder, whole):
    """Rank 0 waits in a collective meanwhile."""
    slow_one = partial(faults.before_step, partial(time.sleep, 0.5), on=1)
    fault = partial(faults.all_of, (slow_one, partial(faults.quick_watch, 5.0)))
    with Crew(2, shards, folder / "run", *FLAGS, "--timeout", "8", fault=fault) as crew:
        crew.wait_for("step 7/")
        time.sleep(0.2)
        crew.send(signal.SIGSTOP, group=True)
        time.sleep(15)  # more than the watchdog's five seconds above the timeout
        crew.send(signal.SIGCONT, group=True)
        assert crew.end() == [0, 0], crew.text()
    assert_same_bits(folder / "run" / LAST, whole / LAST)


@scene
def a_killed_main_process_is_named_and_the_other_ends(shards, folder, whole):
    kill(0, shards, folder, whole)


@scene
def a_killed_process_is_named_and_the_main_one_ends(shards, folder, whole):
    kill(1, shards, folder, whole)


@scene
def a_step_that_does_not_end_is_aborted_with_the_stacks_of_all(shards, folder, whole):
    with Crew(2, shards, folder / "run", *FLAGS, "--timeout", "5", fault=partial(faults.sleep_at, 3, 1)) as crew:
        crew.wait_for("step 2/")
        began = time.monotonic()
        assert crew.end(60) == [4, 4], crew.text()
        seconds = time.monotonic() - began
        print(f"{seconds:.1f} s to the end, of which 5 s are patience")
        for rank in (0, 1):
            (stacks,) = (p.read_text() for p in (folder / "run" / "hangs").glob(f"step-0000002-rank-{rank}-*.txt"))
            assert stacks.startswith(f"rank {rank} on ") and "most recent call first" in stacks
            assert stacks.partition("\n")[0] in crew.text(rank) and "most recent call first" in crew.text(rank)
        assert "faults.py" in stacks and "faults.py" in crew.text(1)  # where it sleeps
        assert re.search(r"fastmae: rank 1: no progress for \d+ s after step 2, in a step", crew.text(1))
        assert seconds < 5 + 10 + faults.load()


@scene
def a_stuck_loader_names_itself_before_the_watch_does(shards, folder, whole):
    with Crew(2, shards, folder / "run", *FLAGS, "--timeout", "12", fault=partial(faults.stuck_loader, 1)) as crew:
        assert crew.end(90) == [2, 2], crew.text()
        assert re.search(r"fastmae: no data for 6 s; loader workers: pid \d+ at \S+ .*Is the file system gone", crew.text(1))
        assert "fastmae: another rank could not read its data; the reason is in that rank's output" in crew.text(0)


@pytest.fixture(scope="module")
def undisturbed(shard_folder, tmp_path_factory):
    """The folder of a run of two processes to which nothing happened."""
    out = tmp_path_factory.mktemp("undisturbed")
    run(2, shard_folder, out, *FLAGS)
    return out


@pytest.fixture(scope="module")
def ends(request, shard_folder, undisturbed, tmp_path_factory):
    yield from scene.play(request, shard_folder, undisturbed, tmp_path_factory)


@scene.every
def test_that(scene, ends):
    ends[scene].result()
