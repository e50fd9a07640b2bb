"""From text files to batches: files -> characters -> ids -> windows of ids."""

from data.baselines import baselines
from data.batches import (
    draw_starts,
    evenly_spaced,
    fit_block_size,
    read_in_order,
    read_windows,
    step_seed,
)
from data.catalogue import CATALOGUE
from data.files import STANDARD_INPUT
from data.survey import LONG_COPY, count_copied, coverage, survey
from data.text import Text, TextConfig, read_text
from data.vocabulary import Vocabulary
