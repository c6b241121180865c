"""Runs that are killed and stopped end with the bits of one that was not."""

import itertools
import random
import re
import shutil
import signal
import time

import pytest
from test_train import assert_equal_bits, final_arrays, read_records
