"""The readable names of ImageNet's classes."""

from xar_cli.data.imagenet import class_title, imagenet_names


def test_the_thousand_ids_have_names_in_order():
    names = imagenet_names()
    assert len(names) == 1000
    assert list(names) == sorted(names)
    assert len(set(names.values())) == 1000
    assert list(names.values())[:2] == ["tench", "goldfish"]
    assert (names["n02123045"], names["n15075141"]) == ("tabby", "toilet tissue")


def test_other_names_stand_for_themselves():
    assert class_title("cats") == "cats"
    assert class_title("n01443537") == "goldfish"
