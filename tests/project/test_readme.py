"""Every Python block of the README runs as it stands."""

import re

import pytest
from helpers import ROOT

import diffusers_mp


README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS)
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(block, namespace)
    assert [sample.size for sample in namespace["samples"]] == [(8, 8), (8, 8)]


def test_there_is_a_block():
    assert len(BLOCKS) == 1
    assert all(name in diffusers_mp.__all__ for name in re.findall(r"\bMP\w+", BLOCKS[0]))
