"""Magnitudes at the start and after training, as their scripts measure them."""

from types import SimpleNamespace

import block_magnitudes
import pytest
import shared
from helpers import reset_accelerate
from shared import train_mpdit

from diffusers_mp import MPDiTTransformer2DModel, get_preset


def test_block_magnitudes_of_s2_stay_bounded_and_fall_by_averaging_alone():
    model = MPDiTTransformer2DModel(**get_preset("S/2", "E")).eval()
    measured = block_magnitudes.block_magnitudes(model, batch_size=4)
    outputs = [numbers["output"] for numbers in measured]
    assert len(outputs) == 12
    assert all(0.4 < output < 1.1 for output in outputs)
    assert outputs[0] == pytest.approx(0.95, abs=0.05)
    assert outputs[-1] == pytest.approx(0.65, abs=0.15)
    # Attention loses magnitude, feed-forward hardly any.
    assert all(numbers["attention"] < 1 for numbers in measured)
    assert measured[0]["attention"] < 0.75
    assert all(0.85 < numbers["feed_forward"] < 1.15 for numbers in measured)
    # Without the average over tokens nothing is lost.
    model.set_attn_processor(block_magnitudes.SelfOnlyAttnProcessor())
    measured = block_magnitudes.block_magnitudes(model, batch_size=4)
    assert all(0.93 < numbers["output"] < 1.07 for numbers in measured)


def test_block_magnitudes_table_has_a_row_for_each_block(run_here):
    printed = run_here("quality/block_magnitudes.py", "--sizes", "XS/8", "--batch_size", "2")
    assert "`python benchmarks/quality/block_magnitudes.py --sizes XS/8 --batch_size 2`" in printed
    rows = [line for line in printed.splitlines() if line.startswith("| ") and line[2].isdigit()]
    assert len(rows) == 6
    # Zero gates: at the start a block of A changes nothing.
    assert len({row.split("|")[4] for row in rows}) == 1


class Killed(Exception):
    pass


@pytest.mark.usefixtures("few_digits")
@pytest.mark.slow  # recorder, trainer and plots, each of which has its tests
def test_digits_magnitudes_goes_on_after_a_kill_and_draws(tmp_path, monkeypatch, run_here):
    def train(command):
        try:
            train_mpdit.main(train_mpdit.parse_args(command[2:]))
        finally:
            reset_accelerate()
        return SimpleNamespace(returncode=0)

    def kill(*args):
        raise Killed

    monkeypatch.setattr(shared, "subprocess", SimpleNamespace(run=train))
    small = ("--max_train_steps", "4", "--vae_steps", "4", "--num_validation_images", "8")
    more = ("--configurations", "E", "--ema_stds", "0.05", "0.1")
    command = ("quality/digits_magnitudes.py", "--output_dir", str(tmp_path), *small, *more)
    with monkeypatch.context() as of_the_first_run:
        of_the_first_run.setattr(train_mpdit, "finish", kill)
        with pytest.raises(Killed):
            run_here(*command)
    vae = (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()
    printed = run_here(*command)
    assert f"Resuming from {tmp_path / 'E' / 'checkpoint-'}" in printed
    assert (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").read_bytes() == vae
    assert "| E, block | attention, out / in |" in printed
    assert "| E, width of the average | 0.05 | 0.1 |" in printed
    figures = {path.stem: path.stat().st_size for path in (tmp_path / "figures").iterdir()}
    assert set(figures) == {f"magnitudes_{name}" for name in ("blocks", "time", "angles")}
    assert min(figures.values()) > 10_000
