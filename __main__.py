"""``python -m satdifuser`` is the command line."""

from satdifuser.cli import main

main()
