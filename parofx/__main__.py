"""`python -m parofx` is the command `parofx`."""

from parofx.cli import main

main()
