"""The work directory of a tokenization, from its plan to the finished pair.

`PREFIX.work` holds the plan, one report per finished part and the runs that the report counts. It
is the only state that jobs on several machines share and that a resumed job needs. Next to a
finished pair `PREFIX.plan.json` keeps the plan, so that a late job detects that nothing is left to
do.
"""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

from phi4.data.files.atomic_files import write_atomically
from phi4.data.files.inputs import PLAN_FILE, WORK_SUFFIX
from phi4.data.files.manifest import manifest_path
from phi4.data.files.rejections import rejected_path
from phi4.data.files.token_writer import existing_file
from phi4.data.tokenize.part_report import PartReport
from phi4.data.tokenize.plan import TokenizePlan, difference
from phi4.errors import DataError

_PART_FILE = re.compile(r"(\d{6,})(\.json|-\d{4,}\.(tokens|keys))(\.partial-[0-9a-f]+)?")
_OTHER_FILE = re.compile(
    r"plan\.json\.partial-[0-9a-f]+|rejected-\d+-of-\d+\.jsonl(\.partial-[0-9a-f]+)?"
)


class FinishedPlan(msgspec.Struct, frozen=True):
    """The plan of a finished pair, with the sha256 of the pair's manifest."""

    manifest_sha256: str
    plan: TokenizePlan


def work_directory(prefix: str | Path) -> Path:
    """Return the directory of the runs of `PREFIX.bin` until they are merged."""
    return Path(f"{prefix}{WORK_SUFFIX}")


def is_finished(plan: TokenizePlan, prefix: str | Path, *, overwrite: bool = False) -> bool:
    """Return whether this plan has already produced the pair of a prefix.

    Removes remains of the work directory that a killed merge left.

    Args:
        plan: plan of the job.
        prefix: prefix of the pair to be written.
        overwrite: allow replacing another pair.

    Raises:
        DataError: another pair exists under the prefix.
    """
    path, finished = work_directory(prefix) / PLAN_FILE, _finished_plan(prefix)
    if finished == plan:
        if path.exists() and path.read_bytes() == msgspec.json.encode(plan):
            discard(prefix, plan)
        with suppress(OSError):  # Empty if a job was killed just before it removed it.
            path.parent.rmdir()
        return True
    if not (path.exists() or overwrite) and (existing := existing_file(prefix)):
        how = f"made with {difference(finished, plan)}" if finished else "not made by this plan"
        raise DataError(
            f"{existing} exists and was {how}; give another --out, or --overwrite to replace it"
        )
    return False


def keep_plan(plan: TokenizePlan, prefix: str | Path) -> None:
    """Write `PREFIX.plan.json` next to a complete pair."""
    finished = FinishedPlan(_manifest_sha256(prefix), plan)
    write_atomically(_plan_path(prefix), msgspec.json.encode(finished))


def begin(plan: TokenizePlan, prefix: str | Path) -> None:
    """Create the work directory, or check that it belongs to the same plan.

    Raises:
        DataError: the directory belongs to another plan, or holds other files.
    """
    work = work_directory(prefix)
    path, content = work / PLAN_FILE, msgspec.json.encode(plan)
    if path.exists():
        if path.read_bytes() != content:
            raise DataError(
                f"{work} was created with {difference(read_plan(work), plan)}; undo that to "
                f"continue, or remove {work} to start over"
            )
        return
    names = sorted(os.listdir(work)) if work.exists() else []
    # Of phi4's files, the plan is created first and removed last.
    foreign = [name for name in names if not name.startswith(f"{PLAN_FILE}.partial-")]
    if foreign:
        raise DataError(
            f"{work} holds {foreign[0]} and no {PLAN_FILE}, so it is not a work directory of phi4; "
            f"move the file or give another --out"
        )
    work.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def read_plan(work: Path) -> TokenizePlan | None:
    """Read the plan, or None if another version of phi4 wrote it.

    Raises:
        FileNotFoundError: there is no plan.
    """
    try:
        return msgspec.json.decode((work / PLAN_FILE).read_bytes(), type=TokenizePlan)
    except msgspec.DecodeError:
        return None


def read_report(work: Path, index: int) -> PartReport | None:
    """Read the report of a part; None while it is not finished."""
    try:
        return msgspec.json.decode(report_path(work, index).read_bytes(), type=PartReport)
    except FileNotFoundError:
        return None


@contextmanager
def sharing(prefix: str | Path) -> Iterator[None]:
    """Convert errors about files of a work directory that vanish during use.

    Raises:
        DataError: another job has finished the pair, or the directory was removed.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise DataError(
            f"{error.filename} is gone: another job finished {prefix}, or its work directory was "
            f"removed; check the pair with `phi4 data verify {prefix}`"
        ) from None


def run_path(work: Path, part: int, run: int, suffix: str) -> Path:
    """Return the path of a file of one run: `tokens`, int32, or `keys`, KEY_TYPE."""
    return work / f"{part:06}-{run:04}.{suffix}"


def report_path(work: Path, index: int) -> Path:
    return work / f"{index:06}.json"


def rejections_path(prefix: str | Path, shard: tuple[int, int]) -> str:
    """Return the path of the bad rows of a job that stops; each of several shards has its own
    file."""
    if shard[1] == 1:
        return rejected_path(prefix)
    return str(work_directory(prefix) / f"rejected-{shard[0]}-of-{shard[1]}.jsonl")


def discard(prefix: str | Path, plan: TokenizePlan) -> None:
    """Remove the files of a plan from the work directory, and the directory if it is then empty."""
    work = work_directory(prefix)
    for name in os.listdir(work):
        part = _PART_FILE.fullmatch(name)
        if _OTHER_FILE.fullmatch(name) or (part and int(part[1]) < len(plan.parts)):
            (work / name).unlink(missing_ok=True)
    # Last, so that a killed job's directory can still be identified.
    (work / PLAN_FILE).unlink(missing_ok=True)
    with suppress(OSError):
        work.rmdir()


def _plan_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.plan.json")


def _manifest_sha256(prefix: str | Path) -> str:
    return hashlib.sha256(manifest_path(prefix).read_bytes()).hexdigest()


def _finished_plan(prefix: str | Path) -> TokenizePlan | None:
    """Return the plan of the pair; None if there is no such pair or it has no plan."""
    try:
        finished = msgspec.json.decode(_plan_path(prefix).read_bytes(), type=FinishedPlan)
        return finished.plan if finished.manifest_sha256 == _manifest_sha256(prefix) else None
    except (FileNotFoundError, msgspec.DecodeError):
        return None
