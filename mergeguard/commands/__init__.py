"""Commands of the command line, a file each; `cli.py` registers them. Light to import: no torch."""
