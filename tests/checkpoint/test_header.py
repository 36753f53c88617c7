"""The safetensors header: what the strict reader refuses and accepts, and that what is written reads back."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import safetensors
import safetensors.numpy
from checkpoint_files import entry, file_bytes, tensors_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from paramdelta.checkpoint.header import Header, parse_header, read_header
from paramdelta.dtypes import DTYPES
from paramdelta.errors import CheckpointError


def parse(content: bytes, subject: str = "file") -> Header:
    """Parse a file whose first 8 bytes are right."""
    (length,) = struct.unpack("<Q", content[:8])
    return parse_header(content[8 : 8 + length], file_size=len(content), subject=subject)


def refusal(tmp_path: Path, content: bytes) -> CheckpointError:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(path)
    assert all(c.subject.startswith(str(path)) for c in caught.value.complaints)
    return caught.value


def library_accepts(content: bytes) -> bool:
    try:
        safetensors.deserialize(content)
    except safetensors.SafetensorError:
        return False
    return True


def one(text: str, size: int = 4, *, name: str = '"a"') -> bytes:
    """Return a file whose header is ``{"a": text}``, with ``size`` bytes of data."""
    return file_bytes(f"{{{name}:{text}}}", bytes(size))


def fields(dtype: str = '"F32"', shape: str = "[1]", offsets: str = "[0,4]") -> str:
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}'


GOOD = fields()
B_GOOD = fields(offsets="[4,8]")
U8 = '"U8"'

# id: (file, what the complaint says, whether the safetensors library refuses the file too)
REFUSED: dict[str, tuple[bytes, str, bool]] = {
    # the file
    "no bytes": (b"", "is 0 bytes long: too short", True),
    "seven bytes": (b"\2\0\0\0\0\0\0", "is 7 bytes long: too short", True),
    "header beyond the cap": (file_bytes("{}", length=100_000_001), "header of 100,000,001 bytes; the most", True),
    "length of all ones": (b"\xff" * 16, "header of 18,446,744,073,709,551,615 bytes; the most", True),
    "header beyond the file": (file_bytes("{}", length=3), "10 bytes, header of 3: the file is truncated", True),
    # the JSON
    "empty header": (file_bytes(""), "header: is empty", True),
    "blank header": (file_bytes("   \t"), "header: is empty", True),
    "bad UTF-8": (file_bytes(b'{"\xff":1}'), "is not UTF-8 (byte ", True),
    "UTF-8 of a surrogate": (file_bytes(b'{"abc\xed\xa0\x80":1}'), "is not UTF-8 (byte ", True),
    "overlong UTF-8": (file_bytes(b'{"abcdef\xc0\x80":1}'), "is not UTF-8 (byte ", True),
    "byte order mark": (file_bytes("\ufeff{}"), "byte order mark", True),
    "NUL padding": (file_bytes("{}\0\0"), "padded with NUL bytes", True),
    "trailing comma": (one(GOOD + ","), "Expecting property name enclosed in", True),
    "comment": (file_bytes('{/*b*/"a":' + GOOD + "}", bytes(4)), "Expecting property name enclosed in", True),
    "second document": (file_bytes("{}{}"), "Extra data (character 2)", True),
    "not closed": (file_bytes('{"a"'), "Expecting ':' delimiter", True),
    "single quotes": (file_bytes("{    'a':1}"), "Expecting property name enclosed in", True),
    "raw control character": (one(GOOD, name='"\n"'), "Invalid control character", True),
    "bad escape": (one(GOOD, name='"\\x"'), "Invalid \\escape", True),
    "lone high surrogate": (one(GOOD, name='"\\ud800"'), "lone surrogate", True),
    "lone low surrogate": (one(GOOD, name='"\\udfff"'), "lone surrogate", True),
    "lone surrogate in a value": (one(fields(dtype='"\\ud800"')), "lone surrogate", True),
    "NaN": (one(fields(shape="[NaN]")), "it holds NaN", True),
    "infinity": (one(fields(shape="[Infinity]")), "it holds Infinity", True),
    "minus infinity": (one(fields(shape="[-Infinity]")), "it holds -Infinity", True),
    "leading zero": (one(fields(shape="[01]")), "Expecting ',' delimiter", True),
    "an array": (file_bytes("[]"), "is not a JSON object", True),
    "a string": (file_bytes('"a"'), "is not a JSON object", True),
    "null": (file_bytes("null"), "is not a JSON object", True),
    "nested too deeply": (file_bytes('{"a":' + "[" * 100_000), "is nested too deeply", True),
    # the metadata
    "metadata twice": (file_bytes('{"__metadata__":{},"__metadata__":{}}'), "__metadata__ appears twice", True),
    "metadata a list": (file_bytes('{"__metadata__":[]}'), "__metadata__ is not an object", True),
    "metadata a number": (file_bytes('{"__metadata__":{"k":1}}'), "values that are not strings: k", True),
    "metadata null": (file_bytes('{"__metadata__":{"n":null}}'), "values that are not strings: n", True),
    "metadata key twice": (file_bytes('{"__metadata__":{"k":"a","k":"a"}}'), "holds a key twice", False),
    # one tensor
    "tensor null": (one("null"), "not described by a JSON object", True),
    "tensor a list": (one("[]"), "not described by a JSON object", True),
    "field twice": (one(GOOD[:-1] + ',"shape":[1]}'), "has a field twice", True),
    "no dtype": (one('{"shape":[1],"data_offsets":[0,4]}'), "has no dtype", True),
    "no shape": (one('{"dtype":"F32","data_offsets":[0,4]}'), "has no shape", True),
    "no offsets": (one('{"dtype":"F32","shape":[1]}'), "has no data_offsets", True),
    "unknown dtype": (one(fields(dtype='"F128"')), "unknown dtype F128", True),
    "lower-case dtype": (one(fields(dtype='"f32"')), "unknown dtype f32", True),
    "dtype with a space": (one(fields(dtype='"F32 "')), "unknown dtype F32", True),
    "dtype a number": (one(fields(dtype="32")), "unknown dtype 32", True),
    "dtype a list": (one(fields(dtype='["F32"]')), "unknown dtype [", True),
    "shape a string": (one(fields(shape='"1"')), "a shape that is no list", True),
    "shape null": (one(fields(shape="null")), "a shape that is no list", True),
    "shape an object": (one(fields(shape="{}")), "a shape that is no list", True),
    "shape with a float": (one(fields(shape="[1.0]")), "shape with 1.0;", True),
    "shape with an exponent": (one(fields(shape="[1e0]")), "shape with 1e0;", True),
    "shape with a negative": (one(fields(shape="[-1]")), "shape with -1;", True),
    "shape with minus zero": (one(fields(shape="[-0]")), "shape with -0;", True),
    "shape with a string": (one(fields(shape='["1"]')), 'shape with "1";', True),
    "shape with a boolean": (one(fields(shape="[true]")), "shape with true;", True),
    "shape with null": (one(fields(shape="[null]")), "shape with null;", True),
    "shape with a list": (one(fields(shape="[[1]]")), "shape with [1];", True),
    "shape of 2^64": (one(fields(shape="[18446744073709551616]")), "shape with 18446744073709551616;", True),
    "shape of 5000 digits": (one(fields(shape=f"[{'7' * 5000}]")), "shape with 7777777", True),
    "offsets an object": (one(fields(offsets='{"0":0,"1":4}')), "are not a list of two", True),
    "one offset": (one(fields(offsets="[0]")), "are not a list of two", True),
    "three offsets": (one(fields(offsets="[0,4,4]")), "are not a list of two", True),
    "offsets with a float": (one(fields(offsets="[0,4.0]")), "data_offsets with 4.0;", True),
    "offsets with an exponent": (one(fields(offsets="[0,4e0]")), "data_offsets with 4e0;", True),
    "offsets with a negative": (one(fields(offsets="[-4,0]")), "data_offsets with -4;", True),
    "offsets with minus zero": (one(fields(offsets="[-0,4]")), "data_offsets with -0;", True),
    "offsets with a string": (one(fields(offsets='[0,"4"]')), 'data_offsets with "4";', True),
    "offsets with a boolean": (one(fields(offsets="[false,4]")), "data_offsets with false;", True),
    "offsets of 2^64": (one(fields(offsets="[0,18446744073709551616]")), "offsets with 18446744073709551616;", True),
    "offsets backwards": (one(fields(offsets="[4,0]")), "run backwards: 4 to 0", True),
    "size too small": (one(fields(shape="[2]")), "has 4 bytes of data, but its shape and dtype make 8", True),
    "size too large": (one(fields(shape="[]", offsets="[0,8]"), 8), "has 8 bytes of data, but its shape", True),
    "overflow": (one(fields(shape="[4294967296,4294967296]", offsets="[0,0]"), 0), "overflows 64 bits", True),
    "overflow, then zero": (
        one(fields(shape="[9223372036854775808,4,0]", offsets="[0,0]"), 0),
        "overflows 64 bits",
        True,
    ),
    "ends within a byte, F4": (one(fields('"F4"', "[3]", "[0,2]"), 2), "within a byte: 12 bits of F4", True),
    "ends within a byte, F6_E2M3": (one(fields('"F6_E2M3"', "[2]", "[0,2]"), 2), "12 bits of F6_E2M3", True),
    "ends within a byte, F6_E3M2": (one(fields('"F6_E3M2"', "[1]", "[0,1]"), 1), "6 bits of F6_E3M2", True),
    # tensors together
    "name twice": (file_bytes(f'{{"a":{GOOD},"a":{B_GOOD}}}', bytes(8)), "a: appears twice in the header", True),
    "name twice, aliased": (
        file_bytes(f'{{"a":{GOOD},"a":{GOOD}}}', bytes(4)),
        "a: appears twice in the header",
        False,
    ),
    "name twice, escaped": (
        file_bytes(f'{{"a":{GOOD},"\\u0061":{GOOD}}}', bytes(4)),
        "a: appears twice in the header",
        False,
    ),
    "hole at the start": (one(fields(offsets="[4,8]"), 8), "starts at byte 4, after a hole from 0", True),
    "hole between": (
        file_bytes(f'{{"a":{GOOD},"b":{fields(offsets="[8,12]")}}}', bytes(12)),
        "b: starts at byte 8, after a hole from 4",
        True,
    ),
    "overlap": (
        file_bytes(f'{{"a":{GOOD},"b":{fields(offsets="[2,6]")}}}', bytes(6)),
        "b: starts at byte 2, within data of another (to 4)",
        True,
    ),
    "alias": (file_bytes(f'{{"a":{GOOD},"b":{GOOD}}}', bytes(4)), "b: starts at byte 0, within data", True),
    "empty tensor within another": (
        file_bytes(f'{{"a":{GOOD},"b":{fields(shape="[0]", offsets="[3,3]")}}}', bytes(4)),
        "b: starts at byte 3, within",
        True,
    ),
    "empty tensor beyond the end": (
        file_bytes(f'{{"a":{GOOD},"b":{fields(shape="[0]", offsets="[5,5]")}}}', bytes(5)),
        "b: starts at byte 5, after a hole from 4",
        True,
    ),
    "data cut off": (one(GOOD, 3), "tensors end at byte 4 of 3 bytes of data: the file is truncated", True),
    "no data at all": (one(GOOD, 0), "tensors end at byte 4 of 0 bytes", True),
    "trailing byte": (one(GOOD, 5), "holds 1 bytes behind its last tensor", True),
    "data without tensors": (file_bytes("{}", bytes(7)), "holds 7 bytes behind", True),
}

ACCEPTED: dict[str, bytes] = {
    "no tensors": file_bytes("{}"),
    "no tensors, but metadata": file_bytes('{"__metadata__":{"format":"pt"}}'),
    "padded": file_bytes('{"a":' + GOOD + "}    ", bytes(4)),
    "white space around": file_bytes(' \n\t{"a" :\r\n' + GOOD + "} \n\t\r ", bytes(4)),
    "unknown fields": one(GOOD[:-1] + ',"extra":{"deep":[1.5,-1,null,true]}}'),
    "fields in another order": one('{"data_offsets":[0,4],"shape":[1],"dtype":"F32"}'),
    "tensors in another order": file_bytes(f'{{"b":{B_GOOD},"a":{GOOD}}}', bytes(8)),
    "unaligned header": one(GOOD, name='"abc"'),
    "unaligned tensors": file_bytes(f'{{"a":{fields(U8, "[1]", "[0,1]")},"b":{fields(offsets="[1,5]")}}}', bytes(5)),
    "scalar": one(fields(shape="[]")),
    "empty": one(fields(shape="[0]", offsets="[0,0]"), 0),
    "empty, other sizes huge": one(fields(shape="[0,4294967296,4294967296]", offsets="[0,0]"), 0),
    "empty before and after": file_bytes(
        json.dumps({"c": entry("F32", [0], 4, 4), "b": entry("F32", [1], 0, 4), "a": entry("F32", [0, 9], 0, 0)}),
        bytes(4),
    ),
    "many dimensions": one(fields(shape=f"[{','.join('1' * 64)}]")),
    "empty name": one(GOOD, name='""'),
    "names beyond the BMP": file_bytes(f'{{"\\ud83d\\ude00":{GOOD},"\U0001f601":{B_GOOD}}}', bytes(8)),
    "escaped control characters": one(GOOD, name='"\\u0000\\n"'),
    "F4 counts nibbles": one(fields('"F4"', "[3,4]", "[0,6]"), 6),
    "F6_E2M3 of whole bytes": one(fields('"F6_E2M3"', "[4]", "[0,3]"), 3),
    "F6_E3M2 of whole bytes": one(fields('"F6_E3M2"', "[2,4]", "[0,6]"), 6),
}


@pytest.mark.parametrize(("content", "message", "library_refuses"), REFUSED.values(), ids=REFUSED.keys())
def test_is_refused(tmp_path: Path, content: bytes, message: str, library_refuses: bool) -> None:
    error = refusal(tmp_path, content)
    assert message in str(error)
    assert error.exit_code == 2
    assert len(error.complaints) == 1, "one thing is wrong, so one complaint"
    assert library_accepts(content) is not library_refuses


@pytest.mark.parametrize("content", ACCEPTED.values(), ids=ACCEPTED.keys())
def test_is_accepted(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert_same_as_library(read_header(path), content)


def test_each_message_names_its_own_rule() -> None:
    """What one rule's complaint says is never said when another rule is broken."""
    messages = {}
    for name, (content, _, _) in REFUSED.items():
        if len(content) >= 8 and 8 + int.from_bytes(content[:8], "little") <= len(content):
            with pytest.raises(CheckpointError) as caught:
                parse(content)
            messages[name] = str(caught.value)
    told = {message for _, message, _ in REFUSED.values()}
    for name, message in messages.items():
        assert [text for text in told if text in message] == [REFUSED[name][1]], name


def test_every_bad_tensor_is_reported() -> None:
    header = {
        "good": entry("F32", [1], 0, 4),
        "no such dtype": entry("F33", [1], 4, 8),
        "too small": entry("F32", [2], 8, 12),
        "negative": entry("F32", [-1], 12, 16),
        "__metadata__": {"k": 1},
    }
    with pytest.raises(CheckpointError) as caught:
        parse(file_bytes(json.dumps(header), bytes(16)), subject="x.safetensors")
    assert [c.subject for c in caught.value.complaints] == [
        "x.safetensors",
        "x.safetensors: no such dtype",
        "x.safetensors: too small",
        "x.safetensors: negative",
    ]
    nothing = parse_error(one("{}"))
    assert "has no dtype and no shape and no data_offsets" in str(nothing)


def test_every_hole_is_reported() -> None:
    header = {name: entry("F32", [1], 8 * i + 4, 8 * i + 8) for i, name in enumerate("abc")}
    error = parse_error(file_bytes(json.dumps(header), bytes(30)))
    assert [c.subject for c in error.complaints] == ["file: a", "file: b", "file: c", "file"]


def test_a_thousand_complaints_are_cut_short() -> None:
    error = parse_error(file_bytes(json.dumps({f"t{i}": None for i in range(1000)})))
    assert len(error.complaints) == 21
    assert "and 980 more" in error.complaints[-1].problem


def parse_error(content: bytes) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        parse(content)
    return caught.value


def test_names_are_shown_escaped() -> None:
    name = "a\x1b[31m\n\u202eb" + "x" * 1000
    text = str(parse_error(file_bytes(json.dumps({name: entry("F32", [1], 0, 5)}), bytes(5))))
    assert all(c.isprintable() for c in text)
    assert "a\\x1b[31m\\n\\u202eb" in text
    assert len(text) < 500
    text = str(parse_error(one(fields(dtype=json.dumps("F\x1b")))))
    assert "F\\x1b" in text
    assert "\x1b" not in text


def test_long_numbers_are_cut() -> None:
    text = str(parse_error(one(fields(shape=f"[1.{'0' * 100_000}]"))))
    assert len(text) < 500


HOSTILE = {
    "deep objects": '{"a":' * 50_000,
    "deep objects, closed": '{"a":' * 400 + "1" + "}" * 400,
    "deep list as a dtype": '{"a":' + fields(dtype="[" * 900 + "]" * 900) + "}",
    "deep list in a shape": '{"a":' + fields(shape="[" * 900 + "]" * 900) + "}",
    "deep unknown field": '{"a":' + GOOD[:-1] + ',"x":' + "[" * 900 + "]" * 900 + '}, "b": 1}',
    "many digits": '{"a":' + fields(offsets=f"[0,{'9' * 5000}]") + "}",
    "many digits in an unknown field": '{"a":' + GOOD[:-1] + f',"x":{"9" * 5000}' + '}, "b": 1}',
    "a million ones": '{"a":' + fields(shape="[" + "1," * 999_999 + "1]", offsets="[0,5]") + "}",
    "a million twos": '{"a":' + fields(shape="[" + "2," * 999_999 + "2]") + "}",
    "a million large sizes": '{"a":' + fields(shape="[" + f"{2**63}," * 999_999 + "2]") + "}",
    "offsets beyond 63 bits": '{"a":' + fields(U8, f"[{2**64 - 1}]", f"[0,{2**64 - 1}]") + "}",
    "a hundred thousand tensors in one place": json.dumps({f"t{i}": entry("U8", [1], 0, 1) for i in range(100_000)}),
}


@pytest.mark.parametrize("header", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_headers_end_with_a_complaint(tmp_path: Path, header: str) -> None:
    refusal(tmp_path, file_bytes(header, bytes(4)))


def test_deep_objects_with_an_escape_end_with_a_complaint(tmp_path: Path) -> None:
    refusal(tmp_path, file_bytes('{"\\u0061":' * 900 + "1" + "}" * 900, bytes(4)))


def test_an_absent_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent: cannot be read: No such file"):
        read_header(tmp_path / "absent")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        read_header(tmp_path / "pipe")


def test_an_lfs_pointer_is_named(tmp_path: Path) -> None:
    pointer = tmp_path / "model.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    with pytest.raises(CheckpointError, match="Git LFS pointer"):
        read_header(pointer)


@given(data=st.data())
@settings(max_examples=400, deadline=None)
def test_damaged_files_end_with_a_complaint_or_read_as_the_library_does(data: st.DataObject) -> None:
    content = bytearray(tensors_bytes({"ab": ("F32", (2, 1)), "c": ("U8", (3,)), "d": ("F4", (2,))}, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(8, len(content) - 1))
        change = data.draw(st.sampled_from(("replace", "insert", "delete")))
        byte = data.draw(st.sampled_from(b'{}[]",:0129-+.eE \\\t\0\xff\xc3ntfu') | st.integers(0, 255))
        content[at : at + (change != "insert")] = b"" if change == "delete" else bytes([byte])
    file = struct.pack("<Q", int.from_bytes(content[:8], "little")) + bytes(content[8:])
    if 8 + int.from_bytes(content[:8], "little") > len(content):
        return
    try:
        header = parse(file)
    except CheckpointError:
        return
    assert_same_as_library(header, file)


def assert_same_as_library(header: Header, content: bytes) -> None:
    theirs = {name: (t["dtype"], tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(content)}
    ours = {
        name: (DTYPES[code].safetensors, shape, content[header.data_start + begin :][:size])
        for name, code, shape, begin, size in zip(
            header.names, header.dtypes, header.shapes, header.begin, header.nbytes, strict=True
        )
    }
    assert ours == theirs
