"""Which class each image is of: names before ids, the reference's proportion, and an order that any start shares."""

from fractions import Fraction

import numpy as np
import pytest
from diffusers import DDPMScheduler
from helpers import tiny_model

from diffusers_mp import MPDiTPipeline
from diffusers_mp.evaluation.classes import apportioned, draw_classes, in_order, label_ids, spread


def pipeline(*names, num_classes=None):
    transformer = tiny_model(num_classes=num_classes or len(names) or None)
    return MPDiTPipeline(transformer, DDPMScheduler(), id2label=dict(enumerate(names)) if names else None)


NUMBERS = ("0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9")  # class folders 0…11, as texts are sorted


def test_a_number_is_a_name_where_a_class_has_it():
    pipe = pipeline(*NUMBERS)
    assert [pipe.id2label[id_] for id_ in label_ids(pipe, ["2", "10", " 9"])] == ["2", "10", "9"]
    assert [pipe.id2label[id_] for id_ in in_order(pipe.id2label)] == [str(number) for number in range(12)]
    draw = draw_classes(pipe, None, None, 24)
    assert draw.line().startswith("Classes, in turn: 0 (id 0) 2, 1 (id 1) 2, 2 (id 4) 2, 3 (id 5) 2,")


def test_a_number_is_an_id_where_no_class_has_that_name():
    assert label_ids(pipeline("cat", "dog", "owl"), ["owl", "0"]) == [2, 0]
    assert label_ids(pipeline("cat", "2", "owl"), ["2", "0"]) == [1, 0]
    assert label_ids(pipeline(num_classes=3), ["2", "0"]) == [2, 0]
    assert label_ids(pipeline("tench, Tinca tinca", "goldfish"), ["Tinca tinca"]) == [0]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["golfish"], "got the unknown name 'golfish'. Did you mean 'goldfish'"),
        (["3"], r"must be ids in \[0, 2\] or names, got 3"),
        (["-1"], "the unknown name '-1'"),
        (["crane"], r"the ambiguous name 'crane'; use one of its ids: \[1, 2\]"),
        (["goldfish", "0"], "must be of different classes, got 'goldfish' and '0', both of id 0"),
    ],
)
def test_labels_that_stand_for_no_class_or_the_same(labels, message):
    with pytest.raises(ValueError, match=message):
        draw_classes(pipeline("goldfish", "crane, bird", "crane, machine"), labels, {"goldfish": 3}, 9)


def test_classes_are_drawn_in_the_proportion_of_the_reference():
    draw = draw_classes(pipeline("cat", "dog", "owl"), None, {"dog": 90, "cat": 10}, 20)
    assert draw.description() == {
        "drawn": "in the reference's proportion",
        "counts": {"cat": 2, "dog": 18, "owl": 0},
    }
    assert draw.line() == "Classes, in the reference's proportion: cat (id 0) 2, dog (id 1) 18, owl (id 2) 0"
    assert draw.mismatch is None
    assert np.bincount(draw.class_ids()).tolist() == [2, 18]
    # The classes that were named, among themselves and in their order.
    draw = draw_classes(pipeline("cat", "dog", "owl"), ["owl", "0"], {"dog": 90, "cat": 10, "owl": 30}, 8)
    assert draw.description()["counts"] == {"owl": 6, "cat": 2}
    # By synonyms, and by ids where classes have no names.
    draw = draw_classes(pipeline("tench, Tinca tinca", "goldfish"), None, {"tench": 3, "goldfish": 1}, 4)
    assert draw.description()["counts"] == {"tench, Tinca tinca": 3, "goldfish": 1}
    assert draw_classes(pipeline(num_classes=2), None, {"1": 3, "0": 1}, 4).class_ids() == [1, 0, 1, 1]


@pytest.mark.parametrize(
    ("reference", "labels", "mismatch"),
    [
        (None, None, "the reference has no class labels that are known here"),
        (
            {"cat": 1, "a": 2, "b": 3, "c": 4, "d": 5},
            None,
            "the model has no class of the same name for 4 of the reference ('a', 'b', 'c', …)",
        ),
        ({"0": 1, "1": 9}, None, "the model has no class of the same name for 2 of the reference ('0', '1')"),
        ({"cat": 10}, ["owl"], "the reference has no image of these classes"),
    ],
)
def test_where_the_reference_has_others_classes_come_in_turn(reference, labels, mismatch):
    draw = draw_classes(pipeline("cat", "dog", "owl"), labels, reference, 7)
    assert draw.mismatch == mismatch
    assert draw.description()["drawn"] == "in turn"
    assert draw.class_ids() == ([2] * 7 if labels else [0, 1, 2, 0, 1, 2, 0])


def test_classes_of_one_name_are_told_apart_and_no_class_is_no_draw():
    draw = draw_classes(pipeline("crane", "crane", "owl"), None, {"crane": 3, "owl": 1}, 3)
    assert draw.description()["counts"] == {"crane (id 0)": 1, "crane (id 1)": 1, "owl": 1}
    assert draw_classes(pipeline(), ["cat"], {"cat": 3}, 3) is None


@pytest.mark.parametrize("num_classes", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("num_samples", [1, 2, 10, 11, 99, 100])
def test_equal_shares_come_in_turn(num_classes, num_samples):
    order = spread(apportioned([5] * num_classes, num_samples))
    assert order == [index % num_classes for index in range(num_samples)]


def test_every_start_is_nearly_in_proportion():
    rng = np.random.default_rng(0)
    for _ in range(50):
        weights = rng.integers(0, 1000, rng.integers(2, 12)).tolist()
        weights[0] += 1
        total = int(rng.integers(1, 500))
        counts = apportioned(weights, total)
        assert sum(counts) == total
        for weight, count in zip(weights, counts, strict=True):
            assert abs(count - Fraction(weight * total, sum(weights))) < 1
        order = spread(counts)
        assert np.bincount(order, minlength=len(counts)).tolist() == counts
        so_far = np.cumsum(np.eye(len(counts))[order], axis=0)
        shares = np.arange(1, total + 1)[:, None] * np.array(counts) / total
        assert np.abs(so_far - shares).max() < len(counts) / 2
