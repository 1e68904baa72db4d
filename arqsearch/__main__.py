"""``python -m arqsearch``, which ``torchrun -m arqsearch train RECIPE`` needs."""

from arqsearch.cli import main

if __name__ == "__main__":
    main()
