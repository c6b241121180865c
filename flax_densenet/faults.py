"""One line for what the machine did: a full disk, too little memory."""

import errno

_DISK = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM),
    *(errno.ENOENT, errno.EFBIG, errno.ESTALE, errno.ENOTDIR, errno.EMFILE),
)
_MEMORY = ('RESOURCE_EXHAUSTED', 'Out of memory', 'out of memory', 'OUT_OF_MEMORY')


def explain(error: Exception) -> str | None:
    """What to do about an error of the machine; None for any other error."""
    text = ' '.join(str(error).split())
    if isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(word in text for word in _MEMORY)
    ):
        return (
            f'out of memory ({text[:160] or "MemoryError"}): use a smaller '
            'data.batch_size or data.image_size, model.remat=block or '
            'model.dtype=bfloat16; the same command goes on from the last checkpoint'
        )
    if isinstance(error, OSError) and error.errno in _DISK:
        return (
            f'{error.filename or "a file"}: {error.strerror}; mend that, and the same '
            'command goes on from the last checkpoint'
        )
    return None
