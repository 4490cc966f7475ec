"""Quantised weights, as diffusers and torchao have them."""

import pytest
import torch
from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin, QuantizationMethod
from helpers import NOT_IN_DEV, tiny_inputs, tiny_model
from peft import LoraConfig

from diffusers_mp import MPDiTTransformer2DModel


@torch.no_grad()
def forward(model, **inputs):
    return model(**(inputs or tiny_inputs())).sample


@pytest.fixture
def no_op_quantizer(monkeypatch):
    """One that diffusers takes for a backend, and that leaves maps alone: none of theirs is installed."""

    class Quantizer(DiffusersQuantizer):
        is_serializable = is_trainable = True

        def _process_model_before_weight_loading(self, model, **kwargs):
            pass

        def _process_model_after_weight_loading(self, model, **kwargs):
            return model

    class QuantizationConfig(QuantizationConfigMixin):
        to_diff_dict = QuantizationConfigMixin.to_dict

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "quanto", Quantizer)
    return QuantizationConfig(quant_method=QuantizationMethod.QUANTO)


@pytest.mark.parametrize("configuration", "AE")
def test_quantised_rows_are_used_as_stored(configuration, tmp_path, no_op_quantizer):
    tiny_model(configuration).eval().save_pretrained(tmp_path)
    model = MPDiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=no_op_quantizer)
    assert model.hf_quantizer is not None


def test_quantising_rows_that_are_normalised_on_use_is_refused(tmp_path, no_op_quantizer):
    tiny_model("C").eval().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`quantization_config` must be None, .* got QuantizationConfig"):
        MPDiTTransformer2DModel.from_pretrained(tmp_path, quantization_config=no_op_quantizer)


@pytest.mark.parametrize("configuration", ["A", "C", "E"])
def test_int8_weights_and_a_lora_beside_them(configuration):
    quantization = pytest.importorskip("torchao.quantization", reason=NOT_IN_DEV)
    model = tiny_model(configuration, attention_head_dim=16).eval()
    expected = forward(model)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    if configuration == "C":
        with pytest.raises(ValueError, match="weights not quantised otherwise, .*; got Int8Tensor"):
            forward(model)
        return
    quantised = forward(model)
    assert (quantised - expected).norm() < 0.03 * expected.norm()
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    for mode in (True, False):
        assert torch.equal(forward(model.train(mode)), quantised)
    model.train()(**tiny_inputs()).sample.square().mean().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.sub_(parameter.grad)
    trained = forward(model)
    model.state_dict()
    assert torch.equal(forward(model.eval()), trained)
    assert not torch.equal(trained, quantised)
