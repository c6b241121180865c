"""Options for reading a table of labels, from `config.data`."""

import dataclasses
import re

from flax_densenet.data import soft_labels, split_column, subgroup_columns
from flax_densenet.errors import UserError

KINDS = ('auto', 'labels', 'classes')
MEANINGS = ('unknown', 'negative', 'positive')
OF_UNCERTAIN = (*MEANINGS, 'soft')


@dataclasses.dataclass(frozen=True)
class Options:
    """Options for reading a table.

    Attributes:
      kind: `labels` for several labels per image, `classes` for one class each, or
        `auto`.
      columns: columns of the labels or the class; empty to detect them.
      groups: `column:NAME`, `none`, or anything else to detect the column.
      blank, uncertain: meaning of a missing cell and of -1: unknown (or ignore),
        negative, positive; -1 also soft.
      split: the column of parts, see `split_column`.
      for_training: whether a model learns from the table; a measured one needs no
        negative images.
      soft: the range of `soft` targets, see `soft_labels`.
      subgroups: columns that divide the images for the report, see `subgroup_columns`.
      held_out_chooses: the only part that is held out chooses the best epoch. Otherwise
        others do, such as those of `data.val_fraction`.
    """

    kind: str = 'auto'
    columns: tuple[str, ...] = ()
    groups: str = 'auto'
    blank: str = 'unknown'
    uncertain: str = 'unknown'
    split: str = 'auto'
    for_training: bool = True
    soft: tuple[float, float] = soft_labels.SPAN
    subgroups: str = 'auto'
    held_out_chooses: bool = True

    def purposes(self, parts: int) -> list[str]:
        """What two or three parts are for, in a message.

        The texts are empty if a model is only measured: what it was trained on is not
        known from the data.
        """
        if not self.for_training:
            return [''] * parts
        chooses, ends = ', which chooses the best epoch', ', which is measured once, at'
        ends += ' the end'
        only = chooses if self.held_out_chooses else ends
        return [' to train on', *([only] if parts == 2 else [chooses, ends])]

    def __post_init__(self):
        for name in ('blank', 'uncertain'):
            if getattr(self, name) == 'ignore':
                object.__setattr__(self, name, 'unknown')
        object.__setattr__(self, 'soft', soft_labels.check(self.soft))
        for field, value, valid in (
            ('label_kind', self.kind, KINDS),
            ('blank_labels', self.blank, MEANINGS),
            ('uncertain_labels', self.uncertain, OF_UNCERTAIN),
        ):
            if value not in valid:
                raise UserError(
                    f'data.{field}={value} is not known; use {", ".join(valid)}'
                )
        check_groups(self.groups)
        split_column.check(self.split)
        subgroup_columns.check(self.subgroups)


def options_of(fields) -> Options:
    """The options from the fields of `config.data`."""
    return Options(
        fields['label_kind'],
        tuple(fields['label_columns']),
        fields['groups'],
        fields['blank_labels'],
        fields['uncertain_labels'],
        fields['split'],
        soft=tuple(fields['soft_labels']),
        subgroups=fields['subgroups'],
    )


def check_groups(groups: str) -> re.Pattern | None:
    """The pattern of `path:REGEX`; None for other valid values of `data.groups`.

    Raises:
      UserError: the value is invalid.
    """
    kind, _, value = groups.partition(':')
    if kind == 'path' and value:
        try:
            return re.compile(value)
        except re.error as error:
            raise UserError(f'data.groups={groups}: {error}') from error
    if groups not in ('auto', 'none', 'path') and not (kind == 'column' and value):
        raise UserError(
            f'data.groups={groups} is not known; use auto, none, column:NAME, path or '
            'path:REGEX'
        )
    return None
