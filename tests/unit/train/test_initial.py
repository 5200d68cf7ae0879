from tests.runs import small_recipe
from xar_cli.train.initial import fresh_class_table, matching_classes


def test_classes_are_matched_by_name():
    three, two = small_recipe("data.num_classes=3"), small_recipe("data.num_classes=2")
    found = matching_classes(three, two, ["cat", "dog", "owl"], ["owl", "cat"])
    assert found == {0: 1, 2: 0, 3: 2}  # dog is new; the null classes are 3 and 2


def test_without_names_by_number_if_as_many():
    three = small_recipe("data.num_classes=3")
    assert matching_classes(three, three, (), ()) == {0: 0, 1: 1, 2: 2, 3: 3}
    assert matching_classes(three, small_recipe("data.num_classes=2"), (), ()) == {3: 2}


def test_fresh_table():
    table = fresh_class_table(small_recipe("model.dim=512", "model.heads=8"))
    assert table.shape == (11, 512)
    assert abs(table.std().item() - 0.02) < 0.001
