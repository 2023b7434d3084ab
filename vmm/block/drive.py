"""A disk as a person says it: `--drive PATH[,readonly][,format=F][,serial=S][,cache=C]...`."""

from __future__ import annotations

from os import PathLike

from vmm import config_types as types
from vmm.block.probe import FORMATS, LAYERED
from vmm.errors import UsageError
from vmm.units import put_once

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from vmm.block.nbd import NbdImage
    from vmm.block.overlay import Overlay
    from vmm.block.raw import RawImage
    from vmm.virtio.device import VirtioDevice
    from vmm.virtio.rate import Rate

FLAGS = ("readonly", "snapshot")
KEYS = (
    "format", "serial", "cache", "queues", "werror", "discard", "backing", "data-file",
    "logical-block-size", "physical-block-size",
)  # fmt: skip
LIMITS = ("bps", "burst", "iops", "iops-burst")
"""See `vmm.virtio.rate`."""
CACHES = ("writeback", "none", "unsafe")
WERRORS = ("report", "stop")
DISCARDS = {"unmap": "unmap", "on": "unmap", "off": "off", "ignore": "off"}
"""What may be said, QEMU's words among it, and what it means."""
BLOCK_SIZES = (512, 1024, 2048, 4096)
QUEUES_MAX = 16


KINDS = {
    "path": types.PATH,
    "readonly": types.FLAG,
    "format": types.TEXT,
    "serial": types.TEXT,
    "cache": types.TEXT,
    "queues": types.WHOLE,
    "snapshot": types.FLAG,
    "werror": types.TEXT,
    "discard": types.TEXT,
    "data_file": types.PATH,
    "logical_block_size": types.WHOLE,
    "physical_block_size": types.WHOLE,
    "bps": types.RATE,
    "burst": types.RATE,
    "iops": types.RATE,
    "iops_burst": types.RATE,
}


class Drive:
    """One disk's configuration, checked before anything is opened.

    Args:
        path: the image.
        readonly: the guest may not write.
        format: one of FORMATS; empty: raw, unless the file's first bytes say otherwise, which is
            refused (a guest can write what it likes at the beginning of a raw disk).
        serial: up to 20 ASCII characters.
        cache: `writeback`, `none` (O_DIRECT) or `unsafe` (flushes are not carried out).
        queues: request queues, 1 to 16.
        snapshot: the image is only read; what the guest writes goes with the machine.
        werror: what happens when there is no space left for a write: `report` it to the guest, or
            `stop`: the machine is paused, and does it again when it goes on.
        discard: `unmap`: the space of what the guest discards goes back to the host; `off`: the
            image keeps its space, and the guest is not offered discards.
        backing: the files that the image's header names as its backing file, that one's, and so
            on; a header's word alone does not have them opened.
        data_file: the same for the file with a qcow2 image's data, or with a VMDK descriptor's
            extents (or their directory).
        logical_block_size: bytes of the smallest request a guest makes: 512, 1024, 2048 or 4096.
        physical_block_size: bytes that the guest is told to keep to where it can: one of those, and
            at least the logical one; 0: 4096.
        bps, iops: bytes and requests a second, both directions together: numbers, or text as
            `10M`; 0: no limit.
        burst, iops_burst: what may come at once after a pause; 0: a tenth of a second's worth.

    Attributes:
        rate: the limits; None where there are none.
        inside: the image is a file in a directory that others may have written: `path` is not
            followed if it is a symbolic link.
    """

    __slots__ = (
        "backing",
        "bps",
        "burst",
        "cache",
        "data_file",
        "discard",
        "format",
        "inside",
        "iops",
        "iops_burst",
        "logical_block_size",
        "path",
        "physical_block_size",
        "queues",
        "rate",
        "readonly",
        "serial",
        "snapshot",
        "werror",
    )

    @types.known_keywords
    def __init__(
        self,
        path: str | PathLike[str],
        *,
        readonly: bool = False,
        format: str = "",
        serial: str = "",
        cache: str = "writeback",
        queues: int = 1,
        snapshot: bool = False,
        werror: str = "report",
        discard: str = "unmap",
        backing: str | Sequence[str] = (),
        data_file: str = "",
        logical_block_size: int = 512,
        physical_block_size: int = 0,
        bps: int | str = 0,
        burst: int | str = 0,
        iops: int | str = 0,
        iops_burst: int | str = 0,
    ) -> None:
        if "\0" in str(path):
            raise UsageError(f"--drive {str(path)!r} has a NUL character in it")
        types.check(locals(), KINDS, f"--drive {path}: ")
        if not isinstance(backing, (str, PathLike)):
            backing = types.listed("backing", backing, types.PATH)
        self.path = str(path)
        self.readonly = readonly
        self.inside = False
        self.format = format
        self.serial = serial
        self.cache = cache
        self.queues = queues
        self.snapshot = snapshot
        self.werror = werror
        self.discard = DISCARDS.get(discard, discard)
        self.backing = tuple(map(str, backing if isinstance(backing, tuple) else (backing,)))
        self.data_file = str(data_file)
        self.logical_block_size = logical_block_size
        self.physical_block_size = physical_block_size
        limits = (bps, burst, iops, iops_burst)
        self.rate: Rate | None = None
        self.bps = self.burst = self.iops = self.iops_burst = 0
        if limits != (0, 0, 0, 0):
            from vmm.virtio.rate import Rate

            self.rate = Rate(f"--drive {path}", LIMITS, limits)
            self.bps, self.burst, self.iops, self.iops_burst = self.rate.numbers
        if not self.path:
            raise UsageError("--drive: no path; say --drive disk.img")
        if format == "luks":
            raise UsageError(
                f"--drive {path}: format=luks: a LUKS volume is a raw disk, which the guest itself "
                "unlocks; say format=raw, or leave format out"
            )
        if format and format not in FORMATS:
            raise UsageError(f"--drive {path}: format={format} is not one of {', '.join(FORMATS)}")
        if werror not in WERRORS:
            raise UsageError(f"--drive {path}: werror={werror} is not one of {', '.join(WERRORS)}")
        if self.discard not in ("unmap", "off"):
            raise UsageError(f"--drive {path}: discard={discard} is not one of unmap, off")
        if self.backing and format not in LAYERED:
            raise UsageError(
                f"--drive {path}: backing= goes with format={', '.join(LAYERED[:-1])} or "
                f"{LAYERED[-1]}"
            )
        if self.data_file and format not in ("qcow2", "vmdk"):
            raise UsageError(f"--drive {path}: data-file= goes with format=qcow2 or vmdk")
        self._check_blocks()
        if self.external and (0 < self.burst < self.bps or 0 < self.iops_burst < self.iops):
            raise UsageError(
                f"--drive {path}: with format={format} a burst is a second's worth at least"
            )
        if cache not in CACHES:
            raise UsageError(f"--drive {path}: cache={cache} is not one of {', '.join(CACHES)}")
        if len(serial) > 20 or not serial.isascii() or not serial.isprintable():
            raise UsageError(f"--drive {path}: serial={serial!r} is not up to 20 ASCII characters")
        if not 1 <= queues <= QUEUES_MAX:
            raise UsageError(f"--drive {path}: queues={queues} is not from 1 to {QUEUES_MAX}")

    def _check_blocks(self) -> None:
        logical, physical = self.logical_block_size, self.physical_block_size
        for name, size in (("logical", logical), ("physical", physical or 4096)):
            if size not in BLOCK_SIZES:
                raise UsageError(
                    f"--drive {self.path}: {name}-block-size={size} is not one of "
                    f"{', '.join(map(str, BLOCK_SIZES))}"
                )
        if 0 < physical < logical:
            raise UsageError(
                f"--drive {self.path}: physical-block-size={physical} is less than "
                f"logical-block-size={logical}"
            )

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.__slots__)
        return f"Drive({values})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Drive) and all(
            getattr(self, name) == getattr(other, name) for name in self.__slots__
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def parse(cls, text: str) -> Drive:
        """From the command line. A comma in the path is written twice, as in QEMU."""
        words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
        values: dict[str, str] = {}
        backing: list[str] = []
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if key == "backing" and equals:
                if not value:
                    raise UsageError(f"--drive {text}: nothing after backing=")
                backing.append(value)
                continue
            if key in FLAGS:
                if value not in ("", "on", "off"):
                    raise UsageError(f"--drive {text}: {key}={value} is not on or off")
            elif key not in KEYS + LIMITS or not equals:
                raise UsageError(
                    f"--drive {text}: {word!r} is not one of {', '.join(FLAGS)}, "
                    f"{'=, '.join(KEYS + LIMITS)}="
                )
            if key in FLAGS:
                values[key] = value
            else:
                put_once(values, key, value, f"--drive {text}")
        queues = values.get("queues", "1")
        if not (queues.isascii() and queues.isdecimal()) or len(queues) > 4:
            raise UsageError(f"--drive {text}: queues={queues} is not from 1 to {QUEUES_MAX}")
        sizes = []
        for key, default in (("logical-block-size", "512"), ("physical-block-size", "0")):
            value = values.get(key, default)
            if value != default and value not in map(str, BLOCK_SIZES):
                raise UsageError(
                    f"--drive {text}: {key}={value} is not one of "
                    f"{', '.join(map(str, BLOCK_SIZES))}"
                )
            sizes.append(int(value))
        return cls(
            words[0],
            discard=values.get("discard", "unmap"),
            backing=backing,
            data_file=values.get("data-file", ""),
            logical_block_size=sizes[0],
            physical_block_size=sizes[1],
            readonly=values.get("readonly", "off") != "off",
            snapshot=values.get("snapshot", "off") != "off",
            werror=values.get("werror", "report"),
            bps=values.get("bps", 0),
            burst=values.get("burst", 0),
            iops=values.get("iops", 0),
            iops_burst=values.get("iops-burst", 0),
            format=values.get("format", ""),
            serial=values.get("serial", ""),
            cache=values.get("cache", "writeback"),
            queues=int(queues),
        )

    def from_directory(self, directory: str) -> Drive:
        """The same drive, its relative paths taken from `directory`."""
        import copy
        import os

        made = copy.copy(self)
        made.path = os.path.join(directory, self.path)
        made.backing = tuple(os.path.join(directory, path) for path in self.backing)
        if self.data_file:
            made.data_file = os.path.join(directory, self.data_file)
        return made

    @property
    def foreign(self) -> bool:
        """Its format is one that qemu-storage-daemon reads and writes."""
        return self.format not in ("", "raw")

    @property
    def external(self) -> bool:
        """Another process serves the guest's queues, so guest memory must be shared. With what such
        a process does not know (a serial number, for one) this process serves them."""
        ours = self.serial or self.snapshot or self.werror == "stop" or self.discard == "off"
        sizes = self.logical_block_size != 512 or self.physical_block_size
        return self.foreign and not ours and not sizes

    def open(self, number: int) -> VirtioDevice:
        """The device, with its image open and locked. Raises UsageError, HostError."""
        if self.external:
            from vmm.block.storage_daemon import open_disk

            return open_disk(self, f"blk{number}")
        from vmm.virtio.blk import Block

        base = self._image()
        image: RawImage | NbdImage | Overlay = base
        try:
            if image.size % self.logical_block_size:
                raise UsageError(
                    f"--drive {self.path}: {image.size} bytes is not whole blocks of "
                    f"logical-block-size={self.logical_block_size}"
                )
            if self.snapshot and not self.readonly:
                from vmm.block.overlay import Overlay

                image = Overlay(base)
        except BaseException:
            image.close()
            raise
        disk = Block(
            image,
            serial=self.serial,
            queues=self.queues,
            stop_when_full=self.werror == "stop",
            discard=self.discard != "off",
            block_size=self.logical_block_size,
            physical_size=self.physical_block_size or 4096,
            name=f"blk{number}",
        )
        if self.rate:
            self.rate.apply(disk.limit)
        if self.foreign:
            from vmm.block.nbd import NbdImage

            assert isinstance(base, NbdImage)
            server, session = base, base.session

            def gone() -> None:
                if server.lost(session):
                    disk.complain(
                        f"{self.path}: {server.why_gone()}; the guest gets I/O errors from now on"
                    )

            disk.peers = [(server.peer_fd, gone)]
        return disk

    def _image(self) -> RawImage | NbdImage:
        readonly = self.readonly or self.snapshot
        if self.foreign:
            from vmm.block.storage_daemon import open_image

            return open_image(self)
        from vmm.block.raw import RawImage

        return RawImage(
            self.path,
            readonly=readonly,
            cache=self.cache,
            format=self.format,
            discard=self.discard,
            follow=not self.inside,
        )


def check_once(drives: Sequence[Drive], *, look: bool = True) -> None:
    """UsageError where two of `drives` are one image and one writes to it: by whatever names, or,
    without `look`, by one name, and no file is looked at."""
    import os
    import stat

    found: dict[object, Drive] = {}
    for drive in drives:
        key: object = os.path.normpath(drive.path)
        if look:
            try:
                info = os.stat(drive.path)
            except OSError:
                continue  # whoever opens it tells of it
            device = stat.S_ISBLK(info.st_mode)
            key = info.st_rdev if device else (info.st_dev, info.st_ino)
        other = found.setdefault(key, drive)
        kept = all(each.readonly or each.snapshot for each in (drive, other))
        if other is not drive and not kept:
            same = "given twice" if drive.path == other.path else f"the image of {other.path} too"
            raise UsageError(
                f"--drive {drive.path}: {same}; two disks that write to one image destroy it: "
                "give each readonly or snapshot, or one of them a copy"
            )
