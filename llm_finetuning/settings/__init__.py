"""The settings behind the notebooks' parameters cells: one class a notebook, validated as a whole.

Default, type, check and sentence of a setting stand together at its field. A parameters cell holds literals; the cell
after it calls `from_cell(Finetuning, globals())`. Nothing heavy is imported here, so a typing mistake is answered at
once.
"""

from llm_finetuning.settings.checks import (
    AUTO,
    NOT_IN_FORM,
    SYSTEM_MESSAGE,
    from_cell,
    from_file,
    not_in_form,
    split_names,
)
from llm_finetuning.settings.data_prep import NO_FILTERS, PHI2_FILTERS, DataPrep
from llm_finetuning.settings.evaluation import Evaluation
from llm_finetuning.settings.finetuning import EXPERTS, GGUF_TYPES, TRIAL_PAIRS, Finetuning, gguf_types
from llm_finetuning.settings.folders import Folders
from llm_finetuning.settings.generation import Generation
from llm_finetuning.settings.inference import Inference, sampling_rules
from llm_finetuning.settings.preference import LOSSES, PreferenceTuning

__all__ = [
    "AUTO",
    "EXPERTS",
    "GGUF_TYPES",
    "LOSSES",
    "NOT_IN_FORM",
    "NO_FILTERS",
    "PHI2_FILTERS",
    "SYSTEM_MESSAGE",
    "TRIAL_PAIRS",
    "DataPrep",
    "Evaluation",
    "Finetuning",
    "Folders",
    "Generation",
    "Inference",
    "PreferenceTuning",
    "from_cell",
    "from_file",
    "gguf_types",
    "not_in_form",
    "sampling_rules",
    "split_names",
]
