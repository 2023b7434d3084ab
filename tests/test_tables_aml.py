"""vmm/tables/aml.py: its encodings, as ACPI 6.5 chapter 20 has them and as ACPICA reads them."""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from tests.support import acpica
from vmm.tables import acpi, aml


def evaluate(tmp_path: Path, *body: bytes, name: str = "TEST") -> str:
    """What ACPICA's interpreter makes of object `name` in a DSDT of `body`."""
    said = acpica.execute(tmp_path, acpi.table("DSDT", 2, b"".join(body)), f"evaluate \\{name}")
    assert "returned object" in said, said
    return said.split("external buffer length", 1)[1]


def integers(said: str) -> list[int]:
    return [int(text, 16) for text in re.findall(r"\[Integer\] = (\w+)", said)]


def as_asl(tmp_path: Path, *body: bytes) -> str:
    """The disassembly, spaces squeezed; it compiles to the same bytes again."""
    table = acpi.table("DSDT", 2, b"".join(body))
    source = acpica.disassemble(tmp_path, "DSDT", table)
    assert acpica.recompile(tmp_path, "DSDT")[36:] == table[36:]
    source = re.sub(r"/\*.*?\*/|//.*?$", "", source, flags=re.S | re.M)
    return " ".join(source[source.index("DefinitionBlock") :].split())


# --- lengths (section 20.2.4) ---------------------------------------------------------------------


def decode_length(data: bytes) -> tuple[int, int]:
    """PkgLength at the start of `data`: (value, its bytes), as the specification tells it."""
    follow = data[0] >> 6
    if not follow:
        return data[0] & 0x3F, 1
    assert not data[0] & 0x30, "bits 4 and 5 must be 0"
    value = data[0] & 0xF
    for position in range(follow):
        value |= data[1 + position] << (4 + 8 * position)
    return value, 1 + follow


LAST = {1: 0x3F - 1, 2: 0xFFF - 2, 3: 0xFFFFF - 3}
"""The most content with so many bytes of length."""
SIZES = [(0, 1), (1, 1), (0x10, 1)]
SIZES += [(most, size) for size, most in LAST.items()]
SIZES += [(most + 1, size + 1) for size, most in LAST.items()]


@pytest.mark.parametrize(("content", "size"), SIZES)
def test_package_lengths_of_every_size(content: int, size: int) -> None:
    data = aml.pkg_length(bytes(content))
    assert decode_length(data) == (size + content, size)
    assert len(data) == size + content


@pytest.mark.parametrize("data", [LAST[1], LAST[1] + 1, LAST[2], LAST[2] + 1, 70000])
def test_acpica_reads_packages_of_every_size(data: int, tmp_path: Path) -> None:
    # The buffer's own length is encoded with its content; the object after it must be found too.
    size = len(aml.integer(data))
    value = bytes(index % 251 for index in range(data - size))
    body = aml.name("BUFF", aml.buffer(value)) + aml.name("TEST", aml.package(1, 2, 3))
    assert integers(evaluate(tmp_path, body)) == [1, 2, 3]
    if data < 0x2000:  # what acpiexec can show
        assert f"Length {len(value):02X} =" in evaluate(tmp_path, body, name="BUFF")


def test_a_package_too_long_is_refused() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return (1 << 28) - 4

    with pytest.raises(ValueError, match="268435452 bytes is too long"):
        aml.pkg_length(Huge())


# --- integers, strings, names ---------------------------------------------------------------------

INTEGERS = {
    0: "00",
    1: "01",
    2: "0a02",
    0xFF: "0aff",
    0x100: "0b0001",
    0xFFFF: "0bffff",
    0x10000: "0c00000100",
    0xFFFFFFFF: "0cffffffff",
    0x100000000: "0e0000000001000000",
    (1 << 64) - 1: "0effffffffffffffff",
}


@pytest.mark.parametrize(("value", "encoding"), INTEGERS.items())
def test_integers_have_their_shortest_encoding(value: int, encoding: str) -> None:
    assert aml.integer(value).hex() == encoding
    assert aml.term(value).hex() == encoding


def test_acpica_reads_every_integer_back(tmp_path: Path) -> None:
    package = aml.name("TEST", aml.package(*INTEGERS))
    assert integers(evaluate(tmp_path, package)) == list(INTEGERS)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_what_is_no_integer_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match="is no AML integer"):
        aml.integer(value)


def test_strings(tmp_path: Path) -> None:
    assert aml.term("LNRO0005") == b"\x0dLNRO0005\0"
    assert aml.term("") == b"\x0d\0"
    said = evaluate(tmp_path, aml.name("TEST", 'a b"c'))
    assert r'[String] Length 05 = "a b\"c"' in said or '[String] Length 05 = "a b"c"' in said


@pytest.mark.parametrize("text", ["caf\u00e9", "a\0b"])
def test_what_is_no_string_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # UnicodeEncodeError is one
        aml.term(text)


@pytest.mark.parametrize(
    ("path", "encoding"),
    [
        ("A", b"A___"),
        ("_SB", b"_SB_"),
        ("ABCD", b"ABCD"),
        ("\\", b"\\\0"),
        ("\\_SB", b"\\_SB_"),
        ("^^AB", b"^^AB__"),
        ("\\_SB.PWRB", b"\\\x2e_SB_PWRB"),
        ("^A.B", b"^\x2eA___B___"),
        ("\\_SB.PCI0.S00", b"\\\x2f\x03_SB_PCI0S00_"),
    ],
)
def test_name_strings(path: str, encoding: bytes) -> None:
    assert aml.name_string(path) == encoding


@pytest.mark.parametrize("path", ["ABCDE", "A..B", "\\_SB.", "a", "A-B", "1AB", "\u00c4"])
def test_what_is_no_name_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="AML name"):
        aml.name_string(path)


def test_acpica_finds_nested_names(tmp_path: Path) -> None:
    inner = aml.device("DEV", aml.scope("^SUB", aml.name("X", 7)))
    tree = aml.scope("\\_SB", aml.device("BUS", aml.device("SUB"), inner))
    assert integers(evaluate(tmp_path, tree, name="_SB.BUS.SUB.X")) == [7]


# --- objects and methods --------------------------------------------------------------------------


@pytest.mark.parametrize("count", [0, 1, 59, 60, 255])
def test_packages(count: int, tmp_path: Path) -> None:
    assert integers(evaluate(tmp_path, aml.name("TEST", aml.package(*range(count))))) == list(
        range(count)
    )


def test_a_package_holds_at_most_255_elements() -> None:
    with pytest.raises(ValueError):
        aml.package(*range(256))


def test_a_method_computes(tmp_path: Path) -> None:
    body = aml.method(
        "TEST",
        0,
        aml.store(0x1234, aml.LOCAL0),
        aml.if_(aml.bit_and(aml.LOCAL0, 1), aml.return_(1)),
        aml.if_(aml.bit_and(aml.LOCAL0, 4), aml.return_(aml.bit_and(aml.LOCAL0, 0xFF0))),
        aml.return_(2),
    )
    assert integers(evaluate(tmp_path, body)) == [0x230]


@pytest.mark.parametrize(
    ("arguments", "serialized", "flags"), [(0, True, 8), (1, True, 9), (7, False, 7)]
)
def test_method_flags(arguments: int, serialized: bool, flags: int) -> None:
    code = aml.method("M", arguments, aml.return_(0), serialized=serialized)
    assert code == bytes((0x14, 8)) + b"M___" + bytes((flags,)) + b"\xa4\0"


def test_a_method_takes_its_argument(tmp_path: Path) -> None:
    table = acpi.table("DSDT", 2, aml.method("TEST", 1, aml.return_(aml.bit_and(aml.ARG0, 0xF))))
    said = acpica.execute(tmp_path, table, "execute \\TEST 0x35")
    assert integers(said) == [5]


def test_asl_of_a_device_with_registers(tmp_path: Path) -> None:
    source = as_asl(
        tmp_path,
        aml.device(
            "DEV",
            aml.name("_HID", aml.eisa_id("PNP0A08")),
            aml.operation_region("REGS", aml.SYSTEM_MEMORY, 0xD0000000, 0x300),
            aml.field("REGS", aml.BYTE_ACC, ("BIT", 1), ("LONG", 62), ("MORE", 65), ("MOST", 4096)),
            aml.method("PING", 0, aml.notify("\\DEV", 0x80), serialized=False),
        ),
    )
    assert 'Device (DEV) { Name (_HID, EisaId ("PNP0A08")' in source
    assert "OperationRegion (REGS, SystemMemory, 0xD0000000, 0x0300)" in source
    fields = "{ BIT, 1, LONG, 62, MORE, 65, MOST, 4096 }"
    assert f"Field (REGS, ByteAcc, NoLock, Preserve) {fields}" in source
    assert "Method (PING, 0, NotSerialized) { Notify (\\DEV, 0x80) }" in source


@pytest.mark.parametrize("bits", [1, 0x3F, 0x40, 0xFFF, 0x1000, 0xFFFFF, 0x100000, 0xFFFFFFF])
def test_field_lengths_of_every_size(bits: int) -> None:
    code = aml.field("REGS", aml.BYTE_ACC, ("F", bits))
    start = code.index(b"F___") + 4
    size = 1 + sum(bits > most for most in (0x3F, 0xFFF, 0xFFFFF))
    assert decode_length(code[start:]) == (bits, size)
    assert len(code) == start + size


@pytest.mark.parametrize("bits", [0, -1, 1 << 28])
def test_impossible_fields_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match="AML field"):
        aml.field("REGS", aml.BYTE_ACC, ("F", bits))


@pytest.mark.parametrize(
    ("text", "value"),
    [("PNP0501", 0x0105D041), ("PNP0A08", 0x080AD041), ("QEM0001", 0x0100AD44)],
)
def test_eisa_ids(text: str, value: int) -> None:
    assert aml.eisa_id(text) == struct.pack("<BI", 0x0C, value)


# --- resources (section 6.4) ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("descriptor", "asl"),
    [
        (aml.io(0x3F8, 8), "IO (Decode16, 0x03F8, 0x03F8, 0x01, 0x08, )"),
        (aml.irq_no_flags(0), "IRQNoFlags () {0}"),
        (aml.irq_no_flags(15), "IRQNoFlags () {15}"),
        (
            aml.memory32_fixed(0xD0000000, 0x1000),
            "Memory32Fixed (ReadWrite, 0xD0000000, 0x00001000, )",
        ),
        (
            aml.memory32_fixed(0xFED00000, 0x400, writable=False),
            "Memory32Fixed (ReadOnly, 0xFED00000, 0x00000400, )",
        ),
        (
            aml.interrupt(300),
            "Interrupt (ResourceConsumer, Edge, ActiveHigh, Exclusive, ,, ) { 0x0000012C, }",
        ),
        (
            aml.interrupt(5, edge=False),
            "Interrupt (ResourceConsumer, Level, ActiveHigh, Exclusive, ,, ) { 0x00000005, }",
        ),
        (
            aml.address_space(2, 0, 256, bits=16),
            "WordBusNumber (ResourceProducer, MinFixed, MaxFixed, PosDecode, "
            "0x0000, 0x0000, 0x00FF, 0x0000, 0x0100, ,, )",
        ),
        (
            aml.address_space(1, 0x1000, 0xF000, bits=32, specific=3),
            "DWordIO (ResourceProducer, MinFixed, MaxFixed, PosDecode, EntireRange, "
            "0x00000000, 0x00001000, 0x0000FFFF, 0x00000000, 0x0000F000, ,, , TypeStatic, "
            "DenseTranslation)",
        ),
        (
            aml.address_space(0, 1 << 40, 1 << 39, bits=64, specific=1),
            "QWordMemory (ResourceProducer, PosDecode, MinFixed, MaxFixed, NonCacheable, "
            "ReadWrite, 0x0000000000000000, 0x0000010000000000, 0x0000017FFFFFFFFF, "
            "0x0000000000000000, 0x0000008000000000, ,, , AddressRangeMemory, TypeStatic)",
        ),
    ],
)
def test_resource_descriptors(descriptor: bytes, asl: str, tmp_path: Path) -> None:
    source = as_asl(tmp_path, aml.name("_CRS", aml.resource_template(descriptor)))
    assert f"Name (_CRS, ResourceTemplate () {{ {asl} }})" in source


def test_a_template_of_many_descriptors(tmp_path: Path) -> None:
    ports = [aml.io(port, 1) for port in range(0, 200)]
    source = as_asl(tmp_path, aml.name("_CRS", aml.resource_template(*ports)))
    assert source.count("IO (Decode16") == 200
