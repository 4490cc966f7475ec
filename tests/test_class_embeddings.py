"""Another set of classes: rows of known names and of the null condition stay to the bit, the others are new."""

import copy
import random

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel
from helpers import row_norms, tiny_inputs, tiny_model

from diffusers_mp import MPDiTTransformer2DModel, MPLinear, normalize_weights_, resize_class_embeddings_
from diffusers_mp.rotation_swap import swap_adaln_for_rotation


OLD = {id: f"class {id}" for id in range(10)}


def stock_model(**overrides):
    torch.manual_seed(0)
    config = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8}
    model = DiTTransformer2DModel(**{**config, "num_embeds_ada_norm": 10, **overrides}).eval()
    for table in tables(model):
        torch.nn.init.normal_(table.weight, std=0.3)
    return model


MODELS = {
    "E": lambda: tiny_model("E").eval(),
    "E in training": lambda: tiny_model("E").train(),
    "C": lambda: tiny_model("C").eval(),
    "A": lambda: tiny_model("A").eval(),
    "bf16": lambda: tiny_model("E").eval().to(torch.bfloat16),
    "DiT": stock_model,
}


def tables(model):
    if isinstance(model, MPDiTTransformer2DModel):
        return [model.conditioning_embedder.class_embedder]
    return [block.norm1.emb.class_embedder.embedding_table for block in model.transformer_blocks]


def num_classes(model):
    return model.config["num_classes" if isinstance(model, MPDiTTransformer2DModel) else "num_embeds_ada_norm"]


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("seed", range(3))
def test_any_choice_of_kept_and_new_names(kind, seed):
    model, rng = MODELS[kind](), random.Random(seed)
    names = rng.sample(list(OLD.values()), rng.randint(0, 10)) + [f"new {n}" for n in range(rng.randint(1, 12))]
    rng.shuffle(names)
    before = [table.weight.detach().clone() for table in tables(model)]
    rest = {name: value.clone() for name, value in model.state_dict().items() if "class_embedder" not in name}
    assert resize_class_embeddings_(model, OLD, dict(enumerate(names))) is model
    assert num_classes(model) == len(names)
    for old, table in zip(before, tables(model), strict=True):
        new = table.weight.detach()
        assert new.dtype == old.dtype
        assert new.shape == (len(names) + 1, old.shape[1]) == (table.num_embeddings, table.embedding_dim)
        assert torch.equal(new[-1], old[-1])
        scale = old[:-1].double().square().mean().sqrt().item()
        for id, name in enumerate(names):
            if name in OLD.values():
                assert torch.equal(new[id], old[int(name.split()[1])])
            else:
                assert row_norms(new[id]).item() == pytest.approx(scale * old.shape[1] ** 0.5, rel=5e-3)
        drawn = new[[id for id, name in enumerate(names) if name.startswith("new")]].double()
        assert torch.linalg.matrix_rank(drawn) == min(drawn.shape)
    assert all(torch.equal(model.state_dict()[name], value) for name, value in rest.items())


@pytest.mark.parametrize("kind", ["E", "A", "DiT"])
@torch.no_grad()
def test_kept_classes_are_predicted_as_before(kind):
    model = MODELS[kind]()
    inputs = {**tiny_inputs(), "class_labels": torch.tensor([7, 2, 10])}
    before = model(**inputs).sample
    resize_class_embeddings_(model, OLD, {0: "cat", 1: "class 2", 2: "dog", 3: "class 7"})
    assert torch.equal(model(**{**inputs, "class_labels": torch.tensor([3, 1, 4])}).sample, before)
    # A new class has a prediction of its own.
    other = model(**{**inputs, "class_labels": torch.tensor([0, 2, 0])}).sample
    assert not torch.allclose(other, before, atol=1e-4)


@pytest.mark.parametrize("kind", ["E", "C", "A", "DiT"])
def test_saved_and_loaded(kind, tmp_path):
    model = resize_class_embeddings_(MODELS[kind](), OLD, {0: "cat", 1: "class 2"})
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert num_classes(again) == 2
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_rows_of_a_magnitude_preserving_table_are_as_normalisation_leaves_them():
    model = resize_class_embeddings_(tiny_model("E"), OLD, {id: f"new {id}" for id in range(50)})
    (table,) = tables(model)
    before = table.weight.detach().clone()
    normalize_weights_(model)
    assert torch.equal(table.weight, before)


def test_all_blocks_of_a_dit_get_the_same_rows_and_drop_labels_to_the_new_null():
    model = stock_model()
    for table in tables(model)[1:]:
        table.weight.data.copy_(tables(model)[0].weight)
    resize_class_embeddings_(model, OLD, {0: "cat", 1: "class 2", 2: "dog"})
    first, second = tables(model)
    assert torch.equal(first.weight, second.weight)
    assert [block.norm1.emb.class_embedder.num_classes for block in model.transformer_blocks] == [3, 3]
    labeler = model.transformer_blocks[0].norm1.emb.class_embedder.train()
    labeler.dropout_prob = 1.0
    assert torch.equal(labeler(torch.arange(3)), first.weight[[3, 3, 3]])


def test_a_swapped_dit(tmp_path):
    model = stock_model()
    swap_adaln_for_rotation(model)
    resize_class_embeddings_(model, OLD, {0: "cat", 1: "class 4"}).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert num_classes(again) == 2
    assert torch.equal(tables(again)[1].weight, tables(model)[1].weight)


def test_the_draw_is_the_generator_s():
    models = [tiny_model("E") for _ in range(3)]
    for model, seed in zip(models, (0, 0, 1), strict=True):
        resize_class_embeddings_(model, None, {0: "cat"}, generator=torch.Generator().manual_seed(seed))
    first, second, third = (tables(model)[0].weight[0] for model in models)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_without_old_names_only_the_null_row_stays():
    model = tiny_model("E")
    before = copy.deepcopy(tables(model)[0].weight)
    resize_class_embeddings_(model, None, OLD)
    after = tables(model)[0].weight
    assert torch.equal(after[-1], before[-1])
    assert not any(torch.equal(row, old) for row in after[:-1] for old in before)


def test_frozen_tables_stay_frozen():
    model = tiny_model("E").requires_grad_(False)
    resize_class_embeddings_(model, OLD, {0: "cat"})
    assert not tables(model)[0].weight.requires_grad


def test_names_as_json_has_them_and_names_that_stand_for_several_classes():
    model = tiny_model("E", num_classes=4)
    before = tables(model)[0].weight.detach().clone()
    old = {"0": "crane", "1": "cup", "2": "crane", "3": "cat"}
    again = resize_class_embeddings_(copy.deepcopy(model), old, {"1": "crane", "0": "cat", "2": "dog", "3": "crane"})
    assert torch.equal(tables(again)[0].weight[[0, 1, 3]], before[[3, 0, 2]])
    # Without the ambiguous name there is nothing to ask.
    assert torch.equal(tables(resize_class_embeddings_(copy.deepcopy(model), old, {0: "cup"}))[0].weight[0], before[1])
    with pytest.raises(ValueError, match="must have the name 'crane' as often as `old_id2label`, .* 2 classes; .* 1"):
        resize_class_embeddings_(model, old, {0: "crane"})


@pytest.mark.parametrize(
    "old, new, message",
    [
        ({0: "a"}, {0: "b"}, r"`old_id2label` must name the ids 0 to 9, got 1 ids: 0\."),
        (OLD, {}, "`new_id2label` must name the ids 0 to their number - 1, got 0 ids"),
        (OLD, {1: "a", 2: "b"}, r"`new_id2label` must name .*, got 2 ids: 1, 2\."),
    ],
)
def test_ids_that_are_not_consecutive(old, new, message):
    with pytest.raises(ValueError, match=message):
        resize_class_embeddings_(tiny_model("E"), old, new)


@pytest.mark.parametrize("old, new, name", [(None, ["a", "b"], "new_id2label"), (["a"], OLD, "old_id2label")])
def test_names_without_ids(old, new, name):
    with pytest.raises(TypeError, match=rf"`{name}` must map ids to names, .* got a list"):
        resize_class_embeddings_(tiny_model("E"), old, new)


def test_models_without_classes():
    with pytest.raises(ValueError, match="`model` must have a label table"):
        resize_class_embeddings_(tiny_model("E", num_classes=None), None, OLD)
    for model in (MPLinear(4, 4), AutoencoderKL()):
        with pytest.raises(TypeError, match="`model` must be an MPDiTTransformer2DModel or a DiTTransformer2DModel"):
            resize_class_embeddings_(model, None, OLD)
