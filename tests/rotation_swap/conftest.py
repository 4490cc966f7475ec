import pytest
import torch


@pytest.fixture
def clean_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()
