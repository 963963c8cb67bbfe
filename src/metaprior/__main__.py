"""python -m metaprior: the command line."""

from metaprior.cli import main

if __name__ == "__main__":
    main()
