"""Names of folders, files and repositories as users write them: which are meant as paths, and what was meant by a
path that does not exist. A leaf that everything may import.
"""

import os
from difflib import get_close_matches
from pathlib import Path


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a path: it is no name that a repository of the Hub could have."""
    path = Path(name)
    in_ours = len(path.parts) == 2 and path.parts[0] in ("runs", "checkpoints")
    return path.is_absolute() or name.startswith((".", "~")) or len(path.parts) > 2 or in_ours


def is_local(name: str) -> bool:
    """Whether a name is most likely meant as a path: also `x/y` where there is a folder `x`."""
    path = Path(name)
    return is_path(name) or (len(path.parts) == 2 and path.parent.is_dir())


def split_place(name: str | os.PathLike[str]) -> tuple[str, str | None]:
    """A folder, a file or a repository as it is, and None; of `user/repo/sub/folder` the repository, and the folder
    in it.
    """
    path = Path(name)
    outer = path.parts[0] if path.parts else ""
    on_the_hub = len(path.parts) > 2 and not path.is_absolute() and not str(name).startswith((".", "~"))
    if not on_the_hub or path.exists() or outer in ("runs", "checkpoints") or Path(outer).is_dir():
        return str(name), None
    return "/".join(path.parts[:2]), "/".join(path.parts[2:])


def did_you_mean(name: str | os.PathLike[str]) -> str:
    """ " Did you mean 'runs/my-kl'?": the folders and files with names near to that of a path that does not exist.

    Empty where no name is near. It begins with a space, so that it can follow a sentence.
    """
    parts = Path(name).parts
    known = [Path(*parts[:end]) for end in range(len(parts), 0, -1) if Path(*parts[:end]).is_dir()]
    parent = known[0] if known else Path()
    missing, *below = parts[len(parent.parts) :] or ("",)
    try:
        entries = [entry.name for entry in parent.iterdir() if not entry.name.startswith(".")]
    except OSError:  # a folder that may not be read
        return ""
    by_lower = {entry.lower(): entry for entry in sorted(entries)}
    near = [parent / by_lower[entry] for entry in get_close_matches(missing.lower(), by_lower, n=3)]
    ends = range(len(below), -1, -1)  # of what follows, as much as there is
    found = [next(path for end in ends if (path := Path(entry, *below[:end])).exists()) for entry in near]
    return f" Did you mean {' or '.join(repr(str(path)) for path in found)}?" if found else ""


def no_such(what: str, name: str | os.PathLike[str]) -> str:
    """ "There is no folder 'runs/my-lk'. Did you mean 'runs/my-kl'?" for a path that does not exist."""
    return f"There is no {what} {str(name)!r}.{did_you_mean(name)}"
