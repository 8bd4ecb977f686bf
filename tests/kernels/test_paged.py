"""Statistics gathered while decoding, against the definitions; test_triton.py has the kernel."""

from __future__ import annotations

import pytest
import torch

from rlattn.kernels import StatisticsOptions
from rlattn.kernels.paged import decode_statistics
from rlattn.kernels.statistics import AttentionVariant
from tests.kernels.decoding import assert_decoded

VARIANTS = [
    {},
    {"sliding_window": 20},
    {"sliding_window": 4, "softcap": 2.0},
    {"sinks": torch.tensor([0.5, -2.0, 3.0, 0.0, 1.0, -1.0])},
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("options", [StatisticsOptions(), StatisticsOptions(30, 0, 5), StatisticsOptions(3, 4, 4)])
def test_rows_add_up_to_the_definitions(packed, options, variant):
    assert_decoded(packed([40, 33, 1, 25]), options, given_lse=False, **variant)


@pytest.mark.parametrize(
    ("options", "named"), [(StatisticsOptions(fai_high=None), "fai_high"), (StatisticsOptions(sink_tokens=2), "=2")]
)
def test_what_a_band_cannot_give_is_refused(options, named):
    none = torch.empty(0)
    with pytest.raises(ValueError, match=named):
        decode_statistics(none, none, none, none, none, none, options=options, variant=AttentionVariant(1.0))
