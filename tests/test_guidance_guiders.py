"""Guiders of diffusers in the pipeline, against their formula applied by hand."""

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.guiders import (
    AdaptiveProjectedGuidance,
    AdaptiveProjectedMixGuidance,
    AutoGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    LTX2Guidance,
    MagnitudeAwareGuidance,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    TangentialClassifierFreeGuidance,
)
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from guided_sampling import (
    DDPM,
    LABELS,
    NULL,
    NUM_STEPS,
    by_hand,
    count_rows,
    ddim,
    pipeline,
    predict,
    sample,
    weak_model,
)
from helpers import relative_error, tiny_model

from diffusers_mp import MPDiTPipeline


# How to make one, and whether it has a momentum to start with.
GUIDERS = {
    "cfg": (lambda: ClassifierFreeGuidance(3.0), False),
    "cfg rescaled": (lambda: ClassifierFreeGuidance(3.0, guidance_rescale=0.7), False),
    "cfg original": (lambda: ClassifierFreeGuidance(2.0, use_original_formulation=True), False),
    "cfg from 0.2 to 0.6": (lambda: ClassifierFreeGuidance(3.0, start=0.2, stop=0.6), False),
    "zero star": (lambda: ClassifierFreeZeroStarGuidance(3.0, zero_init_steps=2, start=0.2, stop=0.8), False),
    "tangential": (lambda: TangentialClassifierFreeGuidance(3.0), False),
    "magnitude aware": (lambda: MagnitudeAwareGuidance(3.0, alpha=0.1), False),
    "projected": (lambda: AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_rescale=4.0, eta=0.5), False),
    "projected, momentum": (
        lambda: AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5, start=0.2),
        True,
    ),
    "projected mix": (lambda: AdaptiveProjectedMixGuidance(3.0, adaptive_projected_guidance_start_step=1), True),
}


class TestGuiders:
    @pytest.mark.parametrize("with_weak_model", [False, True], ids=["null", "weak model"])
    @pytest.mark.parametrize("name", GUIDERS)
    def test_forward_applied_by_hand(self, name, with_weak_model):
        make, has_momentum = GUIDERS[name]
        weak = weak_model() if with_weak_model else None
        pipe = pipeline(guider=make(), guidance_transformer=weak)
        strong, guider = pipe.transformer, make()
        if has_momentum:
            guider.momentum_buffer = MomentumBuffer(-0.5)

        def guide(step, timestep, latents):
            guider.set_state(step, NUM_STEPS, timestep)
            if guider.num_conditions == 1:
                return guider.forward(predict(strong, latents, timestep, LABELS)).pred
            if with_weak_model:
                pair = [predict(model, latents, timestep, LABELS) for model in (strong, weak)]
            else:
                both = predict(strong, torch.cat([latents, latents]), timestep, torch.cat([LABELS, NULL]))
                pair = both.chunk(2)
            if name == "magnitude aware":
                pair = [prediction.flatten(1).unsqueeze(1) for prediction in pair]  # no images: see the pipeline
            return guider.forward(*pair).pred.reshape(latents.shape)

        expected = by_hand(strong, ddim(), guide)
        got = sample(pipe)
        assert relative_error(got, expected) < 1e-6
        assert relative_error(got, sample(pipeline(strong), guidance_scale=1.0)) > 0.1
        # A second call starts anew.
        assert torch.equal(sample(pipe), got)

    def test_no_unconditional_pass_outside_the_guider_s_own_interval(self):
        pipe = pipeline(guider=ClassifierFreeGuidance(3.0, start=0.2, stop=0.6))
        rows = count_rows(pipe.transformer)
        sample(pipe)
        assert rows == [2, 4, 4, 2, 2]
        assert pipe.guidance_scale is None
        pipe.guider.disable()
        assert torch.equal(sample(pipe), sample(pipeline(pipe.transformer), guidance_scale=1.0))

    def test_classifier_free_guider_is_the_guidance_scale(self):
        pipe = pipeline(guider=ClassifierFreeGuidance(3.0))
        plain = sample(pipeline(pipe.transformer), guidance_scale=3.0)
        assert relative_error(sample(pipe), plain) < 1e-5

    def test_learned_variance_passes_the_guider_by(self):
        scheduler = DDPMScheduler(**DDPM, variance_type="learned_range")
        pipe = pipeline(tiny_model(out_channels=8).eval(), scheduler, guider=ClassifierFreeGuidance(3.0))
        plain = sample(pipeline(pipe.transformer, scheduler), guidance_scale=3.0)
        assert relative_error(sample(pipe), plain) < 1e-4

    def test_saved_loaded_and_changed(self, tmp_path):
        pipe = pipeline(guider=AdaptiveProjectedGuidance(3.0, adaptive_projected_guidance_momentum=-0.5))
        expected = sample(pipe)
        pipe.save_pretrained(tmp_path)
        again = MPDiTPipeline.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert torch.equal(sample(again), expected)
        again.guider = again.guider.new(guidance_scale=5.0)
        assert not torch.equal(sample(again), expected)
        other = MPDiTPipeline.from_pipe(again, guider=ClassifierFreeGuidance(2.0))
        assert isinstance(other.guider, ClassifierFreeGuidance)

    @pytest.mark.parametrize(
        "make, message",
        [
            (
                lambda: SkipLayerGuidance(skip_layer_guidance_layers=[0]),
                "needs pred_cond, pred_uncond, pred_cond_skip",
            ),
            (lambda: PerturbedAttentionGuidance(perturbed_guidance_layers=[0]), "needs .*, pred_cond_skip"),
            (lambda: SmoothedEnergyGuidance(seg_guidance_layers=[0]), "needs .*, pred_cond_seg"),
            (LTX2Guidance, "LTX2Guidance needs .*, pred_cond_modality"),
            (lambda: AutoGuidance(auto_guidance_layers=[0], dropout=1.0), "AutoGuidance does not.* a `guidance_trans"),
        ],
        ids=["skip", "perturbed", "smoothed", "ltx2", "auto"],
    )
    def test_guiders_that_need_more_are_refused(self, make, message):
        with pytest.raises(ValueError, match=f"`guider` must .*{message}"):
            pipeline(guider=make())
        pipe = pipeline()
        pipe.guider = make()
        with pytest.raises(ValueError, match=f"`guider` must .*{message}"):
            sample(pipe)

    def test_other_objects_are_refused(self):
        with pytest.raises(TypeError, match="`guider` must be a guider of `diffusers.guiders`, got a float"):
            pipeline(guider=3.0)

    @pytest.mark.parametrize("beside", [{"guidance_scale": 1.0}, {"guidance_interval": (0.1, 1.0)}], ids=str)
    def test_two_settings_at_once(self, beside):
        with pytest.raises(ValueError, match=r"must be None in a pipeline with a `guider`, .*guider.new\("):
            sample(pipeline(guider=ClassifierFreeGuidance()), **beside)

    @pytest.mark.parametrize(
        "overrides, message",
        [({"num_classes": None}, "an unconditional"), ({"class_dropout_prob": 0.0}, "a transformer trained without")],
        ids=str,
    )
    def test_nothing_to_guide_away_from(self, overrides, message):
        pipe = pipeline(tiny_model(**overrides).eval(), guider=ClassifierFreeGuidance())
        labels = None if pipe.transformer.config.num_classes is None else LABELS
        with pytest.raises(ValueError, match=f"`guider` must be None for {message}.*got ClassifierFreeGuidance"):
            sample(pipe, labels)
