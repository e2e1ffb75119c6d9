"""Master keys of encrypted stores."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def write_master_key(path: Path) -> None:
    """Makes a file of mode 0600 with a new random key, in 64 hexadecimal digits.

    FileExistsError: there is something at `path`; a key is never overwritten.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
        file.flush()
        os.fsync(file.fileno())
