"""What is fed to a target: files by name, written into an empty folder, read back from one, kept as JSON."""

import base64
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Special:
    """Something in a folder that is no regular file: a ``fifo``, a ``folder``, or a ``link`` to ``to``."""

    what: str
    to: str = ""


@dataclass(frozen=True)
class Case:
    """The files that a target gets, by their path in its folder."""

    target: str
    files: dict[str, bytes | Special]

    @property
    def size(self):
        """The bytes of all files."""
        return sum(len(content) for content in self.files.values() if isinstance(content, bytes))

    def write(self, folder):
        """Lay the files out in ``folder``, in place of whatever was there."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif content.what == "fifo":
                os.mkfifo(path)
            elif content.what == "folder":
                path.mkdir()
            else:
                path.symlink_to(content.to)

    def dump(self):
        """Give the case as text, which :func:`load` reads; bytes that are text stay readable."""
        files = {name: _said(content) for name, content in self.files.items()}
        return json.dumps({"target": self.target, "files": files}, indent=1) + "\n"


def load(text):
    """Read a case that :meth:`Case.dump` wrote."""
    table = json.loads(text)
    return Case(table["target"], {name: _meant(said) for name, said in table["files"].items()})


def found(target, folder):
    """Give the case that lies in ``folder``: what is left of one that took its process with it."""
    files = {}
    for path in sorted(Path(folder).rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            files[name] = Special("link", str(path.readlink()))
        elif path.is_fifo():
            files[name] = Special("fifo")
        elif path.is_file():
            files[name] = path.read_bytes()
        elif not any(path.iterdir()):
            files[name] = Special("folder")
    return Case(target, files)


def _said(content):
    if isinstance(content, Special):
        return {"special": content.what, "to": content.to}
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(content).decode()}
    return {"text": text}


def _meant(said):
    if "special" in said:
        return Special(said["special"], said["to"])
    return said["text"].encode() if "text" in said else base64.b64decode(said["base64"])
