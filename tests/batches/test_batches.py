import datasets
import pytest
import torch

from safegrad_optim import KLAlignment
from safegrad_optim.batches import as_batches, position_mask
from tests.support.models import padded, safety_rows, tiny_peft


def row(**fields):
    return {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]} | fields


def as_one(batches):
    return as_batches(batches, positions="response", batch_size=8)


def collate(rows):
    batch = padded(rows)
    return batch | {"input_ids": batch["input_ids"] * batch["attention_mask"]}


def assert_same_batches(found, expected):
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            assert left[name].tolist() == right[name].tolist()


def test_rows_batches_datasets_and_loaders_are_the_same():
    rows = safety_rows(6)
    expected = as_batches(rows, positions="response", batch_size=2)
    dataset = datasets.Dataset.from_list(rows)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collate)
    for given in (dataset, dataset.with_format("torch"), loader, iter(rows)):
        assert_same_batches(as_batches(given, positions="response", batch_size=2), expected)
    batches = [collate(rows[:2]), collate(rows[2:4]), collate(rows[4:])]
    assert_same_batches(as_batches(batches, positions="response", batch_size=8), expected)


def test_masks_select_the_position_before_each_compared_token():
    (batch,) = as_one(
        [
            {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
            {"input_ids": [5, 6], "labels": [-100, 6]},
        ]
    )
    assert position_mask(batch, "response").tolist() == [
        [False, True, True, False],
        [True, False, False, False],
    ]
    assert position_mask(batch, "all").tolist() == [[True, True, True, False], [True, False, False, False]]


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "empty"),
        ([[1, 2]], TypeError, "batch 0 is a list, expected a mapping"),
        ([{"input_ids": [1, 2]}], ValueError, "no 'labels'"),
        ([{"labels": [1, 2]}], ValueError, "no 'input_ids'"),
        ([{"input_ids": ["a"], "labels": [1]}], TypeError, "'input_ids' is a list that makes no tensor"),
        ([{"input_ids": [1, 2], "labels": [1, 2, 3]}], ValueError, r"\(1, 2\) and labels \(1, 3\)"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], ValueError, "batch 0 has no response token"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], ValueError, "no response token"),
        (
            [padded(safety_rows(2)), {"input_ids": [[1, 2]], "labels": [[-100, -100]]}],
            ValueError,
            "batch 1 has no response token",
        ),
        (
            [
                {"input_ids": [1, 2], "labels": [1, 2]},
                {"input_ids": [1, 2], "labels": [1, 2], "extra": [1, 1]},
            ],
            ValueError,
            "different fields",
        ),
        ([row(length=2)], ValueError, r"'length' .* shape \(\)"),
        ([row(length=[2])], ValueError, r"'length' .* shape \(1,\)"),
        (
            {**padded(safety_rows(2)), "length": [5, 6]},
            ValueError,
            r"have \['length'\], which the forward of LlamaForCausalLM",
        ),
        (
            [
                {
                    "input_ids": [1, 2, 3],
                    "labels": [-100, 2, 3],
                    "position_ids": [0, 0, 1],
                    "attention_mask": [1] * 3,
                }
            ],
            ValueError,
            "position_ids start again",
        ),
        (
            [row(labels=[-100, 2, 4])],
            ValueError,
            "in row 0 the label at place 2 is 4, and the input id 3",
        ),
        (
            [row(attention_mask=[1, 1, 0])],
            ValueError,
            "1 labels are on padding",
        ),
    ],
)
def test_what_cannot_align_is_refused(batches, error, message):
    with pytest.raises(error, match=message):
        KLAlignment(tiny_peft(), batches)


def test_batch_size_is_checked():
    with pytest.raises(ValueError, match="batch_size is 0"):
        KLAlignment(tiny_peft(), safety_rows(), batch_size=0)


def test_rows_with_positions_of_one_text_are_no_packed_rows():
    rows = [row | {"position_ids": [*range(len(row["labels"]))]} for row in safety_rows(3)]
    (batch,) = as_one(rows)
    # Padding is told from text by its position.
    counts = [len(row["labels"]) - 1 for row in rows]
    assert position_mask(batch, "all").sum(dim=1).tolist() == counts
    expected = position_mask(as_one(safety_rows(3))[0], "all")
    assert torch.equal(position_mask(batch, "all"), expected)


def test_a_batch_is_a_copy():
    given = padded(safety_rows(2))
    (batch,) = as_one(given)
    given["labels"].fill_(-100)
    given["input_ids"].zero_()
    assert position_mask(batch, "response").any()
    assert batch["input_ids"].any()
