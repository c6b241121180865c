"""Bodies of browsers' forms (`multipart/form-data`): the image and its options in them.

Nothing is written to a disk, and what is read is bounded before: by who calls, in
bytes, and here in parts.
"""

import dataclasses
from typing import Any

from python_multipart import exceptions, multipart

# A form has one image and the options of /predict; browsers may add fields.
_MAX_PARTS = 16
# Longer text is no option.
_MAX_TEXT = 1000
# What the parts' headers may take beside the image.
OVERHEAD_BYTES = 20_000


class FormError(ValueError):
    """What is wrong with a form, in words for who sent it."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What a form holds: the bytes of its one file, and its text fields by name."""

    image: bytes
    fields: dict[str, str]


def is_form(content_type: str) -> bool:
    """Whether a body with this header is a form with parts.

    >>> is_form('Multipart/Form-Data; boundary=x'), is_form('image/png')
    (True, False)
    """
    return content_type.lower().startswith('multipart/')


def parse(content_type: str, body: bytes) -> Form:
    """Reads a whole form.

    Args:
      content_type: the header, which names what stands between the parts.

    Raises:
      FormError: it is none, is cut off, or has not exactly one file.
    """
    kind, options = multipart.parse_options_header(content_type)
    if kind != b'multipart/form-data':
        raise FormError('it must be multipart/form-data')
    if not options.get(b'boundary'):
        raise FormError('its header Content-Type has no boundary')
    files: list[Any] = []
    fields: dict[str, str] = {}
    ended: list[bool] = []

    def check_count():
        if len(files) + len(fields) >= _MAX_PARTS:
            raise FormError(f'it has more than {_MAX_PARTS} parts')

    def on_file(file):
        check_count()
        files.append(file)

    def on_field(field):
        check_count()
        name = field.field_name.decode('utf-8', 'replace')
        value = field.value or b''
        if len(value) > _MAX_TEXT:
            raise FormError(
                f'its part {name[:80]} is a long text; send the image as a file, as '
                'with -F image=@photo.jpg'
            )
        fields[name] = value.decode('utf-8', 'replace')

    try:
        parser = multipart.FormParser(
            'multipart/form-data',
            on_field,
            on_file,
            on_end=lambda: ended.append(True),
            boundary=options[b'boundary'],
            config={'MAX_MEMORY_FILE_SIZE': len(body) + 1},
        )
        parser.write(body)
        parser.finalize()
    except exceptions.FormParserError as error:
        raise FormError(f'it cannot be parsed ({error})'[:200]) from error
    if not ended:
        raise FormError('it is cut off')
    # A field of a form that is left empty is a file of no name and no bytes.
    files = [file for file in files if file.size or file.file_name]
    if len(files) != 1:
        raise FormError(
            f'it has {len(files) or "no"} file{"s" * (len(files) > 1)}; send one, as '
            'with curl -F image=@photo.jpg'
        )
    files[0].file_object.seek(0)
    return Form(files[0].file_object.read(), fields)
