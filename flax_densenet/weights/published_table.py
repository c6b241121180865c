"""The table of published weights as text and as Markdown."""

from collections.abc import Sequence

from flax_densenet.weights import published

_NOT_PUBLISHED = 'not published'


def describe_preparation(entry: published.PublishedWeights) -> str:
    """Describes the preparation of images in a few words."""
    fields = entry.preparation
    side = fields['image_size']
    if fields['resize'] == 'stretch':
        text = f'stretched to {side}'
    elif fields['crop_fraction'] == 1:
        text = f'shorter side {side}, center'
    else:
        text = f'shorter side {round(side / fields["crop_fraction"])}, center {side}'
    scale = "ImageNet's mean and std"
    if fields['channels'] == 1:
        scale = 'gray, -1024 to 1024'
    return f'{text}, {fields["interpolation"]}; {scale}'


def describe_size(entry: published.PublishedWeights) -> str:
    """The size of the file, as published or estimated from the parameters."""
    if entry.size is not None:
        return f'{entry.size / 1e6:.0f} MB'
    return f'~{4 * entry.parameters / 1e6:.0f} MB'


def describe_accuracy(entry: published.PublishedWeights) -> str:
    """The accuracy with its source, or `not published`."""
    if entry.accuracy is None:
        return 'none: no classifier' if entry.classes == 'none' else _NOT_PUBLISHED
    return f'{entry.accuracy} [{entry.accuracy_source}]'


def default_name(entry: published.PublishedWeights) -> str:
    """The short name of this entry; '' if it has none."""
    return next((n for n, full in published.DEFAULTS.items() if full == entry.name), '')


def describe_check(entry: published.PublishedWeights) -> str:
    """Says whether the outputs of the published file were verified."""
    return 'verified' if entry.fingerprint else published.UNVERIFIED


def format_text(entries: Sequence[published.PublishedWeights]) -> str:
    """The table for a terminal."""
    lines = []
    for entry in entries:
        short = default_name(entry)
        lines += [
            entry.name + (f'   (also: {short})' if short else ''),
            f'    {entry.variant}, {entry.parameters / 1e6:.2f} million parameters, '
            f'{describe_size(entry)}, {entry.image_size} pixels',
            f'    images: {describe_preparation(entry)}',
            f'    accuracy: {describe_accuracy(entry)}',
            f'    license: {entry.license}',
            f'    {describe_check(entry)}',
        ]
    return '\n'.join(lines)


_HEADINGS = (
    *('Name', 'Parameters', 'Pixels', 'Images', 'Published accuracy', 'License'),
    *('Size', 'Check'),
)


def format_markdown(entries: Sequence[published.PublishedWeights]) -> str:
    """The table for docs/pretrained.md."""
    rows = [_HEADINGS, ['---'] * len(_HEADINGS)]
    for entry in entries:
        short = default_name(entry)
        rows.append(
            [
                f'`{entry.name}`' + (f', `{short}`' if short else ''),
                f'{entry.parameters / 1e6:.2f} M',
                str(entry.image_size),
                describe_preparation(entry),
                describe_accuracy(entry).replace('[', '(').replace(']', ')'),
                entry.license,
                describe_size(entry),
                describe_check(entry),
            ]
        )
    return '\n'.join(f'| {" | ".join(row)} |' for row in rows)
