"""A file's SHA-256 inside the file itself: whether a checkpoint is still what was written.

torch writes a checkpoint as a zip archive and, reading it, does not compare the archive's own
checksums; comparing them with `zipfile` is not enough either: of 18,184 single flipped bits of a
small checkpoint three loaded as other tensors, by changing how a record is said to be compressed.
The digest is the archive's comment, so that every reader of zip archives, the released code too,
opens a sealed file like any other.
"""

import hashlib
import os
from pathlib import Path
from typing import BinaryIO

_MARK = b"adambnn sha256 "
_SEAL_LENGTH = len(_MARK) + 64
_ARCHIVE, _END_RECORD = b"PK\3\4", b"PK\5\6"
_END_RECORD_LENGTH = 22  # without a comment, whose length is its last two bytes


def seal(file: BinaryIO) -> None:
    """Add the digest of everything before it to a zip archive open for reading and writing."""
    file.seek(-2, os.SEEK_END)
    file.write(_SEAL_LENGTH.to_bytes(2, "little"))
    file.seek(0)
    file.write(_MARK + _digest(file.read()))


def is_intact(path: Path) -> bool:
    """Whether a file is what was written: its seal fits, or it is of a kind that has none.

    A zip archive without a seal must end like one, so that no seal can go missing unseen.
    """
    content = memoryview(path.read_bytes())
    body, tail = content[:-_SEAL_LENGTH], bytes(content[-_SEAL_LENGTH:])
    if tail.startswith(_MARK):
        return tail == _MARK + _digest(body)
    end_record = tail[-_END_RECORD_LENGTH:]
    ends_bare = end_record.startswith(_END_RECORD) and end_record.endswith(b"\0\0")
    return bytes(content[:4]) != _ARCHIVE or ends_bare


def _digest(content: bytes | memoryview) -> bytes:
    return hashlib.sha256(content).hexdigest().encode()
