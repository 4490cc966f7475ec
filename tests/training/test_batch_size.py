"""One global batch, however many processes share it: the same samples in each update."""

import argparse

import pytest

from diffusers_mp.training import StreamBatchSampler
from diffusers_mp.training.batch_size import add_batch_arguments, check_batch_arguments, divide_batch


def parsed(*argv):
    parser = argparse.ArgumentParser()
    add_batch_arguments(parser.add_argument, 256)
    args = parser.parse_args(argv)
    check_batch_arguments(args, parser, 256)
    return args


@pytest.mark.parametrize(
    "argv, num_processes, micro, accumulation",
    [
        ((), 1, 256, 1),
        ((), 8, 32, 1),
        (("--train_batch_size", "64"), 1, 64, 4),
        (("--train_batch_size", "64"), 2, 64, 2),
        (("--train_batch_size", "64"), 8, 32, 1),
        # 48 divides no share: the largest below that does.
        (("--train_batch_size", "48"), 1, 32, 8),
        (("--total_batch_size", "96", "--train_batch_size", "20"), 3, 16, 2),
        (("--total_batch_size", "7", "--train_batch_size", "6"), 1, 1, 7),
    ],
)
def test_accumulation_follows_from_the_global_batch(argv, num_processes, micro, accumulation):
    args = parsed(*argv)
    batch = divide_batch(args, num_processes)
    assert batch == (args.total_batch_size, micro, num_processes, accumulation)
    assert batch.total == micro * num_processes * accumulation


def test_the_same_samples_in_each_update_on_1_2_and_8_processes():
    args, updates = parsed("--total_batch_size", "48", "--train_batch_size", "4"), {}
    for num_processes in (1, 2, 8):
        batch = divide_batch(args, num_processes)
        streams = [
            list(
                StreamBatchSampler(
                    100,
                    seed=3,
                    train_batch_size=batch.micro,
                    max_train_steps=5,
                    num_processes=num_processes,
                    process_index=index,
                    gradient_accumulation_steps=batch.accumulation,
                )
            )
            for index in range(num_processes)
        ]
        updates[num_processes] = [
            [
                place
                for micro_step in range(update * batch.accumulation, (update + 1) * batch.accumulation)
                for stream in streams
                for place in stream[micro_step]
            ]
            for update in range(5)
        ]
        assert [len(update) for update in updates[num_processes]] == [48] * 5
    assert updates[1] == updates[2] == updates[8]


def test_accumulation_by_hand_multiplies_as_in_diffusers():
    args = parsed("--train_batch_size", "4", "--gradient_accumulation_steps", "3")
    assert divide_batch(args, 2) == (24, 4, 2, 3)
    assert str(divide_batch(args, 2)) == "24 images an update = 4 x 2 processes x 3 accumulated"


@pytest.mark.parametrize(
    "total, num_processes, nearest", [("256", 6, "252 or 258"), ("3", 8, "8"), ("17", 16, "16 or 32")]
)
def test_processes_that_cannot_share_a_batch_are_refused(total, num_processes, nearest):
    with pytest.raises(
        ValueError, match=f"multiple of .* processes, {num_processes}, got {total}: {nearest} would do"
    ):
        divide_batch(parsed("--total_batch_size", total), num_processes)


@pytest.mark.parametrize(
    "argv, message",
    [
        (("--total_batch_size", "8", "--gradient_accumulation_steps", "2"), "give one of --total_batch_size"),
        (("--gradient_accumulation_steps", "2"), "--gradient_accumulation_steps needs --train_batch_size beside it"),
    ],
)
def test_an_update_that_is_said_twice_or_by_half_is_refused(capsys, argv, message):
    with pytest.raises(SystemExit, match="2"):
        parsed(*argv)
    assert message in capsys.readouterr().err
