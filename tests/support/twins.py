"""Cases of a kernel that under ``make test`` its twin alone runs: Triton's interpreter, far slower, needs ``make test-all``."""

from functools import partial

import pytest

twin = partial(pytest.param, marks=pytest.mark.twin)
"""A case, as ``pytest.param``: a further shape or dtype of what another case of the same test shows."""
