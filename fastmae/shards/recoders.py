"""The processes that recode images: results come in the order of the images, and few of them wait in memory.

A task is a handful of images, so that one shard alone keeps every process at work. A thread for each process hands it tasks and
waits for the answers, in queues that an interrupt leaves usable at every moment; futures hold locks of their own meanwhile. Of
each connection either end is open in one process only: when one side dies, however it does, the other reads an end of file and
never waits for the rest of a message.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, Pipe
from multiprocessing.context import ForkProcess
from queue import SimpleQueue

from fastmae.fork import uninterrupted
from fastmae.images.listing import Source
from fastmae.images.recode import Recode, recode

_IMAGES, _BYTES = 8, 1 << 20  # a task: at most so many images, and none after so many bytes of them
_AHEAD = 8  # tasks a worker that run or wait, so that a slow image or a flush to the disk idles nobody
_LOOK = 2.0  # seconds between an idle worker's looks at whether its parent is still there


class RecoderError(RuntimeError):
    """A worker process died; the message says of what."""


def recode_all(sources: Iterable[Source], settings: Recode, workers: int) -> Iterator[tuple[Source, bytes | str]]:
    """Each source with its JPEG bytes, or with the reason why there are none; close it if it is not read to its end.

    ``workers`` processes recode, 0 does it here. Raises RecoderError if one of them dies.
    """
    if workers == 0:
        yield from ((source, _recode_one(source, settings)) for source in sources)
        return
    recoders: list[tuple[ForkProcess, Connection]] = []
    threads: list[threading.Thread] = []
    todo: SimpleQueue[tuple[list[Source], SimpleQueue] | None] = SimpleQueue()
    waiting: deque[tuple[list[Source], SimpleQueue]] = deque()
    try:
        with uninterrupted():
            _start(recoders, workers, settings)
            for recoder in recoders:
                thread = threading.Thread(target=_ask, args=(todo, *recoder), daemon=True)
                thread.start()
                threads.append(thread)
        for task in _tasks(sources):
            waiting.append((task, SimpleQueue()))
            todo.put(waiting[-1])
            if len(waiting) >= _AHEAD * workers:
                yield from _take(waiting)
        while waiting:
            yield from _take(waiting)
    finally:
        for process, _ in recoders:
            process.kill()  # it only reads: there is nothing to finish, and its thread gets an end of file
        for _ in threads:
            todo.put(None)
        for thread in threads:
            thread.join()
        for process, connection in recoders:
            process.join()
            connection.close()


def _ask(todo: SimpleQueue, process: ForkProcess, connection: Connection) -> None:
    """The life of a worker's thread: until there is nothing to do. Each task has a queue for its answer."""
    while item := todo.get():
        task, answer = item
        try:
            connection.send(task)
            answer.put(connection.recv())
        except (EOFError, OSError):
            process.join()
            answer.put(RecoderError(_cause(process, task)))
        except Exception as error:  # raised where the answer is waited for
            answer.put(error)


def _tasks(sources: Iterable[Source]) -> Iterator[list[Source]]:
    task: list[Source] = []
    held = 0
    for source in sources:
        task.append(source)
        held += source.bytes
        if len(task) == _IMAGES or held > _BYTES:
            yield task
            task, held = [], 0
    if task:
        yield task


def _take(waiting: deque[tuple[list[Source], SimpleQueue]]) -> Iterator[tuple[Source, bytes | str]]:
    task, answer = waiting.popleft()
    results = answer.get()
    if isinstance(results, Exception):
        raise results
    yield from zip(task, results, strict=True)


def _start(recoders: list[tuple[ForkProcess, Connection]], workers: int, settings: Recode) -> None:
    """Fork the workers and add them to ``recoders``."""
    for _ in range(workers):
        ours, theirs = Pipe()
        not_theirs = [ours, *(connection for _, connection in recoders)]
        # Forked on every Python: from a fork server, a worker would not be this process's child.
        process = multiprocessing.get_context("fork").Process(
            target=_serve, args=(theirs, settings, not_theirs, os.getpid()), daemon=True
        )
        process.start()
        theirs.close()
        recoders.append((process, ours))


def _cause(process: ForkProcess, task: list[Source]) -> str:
    code = process.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
    if code in (-signal.SIGKILL, -signal.SIGTERM):
        return f"worker process {process.pid} {how}, probably out of memory; use fewer workers"
    names = ", ".join(source.name for source in task)
    return f"worker process {process.pid} {how} at one of these images, which may have to be left out: {names}"


def _serve(connection: Connection, settings: Recode, not_mine: list[Connection], parent: int) -> None:
    """The life of a worker: until its parent ends it or is gone."""
    gc.freeze()  # else a collection of garbage would copy the parent's list of images into this process
    for other in not_mine:
        other.close()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, which ends its workers
    with contextlib.suppress(EOFError, OSError):
        while True:
            # A fork that somebody else made meanwhile may hold the parent's end open.
            while not connection.poll(_LOOK):
                if os.getppid() != parent:
                    return
            connection.send([_recode_one(source, settings) for source in connection.recv()])


def _recode_one(source: Source, settings: Recode) -> bytes | str:
    try:
        return recode(source.path, settings)
    except Exception as error:  # the image is named and counted, and no image ends the build
        return str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
