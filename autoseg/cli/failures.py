"""What goes wrong outside the program, in words: options given twice, and files that cannot be read or written."""

import errno
import os
from collections import Counter
from typing import Any

import typer
from typer.core import TyperCommand

SHOW_TRACEBACK = "AUTOSEG_TRACEBACK"
"""Variable of the environment: whatever its value, errors of the system show where in the program they happened."""

CURES = {
    errno.ENOSPC: "the disk is full: free space on it, then the same command goes on",
    errno.EDQUOT: "your share of the disk is used up: free space on it, then the same command goes on",
    errno.EROFS: "nothing can be written there: give another folder (-o, --workspace)",
    errno.EACCES: "change its permissions, or give another path (-o, --workspace)",
    errno.EPERM: "change its permissions, or give another path (-o, --workspace)",
    errno.ENOENT: "it was there or should have been made: look whether the path is right and the disk connected",
    errno.EEXIST: "something else has that name: remove it, or give another path",
    errno.ENOTDIR: "a part of that path is a file: remove it, or give another path",
    errno.EISDIR: "a folder has the name of a file: remove it, or give another path",
    errno.EIO: "the disk or the network failed: look at it, then give the same command again",
    errno.ESTALE: "the network drive has changed: mount it again, then give the same command again",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n), or give fewer --workers",
}
"""Errors of the system that are no mistake of the program, and what to do."""


def in_words(error: OSError) -> str | None:
    """An error of the system in one line: what, where, and what to do; None if it may be a mistake of the program.

    That is so where it names no file, unless it is one of CURES. In either case the traceback is shown if
    SHOW_TRACEBACK is set.
    """
    if SHOW_TRACEBACK in os.environ or (error.filename is None and error.errno not in CURES):
        return None
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    cure = CURES.get(error.errno or 0, "look at that file or folder, then give the same command again")
    return f"{where}{error.strerror}; {cure} ({SHOW_TRACEBACK}=1 shows where in the program it happened)"


class Command(TyperCommand):
    """A verb that refuses an option of one value that is given twice, of which the last would count in silence."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As usual, after a look at which options there are; raises typer.BadParameter."""
        found: list[Any] = [*self.make_parser(ctx).parse_args(args=list(args))[2]]
        for option, times in Counter(found).items():
            single = option.param_type_name == "option" and not (option.multiple or option.is_flag or option.count)
            if single and times > 1:
                raise typer.BadParameter(f"is given {times} times, and takes one value", ctx=ctx, param=option)
        return super().parse_args(ctx, args)
