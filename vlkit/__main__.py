"""`python -m vlkit` is `vlkit`."""

from vlkit.cli import main

main()
