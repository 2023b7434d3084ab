"""A disk as a person says it: `--drive PATH[,readonly][,format=F][,serial=S][,cache=C]...`."""

from __future__ import annotations

from vmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from vmm.virtio.device import VirtioDevice

KEYS = ("readonly", "format", "serial", "cache", "queues")
FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vdi", "vpc", "qed", "parallels")
"""The last seven by qemu-storage-daemon."""
CACHES = ("writeback", "none", "unsafe")
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
    """

    __slots__ = ("cache", "format", "path", "queues", "readonly", "serial")

    def __init__(
        self,
        path: str,
        *,
        readonly: bool = False,
        format: str = "",
        serial: str = "",
        cache: str = "writeback",
        queues: int = 1,
    ) -> None:
        self.path = str(path)
        self.readonly = readonly
        self.format = format
        self.serial = serial
        self.cache = cache
        self.queues = queues
        if not self.path:
            raise UsageError("--drive: no path; say --drive disk.img")
        if format and format not in FORMATS:
            raise UsageError(f"--drive {path}: format={format} is not one of {', '.join(FORMATS)}")
        if serial and self.external:
            raise UsageError(f"--drive {path}: serial= works with format=raw only")
        if cache not in CACHES:
            raise UsageError(f"--drive {path}: cache={cache} is not one of {', '.join(CACHES)}")
        if len(serial) > 20 or not serial.isascii() or not serial.isprintable():
            raise UsageError(f"--drive {path}: serial={serial!r} is not up to 20 ASCII characters")
        if not 1 <= queues <= QUEUES_MAX:
            raise UsageError(f"--drive {path}: queues={queues} is not from 1 to {QUEUES_MAX}")

    @classmethod
    def parse(cls, text: str) -> Drive:
        """From the command line. A comma in the path is written twice, as in QEMU."""
        words = [word.replace("\0", ",") for word in text.replace(",,", "\0").split(",")]
        values: dict[str, str] = {}
        for word in words[1:]:
            key, equals, value = word.partition("=")
            if key not in KEYS or (not equals and key != "readonly"):
                raise UsageError(
                    f"--drive {text}: {word!r} is not readonly, format=, serial=, cache= or queues="
                )
            values[key] = value
        if values.get("readonly", "on") not in ("", "on", "off"):
            raise UsageError(f"--drive {text}: readonly={values['readonly']} is not on or off")
        if not values.get("queues", "1").isdecimal():
            raise UsageError(f"--drive {text}: queues={values['queues']} is not a number")
        return cls(
            words[0],
            readonly="readonly" in values and values["readonly"] != "off",
            format=values.get("format", ""),
            serial=values.get("serial", ""),
            cache=values.get("cache", "writeback"),
            queues=int(values.get("queues", "1")),
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

        image = RawImage(self.path, readonly=self.readonly, cache=self.cache)
        try:
            found = "raw" if self.format else probe(self.path)
            if found != "raw":
                raise UsageError(
                    f"--drive {self.path}: this looks like a {found} image; say "
                    f"{self.path},format={found} (or format=raw, if it only looks so)"
                )
        except BaseException:
            image.close()
            raise
        return Block(image, serial=self.serial, queues=self.queues, name=f"blk{number}")
