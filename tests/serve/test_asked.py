"""What a served model is asked for and refuses: names and tensors that are none, copies of its layers."""

import copy
import pickle

import pytest
import torch

import loraspan
import serving
from loraspan.errors import ArgumentError, UnknownTaskError, UnsupportedError


def test_a_model_is_attached_once_and_a_served_layer_not_copied():
    space, model = serving.team(), serving.Tower()
    served = loraspan.attach(model, space)
    for again in (model, served):
        with pytest.raises(ArgumentError, match="attached already"):
            loraspan.attach(again, space)
    for copied in (copy.deepcopy, copy.copy, pickle.dumps):
        with pytest.raises(UnsupportedError, match="not copied or pickled"):
            copied(model.layers[0].q_proj)
    with pytest.raises(UnsupportedError, match="DataParallel"):
        model.layers[0].q_proj._replicate_for_data_parallel()
    with pytest.raises(ArgumentError, match="dtype is float16"):
        loraspan.attach(serving.Tower(), space, dtype=torch.int8)


@pytest.mark.parametrize(
    ("names", "options", "error", "message"),
    [
        ("nobody", {}, UnknownTaskError, "no task 'nobody'"),
        (["task 0", 3], {}, ArgumentError, "got 3"),
        ([], {}, ArgumentError, "needs a name"),
        ([{}], {}, ArgumentError, "finite weights"),
        ([{"task 0": float("nan")}], {}, ArgumentError, "finite weights"),
        ([["task 0"], ["task 1", None]], {"per": "token"}, ArgumentError, "of one length"),
        ("task 0", {"per": "batch"}, ArgumentError, "per is 'row' or 'token'"),
        ({"task 0", "task 1"}, {}, ArgumentError, "or lists; got {'task"),
        ([{"task 0": [1.0]}], {}, ArgumentError, "finite weights"),
        ([{"task 0": 1e39}], {}, ArgumentError, "finite weights"),
    ],
)
def test_names_that_are_none_are_refused(names, options, error, message):
    served = loraspan.attach(serving.Tower(), serving.team())
    with pytest.raises(error, match=message), served.tasks(names, **options):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"task_ids": torch.tensor([0, 1], dtype=torch.int32)}, r"torch.int32 \[2\]"),
        ({"task_ids": [0, 1]}, "got list"),
        ({"task_ids": torch.tensor(0)}, r"int64 tensor \[B\]"),
        ({"task_shares": torch.ones(2, 1)}, "got NoneType"),
        ({"task_ids": torch.tensor([[0, 1]]), "task_shares": torch.ones(1, 3)}, r"float32 \[1, 3\]"),
        ({"task_ids": torch.tensor([0, 1, 2])}, "rows that divide its first axis"),
        ({"task_ids": torch.tensor([[0, 1], [0, 1]])}, "for its tokens"),
        ({"task_ids": torch.tensor([0, 4])}, "served has 4"),
        ({"task_ids": torch.tensor([-2, 0])}, "served has -2"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(given, message):
    served = loraspan.attach(serving.Tower(), serving.team())
    with pytest.raises(ArgumentError, match=message):
        served(serving.batch(2), **given)
