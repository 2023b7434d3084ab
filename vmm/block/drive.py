"""A disk as a person says it: `--drive PATH[,readonly][,format=F][,serial=S][,cache=C]...`."""

from __future__ import annotations

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.block.overlay import Overlay
    from vmm.virtio.device import VirtioDevice
    from vmm.virtio.rate import Rate

FLAGS = ("readonly", "snapshot")
KEYS = ("format", "serial", "cache", "queues", "werror")
LIMITS = ("bps", "burst", "iops", "iops-burst")
"""See `vmm.virtio.rate`."""
FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc", "qed", "parallels")
"""The last seven by qemu-storage-daemon."""
CACHES = ("writeback", "none", "unsafe")
WERRORS = ("report", "stop")
QUEUES_MAX = 16


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
        bps, iops: bytes and requests a second, both directions together: numbers, or text as
            `10M`; 0: no limit.
        burst, iops_burst: what may come at once after a pause; 0: a tenth of a second's worth.

    Attributes:
        rate: the limits; None where there are none.
    """

    __slots__ = (
        "bps",
        "burst",
        "cache",
        "format",
        "iops",
        "iops_burst",
        "path",
        "queues",
        "rate",
        "readonly",
        "serial",
        "snapshot",
        "werror",
    )

    def __init__(
        self,
        path: str,
        *,
        readonly: bool = False,
        format: str = "",
        serial: str = "",
        cache: str = "writeback",
        queues: int = 1,
        snapshot: bool = False,
        werror: str = "report",
        bps: int | str = 0,
        burst: int | str = 0,
        iops: int | str = 0,
        iops_burst: int | str = 0,
    ) -> None:
        self.path = str(path)
        self.readonly = readonly
        self.format = format
        self.serial = serial
        self.cache = cache
        self.queues = queues
        self.snapshot = snapshot
        self.werror = werror
        limits = (bps, burst, iops, iops_burst)
        self.rate: Rate | None = None
        self.bps = self.burst = self.iops = self.iops_burst = 0
        if limits != (0, 0, 0, 0):
            from vmm.virtio.rate import Rate

            self.rate = Rate(f"--drive {path}", LIMITS, limits)
            self.bps, self.burst, self.iops, self.iops_burst = self.rate.numbers
        if not self.path:
            raise UsageError("--drive: no path; say --drive disk.img")
        if "\0" in self.path:
            raise UsageError(f"--drive {self.path!r} has a NUL character in it")
        if format and format not in FORMATS:
            raise UsageError(f"--drive {path}: format={format} is not one of {', '.join(FORMATS)}")
        if werror not in WERRORS:
            raise UsageError(f"--drive {path}: werror={werror} is not one of {', '.join(WERRORS)}")
        if self.external:
            given = (("serial=", serial), ("snapshot", snapshot), ("werror=stop", werror == "stop"))
            for name, value in given:
                if value:
                    raise UsageError(f"--drive {path}: {name} works with format=raw only")
            if 0 < self.burst < self.bps or 0 < self.iops_burst < self.iops:
                raise UsageError(
                    f"--drive {path}: with format={format} a burst is a second's worth at least"
                )
        if cache not in CACHES:
            raise UsageError(f"--drive {path}: cache={cache} is not one of {', '.join(CACHES)}")
        if len(serial) > 20 or not serial.isascii() or not serial.isprintable():
            raise UsageError(f"--drive {path}: serial={serial!r} is not up to 20 ASCII characters")
        if not 1 <= queues <= QUEUES_MAX:
            raise UsageError(f"--drive {path}: queues={queues} is not from 1 to {QUEUES_MAX}")

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
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if key in FLAGS:
                if value not in ("", "on", "off"):
                    raise UsageError(f"--drive {text}: {key}={value} is not on or off")
            elif key not in KEYS + LIMITS or not equals:
                raise UsageError(
                    f"--drive {text}: {word!r} is not one of {', '.join(FLAGS)}, "
                    f"{'=, '.join(KEYS + LIMITS)}="
                )
            values[key] = value
        queues = values.get("queues", "1")
        if not queues.isdecimal() or len(queues) > 4:
            raise UsageError(f"--drive {text}: queues={queues} is not from 1 to {QUEUES_MAX}")
        return cls(
            words[0],
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

    @property
    def external(self) -> bool:
        """Another process serves it, so guest memory must be shared."""
        return self.format not in ("", "raw")

    def open(self, number: int) -> VirtioDevice:
        """The device, with its image open and locked. Raises UsageError, HostError."""
        if self.external:
            from vmm.block.storage_daemon import open_disk

            return open_disk(self, f"blk{number}")
        from vmm.block.raw import RawImage, probe
        from vmm.virtio.blk import Block

        keep = self.readonly or self.snapshot
        base = RawImage(self.path, readonly=keep, cache=self.cache)
        image: RawImage | Overlay = base
        try:
            found = "raw" if self.format else probe(self.path)
            if found != "raw":
                raise UsageError(
                    f"--drive {self.path}: this looks like a {found} image; say "
                    f"{self.path},format={found} (or format=raw, if it only looks so)"
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
            name=f"blk{number}",
        )
        if self.rate:
            self.rate.apply(disk.limit)
        return disk
