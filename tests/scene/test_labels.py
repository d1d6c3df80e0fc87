"""Class tables and label maps."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiffclip.errors import InputDataError
from fastdiffclip.scene.labels import (
    class_table,
    count_values,
    read_class_table,
    read_label_map,
    with_colours,
)
from fastdiffclip.scene.readers.source import RasterSource, source_of_array
from fastdiffclip.scene.store import ClassInfo


def table(tmp_path: Path, text: str) -> tuple[list[ClassInfo], list[str]]:
    (tmp_path / "classes.csv").write_text(text, encoding="utf-8")
    return read_class_table(tmp_path / "classes.csv")


def source(values: np.ndarray, nodata: float | None = None) -> RasterSource:
    raster = source_of_array(Path("gt.npy"), "gt.npy", values)
    raster.nodata = nodata
    return raster


def test_the_columns_by_name_in_any_order(tmp_path: Path) -> None:
    classes, warnings = table(tmp_path, 'colour,name,value,description\n#0A141e,oak,2,"a tree, green"\n,Straße,1,\n')
    assert classes == [ClassInfo(1, "Straße"), ClassInfo(2, "oak", "a tree, green", (10, 20, 30))]
    assert warnings == []


@pytest.mark.parametrize("text", [
    "1,oak\n2,road\n", "1;oak\n2;road\n", "1\toak\n2\troad\n", "\ufeffvalue,name\n2,road\n\n1,oak\n",
    "id,class\r\n1, oak\r\n2, road\r\n", "label,pixels,taxon,plots\n1,10,oak,3\n2,20,road,4\n",
])  # fmt: skip
def test_forms_of_a_table(tmp_path: Path, text: str) -> None:
    assert table(tmp_path, text)[0] == [ClassInfo(1, "oak"), ClassInfo(2, "road")]


def test_first_two_text_columns_are_name_and_description(tmp_path: Path) -> None:
    classes, _ = table(tmp_path, "value,taxon,scientific_name,pixels\n1,PIPA2,Pinus palustris Mill.,4852\n")
    assert classes == [ClassInfo(1, "PIPA2", "Pinus palustris Mill.")]


def test_row_of_value_zero_is_left_out_and_said_when_it_has_a_name(tmp_path: Path) -> None:
    assert table(tmp_path, "0,Unlabelled\n1,oak\n") == ([ClassInfo(1, "oak")], [])
    classes, warnings = table(tmp_path, "0,water\n1,oak\n")
    assert classes == [ClassInfo(1, "oak")] and "'water' with value 0 is left out" in warnings[0]


@pytest.mark.parametrize(("text", "message"), [
    ("", "is empty"),
    ("value,name\n", "names no class"),
    ("name,colour\noak,#010203\n", "expected a column 'value'"),
    ("value,pixels\n1,7\n", "no column of names"),
    ("1,oak\n1,elm\n", "line 2: value 1 stands in the table twice"),
    ("1,oak\n2,oak\n", "line 2: two classes are called 'oak'"),
    ("1,oak\nx,elm\n", "line 2: 'x' is no class value"),
    ("1,oak\n70000,elm\n", "line 2: '70000' is no class value"),
    (f"1,oak\n{'9' * 5000},elm\n", "line 2: '99999"),
    ("1,oak\n-1,elm\n", "line 2: '-1' is no class value"),
    ("1,oak\n2,\n", "line 2: class 2 has no name"),
    ("1,oak,,red\n", "line 1: 'red' is no colour, expected #rrggbb"),
])  # fmt: skip
def test_tables_with_a_mistake(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputDataError, match=message):
        table(tmp_path, text)


def test_tables_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes(b"1,\xff\xfe\n")
    for name in ("x.csv", "none.csv"):
        with pytest.raises(InputDataError, match="cannot be read as UTF-8"):
            read_class_table(tmp_path / name)


@given(st.integers(2, 120))
def test_default_colours_are_distinct(count: int) -> None:
    given_colour = with_colours([ClassInfo(1, "x")])[0].colour  # the first default one, already taken
    classes = with_colours([ClassInfo(i, str(i)) for i in range(count)] + [ClassInfo(999, "mine", "", given_colour)])
    colours = [info.colour for info in classes]
    assert colours[-1] == given_colour and len(set(colours)) == count + 1


def test_first_default_colours_are_far_apart() -> None:
    colours = [np.array(info.colour) for info in with_colours([ClassInfo(i, str(i)) for i in range(16)])]
    assert min(np.abs(a - b).sum() for a, b in itertools.combinations(colours, 2)) >= 60


def test_values_without_a_row_are_an_error_with_pixel_counts() -> None:
    counts = count_values([np.array([[0, 1, 3]]), np.array([[3, 9, 0]])])
    assert counts == {1: 1, 3: 2, 9: 1}
    with pytest.raises(InputDataError, match=r"label values 3 \(2 pixels\), 9 \(1 pixels\)"):
        class_table(counts, [ClassInfo(1, "oak"), ClassInfo(2, "never seen")])
    classes, warnings = class_table({1: 1}, [ClassInfo(1, "oak"), ClassInfo(2, "never seen")])
    assert [info.name for info in classes] == ["oak", "never seen"] and warnings == []
    assert all(info.colour for info in classes)


def test_without_a_table_names_are_numbered_with_a_warning() -> None:
    classes, warnings = class_table({3: 5, 12: 1}, None)
    assert [(info.value, info.name) for info in classes] == [(3, "class 3"), (12, "class 12")]
    assert "label values 3, 12 have no class name" in warnings[0]


def test_names_and_colours_of_the_label_file_are_used() -> None:
    one, two = source(np.ones((1, 1), np.uint8)), source(np.ones((1, 1), np.uint8))
    one.class_names, one.class_colours = {1: "oak"}, {1: (1, 2, 3), 2: (0, 0, 0)}
    two.class_names = {1: "oak", 2: "elm", 5: "never seen"}
    classes, warnings = class_table({1: 1, 2: 1}, None, [one, two])
    assert classes[0] == ClassInfo(1, "oak", "", (1, 2, 3)) and warnings == []
    assert classes[1].name == "elm" and classes[1].colour != (0, 0, 0)
    two.class_names = {1: "ash"}
    with pytest.raises(InputDataError, match="value 1 is 'oak' in one label file and 'ash' in"):
        class_table({1: 1}, None, [one, two])


@pytest.mark.parametrize("dtype", ["bool", "uint8", "int16", "int64", "float32", "float64"])
def test_label_maps_of_any_type(dtype: str) -> None:
    values = np.array([[0, 1], [1, 0]]).astype(dtype)
    labels = read_label_map(source(values))
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels, values.astype(int))


@pytest.mark.parametrize("values", [
    np.array([[1, 255, 2]], np.uint8), np.array([[1.0, 255.0, 2.0]]), np.array([[1, 255, 2]], np.int32),
])  # fmt: skip
def test_nodata_becomes_unlabelled(values: np.ndarray) -> None:
    np.testing.assert_array_equal(read_label_map(source(values, nodata=255.0)), [[1, 0, 2]])
    np.testing.assert_array_equal(read_label_map(source(np.array([[np.nan, 4.0]]))), [[0, 4]])
    np.testing.assert_array_equal(read_label_map(source(np.array([[-1, 4]]), nodata=-1)), [[0, 4]])


@pytest.mark.parametrize(("values", "message"), [
    (np.array([[1, -2, -2]]), r"2 values that are negative \(such as -2\)"),
    (np.array([[1, 65536]]), "1 values that are above 65535"),
    (np.array([[1.5, 2.0]]), r"not whole numbers \(such as 1.5\)"),
    (np.array([[np.inf, 2.0]]), "above 65535"),
    (np.ones((2, 2, 3), np.uint8), "have 3 bands, expected one"),
])  # fmt: skip
def test_label_maps_that_cannot_be_used(values: np.ndarray, message: str) -> None:
    with pytest.raises(InputDataError, match=message):
        read_label_map(source(values))


def test_large_maps_are_read_in_blocks() -> None:
    values = np.arange(700 * 3, dtype=np.int32).reshape(700, 3)
    np.testing.assert_array_equal(read_label_map(source(values)), values)


def test_the_real_class_table_works_as_it_is(real_data: Path) -> None:
    classes, warnings = read_class_table(real_data / "osbs" / "classes.csv")
    assert warnings == [] and len(classes) == 12
    assert classes[0] == ClassInfo(1, "PIPA2", "Pinus palustris Mill.")
