"""--set and TOML: typed, validated, and never a second way to say what has an option."""

import pytest

from autoseg import settings
from autoseg.records import AutosegError, record
from autoseg.schema import Recipe


@record
class Part:
    name: str
    patch: tuple[int, ...] = (5, 7, 11)


@record
class Whole:
    title: str = "t"
    parts: tuple[Part, ...] = (Part(name="2d", patch=(7, 11)), Part(name="3d"))


def test_values_are_read_as_toml_or_plain_text():
    assert settings.parse(["a.b=1", "c=[2, 3]", "d=text", "e=true", "f=1e-3", "g=pkg.module:Name"]) == {
        "a.b": 1, "c": [2, 3], "d": "text", "e": True, "f": 0.001, "g": "pkg.module:Name",
    }  # fmt: skip
    with pytest.raises(AutosegError, match="field=value"):
        settings.parse(["learning_rate"])


def test_a_field_of_a_named_part_is_changed_and_the_rest_stays():
    changed = settings.change(Whole(), {"parts.3d.patch": [9, 9, 13], "title": "new"})
    assert changed == Whole(title="new", parts=(Part(name="2d", patch=(7, 11)), Part(name="3d", patch=(9, 9, 13))))
    assert settings.change(Whole(), {"parts.0.name": "flat"}).parts[0].name == "flat"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"learning_rat": 1}, "learning_rate"),
        ({"learning_rate": "fast"}, "learning_rate"),
        ({"learning_rate.x": 1}, "nothing below it"),
    ],
)
def test_what_is_not_possible_is_refused_with_what_is(changes, word):
    with pytest.raises(AutosegError, match=word):
        settings.change(Recipe(), changes)


def test_a_field_with_an_option_of_its_own_is_refused():
    with pytest.raises(AutosegError, match="--epochs"):
        settings.change(Recipe(), {"epochs": 3}, taken={"epochs": "--epochs"})


def test_fields_lists_every_path_that_change_takes():
    rows = settings.fields(Whole())
    assert [path for path, _ in rows] == ["title", "parts.2d.name", "parts.2d.patch", "parts.3d.name", "parts.3d.patch"]
    for path, _ in rows:
        assert settings.change(Whole(), {path: [1]} if path.endswith("patch") else {path: "x"}) != Whole()


def test_toml(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('loss = "ce"\nlearning_rate = 0.5\n[deep]\nx = 1\n')
    assert settings.read_toml(path) == {"loss": "ce", "learning_rate": 0.5, "deep.x": 1}
    path.write_text("loss = ")
    with pytest.raises(AutosegError, match="no valid TOML"):
        settings.read_toml(path)
    with pytest.raises(AutosegError, match="does not exist"):
        settings.read_toml(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("unet", ("unet", {})),
        ("vnet(size=small)", ("vnet", {"size": "small"})),
        ("deeplab( rates=[6, 12, 18], dropout=0.5 )", ("deeplab", {"rates": [6, 12, 18], "dropout": 0.5})),
        ("my.module:Net(wide=true)", ("my.module:Net", {"wide": True})),
        ("focal()", ("focal", {})),
    ],
)
def test_a_name_with_options(text, expected):
    assert settings.parse_call(text) == expected


def test_a_sum_of_names_with_factors_and_options():
    terms = settings.parse_sum(" 0.5*ce + tversky(alpha=1e+1, beta=[1, 2]) +1e-3 * my.module:loss")
    assert terms == ((0.5, "ce", {}), (1.0, "tversky", {"alpha": 10.0, "beta": [1, 2]}), (0.001, "my.module:loss", {}))
    assert settings.parse_sum("dice_ce") == ((1.0, "dice_ce", {}),)
    assert settings.parse_sum("a(b=2*3)") == ((1.0, "a", {"b": "2*3"}),)


@pytest.mark.parametrize("text", ["2*", "a+", "+a", "a b", "0*a", "-1*a", "inf*a", "nan*a", "x*a", "2*3*a", "a)", "*a"])
def test_what_is_no_sum_is_refused(text):
    with pytest.raises(AutosegError, match="write"):
        settings.parse_sum(text)


@pytest.mark.parametrize("text", ["", "focal(gamma)", "focal(2)", "focal(gamma=2", "focal(gamma=)", "a b"])
def test_what_is_no_name_with_options_is_refused(text):
    with pytest.raises(AutosegError, match="write it as"):
        settings.parse_call(text)
