"""The SQLite file of a cache, and the connections to it."""

from __future__ import annotations

import contextlib
import os
import secrets
import sqlite3
import stat
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from openai_eval_client._runtime import mind_forks
from openai_eval_client.errors import ValidationError

if TYPE_CHECKING:
    from collections.abc import Iterator


APPLICATION_ID = int.from_bytes(b"OEvC", "big")  # https://www.sqlite.org/pragma.html#pragma_application_id
SCHEMA_VERSION = 1
_COLUMNS = "key BLOB PRIMARY KEY, created REAL NOT NULL, value BLOB NOT NULL, checksum BLOB NOT NULL"
_TABLES = {name: f"CREATE TABLE {name} ({_COLUMNS})" for name in ("answers", "journal")}
# Seconds that SQLite itself waits for another user of the file.
_PATIENCE_TO_OPEN = 10.0
_PATIENCE_TO_TRY_WRITING = 0.5


class Database:
    """A file that holds our tables and nothing else; made where there is none."""

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.name = os.fspath(path)
        self.path = Path(os.path.realpath(path))
        self._read_only = read_only
        self._wal = Path(f"{self.path}-wal")  # what SQLite has committed and not yet moved into the file
        try:
            if not self.path.exists():
                self._create()
            self._status = self._recognise()
            with contextlib.closing(self.connect(_PATIENCE_TO_OPEN)) as connection:
                self._check_writable(connection)
        except sqlite3.OperationalError as error:
            raise self.unusable(f"cannot be used: {error}") from None
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # SQLite's message may quote damage
            raise self.damaged(error) from None
        except OSError as error:
            raise self.unusable(f"cannot be used: {error.strerror or error}") from None

    def connect(self, patience: float) -> sqlite3.Connection:
        """Open the file, which exists, waiting so many seconds for its other users."""
        try:
            return self._open("mode=rw", patience)
        except sqlite3.OperationalError:
            if not self._read_only or _size(self._wal):
                raise
        return self._open("immutable=1", patience)  # in a directory where SQLite cannot make its side files

    def unusable(self, why: str) -> ValidationError:
        """Return the error for a file that cannot be used, naming it."""
        return ValidationError(f"cache={self.name!r}: {why}", field="cache")

    def damaged(self, error: object) -> ValidationError:
        """Return the error for a file that SQLite cannot read, or whose content is not as it was written."""
        why = f"damaged, or no cache of this package ({error}). It was left as it is: move or restore it"
        return self.unusable(why)

    def is_there(self) -> bool:
        """Return whether the file is still the one that was opened first."""
        # SQLite would apply the log of the old file to one that took its place.
        try:
            return os.path.samestat(self.path.stat(), self._status)
        except OSError:
            return False

    def _create(self) -> None:
        """Make the file under another name, then give it its own: no other process ever sees half of it."""
        if self._read_only:
            raise self.unusable("does not exist, and write=False creates none")
        if _size(self._wal) and not self.path.exists():  # SQLite would take it for the new file's
            why = f"is gone, but {self._wal} still holds a part of it: restore it, or delete that file"
            raise self.unusable(why)
        new = self.path.with_name(f"{self.path.name}.{secrets.token_hex(8)}.new")
        file = os.open(new, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
        try:
            new.chmod(0o600)  # whatever the umask; SQLite gives its side files the same mode
            _fill(new)
            os.fsync(file)
            self._give_name(new)
        finally:
            os.close(file)
            new.unlink(missing_ok=True)

    def _give_name(self, new: Path) -> None:
        try:
            os.link(new, self.path)
        except FileExistsError:
            return  # another process was faster; its file is as good
        except OSError:  # a file system without hard links
            if not os.path.lexists(self.path):
                new.rename(self.path)

    def _recognise(self) -> os.stat_result:
        """Refuse a file that is not ours, without leaving a trace on it."""
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise self.unusable("is not a regular file")
        if not status.st_size:
            raise self.unusable("is empty, which a cache never is: delete it to start a new one")
        try:
            with contextlib.closing(self._raw("immutable=1")) as connection:
                self._check_marks(connection)
        except sqlite3.DatabaseError:  # also where another process is just moving pages into it
            with contextlib.closing(self._raw("mode=ro")) as connection:
                self._check_marks(connection)
        return status

    def _check_marks(self, connection: sqlite3.Connection) -> None:
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise self.unusable("is an SQLite database of another program; it was left as it is")
        if version > SCHEMA_VERSION:
            versions = f"format {version}, this one knows {SCHEMA_VERSION}"
            why = f"was made by a newer version of this package ({versions}); it was left as it is"
            raise self.unusable(why)

    def _open(self, mode: str, patience: float) -> sqlite3.Connection:
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(contextlib.closing(self._raw(mode, patience)))
            connection.execute("PRAGMA synchronous = FULL")  # committed also means: survives a power cut
            connection.execute("PRAGMA trusted_schema = OFF")
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute(f"PRAGMA query_only = {int(self._read_only)}")
            self._check_marks(connection)
            tables = connection.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
            if dict(tables.fetchall()) != _TABLES:
                raise self.damaged("its tables are not as they were made")
            stack.pop_all()  # it stays open
        connection.text_factory = bytes  # where damage makes a text of a value, it need not decode
        return connection

    def _raw(self, mode: str, patience: float = _PATIENCE_TO_OPEN) -> sqlite3.Connection:
        uri = f"{self.path.as_uri()}?{mode}"
        return sqlite3.connect(uri, timeout=patience, isolation_level=None, check_same_thread=False, uri=True)

    def _check_writable(self, connection: sqlite3.Connection) -> None:
        if self._read_only:
            return
        set_patience(connection, _PATIENCE_TO_TRY_WRITING)
        try:
            connection.execute("DELETE FROM journal WHERE key IS NULL")  # no row: it only takes the lock
        except sqlite3.OperationalError as error:
            if not is_locked(error):
                why = f"cannot be written ({error}); CacheConfig(write=False) only reads it"
                raise self.unusable(why) from None


def _fill(path: Path) -> None:
    """Make our tables in an empty file that no other process knows of."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")
        connection.execute("BEGIN")
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
        for table in _TABLES.values():
            connection.execute(table)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")


def set_patience(connection: sqlite3.Connection, seconds: float) -> None:
    """Set how long SQLite waits for another user of the file."""
    # Its own wait covers all that we meet: a transaction begins as a reader or as the writer, and never turns
    # from one into the other, which is what SQLite refuses at once for fear of a deadlock.
    connection.execute(f"PRAGMA busy_timeout = {round(seconds * 1000)}")


def is_locked(error: sqlite3.Error) -> bool:
    """Return whether only another user of the file was in the way."""
    return "database is locked" in str(error)  # SQLITE_BUSY; Python 3.10 has no error codes


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


class Connection:
    """Opened when needed, lent to one thread at a time, closed before a fork and with its owner."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._next_in_line = (
            threading.Lock()
        )  # held while waiting for `_lock`: no thread takes it twice before
        self._open: list[sqlite3.Connection] = []  # one at most
        weakref.finalize(self, _close, self._open)  # also at the interpreter's end
        mind_forks(self)

    @contextlib.contextmanager
    def lent(self, patience: float) -> Iterator[sqlite3.Connection]:
        """Lend it, to wait so many seconds for other users; after an error the next one lent is a new one."""
        with self._next_in_line:
            self._lock.acquire()
        try:
            connection = self._current(patience)
            set_patience(connection, patience)
            yield connection
        except BaseException:
            _close(self._open)
            raise
        finally:
            self._lock.release()

    def close(self) -> None:
        """Close it once no thread uses it; lending it again opens it again."""
        with self._lock:
            _close(self._open)

    def before_fork(self) -> None:
        """Close it: SQLite's locks do not survive a fork, https://www.sqlite.org/howtocorrupt.html."""
        self._next_in_line.acquire()
        self._lock.acquire()
        _close(self._open)

    def after_fork(self, *, child: bool) -> None:  # noqa: ARG002  # the same on both sides
        """Let it be used again."""
        self._lock.release()
        self._next_in_line.release()

    def _current(self, patience: float) -> sqlite3.Connection:
        if not self._database.is_there():
            raise sqlite3.OperationalError("the file is gone, or another is in its place")
        if not self._open:
            self._open.append(self._database.connect(patience))
        return self._open[0]


def _close(connections: list[sqlite3.Connection]) -> None:
    while connections:
        connections.pop().close()
