"""All settings of the program, typed; `from_config` makes them of a ConfigDict."""

from flax_densenet.settings.config import (
    RENAMED,
    SECTIONS,
    current_name,
    flatten,
    from_config,
    from_saved,
    to_config,
    with_current_names,
    with_former_split,
)
from flax_densenet.settings.fields import (
    AugmentationSettings,
    EvaluationSettings,
    LoaderSettings,
    LossSettings,
    ModelSettings,
    OptimizerSettings,
    PreparationSettings,
    ScheduleSettings,
    Settings,
    SourceSettings,
    TrainingSettings,
)

__all__ = [
    'RENAMED',
    'SECTIONS',
    'AugmentationSettings',
    'EvaluationSettings',
    'LoaderSettings',
    'LossSettings',
    'ModelSettings',
    'OptimizerSettings',
    'PreparationSettings',
    'ScheduleSettings',
    'Settings',
    'SourceSettings',
    'TrainingSettings',
    'current_name',
    'flatten',
    'from_config',
    'from_saved',
    'to_config',
    'with_current_names',
    'with_former_split',
]
