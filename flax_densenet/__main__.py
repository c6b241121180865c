"""`python -m flax_densenet COMMAND`, the same as the `flax-densenet` command."""

from flax_densenet.cli import main

if __name__ == '__main__':
    main.entry()
