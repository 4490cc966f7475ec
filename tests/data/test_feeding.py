"""How many helpers prepare what a device computes on, and what of it is pinned. Pinning itself needs a GPU."""

import os

import pytest
import torch
from helpers import tiny_vae

from diffusers_mp.data.feeding import can_pin, default_num_workers, to_device
from diffusers_mp.data.settings import EncodingSettings


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def test_helpers_share_the_processors_of_a_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(6), raising=False)
    assert [default_num_workers(CUDA, most) for most in (4, 8)] == [4, 6]
    for num_processes, expected in ((2, 3), (4, 1), (8, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(num_processes))
        assert default_num_workers(CUDA, 4) == expected
    assert default_num_workers(CPU, 4) == 0


def test_threads_of_an_encoding_follow_from_the_vaes_device(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(64), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    vae = tiny_vae()
    assert EncodingSettings(16).for_vae(vae).num_workers == 0
    assert EncodingSettings(16, num_workers=3).for_vae(vae).num_workers == 3
    assert EncodingSettings(16).for_vae(vae.to("meta")).num_workers == 8
    assert EncodingSettings(16, num_workers=0).for_vae(vae).num_workers == 0
    assert EncodingSettings(16).for_vae(None).num_workers == 0


def test_the_cpu_needs_no_pinned_memory():
    assert not can_pin(CPU)
    batch = {"latents": torch.randn(2, 3)}
    assert to_device(batch, CPU)["latents"] is batch["latents"]


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator may pin")
def test_pinning_is_tried_not_presumed():
    assert not can_pin(CUDA)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_copies_from_pinned_memory():
    assert can_pin(CUDA)
