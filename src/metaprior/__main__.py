"""python -m metaprior: the command line."""

from metaprior_command import main

if __name__ == "__main__":
    main()
