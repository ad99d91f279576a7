"""The writer process: executes tasks one after the other, and ends with the rank that started it.

Signals that ask a run to save and end reach every process of a job; this one ignores them, because
the rank decides, and the file being written may belong to the save that the signal requests.
"""

import ctypes
import mmap
import os
import pickle
import signal
import socket
import struct
import sys

from phi4.errors import Phi4Error
from phi4.rundir.replica import replicate
from phi4.writer.messages import (
    Commit,
    Committed,
    Failed,
    Replicate,
    Replicated,
    Reply,
    Task,
    WriteShards,
    Written,
)
from phi4.writer.shard_file import write_shard_file
from phi4.writer.staging import staged_records

FRAME = struct.Struct("<QQ")
"""Offset and length of a pickled message in the shared memory: small enough that sending it over
the socket never blocks."""

_PR_SET_PDEATHSIG = 1
_NICENESS = 10
"""CPU weight a tenth of a rank's if they share a core: a save may take longer, a step may not."""


def serve(control_fd: int, memory_fd: int, parent_pid: int) -> None:
    """Execute the rank's tasks until it closes the socket or ends.

    Args:
        control_fd: a socket that carries a FRAME per message.
        memory_fd: the shared memory.
        parent_pid: the rank's process.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    _end_with(parent_pid)
    os.nice(_NICENESS)
    with socket.socket(fileno=control_fd) as control:
        while frame := control.recv(FRAME.size):
            offset, length = FRAME.unpack(frame)
            reply = _done(pickle.loads(os.pread(memory_fd, length, offset)), memory_fd)
            content = pickle.dumps(reply)
            write_all(memory_fd, content, offset)
            control.send(FRAME.pack(offset, len(content)))


def write_all(fd: int, content: bytes, offset: int) -> None:
    """Write a message into the shared memory."""
    while content:
        written = os.pwrite(fd, content, offset)
        content, offset = content[written:], offset + written


def _end_with(parent_pid: int) -> None:
    """Have the kernel kill this process when the rank ends, for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(0)


def _done(task: Task, memory_fd: int) -> Reply:
    try:
        if isinstance(task, WriteShards):
            return _write(task, memory_fd)
        if isinstance(task, Replicate):
            replicate(**vars(task))
            return Replicated()
        _commit(task)
        return Committed()
    except OSError as error:
        return Failed(error.strerror or str(error), error.errno, error.filename)
    except Phi4Error as error:
        return Failed(str(error))
    except Exception as error:
        return Failed(f"{type(error).__name__}: {error}")


def _write(task: WriteShards, memory_fd: int) -> Written:
    # Not closed here: closing is refused while a tensor refers to it.
    memory = mmap.mmap(memory_fd, 0)
    return Written(
        tuple(
            write_shard_file(file.path, staged_records(memory, file.records)) for file in task.files
        )
    )


def _commit(task: Commit) -> None:
    if task.lease is not None:
        task.lease.check()
    task.directory.commit(task.files, task.manifest)
    task.directory.prune(task.retention)
