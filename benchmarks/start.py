"""A program that ends after its first training step; timed from outside by `run`."""

from benchmarks import contenders
from flax_densenet import cpu_kernels

cpu_kernels.keep_memory()
import jax  # noqa: E402

if __name__ == '__main__':
    cache = str(cpu_kernels.cache_folder() / 'xla')
    jax.config.update('jax_compilation_cache_dir', cache)
    compiled, state, rows = contenders.make_ours('train')
    jax.block_until_ready(compiled(state, rows))
