"""`python -m mergeguard` is the `mergeguard` command."""

from mergeguard.cli import main

if __name__ == "__main__":
    main()
