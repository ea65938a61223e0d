"""CSV files of measurements and of errors against bounds: typed, append-only, atomic."""

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
# columns in the order of the file: the call, the result, the machine
COLUMNS: dict[str, str] = {
    "schema": "int",
    "case": "str",  # a name of cases.py, or NxV, NxDxV or NxVpP
    "op": "str",  # logits | head | labels
    "mode": "str",  # no_grad | forward | forward+backward
    "dtype": "str",  # fp32 | bf16 | fp16
    "n": "int",
    "v": "int",
    # the width of a head; for labels the most positives of a row; empty for logits
    "d": "float",
    "method": "str",
    "status": "str",  # ok | wrong | out of memory | failed; only ok has numbers
    "note": "str",  # a sentence if status is not ok
    "ms_p50": "float",
    "ms_p20": "float",
    "ms_p80": "float",
    "repeats": "float",
    # the roofline: a copy of the logits, or the matrix products, interleaved with the methods
    "ideal_ms": "float",
    "peak_extra_bytes": "float",  # beyond inputs, results included
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
    """A kind of file: its columns and the number of its schema."""

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
        "ratio": "float",  # the largest error in units of its bound
        "error": "float",
        "bound": "float",
        "place": "str",  # index of that entry
        **{name: COLUMNS[name] for name in WHERE},
    },
)
KINDS = (MEASUREMENTS, BOUNDS)


class BadRows(Mistake):
    """A file that cannot be used as a file of rows."""


def read(paths: Sequence[Path], kind: Kind = MEASUREMENTS) -> "pd.DataFrame":
    """The rows of all files with typed columns; BadRows for a foreign file."""
    import pandas as pd

    frames = [_read_one(path, kind) for path in paths]
    return (
        pd.concat(frames, ignore_index=True)
        if frames
        else _typed(pd.DataFrame(columns=list(kind.columns)), Path("no file"), kind)
    )


def holds(path: Path, kind: Kind) -> bool:
    """True if the file has the header of this kind."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.readline().rstrip("\r\n") == ",".join(kind.columns)
    except OSError:
        return False


def append(path: Path, rows: Sequence[dict[str, Any]], kind: Kind = MEASUREMENTS) -> None:
    """Append rows to a file, or create it.

    The file is checked, then replaced in one step under a lock: neither a crash nor two writers
    lose a row. BadRows for a foreign file or one that cannot be written, also for no rows."""
    import pandas as pd

    new = _typed(pd.DataFrame([{"schema": kind.version} | row for row in rows]), path, kind)
    text = [name for name, held in kind.columns.items() if held == "str"]
    # pandas does not quote a lone carriage return, which ends a row; pandas 2.2 reads no text after
    # a NUL
    new[text] = new[text].replace({"\r\n?": "\n", "\0": r"\\x00"}, regex=True)
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
    """The file behind a path or link; OSError for a device, pipe or folder."""
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is not a file")
    return path


def require_writable(path: Path) -> None:
    """Raise the OSError that ``write_atomically`` would raise."""
    with tempfile.TemporaryFile(dir=destination(path).parent):
        pass


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file; after a crash it has its old content or all of the new."""
    path = destination(path)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # files of mkstemp are private
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
    # in the temporary folder, not beside the results; torch depends on filelock
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
        reads = f"this version reads schema {kind.version}"
        again = "measure again into another file"
        raise BadRows(f"{path} holds rows of schema {found} and {reads}; {again}")
    if list(frame.columns) != list(kind.columns):
        foreign = [name for name in frame.columns if name not in kind.columns]
        absent = [name for name in kind.columns if name not in frame.columns]
        faults = [f"has columns {foreign}" * bool(foreign)]
        faults.append(f"lacks columns {absent}" * bool(absent))
        problem = " and ".join(filter(None, faults)) or "has its columns in another order"
        raise BadRows(f"{path} is not a file of our rows: it {problem}")
    return _typed(frame, path, kind)


def _typed(frame: "pd.DataFrame", path: Path, kind: Kind = MEASUREMENTS) -> "pd.DataFrame":
    foreign = [name for name in frame.columns if name not in kind.columns]
    if foreign:
        raise BadRows(f"rows for {path} have columns {foreign} that are not in the schema")
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
        typed = numbers.astype("int64" if kind == "int" else "float64")
        # pandas truncates and wraps around silently
        if kind == "int" and (typed != numbers).any():
            raise ValueError(f"{numbers[typed != numbers].iloc[0]}")
        return typed
    except (ValueError, TypeError, OverflowError) as error:
        raise BadRows(
            f"{complaint} {'an integer' if kind == 'int' else 'a number'}: {error}"
        ) from None
