"""Bugs of the parsers in Python to plant, and the targets that find them."""

from __future__ import annotations

from tests.fuzz.planted import bug

PLANTED = (
    bug(
        "elf: header length", "vmm/boot/elf.py", "kernel",
        "if len(head) < 52 or (len(head) < 64 and head[4] == ELFCLASS64):",
        "if len(head) < 5:",
    ),
    bug(
        "elf: program headers past the end", "vmm/boot/elf.py", "kernel",
        "if len(table) < phnum * phentsize:",
        "if len(table) > phnum * phentsize:",
    ),
    bug(
        "elf: note's length", "vmm/boot/elf.py", "kernel",
        "while at + 12 <= len(notes):",
        "while at + 8 <= len(notes):",
    ),
    bug(
        "uki: section table", "vmm/boot/uki.py", "kernel",
        "for at in range(0, len(table) - 39, 40):",
        "for at in range(0, len(table), 40):",
    ),
    bug(
        "uki: coff header", "vmm/boot/uki.py", "kernel",
        'if coff[:4] != b"PE\\0\\0" or len(coff) < 24:',
        'if coff[:4] != b"PE\\0\\0":',
    ),
    bug(
        "image: header cut short", "vmm/block/header.py", "image",
        "except (ValueError, struct.error):",
        "except ValueError:",
    ),
    bug(
        "image: descriptor's words", "vmm/block/header.py", "image",
        "if len(words) < 4 or not words[1].isdigit()",
        "if not words[1].isdigit()",
    ),
    bug(
        "wire: window", "vmm/agent/wire.py", "agent-frames",
        "if len(buffer) + self._taken[stream] + length > WINDOW:",
        "if length > WINDOW:",
    ),
    bug(
        "wire: stream's number", "vmm/agent/wire.py", "agent-frames",
        "buffer = self._buffers[stream] if stream in _OUTPUT else None",
        "buffer = self._buffers[stream] if stream != IN else None",
    ),
    bug(
        "wire: event's length", "vmm/agent/wire.py", "agent-frames",
        "if len(data) != _SIZES.get(kind, -1):",
        "if kind not in _SIZES:",
    ),
    bug(
        "wire: credit", "vmm/agent/wire.py", "agent-frames",
        "if stream != IN or credit > WINDOW - self._credit:",
        "if stream != IN:",
    ),
    bug(
        "tree: name with a slash", "vmm/agent/tree.py", "agent-tree",
        'wrong = b"/" in name or',
        "wrong =",
    ),
    bug(
        "tree: name with a NUL", "vmm/agent/tree.py", "agent-tree",
        ' or b"\\0" in name or name in',
        " or name in",
    ),
    bug(
        "tree: links that climb", "vmm/agent/tree.py", "agent-tree",
        'return up > depth or b".." in words[up:]',
        "return False",
    ),
    bug(
        "tree: target's length", "vmm/agent/tree.py", "agent-tree",
        'if b"\\0" in target:',
        "if not target:",
    ),
    bug(
        "tree: up from the root", "vmm/agent/tree.py", "agent-tree",
        "if kind == UP:\n            if not self._stack:",
        "if kind == UP:\n            if self._stack is None:",
    ),
    bug(
        "faults: bytes of all segments", "vmm/faults/wire.py", "fault-frames",
        "if len(starts) * (head + size) > SEGMENTS_MAX:",
        "if len(starts) * (head + size) > SEGMENTS_MAX << 20:",
    ),
    bug(
        "module: place of a section", "vmm/initramfs/modules.py", "module",
        "except (struct.error, IndexError, OverflowError) as error:",
        "except (struct.error, IndexError) as error:",
    ),
    bug(
        "nbd: error number", "vmm/block/nbd.py", "nbd",
        "number = error if error in errno.errorcode else errno.EIO",
        "number = error",
    ),
    bug(
        "vhost-user: answer's length", "vmm/virtio/vhost_user_wire.py", "vhost-user",
        "if length != size:",
        "if length < 0:",
    ),
    bug(
        "pages: region's end", "vmm/snapshot/uffd.py", "pages",
        "if offset + length > snapshot.memory_size or",
        "if offset > snapshot.memory_size or",
    ),
    bug(
        "pages: further descriptors", "vmm/snapshot/uffd.py", "pages",
        "for fd in more:",
        "for fd in more[1:]:",
    ),
    bug(
        "inflight: entries", "vmm/virtio/vhost_user_inflight.py", "inflight",
        "if len(data) < size:",
        "if len(data) < 0:",
    ),
    bug(
        "stream: frame's length", "vmm/net/stream.py", "stream",
        "if size > FRAME_MAX:",
        "if size > 1 << 32:",
    ),
    bug(
        "config: key of signs", "vmm/config_file.py", "config",
        'option = words[0].rstrip(":") if words else ""',
        'option = words[0].rstrip(":")',
    ),
    bug(
        "json: depth", "vmm/snapshot/plain.py", "state-text",
        "except RecursionError:",
        "except ZeroDivisionError:",
    ),
    bug(
        "json: a dict's pairs", "vmm/snapshot/plain.py", "state-text",
        "if not isinstance(pair, list) or len(pair) != 2 or",
        "if not isinstance(pair, list) or",
    ),
    bug(
        "index: runs past the end", "vmm/snapshot/index.py", "index",
        " or length > size - start:",
        ":",
    ),
    bug(
        "index: chunk's number", "vmm/snapshot/index.py", "index",
        "return before < end",
        "return True",
    ),
    bug(
        "manifest: file's name", "vmm/snapshot/manifest.py", "snapshot",
        "super().check(value, where)",
        "pass",
    ),
    bug(
        "shapes: a table's keys", "vmm/shapes.py", "snapshot",
        "if key not in value:\n",
        "if key is value:\n",
    ),
    bug(
        "kconfig: what is no gzip", "vmm/boot/kconfig.py", "kconfig",
        "except zlib.error:",
        "except ZeroDivisionError:",
    ),
    bug(
        "pci: wide reads", "vmm/pci/host.py", "pci",
        "value = 0\n        for function, register, count, shift in self._pieces(offset, size):\n"
        "            piece = (1 << 8 * count) - 1",
        "value = 0\n        for function, register, count, shift in self._pieces(offset, size):\n"
        "            piece = (1 << 8 * size) - 1",
    ),
)  # fmt: skip
