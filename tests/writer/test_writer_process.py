"""The writer process alone: a real interpreter, and forked ones."""

import os
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
import torch

from phi4.errors import PlatformError
from phi4.rundir.manifest import entry_of
from phi4.writer import (
    Failed,
    ShardFile,
    Staging,
    WriterProcess,
    WriteShards,
    Written,
    write_shard_file,
)
from tests.support.forked_writer import forked_writer
from tests.support.ranks import run_ranks
from tests.support.waiting import wait_until

CPU = torch.device("cpu")


def _tensors() -> list[torch.Tensor]:
    whole = torch.arange(24, dtype=torch.float32)
    return [
        whole[3:9].view(2, 3),
        torch.ones(5, dtype=torch.bfloat16),
        torch.empty(0, 4),
        torch.arange(12).view(3, 4).t(),
        torch.tensor(7, dtype=torch.uint8),
    ]


def _written_by(writer: WriterProcess, path: Path) -> Written | Failed:
    tensors = _tensors()
    staged = writer.staging.stage(tensors)
    for tensor in tensors:
        tensor.zero_()
    writer.submit(WriteShards((ShardFile(path, (b"plain", *staged)),)))
    return wait_until(writer.reply, "the writer's answer")


def _check_forked(rank: int, world_size: int, root: Path) -> None:
    direct = write_shard_file(root / "direct", [b"plain", *_tensors()])
    with closing(forked_writer(Staging(CPU))) as writer:
        (file,) = _written_by(writer, root / "staged").files
        assert file.places == direct.places and file.sha256 == direct.sha256
        content = (root / "staged").read_bytes()
        assert (file.num_bytes, file.sha256) == (len(content), entry_of(content).sha256)
        assert content.startswith(b"plain")
        for (offset, length), expected in zip(file.places[1:], _tensors(), strict=True):
            (root / "one").write_bytes(content[offset : offset + length])
            found = torch.load(root / "one", weights_only=True)
            assert found.dtype == expected.dtype and torch.equal(found, expected)
            assert found.untyped_storage().size() == expected.numel() * expected.itemsize
        # What another writer may have begun is never written over.
        assert "File exists" in _written_by(writer, root / "staged").reason
        assert "No such file" in _written_by(writer, root / "nowhere" / "x").reason
        # Signals that ask a run to save and end leave it alone.
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(writer.pid, number)
        assert isinstance(_written_by(writer, root / "more"), Written)
        before = writer.pid
        os.kill(before, signal.SIGKILL)
        ended = psutil.STATUS_ZOMBIE
        wait_until(lambda: psutil.Process(before).status() == ended, "the end of the writer")
        # An idle one that ended is replaced by the next task.
        assert isinstance(_written_by(writer, root / "most"), Written) and writer.pid != before


def test_tensors_are_written_as_they_were_staged(tmp_path: Path) -> None:
    run_ranks(1, _check_forked, tmp_path)


def test_memory_that_the_driver_does_not_pin_is_an_error_each_time() -> None:
    staging = Staging(torch.device("cuda"))
    with patch("torch.cuda.cudart") as cudart:
        cudart().cudaHostRegister.return_value = 2
        for num_bytes in (64, 32):
            with pytest.raises(PlatformError, match=r"cannot pin .* \(error 2\)"):
                staging.stage([torch.zeros(num_bytes, dtype=torch.uint8)])
        cudart().cudaHostUnregister.assert_not_called()
        staging.close()


def test_memory_that_the_machine_has_not_is_an_error_that_says_what_to_do() -> None:
    staging = Staging(CPU, ranks_per_host=1 << 40)
    with pytest.raises(Exception, match=r"checkpoint\.asynchronous=false"):
        staging.stage([torch.ones(1 << 10)])
    staging.close()


_OWNER = """
import sys, time, torch
from pathlib import Path
from phi4.writer import ShardFile, Staging, WriterProcess, WriteShards, Written
writer = WriterProcess(Staging(torch.device("cpu")))
staged = writer.staging.stage([torch.ones(3)])
writer.submit(WriteShards((ShardFile(Path(sys.argv[1]), tuple(staged)),)))
while (reply := writer.reply()) is None:
    time.sleep(0.01)
assert isinstance(reply, Written), reply
print(writer.pid, flush=True)
time.sleep(1e6)
"""


@pytest.mark.slow
def test_interpreter_writes_and_ends_with_its_rank(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _OWNER, tmp_path / "shard"], stdout=subprocess.PIPE, text=True
    ) as owner:
        pid = int(owner.stdout.readline())
        writer = psutil.Process(pid)
        assert writer.ppid() == owner.pid and (tmp_path / "shard").stat().st_size > 12
        owner.kill()
    wait_until(lambda: not psutil.pid_exists(pid), "the writer to end with its rank")
