"""Chooses the column that tells which images are of one patient, study or lesion."""

import dataclasses
import shlex
from collections.abc import Iterable, Mapping, Sequence

from flax_densenet.data import cells as cells_lib

_words = str.split
# Names of columns without case and punctuation, by rank: all images of a patient
# stay together, so a patient comes before a study, and a study before a lesion.
_PATIENTS = _words(
    'patient patientid patientname patientno patientnumber subject subjectid '
    'participant participantid person personid individual individualid animal animalid '
    'mouse mouseid donor donorid mrn pid patno patientkey patientmrn subjectno '
    'subjectnumber subjectname participantno volunteer volunteerid empianon '
    'anonpatientid writer writerid '
    'patients patientsid patientnr patientnum patientcode patientuid patientuuid '
    'patientindex patienthash patientnummer patientenid patientennr patientennummer '
    'pat patid patnr patnum patnumber pt ptid ptno ptnr ptnum ptnumber rid empi anonid '
    'subjects subjectnr subjectcode subjectkey subj subjid subjno subjnr '
    'participants participantnr participantnumber participantcode probandid '
    'ratid cowid pigid sheepid horseid monkeyid dogid catid fishid birdid'
)
_STUDIES = _words(
    'case caseid caseno casenr casenumber casename cases study studyid studyno studynr '
    'studynumber studyuid studyinstanceuid accession accessionid accessionno '
    'accessionnr accessionnumber encounter encounterid encounternumber hadmid stayid '
    'visitid exam examid examno examnumber examination examinationid specimen '
    'specimenid specimenno specimennumber biopsy biopsyid slide slideid slidename '
    'slideno slidenumber wsi wsiid video videoid videoname clipid scanid seriesid '
    'seriesuid seriesinstanceuid'
)
_LESIONS = ['lesionid']
_OTHERS = _words('group groupid')
_RANKS = {
    key: rank
    for rank, keys in enumerate((_PATIENTS, _STUDIES, _LESIONS, _OTHERS))
    for key in keys
}
_ORDER = {key: place for place, key in enumerate(_RANKS)}
# Words that can also be a label (`person`, `animal`), a class or an arm of a study.
_DOUBTFUL = frozenset(
    _words(
        'subject subjects participant person individual animal mouse donor volunteer '
        'writer pat pt rid subj case cases study accession encounter exam examination '
        'specimen biopsy slide wsi video group'
    )
)
_FEW, _MANY = 5, 24  # fewer values in so many rows are not those of patients
_MOST_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Choice:
    """A column of groups.

    Attributes:
      name: the column, or None.
      freed: columns with the name of groups that are not taken for them.
      notes: a line about each guess.
    """

    name: str | None
    freed: frozenset[str]
    notes: list[str]


def is_group(name: str) -> bool:
    """Whether the name of a column or field is that of groups."""
    # pT is the stage of a tumor.
    return cells_lib.key(name) in _RANKS and name.strip() != 'pT'


def identifies_people(name: str) -> bool:
    """Whether the values of a column may not be shown: not so for kinds of studies."""
    key = cells_lib.key(name)
    return is_group(name) and (_RANKS[key] != 1 or key not in _DOUBTFUL)


def group_of(names: Iterable[str]) -> str | None:
    """The column with the owner of each image, such as `Patient ID`; None for none."""
    return min(filter(is_group, names), key=_order, default=None)


def _order(name):
    return _ORDER[cells_lib.key(name)]


def setting(name: str) -> str:
    """The setting that groups by a column, as it is written in a shell."""
    return f'data.groups={shlex.quote("column:" + name)}'


def choose(columns: Mapping[str, Sequence[str]], *, has_labels: bool = False) -> Choice:
    """Chooses among columns by their names and values.

    Columns with the same value in all rows are skipped, and so are those that have
    another value in each row if another one has not.

    Args:
      columns: cells by name, for columns without another role.
      has_labels: whether the labels are other columns.
    """
    ranked = sorted(filter(is_group, columns), key=_order)
    notes, freed = [], set()
    for name in ranked:
        if line := describe_doubt(name, columns[name]):
            freed.add(name)
            notes.append(line)
    doubtful = [name for name in ranked if cells_lib.key(name) in _DOUBTFUL]
    if len(doubtful) == 1 and len(ranked) == len(columns) and not (freed or has_labels):
        freed.update(doubtful)
        notes.append(
            f'the column {doubtful[0]} is the only one for labels, so it is not taken '
            f'for patients; {setting(doubtful[0])} takes it'
        )
    left = [name for name in ranked if name not in freed]
    varied = [name for name in left if len(set(columns[name])) > 1]
    chosen = next(iter(varied or left), None)
    if chosen in varied and not _repeats(columns[chosen]):
        shared = [n for n in varied if _repeats(columns[n]) and _rank(n) < 3]
        chosen = next(iter(shared), chosen)
    others = [
        other + ' (the same in all rows)' * (other not in varied)
        for other in left
        if other != chosen and not describe_label(other, columns[other])
    ]
    if others and chosen in varied:
        notes.append(
            f'images are grouped by the column {chosen}, not by {", ".join(others)}; '
            'data.groups=column:NAME takes another column'
        )
    if chosen in varied and (line := describe_label(chosen, columns[chosen])):
        notes.append(line)
    return Choice(chosen, frozenset(freed), notes)


def describe_label(name: str, cells: Sequence[str]) -> str:
    """A line about a column of groups that may be a label; '' if it may not."""
    is_answer = not cells_lib.yes_or_no(cells)[1] and not cells_lib.says_nothing(cells)
    if not is_answer or len(set(cells)) < 2:
        return ''
    return (
        f'its column {name} is taken for one of patients by its name; '
        'data.label_columns takes it for a label'
    )


def _rank(name):
    return _RANKS[cells_lib.key(name)]


def _known(cells):
    return [cell for cell in cells if not cells_lib.is_missing(cell)]


def _repeats(cells):
    known = _known(cells)
    return len(set(known)) < len(known)


def describe_doubt(name: str, cells: Sequence[str]) -> str:
    """Why a column such as `person` or `group` is not one of groups; '' if it is.

    Only names that also mean something else are in doubt: their column holds yes and
    no, or fewer than 5 values in at least 24 rows. Values with digits, such as `m1`,
    are those of patients, but not of groups, studies or stages (`pt`).
    """
    key = cells_lib.key(name)
    if key not in _DOUBTFUL or len(set(cells)) < 2:
        return ''
    values = sorted({cell.strip() for cell in _known(cells)})
    is_few = len(values) < _FEW and len(cells) >= _MANY
    if is_few and _RANKS[key] == 0 and key != 'pt':
        is_few = not all(any(map(str.isdigit, value)) for value in values)
    if not values or not (is_few or not cells_lib.yes_or_no(cells)[1]):
        return ''
    shown = ', '.join(values[:_MOST_SHOWN])
    return (
        f'the column {name} has only the values {shown}, so it is not taken for '
        f'patients; {setting(name)} keeps images of the same {name} together'
    )
