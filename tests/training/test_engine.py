"""Engines that are not given, or not supported, are refused."""

import pytest
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from diffusers_mp.training.engine import check_engine


@pytest.mark.parametrize(
    "engine, message",
    [
        ("FSDP", "FSDP was asked for, but Accelerate chose NO: it shards on several accelerators only"),
        ("DEEPSPEED", "DEEPSPEED was asked for, but this trainer runs on one process, DDP or FSDP2"),
        ("MEGATRON_LM", "MEGATRON_LM was asked for, but this trainer runs on one process, DDP or FSDP2"),
    ],
)
def test_engine_that_is_not_given_is_refused(monkeypatch, engine, message):
    # On the CPU Accelerate would go on without it and say nothing.

    accelerator = Accelerator()
    monkeypatch.setenv(f"ACCELERATE_USE_{engine}", "true")
    with pytest.raises(RuntimeError, match=message):
        check_engine(accelerator)


@pytest.mark.parametrize(
    "options, more, message",
    [
        ({"fsdp_version": 1}, {}, "FSDP version 1 was asked for, .* launch with `--fsdp_version 2`"),
        ({"activation_checkpointing": True}, {}, "`--fsdp_activation_checkpointing` renames parameters"),
        ({}, {"use_8bit_adam": True}, "`--use_8bit_adam` was asked for under FSDP2"),
        ({}, {"is_compiled": True}, "`--compile` was asked for under FSDP2"),
    ],
)
def test_kind_of_fsdp_that_is_not_supported_is_refused(monkeypatch, options, more, message):

    # A single process says that it shards: nothing needs a second one to be refused.
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_FSDP", "true")
        plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, **options})
        accelerator = Accelerator(fsdp_plugin=plugin)
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
        with pytest.raises(RuntimeError, match=message):
            check_engine(accelerator, **more)
