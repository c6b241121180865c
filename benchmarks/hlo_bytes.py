"""Counts the bytes of memory that a compiled GPU program moves, from its text.

Each operation of the entry computation (a fusion, a library call or a kernel) reads its
operands from memory and writes its results. `cost_analysis` in XLA does not consider
which results are written in place, or which parts a Pallas kernel does not touch. Here,
a slice inside a fusion counts as the slice, a `dynamic-update-slice` as the update, and
a kernel of `gpu_kernels`, which gets the entire buffer, as the channels that it
touches.

`least` computes what the architecture needs at least, in any program.
"""

import collections
import math
import re

_SIZES = {'pred': 1, 'bf16': 2, 'f16': 2, 'f64': 8, 'c64': 8}
_FREE = {
    *('parameter', 'tuple', 'get-tuple-element', 'bitcast', 'constant'),
    *('after-all', 'partition-id'),
}
_LINE = re.compile(
    r'\s+(?:ROOT )?%?(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*?)\)(?:, (.*))?$'
)
_SHAPE = re.compile(r'\b(pred|bf16|f16|[fsuc]\d+)\[([\d,]*)\]')


def bytes_of(shapes: str) -> float:
    """The bytes of all arrays in a text, given by type and shape: `f32[2,3]`."""
    total = 0
    for kind, sizes in _SHAPE.findall(shapes):
        width = _SIZES.get(kind) or int(re.sub(r'\D', '', kind)) / 8
        total += width * math.prod(int(n) for n in sizes.split(',') if n)
    return total


def computations(text: str):
    """The parts of a compiled program; the entry is None.

    Returns:
      `{name: [(result, shape, opcode, operands, attributes)]}`.
    """
    found, lines = {}, None
    for line in text.splitlines():
        head = re.match(r'(ENTRY )?%?(\S+) \(.*\{$', line)
        if head:
            lines = found[None if head[1] else head[2]] = []
        elif lines is not None and (match := _LINE.match(line)):
            name, shape, opcode, operands, rest = match.groups()
            operands = re.findall(r'%([\w.-]+)', operands) or operands
            lines.append((name, shape, opcode, operands, rest or ''))
    return found


def _fusion(lines):
    """(bytes read by operand, bytes written or None for the whole result)."""
    read, users = {}, collections.defaultdict(list)
    for name, shape, opcode, operands, _ in lines:
        if opcode == 'parameter':
            read[name] = int(operands if isinstance(operands, str) else operands[0])
            continue
        for place, operand in enumerate(operands):
            users[operand].append((opcode, place, shape))
    shapes = {line[0]: line[1] for line in lines}
    updates = [bytes_of(shapes[line[3][1]]) for line in lines if 'update' in line[2]]
    parts = {}
    for name, number in read.items():
        uses = users[name]
        if uses and all(use[0] in ('slice', 'dynamic-slice') for use in uses):
            parts[number] = sum(bytes_of(use[2]) for use in uses)
        elif uses and all(use[:2] == ('dynamic-update-slice', 0) for use in uses):
            parts[number] = 0
        else:
            others = [use for use in uses if use[:2] != ('dynamic-update-slice', 0)]
            if others and all(use[0] in ('slice', 'dynamic-slice') for use in others):
                parts[number] = sum(bytes_of(use[2]) for use in others)
    return parts, sum(updates) if updates else None


def _kernel(shape, operands):
    """Of a kernel of ours: of a whole buffer `[P, width]` only what it touches.

    The last operand is the kernel, `[C, M]` of a product, which touches C channels, or
    `[9 * M, G]` of a 3x3 convolution, which puts G into the buffer.
    """
    channels, features = _sizes(operands[-1])
    pixels, width = _sizes(operands[0])
    touched, read = channels, True
    if channels == 9 * width:
        touched, read = features, False
    total = 0
    for place, text in enumerate([*operands, shape]):
        for kind, sizes in _SHAPE.findall(text):
            sizes = [int(n) for n in sizes.split(',')]
            buffer = sizes[0] == pixels and sizes[1:] not in ([features], [width])
            if touched == channels and sizes[0] == pixels and sizes[1:] != [features]:
                buffer = True
            if buffer:
                sizes[1] = min(sizes[1], touched)
                if not read and place < len(operands):
                    sizes[1] = 0
            total += bytes_of(f'{kind}[{",".join(map(str, sizes))}]')
    return total


def _sizes(text):
    return [int(n) for n in _SHAPE.search(text)[2].split(',')]


def count(text: str) -> dict[str, float]:
    """Bytes by kind of operation, of `compiled.as_text()`, the most first."""
    program = computations(text)
    shapes = {line[0]: line[1] for line in program[None]}
    found = collections.Counter()
    for name, shape, opcode, operands, rest in program[None]:
        if opcode in _FREE or opcode.endswith('-done'):
            continue
        kind, known = opcode, [shapes.get(operand, '') for operand in operands]
        total = bytes_of(shape) + sum(map(bytes_of, known))
        if opcode == 'fusion':
            kind = re.sub(r'[.\d]+$', '', name)
            parts, written = _fusion(program[re.search(r'%([\w.-]+)', rest)[1]])
            total = bytes_of(shape) if written is None else written
            for number, operand in enumerate(known):
                total += parts.get(number, bytes_of(operand))
        elif opcode == 'custom-call':
            kind = re.search(r'custom_call_target="([^"]+)"', rest)[1]
            if kind.endswith('xla.gpu.triton'):
                total = _kernel(shape, known)
        found[kind] += total
    return dict(found.most_common())


def least(module, image_size: int, width: int = 2) -> float:
    """The least bytes per image that a training step must move.

    Batch norm and ReLU count as part of the adjacent product, and statistics as part of
    the operation that writes. With C input channels, M channels in the middle and G
    output channels, a layer then reads C and writes M, and reads M and writes G. In the
    backward pass it reads G and M and writes the gradient of M; then it reads M, the
    gradient of M and C, and adds to the gradient of C, which is a read and a write.

    Args:
      module: a DenseNet with bottleneck.
      width: bytes of a value.
    """
    side, channels = image_size, module.stem_features
    values = 0
    if module.stem == 'imagenet':
        side = -(-side // 2)
        # Convolution out; pooling in and out; back: gradient in, x in, gradient out;
        # both again for the weight gradient.
        values += 7 * side**2 * channels
        side = -(-side // 2)
        values += 2 * side**2 * channels
    middle = module.bottleneck * module.growth_rate
    for number, depth in enumerate(module.block_sizes, start=1):
        for _ in range(depth):
            values += side**2 * (4 * channels + 6 * middle + 2 * module.growth_rate)
            channels += module.growth_rate
        if number < len(module.block_sizes):
            # In, out; back: gradient in, x in, gradient out; at a quarter behind.
            after = int(channels * module.compression)
            values += side**2 * (3 * channels + 0.75 * after)
            side, channels = side // 2, after
    return width * (values + side**2 * 3 * channels)
