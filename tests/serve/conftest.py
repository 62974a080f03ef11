"""Where models are served in these tests."""

import pytest
import torch


@pytest.fixture(params=["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def device(request):
    """The CPU, and a GPU where there is one."""
    return torch.device(request.param)
