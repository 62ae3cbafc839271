"""`python -m parofx` is the command `parofx`."""

from parofx.cli import main

if __name__ == "__main__":
    main()
