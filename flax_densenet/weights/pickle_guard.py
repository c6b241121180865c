"""Looks through a pickle before it is read, for what would harm whoever reads it.

No code runs here or there: `torch_files` decides what a pickle may name. But plain data
harms too. A memo's place of 2^31 makes the reader take 32 GB for the table up to it; a
tuple in a tuple, a million deep, overflows the stack of the machine when it is hashed.

>>> import io, pickle
>>> check(io.BytesIO(pickle.dumps({'weight': [1, 2]})))
>>> check(io.BytesIO(b'\\x80\\x02Nr\\xff\\xff\\xff\\x7f.'))
Traceback (most recent call last):
_pickle.UnpicklingError: its table of objects would have 2147483647 places
"""

import pickle
import pickletools

_DEEPEST = 500  # containers inside one another; networks of torch have some 30
_MOST_STEPS = 10_000_000
_PUTS = {'PUT', 'BINPUT', 'LONG_BINPUT'}
_GETS = {'GET', 'BINGET', 'LONG_BINGET'}
# These leave something that holds what they take from the stack.
_HOLDERS = {'TUPLE', 'TUPLE1', 'TUPLE2', 'TUPLE3', 'LIST', 'DICT', 'FROZENSET'}
_HOLDERS |= {'REDUCE', 'NEWOBJ', 'NEWOBJ_EX', 'OBJ', 'INST', 'BUILD'}
_MARK = -1


def check(file):
    """Reads one pickle without making its objects; the file is then where it was.

    Raises:
      pickle.UnpicklingError: it would take memory or stack without end.
      ValueError: it is not whole.
    """
    start = file.tell()
    stack, memo = [], {}
    for steps, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if steps > _MOST_STEPS:
            raise pickle.UnpicklingError('it has no end')
        if opcode.name in _PUTS or opcode.name == 'MEMOIZE':
            place = len(memo) if argument is None else int(argument)
            # Picklers count from 0, and some leave places out.
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
    """What an instruction does to the stack, of which only depths are kept."""
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
