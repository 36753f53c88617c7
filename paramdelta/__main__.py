"""``python -m paramdelta``: the command line."""

from paramdelta.cli import main

if __name__ == "__main__":
    main()
