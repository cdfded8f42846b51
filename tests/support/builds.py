"""Builds of shards as real processes, forked from one that has imported everything, to be killed and interrupted."""

import os
from pathlib import Path

from fastmae.images.recode import Recode
from tests.support.processes import wait_until

SETTINGS = {"settings": Recode(resize=64), "samples_per_shard": 7}


# A process for each line, which builds in a session of its own; torch is imported once for all of them.
FORGE = """
import os, signal, sys, time
from fastmae.images.recode import Recode
from fastmae.shards.build import write_shards
from fastmae.errors import InputError

def build(source, out, log, workers):
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
    try:
        write_shards(source, out, Recode(resize=64), samples_per_shard=7, workers=int(workers))
    except InputError as error:
        print(error, file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)

if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the dead
    for line in sys.stdin:
        if (pid := os.fork()) == 0:
            build(*line.rstrip("\\n").split("\\t"))
            sys.stderr.flush()
            os._exit(0)
        print(pid, flush=True)
"""


class Build:
    """A running build."""

    def __init__(self, forge, source, out, workers=2):
        self.out, self.log = out, out.with_name(f"{out.name}.log")
        forge.stdin.write(f"{source}\t{out}\t{self.log}\t{workers}\n")
        forge.stdin.flush()
        self.pid = int(forge.stdout.readline())

    def processes(self):
        """Process ids of the build and of whatever it started."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                state, _, _, session = stat.read_text().rpartition(")")[2].split()[:4]
            except OSError:  # ended meanwhile
                continue
            if int(session) == self.pid and state != "Z":
                found.append(int(stat.parent.name))
        return found

    def is_running(self):
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def wait(self, seconds=60):
        """Wait for its end and return what it said; nobody may be left after it."""
        assert wait_until(lambda: not self.is_running(), seconds)
        assert wait_until(lambda: not self.processes(), 5)
        return self.log.read_text()


def begun(*arguments):
    """A build that has finished a shard."""
    build = Build(*arguments)
    assert wait_until(lambda: any(build.out.glob("*.tar")), 30)
    return build
