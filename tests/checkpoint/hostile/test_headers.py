"""The reader of headers, on crafted files and on random ones."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from flashmoe_mlx.checkpoint.header import check_header, entries, read_header
from tests.checkpoint.hostile.fuzz import check_alike, check_memory
from tests.checkpoint.hostile.headers import FILES, SOUND


@pytest.mark.parametrize("name", FILES)
def test_hostile_file_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    data, reason = FILES[name]
    file = tmp_path / "model.safetensors"
    file.write_bytes(data)
    with pytest.raises(ValueError) as info:
        read_header(file)
    assert str(info.value) == f"{file} is damaged or not complete: {reason}. Download it again"


@pytest.mark.parametrize("name", SOUND)
def test_sound_file_is_accepted(name: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(SOUND[name])
    first, found = read_header(file)
    with safe_open(file, framework="np") as tensors:
        assert sorted(entry.name for entry in found) == sorted(tensors.keys())
    header = json.loads(SOUND[name][8:first])
    header.pop("__metadata__", None)
    assert {entry.name: list(entry[3:]) for entry in read_header(file)[1]} == {
        name: entry["data_offsets"] for name, entry in header.items()
    }


def test_safetensors_accepts_a_name_twice(tmp_path: Path) -> None:
    """So the check of our own is needed, until this fails."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(FILES["name twice"][0])
    with safe_open(file, framework="np"):
        pass


_FLOOD = 20_000


@pytest.mark.parametrize(
    "header",
    [
        b"{" + b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(_FLOOD)) + b"}",
        b"{" + b",".join([b'"":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}'] * _FLOOD) + b"}",
        b'{"__metadata__":{' + b",".join(b'"%x":""' % i for i in range(_FLOOD * 5)) + b"}}",
        b'{"__metadata__":{"":"' + "\U0001f600".encode() * _FLOOD * 10 + b'"}}',
        b'{"__metadata__":{"":"' + b"\\n" * _FLOOD * 10,
        b'{"a":{"dtype":"U8","shape":[' + b"1," * _FLOOD * 10,
        b'{"a":' + b"[" * _FLOOD * 10,
        b'{"a":' + b"{" * _FLOOD * 10,
        b'{"' + b"a" * _FLOOD * 10,
        b"{" + b" " * _FLOOD * 10,
    ],
    ids=lambda header: header[:30],
)
def test_checking_takes_no_more_memory_than_the_header(header: bytes) -> None:
    check_memory(header, 0)


_DTYPES = st.sampled_from(["U8", "F32", "F4", "F6_E2M3", "F8_E4M3", "BF16", "X"])
_SIZES = st.integers(0, 4) | st.sampled_from([-1, 2**32, 2**61, 2**63, 2**64 - 1, 2**64, 10**30])
_ENTRY = st.fixed_dictionaries(
    {
        "dtype": _DTYPES,
        "shape": st.lists(_SIZES, max_size=3),
        "data_offsets": st.lists(st.integers(0, 9), min_size=2, max_size=2) | st.lists(_SIZES, max_size=3),
    }
)
_HEADER = st.dictionaries(st.text(max_size=3), _ENTRY, max_size=3)


@given(header=_HEADER, data_nbytes=st.integers(0, 12), escaped=st.booleans(), blanks=st.booleans())
@settings(max_examples=300, deadline=None)
def test_nearly_right_headers_agree_with_safetensors(
    header: dict[str, object], data_nbytes: int, escaped: bool, blanks: bool
) -> None:
    text = json.dumps(header, ensure_ascii=escaped, separators=None if blanks else (",", ":"))
    check_alike(text.encode(errors="surrogatepass"), data_nbytes)


@given(
    file=st.sampled_from(list(SOUND.values()) + [data for data, _ in FILES.values() if len(data) < 1000]),
    changes=st.lists(st.tuples(st.integers(0, 200), st.integers(0, 2), st.binary(max_size=3)), max_size=4),
)
@settings(max_examples=500, deadline=None)
def test_mutated_files_agree_with_safetensors(file: bytes, changes: list[tuple[int, int, bytes]]) -> None:
    header = file[8:]
    for position, removed, added in changes:
        header = header[:position] + added + header[position + removed :]
    for data_nbytes in (0, 2):
        check_alike(header, data_nbytes)


@given(st.binary(max_size=64))
def test_random_bytes_agree_with_safetensors(header: bytes) -> None:
    check_alike(header, 0)


@given(
    st.lists(
        st.tuples(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), st.integers(0, 5)),
        max_size=8,
        unique_by=lambda pair: pair[0],
    ).filter(lambda tensors: all(name != "__metadata__" for name, _ in tensors))
)
def test_random_sound_headers_are_accepted(tensors: list[tuple[str, int]]) -> None:
    header, end = {}, 0
    for name, size in tensors:
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    check_header(text, end)
    assert [entry.name for entry in entries(text)] == list(header)
    check_alike(text, end)
