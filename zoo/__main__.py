"""`python -m klas_zoo` is `klas-zoo`."""

from klas_zoo.cli import main

main(prog_name="klas-zoo")
