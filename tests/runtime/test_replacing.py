"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
import threading

import pytest

from openai_eval_client._runtime.loops import replacing


def test_a_file_takes_its_name_when_it_is_whole(tmp_path):
    """Until then what had the name keeps it; afterwards nothing else is there."""
    path = tmp_path / "out"
    path.write_bytes(b"before")
    with replacing(str(path)) as file:
        file.write(b"after")
        file.flush()
        assert path.read_bytes() == b"before"
    assert path.read_bytes() == b"after"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444, 0o755])
def test_what_is_replaced_keeps_its_mode(tmp_path, mode):
    """Nobody else reads the new one before; a new name has what the umask leaves."""
    path = tmp_path / "out"
    path.touch()
    path.chmod(mode)
    with replacing(str(path)):
        (part,) = tmp_path.glob(".out.*")
        assert stat.S_IMODE(part.stat().st_mode) == 0o600 & ~umask()
    assert stat.S_IMODE(path.stat().st_mode) == mode
    with replacing(str(tmp_path / "new")):
        pass
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~umask()


def umask():
    """The process's file mode creation mask."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_half_a_file_has_no_name(tmp_path, error):
    """Whatever stops the writing, what was there stays."""
    path = tmp_path / "out"
    path.write_bytes(b"before")
    with pytest.raises(error), replacing(str(path)) as file:  # noqa: PT012  # it fails half way
        file.write(b"half")
        raise error
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("out", b"before")]


def test_a_link_goes_on_pointing(tmp_path):
    """The file behind it is replaced, not the link."""
    (tmp_path / "real").write_bytes(b"before")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with replacing(str(tmp_path / "link")) as file:
        file.write(b"after")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"after"


def test_a_pipe_is_written_to(tmp_path):
    """What is no regular file stays what it is."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    read_back = []
    reader = threading.Thread(target=lambda: read_back.append(path.read_bytes()))
    reader.start()
    with replacing(str(path)) as file:
        file.write(b"through")
    reader.join(timeout=10)
    assert read_back == [b"through"]
    assert stat.S_ISFIFO(path.stat().st_mode)


@pytest.mark.parametrize("name", ["missing/out", "file/out", "."])
def test_a_name_that_cannot_be_written(tmp_path, monkeypatch, name):
    """The error names it as the user did."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(OSError) as caught, replacing(name):  # noqa: PT011  # any of its subclasses
        pass
    assert caught.value.filename == name
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
