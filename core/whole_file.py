"""Files that are there whole or not at all, whenever somebody looks and whatever kills the writer."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to. As the block ends what is there takes the name, and the place, of `file`; where
    it ends in an exception nothing is left of it.

    Example: with whole_file(Path("ledger.json")) as partial: partial.write_text("{}")
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        yield partial
        partial.replace(file)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
