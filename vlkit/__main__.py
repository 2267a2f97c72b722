"""`python -m vlkit` is `vlkit`."""

from vlkit.cli import main

if __name__ == "__main__":  # worker processes of the demo import this file again
    main()
