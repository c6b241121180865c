"""In a checkout the recipes are in the top-level `configs/`, as flax_densenet.configs.

An installed copy has the recipes themselves in the place of this file.
"""

import pathlib

__path__.append(str(pathlib.Path(__file__).parents[2] / 'configs'))
