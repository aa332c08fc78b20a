"""`python -m autoseg` is the command `autoseg`."""

from autoseg.cli import main

main()
