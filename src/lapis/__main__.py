"""python -m lapis, so that `torchrun -m lapis` works."""

from lapis.cli.main import main

if __name__ == "__main__":
    main()
