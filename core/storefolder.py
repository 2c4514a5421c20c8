"""What may stand in the folder of recorded explorer completions (explorer.store), before anything in it is read."""

import re
from pathlib import Path

IDENTITY_FILE = "store.json"
_ROWS_FILE = re.compile(r"[0-9a-f]{24}\.parquet")
_HALF_CLAIMED = re.compile(rf"\.{re.escape(IDENTITY_FILE)}\.\d+")  # a process that claims the folder now, or died at it


def made_by_store(name: str) -> bool:
    """Whether a file of completions has a name that a store gives, so that it can be made again."""
    return _ROWS_FILE.fullmatch(name) is not None


def folder_problem(folder: Path) -> str | None:
    """Why `folder` can be no store: it is a file, may not be read, or holds something else. None where it can be."""
    if folder.exists() and not folder.is_dir():
        return f"explorer.store = {str(folder)!r} is a file: name a folder"
    # Listed before store.json is looked for: what another process adds to a new store comes after its store.json.
    try:
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except PermissionError as error:
        return f"explorer.store: {error}: choose another folder"
    other = [name for name in names if not _HALF_CLAIMED.fullmatch(name)]
    if not other or (folder / IDENTITY_FILE).exists():
        return None
    shown = ", ".join([*other[:3], "…"] if len(other) > 3 else other)
    return f"explorer.store: {folder} holds other files ({shown}) and no {IDENTITY_FILE}: choose another folder"
