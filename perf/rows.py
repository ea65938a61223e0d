"""Rows of measurements, and of errors against bounds: CSV files that only grow, and a sentence for
a file that is not ours."""

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .mistakes import Mistake

if TYPE_CHECKING:
    import pandas as pd

VERSION = 2
# what a row says, in the order of the file: what was asked, what came out, where
COLUMNS: dict[str, str] = {
    "schema": "int",
    "case": "str",  # a name of cases.py, or NxV, NxDxV or NxVpP
    "op": "str",  # logits | head | labels
    "mode": "str",  # no_grad | forward | forward+backward
    "dtype": "str",  # fp32 | bf16 | fp16
    "n": "int",
    "v": "int",
    # the width of a head; of labels, at most how many of a row are 1; empty for logits
    "d": "float",
    "method": "str",
    "status": "str",  # ok | wrong | out of memory | failed; only ok has numbers
    "note": "str",  # a sentence where status is not ok
    "ms_p50": "float",
    "ms_p20": "float",
    "ms_p80": "float",
    "repeats": "float",
    # the roofline: a copy of the logits, or the matrix products, interleaved with the methods
    "ideal_ms": "float",
    "peak_extra_bytes": "float",  # beyond inputs; what the call returns included
    "loss_error": "float",  # relative, against fp64
    "grad_error": "float",  # worst entry relative to itself, or (head) to its row's largest
    "copy_gbps": "float",
    "matmul_tflops": "float",
    "device": "str",
    "settings": "str",
    "python": "str",
    "torch": "str",
    "triton": "str",
    "lossfuse": "str",
    "package": "str",  # name and version of a peer's package
    "commit": "str",
    "dirty": "bool",
    "tests": "str",  # passed | failed | not run, of this commit on this machine
    "date": "str",  # UTC, one for all rows of a run
}
STATUSES = ("ok", "wrong", "out of memory", "failed")
TEXT = [name for name, kind in COLUMNS.items() if kind == "str"]
WHERE = (
    "device",
    "settings",
    "python",
    "torch",
    "triton",
    "lossfuse",
    "commit",
    "dirty",
    "tests",
    "date",
)


@dataclass(frozen=True)
class Kind:
    """What the rows of a file say, and the number of their schema."""

    name: str
    version: int
    columns: Mapping[str, str]


MEASUREMENTS = Kind("measurements", VERSION, COLUMNS)
BOUNDS = Kind(
    "errors against bounds",
    1,
    {
        "schema": "int",
        "case": "str",  # a name of bounds.py
        "op": "str",  # logits | head
        "dtype": "str",  # fp32 | bf16 | fp16
        "n": "int",
        "v": "int",
        "d": "float",  # the width of a head
        "method": "str",
        # loss, dlogits and so on; of "x, mean" the mean over many entries; repeated: 0, or inf if a
        # second call differs
        "output": "str",
        "ratio": "float",  # the error in units of its bound, where that is largest
        "error": "float",  # there
        "bound": "float",  # there
        "place": "str",  # where it is
        **{name: COLUMNS[name] for name in WHERE},
    },
)
KINDS = (MEASUREMENTS, BOUNDS)


class BadRows(Mistake):
    """A file of rows that cannot be used; the message is a sentence for whoever named the file."""


def read(paths: Sequence[Path], kind: Kind = MEASUREMENTS) -> "pd.DataFrame":
    """The rows of all files, one below the other, every column typed; BadRows where a file is not
    one of ours."""
    import pandas as pd

    frames = [_read_one(path, kind) for path in paths]
    return (
        pd.concat(frames, ignore_index=True)
        if frames
        else _typed(pd.DataFrame(columns=list(kind.columns)), Path("no file"), kind)
    )


def holds(path: Path, kind: Kind) -> bool:
    """Whether a file begins as one with rows of that kind."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip("\r\n") == ",".join(kind.columns)
    except OSError:
        return False


def append(path: Path, rows: Sequence[dict[str, Any]], kind: Kind = MEASUREMENTS) -> None:
    """Add rows below those of ``path``, or start it.

    The old rows are checked and the whole file is replaced in one step, under a lock: neither a
    crash nor two writers lose a row. BadRows if the file is not ours or cannot be written; no rows
    at all is a way to ask."""
    import pandas as pd

    new = _typed(pd.DataFrame([{"schema": kind.version} | row for row in rows]), path, kind)
    text = [name for name, held in kind.columns.items() if held == "str"]
    # a return alone is not quoted, and would end its row
    new[text] = new[text].replace("\r\n?", "\n", regex=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            old = path.read_bytes() if path.exists() and path.stat().st_size else b""
            if old:
                _read_one(path, kind)
            content = new.to_csv(index=False, header=not old).encode(errors="backslashreplace")
            write_atomically(
                path, old + (b"" if old.endswith(b"\n") or not old else b"\n") + content
            )
    except OSError as error:
        raise BadRows(f"{path} cannot be written: {error.strerror or error}") from error


def destination(path: Path) -> Path:
    """The file that is written when ``path`` is: of a link what it leads to. OSError for a device,
    a pipe, a folder: never replaced."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is there and no file")
    return path


def require_writable(path: Path) -> None:
    """OSError where ``write_atomically`` would raise one."""
    with tempfile.TemporaryFile(dir=destination(path).parent):
        pass


def write_atomically(path: Path, content: bytes) -> None:
    """The file has its old content or all of the new."""
    path = destination(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp's files are private; these are results
        os.chmod(name, path.stat().st_mode if path.exists() else 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    # beside the system's other locks and not beside the results; torch depends on filelock
    from filelock import FileLock

    name = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]
    with FileLock(Path(tempfile.gettempdir()) / f"lossfuse-rows-{name}.lock"):
        yield


def _read_one(path: Path, kind: Kind) -> "pd.DataFrame":
    import pandas as pd

    try:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError:
        raise BadRows(f"{path} does not exist") from None
    except OSError as error:
        raise BadRows(f"{path} cannot be read: {error.strerror or error}") from error
    except pd.errors.EmptyDataError:
        frame = pd.DataFrame(columns=list(kind.columns))
    except (pd.errors.ParserError, UnicodeDecodeError) as error:
        raise BadRows(f"{path} is not a CSV file: {error}") from None
    for other in KINDS:
        if other is not kind and list(frame.columns) == list(other.columns):
            raise BadRows(f"{path} holds {other.name}, expected {kind.name}")
    if "schema" in frame and len(frame) and (frame["schema"] != str(kind.version)).any():
        found = ", ".join(sorted(set(frame["schema"])))
        raise BadRows(
            f"{path} holds rows of schema {found} and this version reads schema {kind.version}; measure again into another file"
        )
    if list(frame.columns) != list(kind.columns):
        foreign = [name for name in frame.columns if name not in kind.columns]
        absent = [name for name in kind.columns if name not in frame.columns]
        what = [f"has columns {foreign}" * bool(foreign), f"lacks columns {absent}" * bool(absent)]
        raise BadRows(
            f"{path} is not a file of our rows: it {' and '.join(filter(None, what)) or 'has its columns in another order'}"
        )
    return _typed(frame, path, kind)


def _typed(frame: "pd.DataFrame", path: Path, kind: Kind = MEASUREMENTS) -> "pd.DataFrame":
    foreign = [name for name in frame.columns if name not in kind.columns]
    if foreign:
        raise BadRows(f"rows for {path} have columns {foreign} that the schema has not")
    frame = frame.reindex(columns=list(kind.columns))
    for name, held in kind.columns.items():
        frame[name] = _column(
            frame[name], held, f"{path} has a value in column {name!r} that is not"
        )
    unknown = sorted(set(frame["status"]) - set(STATUSES)) if "status" in frame else []
    if unknown:
        raise BadRows(f"{path} has status {unknown} and expected one of {list(STATUSES)}")
    return frame


def _column(values: "pd.Series[Any]", kind: str, complaint: str) -> "pd.Series[Any]":
    import pandas as pd

    if kind == "str":
        return values.where(values.notna(), "").astype(str)
    if kind == "bool":
        known = values.map({"True": True, "False": False, True: True, False: False})
        if known.isna().any():
            raise BadRows(f"{complaint} True or False")
        return known.astype(bool)
    try:
        numbers = pd.to_numeric(values.where(values != "", None))
        made = numbers.astype("int64" if kind == "int" else "float64")
        # pandas cuts off and wraps around without a word
        if kind == "int" and (made != numbers).any():
            raise ValueError(f"{numbers[made != numbers].iloc[0]}")
        return made
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRows(
            f"{complaint} {'an integer' if kind == 'int' else 'a number'}: {error}"
        ) from None
