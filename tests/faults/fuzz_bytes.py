"""Ways to damage a file: at random, and such that the damage is not noticed at once.

A checksum or a length at the front would keep most random damage from the code behind
it; so PNG chunks, zip members and safetensors headers are also damaged inside and then
sealed again. Everything is drawn from one `random.Random`, so that an input can be made
again.
"""

import copy
import io
import json
import struct
import zipfile
import zlib

_INTEGERS = (0, 1, 2, 127, 128, 255, 256, 32767, 32768, 65535, 65536)
_INTEGERS += (2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
_HOSTILE = (
    *(None, True, False, 0, 1, -1, 3, 0.5, -0.0, 1e-320, 1e308, 2**31, 2**63, 10**30),
    *(float('nan'), float('inf'), '', 'x', 'none', '0', '\x1b[2J', '\u0000', '\udc80'),
    *('../../x', '/etc/passwd', 'a' * 70000, [], {}, [[]], [0], [-1], [10**9], [1e9]),
    *([1, 'x'], {'a': {}}, [2**63], ['a'] * 3000, [6, 12, 24, 16], [0.5] * 3),
)


def damage(rng, seeds, tokens=(), *, most=6) -> bytes:
    """One of the seeds, changed in one to `most` places; rarely not at all."""
    raw = bytearray(rng.choice(seeds))
    for _ in range(min(most, int(rng.expovariate(0.5)) + (rng.random() < 0.97))):
        _CHANGES[rng.randrange(len(_CHANGES))](rng, raw, seeds, tokens)
        if len(raw) > 2**20:
            del raw[2**20 :]
    return bytes(raw)


def _place(rng, raw):
    """Headers and trailers decide more than what is between them."""
    where, size = rng.random(), len(raw)
    if where < 0.35:
        return rng.randrange(min(size, 64) + 1)
    if where < 0.5:
        return size - rng.randrange(min(size, 64) + 1)
    return rng.randrange(size + 1)


def _length(rng):
    return 1 << rng.randrange(12)


def _flip(rng, raw, seeds, tokens):
    for _ in range(1 << rng.randrange(5)):
        at = _place(rng, raw)
        if at < len(raw):
            raw[at] ^= 1 << rng.randrange(8)


def _set(rng, raw, seeds, tokens):
    at = _place(rng, raw)
    raw[at : at + 1] = bytes([rng.randrange(256)])


def _integer(rng, raw, seeds, tokens):
    at, size = _place(rng, raw), rng.choice((1, 2, 4, 8))
    value = (rng.choice(_INTEGERS) + rng.choice((0, 0, -1, 1))) % 2 ** (8 * size)
    raw[at : at + size] = value.to_bytes(size, rng.choice(('little', 'big')))


def _cut(rng, raw, seeds, tokens):
    del raw[_place(rng, raw) :]


def _delete(rng, raw, seeds, tokens):
    at = _place(rng, raw)
    del raw[at : at + _length(rng)]


def _repeat(rng, raw, seeds, tokens):
    at = _place(rng, raw)
    raw[at:at] = raw[at : at + _length(rng)] * rng.choice((1, 1, 2, 50))


def _noise(rng, raw, seeds, tokens):
    at, size = _place(rng, raw), _length(rng)
    raw[at : at + rng.choice((0, size))] = rng.randbytes(size)


def _fill(rng, raw, seeds, tokens):
    at, size = _place(rng, raw), _length(rng)
    raw[at : at + size] = bytes([rng.choice((0, 255, 32, 40))]) * size


def _splice(rng, raw, seeds, tokens):
    other = rng.choice(seeds)
    start = rng.randrange(len(other) + 1)
    if rng.random() < 0.3:
        raw[_place(rng, raw) :] = other[start:]
    else:
        at, size = _place(rng, raw), _length(rng)
        raw[at : at + size] = other[start : start + size]


def _token(rng, raw, seeds, tokens):
    if tokens:
        at, token = _place(rng, raw), rng.choice(tokens)
        raw[at : at + rng.choice((0, len(token)))] = token


def _replace_token(rng, raw, seeds, tokens):
    """One word of the format in the place of another."""
    known = [token for token in tokens if token in raw]
    if known:
        old, new = rng.choice(known), rng.choice(tokens)
        at = raw.find(old, rng.randrange(len(raw)))
        at = raw.find(old) if at < 0 else at
        raw[at : at + len(old)] = new


_CHANGES = (
    *(_flip, _flip, _set, _integer, _integer, _cut, _delete, _repeat, _noise, _fill),
    *(_splice, _token, _replace_token),
)


def seal_png(raw: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have."""
    if raw[:8] != b'\x89PNG\r\n\x1a\n':
        return raw
    out, at = bytearray(raw[:8]), 8
    while at + 12 <= len(raw):
        (size,) = struct.unpack('>I', raw[at : at + 4])
        body = raw[at + 4 : at + 8 + size]
        out += raw[at : at + 4] + body + struct.pack('>I', zlib.crc32(body))
        at += 12 + size
    return bytes(out + raw[at:])


def damage_zip(rng, seeds, tokens) -> bytes:
    """A zip file of which members are damaged, renamed, lost, doubled or swollen."""
    raw = rng.choice(seeds)
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        members = [[name, archive.read(name)] for name in archive.namelist()]
    others = [content for _, content in members if content]
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, what = rng.randrange(len(members)), rng.random()
        # The first member is what the others are read by.
        at = 0 if rng.random() < 0.5 else at
        name, content = members[at]
        if what < 0.75:
            members[at][1] = damage(rng, [content] + others[:2], tokens)
        elif what < 0.85:
            names = ('../../x', '/x', 'data.pkl', 'a/code/b', name + 'x', '')
            members[at][0] = rng.choice(names)
        elif what < 0.9 and len(members) > 1:
            del members[at]
        elif what < 0.95:
            members.append([name, content[::-1]])
        else:
            members[at][1] = content + bytes(rng.choice((10**5, 10**8)))
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', rng.choice((0, 0, 8)), compresslevel=1) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content)
    return out.getvalue()


def damage_json(rng, value):
    """JSON with one to three of its values, or keys, replaced."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = list(_places(value))
        if not places:
            return rng.choice(_HOSTILE)
        parent, key = rng.choice(places)
        new = copy.deepcopy(rng.choice(_HOSTILE))
        what = rng.random()
        if what < 0.1:
            del parent[key]
        elif what < 0.15 and isinstance(parent, dict):
            parent[str(new)[:50]] = parent.pop(key)
        elif what < 0.2 and isinstance(parent[key], list):
            parent[key] = parent[key] * rng.choice((2, 1000))
        elif what < 0.25:
            for _ in range(rng.choice((5, 2000))):
                parent[key] = [parent[key]]
        else:
            parent[key] = new
    return value


def _places(value):
    waiting = [value]
    while waiting:
        node = waiting.pop()
        pairs = node.items() if isinstance(node, dict) else enumerate(node)
        for key, child in pairs:
            yield node, key
            if isinstance(child, dict | list):
                waiting.append(child)


def to_json(value) -> bytes:
    """Deep nests too, which `json` refuses to write."""
    try:
        return json.dumps(value).encode()
    except RecursionError:
        return b'[' * 100_000


def damage_safetensors(rng, seeds) -> bytes:
    """A safetensors file with a damaged header of the right length."""
    raw = rng.choice(seeds)
    size = int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8 : 8 + size])
    if rng.random() < 0.5 and '__metadata__' in header:
        ours = header['__metadata__']
        for name, text in ours.items():
            if text.startswith('{'):
                ours[name] = to_json(damage_json(rng, json.loads(text))).decode()
    else:
        header = damage_json(rng, header)
    text = to_json(header)
    return len(text).to_bytes(8, 'little') + text + raw[8 + size :]
