import torch

from xar_cli.train.ema import WeightAverages, ema_group


def test_two_decays_by_hand():
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    averages = WeightAverages([("w", weight)], [0.5, 0.9])
    with torch.no_grad():
        for value in (3.0, 5.0):
            weight.fill_(value)
            averages.update()
    # 0.5: 1 -> 2 -> 3.5 and -2 -> 0.5 -> 2.75;  0.9: 1 -> 1.2 -> 1.58 and -2 -> -1.5 -> -0.85
    torch.testing.assert_close(averages.tensors(0.5)["w"], torch.tensor([3.5, 2.75]))
    torch.testing.assert_close(averages.tensors(0.9)["w"], torch.tensor([1.58, -0.85]))
    assert not averages.tensors(0.9)["w"].requires_grad


def test_load_sets_one_decay():
    weight = torch.nn.Parameter(torch.zeros(2))
    averages = WeightAverages([("w", weight)], [0.5, 0.9])
    averages.load(0.9, {"w": torch.ones(2)})
    assert averages.tensors(0.9)["w"].tolist() == [1, 1]
    assert averages.tensors(0.5)["w"].tolist() == [0, 0]


def test_group_names_keep_all_digits_of_a_decay():
    assert ema_group(0.9999) == "ema-0.9999"
    assert ema_group(0.99999) != ema_group(0.999999)
    assert ema_group(0.9999999) != ema_group(0.9999998)
