"""Figures of a record, as matplotlib draws them."""

import builtins
import math
import re

import numpy as np
import pytest
import torch
from helpers import tiny_model
from PIL import Image
from processes import run_python
from recorded_models import train

from diffusers_mp import MagnitudeRecorder
from diffusers_mp.diagnostics import plots


@pytest.fixture(scope="module")
def history():
    torch.manual_seed(0)
    _, recorder = train(tiny_model(num_layers=3), 6, {"stride": 2})
    recorder.close()
    return recorder.history


class TestPlots:
    @pytest.fixture(autouse=True)
    def _page(self, tmp_path):
        self.folder = tmp_path

    def written(self, figure):
        figure.savefig(self.folder / "figure.png")
        with Image.open(self.folder / "figure.png") as image:
            pixels = np.asarray(image.convert("RGB"))
        assert pixels.shape[1] == 1050  # 7 inches
        assert pixels.std() > 5
        return figure

    def test_blocks(self, history):
        (self.folder / "magnitudes.json").write_text("")
        recorder = MagnitudeRecorder(tiny_model())
        recorder.history = history
        recorder.save(self.folder / "magnitudes.json")
        figure = self.written(plots.plot_blocks({"E": history, "again": self.folder / "magnitudes.json"}))
        (axes,) = figure.axes
        assert axes.get_xlabel() == "block"
        assert axes.get_ylabel() == "magnitude (RMS) of the output"
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels == [f"{name}, update {step}" for name in ("E", "again") for step in (1, 6)]
        first, last, *from_file = axes.get_lines()
        name = "magnitude/activations/transformer_blocks"
        assert list(first.get_xdata()) == [1, 2, 3]
        assert list(first.get_ydata()) == [history[0][f"{name}.{index}"] for index in range(3)]
        assert list(last.get_ydata()) == [history[-1][f"{name}.{index}"] for index in range(3)]
        assert from_file[1].get_ydata() == pytest.approx(last.get_ydata(), rel=1e-5)

    def test_over_time(self, history):
        figure = self.written(plots.plot_over_time({"E": history, "F": history}, "relative_update"))
        left, right = figure.axes
        assert left.get_ylabel() == "relative update, RMS[new - old] / RMS[old]"
        assert (left.get_title(), right.get_title()) == ("E", "F")
        assert left.get_xlabel() == right.get_xlabel() == "update"
        line = left.get_lines()[1]
        assert list(line.get_xdata()) == [1, 2, 4, 6]
        assert list(line.get_ydata()) == [entry["relative_update/transformer_blocks.1"] for entry in history]
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            f"transformer_blocks.{index}" for index in range(3)
        ]

    def test_lines_are_in_the_order_of_depth(self):
        """Records name blocks first, and a block with what is in it."""
        names = ["patch_embed", "blocks.0", "blocks.1", "blocks.10", "blocks.2", "single_blocks.0", "output"]
        names += [f"blocks.{index}.{part}_modulation" for index in (0, 1, 10, 2) for part in ("attn", "ff")]
        entry = {"step": 1, **{f"relative_update/{name}": 1.0 for name in names}}
        axes = plots.plot_over_time({"A": [entry]}, "relative_update", ".*").axes[0]
        parts = ("", ".attn_modulation", ".ff_modulation")
        blocks = [f"blocks.{index}{part}" for index in (0, 1, 2, 10) for part in parts]
        assert [line.get_label() for line in axes.get_lines()] == ["patch_embed", *blocks, "single_blocks.0", "output"]

    def test_quantities_with_a_sign_are_not_drawn_on_a_logarithm(self, history):
        figure = self.written(plots.plot_over_time({"E": history}, "scale/mean", ".*"))
        assert figure.axes[0].get_yscale() == "linear"
        assert len(figure.axes[0].get_lines()) == 7

    def test_angles(self, history):
        figure = self.written(plots.plot_angles({"E": history}, r"transformer_blocks\..*"))
        axes = figure.axes[0]
        assert axes.get_xlabel() == "angle, radians"
        assert axes.get_title() == "E, update 6"
        assert [text.get_text() for text in axes.get_yticklabels()][:2] == [
            "transformer_blocks.0.attn_modulation",
            "transformer_blocks.0.ff_modulation",
        ]
        low, high = axes.get_xlim()
        assert low == -high
        assert high >= max(value for name, value in history[-1].items() if name.startswith("rotate/rms"))

    def test_ema_widths(self):
        figure = self.written(plots.plot_ema_widths({"E": {0.2: 3.0, 0.05: 2.0, 0.1: 1.5}}, ylabel="held-out loss"))
        axes = figure.axes[0]
        assert axes.get_ylabel() == "held-out loss"
        assert axes.get_xlabel() == "relative width of the average (fraction of training)"
        assert list(axes.get_lines()[0].get_ydata()) == [2.0, 1.5, 3.0]
        assert axes.get_legend().get_texts()[0].get_text() == "E, best 1.5 at 0.1"
        assert list(axes.get_lines()[1].get_xdata()) == [0.1]
        axes = plots.plot_ema_widths({"E": {0.03: math.nan, 0.05: 2.0, 0.1: 3.0}}, ylabel="held-out loss").axes[0]
        assert axes.get_legend().get_texts()[0].get_text() == "E, best 2 at 0.05"

    def test_samples(self):
        images = [Image.new("L", (8, 8), 40 * index) for index in range(5)]
        figure = self.written(plots.plot_samples({"A": images, "E": images}, columns=list("01234")))
        assert len(figure.axes) == 10
        assert [axes.get_title() for axes in figure.axes[:5]] == list("01234")
        assert [figure.axes[0].get_ylabel(), figure.axes[5].get_ylabel()] == ["A", "E"]
        with pytest.raises(ValueError, match="`rows` must have 5 images each, .* got 4 in 'A'"):
            plots.plot_samples({"A": images[:4]}, columns=list("01234"))

    def test_a_record_without_the_quantity(self, history):
        with pytest.raises(ValueError, match=re.escape("must have values nonsense/… of modules that match 'x', got")):
            plots.plot_over_time({"E": history}, "nonsense", "x")
        with pytest.raises(ValueError, match="a record must have entries"):
            plots.plot_blocks({"E": []})

    def test_without_matplotlib(self, monkeypatch):
        real = builtins.__import__

        def without(name, *args, **kwargs):
            if name.startswith("matplotlib"):
                raise ImportError(name)
            return real(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match="plots need matplotlib, which is not installed: `pip install"):
            plots.plot_ema_widths({"E": {0.1: 1.0}}, ylabel="loss")


def test_matplotlib_is_not_imported_with_the_package():
    code = """
        import sys
        assert "matplotlib" not in sys.modules
        from diffusers_mp import MagnitudeRecorder
        from diffusers_mp.diagnostics import plots
        assert "matplotlib" not in sys.modules
    """
    run_python(code)
