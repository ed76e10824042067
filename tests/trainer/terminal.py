"""A real pseudo-terminal, and what would be seen on it."""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import io
import itertools
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from typing import TextIO

import pytest

_CONTROL = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|\x1b\]9;(\d+)\x07")
_SECONDS = 20.0
ROWS, COLUMNS = 40, 220


class Screen:
    """Lines as a VT100 shows them, as far as progress bars go: CR, LF, backspace, cursor up and down, erase, hide and show."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = self.column = 0
        self.cursor = True
        self.marks: set[int] = set()
        self._rest = ""

    def feed(self, text: str) -> None:
        text = self._rest + text
        self._rest = ""
        position = 0
        while position < len(text):
            char = text[position]
            if char == "\x1b":
                found = _CONTROL.match(text, position)
                if found is None:  # its end has not arrived yet
                    self._rest = text[position:]
                    return
                self._control(found)
                position = found.end()
                continue
            self._put(char)
            position += 1

    def _put(self, char: str) -> None:
        if char == "\r":
            self.column = 0
        elif char == "\n":
            self._down(1)
        elif char == "\b":
            self.column = max(0, self.column - 1)
        else:
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + char + line[self.column + 1 :]
            self.column += 1

    def _down(self, by: int) -> None:
        self.row += by
        self.lines += [""] * (self.row + 1 - len(self.lines))

    def _control(self, found: re.Match[str]) -> None:
        arguments, letter, mark = found.groups()
        if mark:
            self.marks.add(int(mark))
        elif letter == "A":
            self.row = max(0, self.row - int(arguments or 1))
        elif letter == "B":
            self._down(int(arguments or 1))
        elif letter == "K":
            line = self.lines[self.row]
            self.lines[self.row] = "" if arguments == "2" else line[: self.column]
        elif letter in "hl" and arguments == "?25":
            self.cursor = letter == "h"


class Terminal:
    """`file` is what a program has as its stdout."""

    def __init__(self) -> None:
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        self.slave = slave
        self.file: TextIO = io.TextIOWrapper(
            io.FileIO(slave, "w", closefd=False), "utf-8", line_buffering=True, write_through=True
        )
        self._screen, self._changed = Screen(), threading.Condition()
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._numbers = itertools.count(1)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                data = os.read(self.master, 1 << 16)
            except OSError:
                return
            if not data:
                return
            with self._changed:
                self._screen.feed(self._decoder.decode(data))
                self._changed.notify_all()

    def seen(self) -> list[str]:
        """The lines of now, without those that are empty."""
        number = next(self._numbers)
        self.file.flush()
        os.write(self.slave, f"\x1b]9;{number}\x07".encode())
        with self._changed:
            assert self._changed.wait_for(lambda: number in self._screen.marks, _SECONDS)
            return [line.rstrip() for line in self._screen.lines if line.strip()]

    @property
    def cursor(self) -> bool:
        self.seen()
        return self._screen.cursor

    @contextlib.contextmanager
    def as_stdout(self) -> Iterator[None]:
        before, sys.stdout = sys.stdout, self.file
        try:
            yield
        finally:
            sys.stdout = before

    def hang_up(self) -> None:
        """Close the window: whoever writes gets EIO."""
        with contextlib.suppress(OSError):
            os.close(self.master)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.slave)  # the reader then gets EIO
        self._reader.join(_SECONDS)
        self.hang_up()


@contextlib.contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """And an environment that fits."""
    import rich

    found = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", str(COLUMNS))
    monkeypatch.setenv("LINES", str(ROWS))
    monkeypatch.setattr(rich, "_console", None)
    try:
        yield found
    finally:
        found.close()
