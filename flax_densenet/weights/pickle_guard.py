"""Checks a pickle for data that would exhaust memory or the stack, before loading it.

`torch_pickle` decides which names a pickle may use, so no code runs. But plain data can
also do harm: a memo index of 2^31 makes the reader allocate a table of 32 GB, and
tuples nested a million levels deep overflow the stack when they are hashed.

>>> import io, pickle
>>> check(io.BytesIO(pickle.dumps({'weight': [1, 2]})))
>>> check(io.BytesIO(b'\\x80\\x02Nr\\xff\\xff\\xff\\x7f.'))
Traceback (most recent call last):
_pickle.UnpicklingError: its table of objects would have 2147483647 places
"""

import pickle
import pickletools

_DEEPEST = 500  # nested containers; networks in torch have about 30
_MOST_STEPS = 10_000_000
_PUTS = {'PUT', 'BINPUT', 'LONG_BINPUT'}
_GETS = {'GET', 'BINGET', 'LONG_BINGET'}
# These push an object that contains what they pop.
_HOLDERS = {'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'LIST', 'DICT', 'FROZENSET'}
_HOLDERS |= {'REDUCE', 'NEWOBJ', 'NEWOBJ_EX', 'OBJ', 'INST', 'BUILD'}
_MARK = -1


def check(file):
    """Scans one pickle without creating its objects, and rewinds the file.

    Raises:
      pickle.UnpicklingError: the pickle would exhaust memory or the stack.
      ValueError: the pickle is truncated.
    """
    start = file.tell()
    stack, memo = [], {}
    for steps, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if steps > _MOST_STEPS:
            raise pickle.UnpicklingError('it never ends')
        if opcode.name in _PUTS or opcode.name == 'MEMOIZE':
            place = len(memo) if argument is None else int(argument)
            # Picklers count from 0; some leave gaps.
            if place > 2 * steps + 1000:
                raise pickle.UnpicklingError(
                    f'its table of objects would have {place} places'
                )
            memo[place] = stack[-1] if stack else 0
        elif opcode.name in _GETS:
            stack.append(memo.get(int(argument), 0))
        else:
            _move(opcode, stack)
    file.seek(start)


def _move(opcode, stack):
    """Applies an instruction to the stack, which holds only nesting depths."""
    if opcode.name == 'MARK':
        stack.append(_MARK)
        return
    taken = []
    before = [item.name for item in opcode.stack_before]
    if 'mark' in before:
        while stack and (depth := stack.pop()) != _MARK:
            taken.append(depth)
        before = before[: before.index('mark')]
    for _ in before:
        taken.append(stack.pop() if stack else 0)
    depth = max(taken, default=0) + (opcode.name in _HOLDERS)
    if depth > _DEEPEST:
        raise pickle.UnpicklingError(f'it is more than {_DEEPEST} containers deep')
    stack += [depth] * len(opcode.stack_after)
