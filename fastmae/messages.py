"""Messages of any size between two processes, over a socket that keeps them apart (SOCK_SEQPACKET).

A large one travels as the handle of an anonymous file, so that no message waits for room for its own bytes.
"""

import errno
import os
import pickle
import socket
import sys

from fastmae.files import anonymous_file

_INLINE = 512  # bytes of a message that is sent as it is
_FULL = (errno.EAGAIN, errno.ETOOMANYREFS)  # of a socket's buffer; of handles that one user may have on their way


def send(end: socket.socket, message: tuple, flags: int = 0) -> bool:
    """Send ``message``, which is pickled; False if there is no room for it now.

    Raises ConnectionError if the other side is gone.
    """
    data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
    try:
        if len(data) <= _INLINE:
            end.send(data, flags)
            return True
        with os.fdopen(anonymous_file("fastmae-message"), "wb") as file:
            file.write(data)
            file.flush()
            handle = file.fileno().to_bytes(4, sys.byteorder)
            end.sendmsg([b"\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, handle)], flags)  # send_fds ignores flags
    except OSError as error:
        if error.errno in _FULL:
            return False
        raise
    return True


def receive(end: socket.socket, flags: int = 0) -> tuple | None:
    """The next message, None if the other side is gone. Raises BlockingIOError with MSG_DONTWAIT if there is none yet."""
    data, files, *_ = end.recvmsg(_INLINE, socket.CMSG_LEN(4), flags | socket.MSG_CMSG_CLOEXEC)  # recv_fds ignores flags
    for _, _, handle in files:
        with os.fdopen(int.from_bytes(handle, sys.byteorder), "rb") as file:
            file.seek(0)
            return pickle.load(file)
    return pickle.loads(data) if data else None
