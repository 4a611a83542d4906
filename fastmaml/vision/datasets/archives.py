"""What goes wrong with archives."""

from __future__ import annotations

import gzip
import lzma
import shutil
import tarfile
import zipfile
import zlib

# Truncated, with wrong checksums, or packed in a way that a flipped bit has made up.
DAMAGED = (
    shutil.ReadError,
    zipfile.BadZipFile,
    tarfile.TarError,
    gzip.BadGzipFile,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    RuntimeError,
)
