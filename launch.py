"""Trains, evaluates and uses DenseNets; `python launch.py --help` lists the commands.

python launch.py --config=configs/densenet121.py --config.data.source=folder:photos
"""

from flax_densenet.cli.main import entry, main  # noqa: F401

if __name__ == '__main__':
    entry()
