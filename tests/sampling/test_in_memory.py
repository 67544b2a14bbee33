import torch

from laplace_debiased.sampling.in_memory import PointsInMemory

X, y = torch.arange(14.0).view(7, 2), torch.arange(7)
SLICES = [slice(0, 2), slice(2, 6), slice(6, 7)]


def read(*batches):
    return list(PointsInMemory(batches).loader())


def test_every_nested_entry_with_a_row_for_each_point_is_divided():
    batch = {
        "shared": torch.eye(2),
        "scalar": torch.tensor(2.0),
        "x": {"values": X, "names": list("abcdefg")},
        "labels": y,
        "note": "n",
    }
    points = PointsInMemory([batch])
    assert len(points) == 7
    (part,) = points.loader().collate_fn([points[1], points[4]])
    assert torch.equal(part["x"]["values"], X[[1, 4]])
    assert part["x"]["names"] == ["b", "e"]
    assert torch.equal(part["labels"], torch.tensor([1, 4]))
    assert torch.equal(part["shared"], torch.eye(2))
    assert part["scalar"] == 2 and part["note"] == "n"


def test_a_pair_has_as_many_points_as_targets():
    ((part, targets),) = read(
        ({"shared": torch.eye(3), "bias": torch.ones(3), "x": X}, y)
    )
    assert torch.equal(targets, y) and torch.equal(part["x"], X)
    assert torch.equal(part["shared"], torch.eye(3))


def test_batches_of_one_layout_are_joined():
    parts = [{"x": X[k], "labels": y[k], "n": ["a"] * len(y[k])} for k in SLICES]
    (joined,) = read(*parts)
    assert torch.equal(joined["x"], X) and torch.equal(joined["labels"], y)
    assert joined["n"] == ["a"] * 7


def test_batches_of_other_shapes_are_not():
    padded = torch.zeros(4, 3)
    pairs = zip([X[:2], padded, X[6:]], (y[k] for k in SLICES), strict=True)
    short, long = read(*pairs)
    assert torch.equal(short[0], X[[0, 1, 6]]) and short[1].tolist() == [0, 1, 6]
    assert torch.equal(long[0], padded) and long[1].tolist() == [2, 3, 4, 5]


def test_nor_are_those_that_share_what_may_differ():
    parts = [{"x": X[k], "m": torch.tensor(k.start), "labels": y[k]} for k in SLICES]
    batches = read(*parts)
    assert [int(batch["m"]) for batch in batches] == [0, 2, 6]
    assert [len(batch["x"]) for batch in batches] == [2, 4, 1]


def test_what_is_shared_in_any_batch_is_shared_in_all():
    turn = torch.eye(4)
    pairs = [({"x": X[k], "turn": turn}, y[k]) for k in SLICES]  # one of 4 points
    ((joined, targets),) = read(*pairs)
    assert torch.equal(joined["x"], X) and torch.equal(targets, y)
    assert torch.equal(joined["turn"], turn)


def test_tensors_that_are_refilled_for_each_batch_are_copied():
    def refilled():
        inputs, targets = torch.empty(2, 2), torch.empty(2, dtype=torch.long)
        for start in (0, 2, 4):
            rows = slice(start, start + 2)
            yield {
                "x": {"values": inputs.copy_(X[rows])},
                "labels": targets.copy_(y[rows]),
            }

    (joined,) = PointsInMemory(refilled()).loader()
    assert torch.equal(joined["x"]["values"], X[:6])
    assert torch.equal(joined["labels"], y[:6])
