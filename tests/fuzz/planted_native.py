"""Bugs of the C path (vmm/virtio/kernel) to plant, and the targets that find them.

What a second check catches as well is not here, because nothing changes without it: a chain's
length in vmm_peek is bounded three times.
"""

from __future__ import annotations

from tests.fuzz.planted import bug

PLANTED = (
    # ring.c
    bug(
        "region end", "ring.c", "rings",
        "addr - region->gpa <= region->size - length",
        "addr - region->gpa <= region->size",
    ),
    bug(
        "region overflow", "ring.c", "rings",
        "length <= region->size &&\n\t\t    addr - region->gpa <= region->size - length",
        "addr + length <= region->gpa + region->size",
    ),
    bug(
        "head bound", "ring.c", "rings",
        "if (at >= limit)\n\t\t\treturn -1;",
        "",
    ),
    bug(
        "head bound by one", "ring.c", "rings",
        "if (at >= limit)",
        "if (at > limit)",
    ),
    bug(
        "room", "ring.c", "frames",
        "!memory || used >= room",
        "!memory",
    ),
    bug(
        "room for a window", "ring.c", "frames",
        "!memory || used >= room",
        "!memory || used >= CHAIN_MAX",
    ),
    bug(
        "loops", "ring.c", "rings",
        "!memory || used >= room",
        "!memory",
        "++count >= limit || used + 1 >= CHAIN_MAX",
        "0",
    ),
    # disk.c
    bug(
        "header read twice", "disk.c", "rings",
        "chain->readable - 1,\n\t\t\t    header.sector * SECTOR)",
        ("chain->readable - 1,\n\t\t\t    ((volatile struct header "
         "*)chain->buffer[0].iov_base)->sector * SECTOR)"),
    ),
    # ring.c
    bug(
        "nested indirect", "ring.c", "rings",
        "if (indirect || !ring->indirect",
        "if (!ring->indirect",
    ),
    bug(
        "indirect not negotiated", "ring.c", "rings",
        "if (indirect || !ring->indirect",
        "if (indirect",
    ),
    bug(
        "indirect with next", "ring.c", "rings",
        " || desc.flags & DESC_F_NEXT || !desc.len",
        " || !desc.len",
    ),
    bug(
        "indirect length", "ring.c", "rings",
        "desc.len % 16 || ",
        "",
    ),
    bug(
        "indirect limit", "ring.c", "rings",
        "limit = desc.len / 16;",
        "limit = ring->size;",
    ),
    bug(
        "indirect table unchecked", "ring.c", "rings",
        "table = host(ring, desc.addr, desc.len);",
        "table = host(ring, desc.addr, 16);",
    ),
    bug(
        "read after write", "ring.c", "rings",
        "else if (chain->writable)\n\t\t\treturn -1;\n",
        "",
    ),
    bug(
        "zero length", "ring.c", "rings",
        "desc.len ? host(ring, desc.addr, desc.len) : NULL",
        "host(ring, desc.addr, desc.len)",
    ),
    bug(
        "descriptor read twice", "ring.c", "rings",
        "buffer[used] = (struct iovec){memory, desc.len};",
        "buffer[used] = (struct iovec){memory, *(volatile uint32_t *)(table + 16 * at + 8)};",
    ),
    bug(
        "too many available", "ring.c", "rings",
        "if ((uint32_t)ready + out > ring->size)\n\t\treturn -1;",
        "",
    ),
    bug(
        "available index", "ring.c", "rings frames requests",
        "((ring->last_avail + ahead) & (ring->size - 1))",
        "((ring->last_avail + ahead) & ring->size)",
    ),
    bug(
        "used index", "ring.c", "rings frames requests",
        "8 * (ring->next_used & (ring->size - 1))",
        "8 * (ring->next_used & ring->size)",
    ),
    bug(
        "used unmasked", "ring.c", "rings frames requests",
        "8 * (ring->next_used & (ring->size - 1))",
        "8 * (ring->next_used & 1023)",
    ),
    bug(
        "interrupt event", "ring.c", "frames",
        "(uint16_t)(new - event - 1) <",
        "(uint16_t)(new - event) <",
    ),
    bug(
        "interrupt wrap", "ring.c", "frames requests",
        "(uint16_t)(new - event - 1) < (uint16_t)(new - old)",
        "new - event - 1 < new - old",
    ),
    bug(
        "no notify asked", "ring.c", "frames",
        "store(&ring->used[0], 0);",
        ";",
    ),
    bug(
        "avail event place", "ring.c", "frames requests",
        "&ring->used[2 + 4 * ring->size]",
        "&ring->used[2 + 8 * ring->size]",
    ),
    # disk.c
    bug(
        "sector range", "disk.c", "rings requests",
        "size / SECTOR <= disk->capacity - sector",
        "size / SECTOR <= disk->capacity",
    ),
    bug(
        "sector overflow", "disk.c", "requests rings",
        "sector <= disk->capacity &&\n\t       size / SECTOR <= disk->capacity - sector",
        "sector + size / SECTOR <= disk->capacity",
    ),
    bug(
        "sector multiple", "disk.c", "requests",
        "!(size % SECTOR)",
        "1",
    ),
    bug(
        "header size", "disk.c", "rings requests",
        "chain->buffer[0].iov_len != sizeof header",
        "0",
    ),
    bug(
        "no writable part", "disk.c", "requests",
        " || !parts ||",
        " ||",
    ),
    bug(
        "status size", "disk.c", "requests",
        "into[parts - 1].iov_len != 1",
        "0",
    ),
    bug(
        "serial size", "disk.c", "requests",
        "parts == 1 && size == sizeof disk->id",
        "parts == 1",
    ),
    bug(
        "serial without a buffer", "disk.c", "rings requests",
        "parts == 1 && size == sizeof disk->id",
        "1",
    ),
    bug(
        "short read", "disk.c", "requests",
        "RWF_NOWAIT) != (ssize_t)size",
        "RWF_NOWAIT) < 0",
    ),
    bug(
        "read-only", "disk.c", "requests",
        "!disk->writable || ",
        "",
    ),
    bug(
        "batch end", "disk.c", "requests",
        "if (interrupt || done >= BATCH || bytes >= BATCH_BYTES)",
        "if (interrupt)",
    ),
    # net.c
    bug(
        "spill bound", "net.c", "frames rings",
        "size > (size_t)net->spill_size ||",
        "",
    ),
    bug(
        "spill bound by the buffers", "net.c", "frames rings",
        "size > (size_t)net->spill_size ||",
        "size > (size_t)net->spill_size + w.room ||",
    ),
    bug(
        "spill longer than it is", "net.c", "frames rings",
        "(struct iovec){net->spill, net->spill_size}",
        "(struct iovec){net->spill, net->spill_size + 64}",
    ),
    bug(
        "window compaction: none", "net.c", "frames",
        "if (w->buffers > CHAIN_MAX / 2 || w->chains == CHAIN_MAX) {",
        "if (0) {",
    ),
    bug(
        "window compaction: late", "net.c", "frames",
        "w->buffers > CHAIN_MAX / 2 || ",
        "",
    ),
    bug(
        "window compaction: buffers stay", "net.c", "frames",
        ("memmove(w->buffer, w->buffer + w->first_buffer,\n\t\t\t\t(w->buffers - "
         "w->first_buffer) * sizeof w->buffer[0]);"),
        "",
    ),
    bug(
        "window compaction: chains stay", "net.c", "frames",
        ("memmove(w->chain, w->chain + w->first_chain,\n\t\t\t\t(w->chains - "
         "w->first_chain) * sizeof w->chain[0]);"),
        "",
    ),
    bug(
        "window compaction: count of buffers", "net.c", "frames",
        "w->buffers -= w->first_buffer;",
        "",
    ),
    bug(
        "window compaction: count of chains", "net.c", "frames",
        "w->chains -= w->first_chain;",
        "",
    ),
    bug(
        "window compaction: start", "net.c", "frames",
        "w->first_buffer = w->first_chain = 0;",
        "w->first_buffer = 0;",
    ),
    bug(
        "window compaction: too few bytes", "net.c", "frames",
        "(w->buffers - w->first_buffer) * sizeof w->buffer[0]",
        "(w->buffers - w->first_buffer - 1) * sizeof w->buffer[0]",
    ),
    bug(
        "window room", "net.c", "frames",
        "CHAIN_MAX - w->buffers)",
        "CHAIN_MAX)",
    ),
    bug(
        "window of readable chains", "net.c", "rings",
        "found < 0 || chain.readable || !chain.writable",
        "found < 0",
    ),
    bug(
        "hold order", "net.c", "frames",
        "memmove(net->spill + placed, net->spill, size - placed);",
        "",
    ),
    bug(
        "spread offset", "net.c", "frames",
        "net->spill + (at - placed), part",
        "net->spill + at, part",
    ),
    bug(
        "spread bound", "net.c", "frames rings",
        "placed < size && (gather(ring, &w, size) || w.room < size)",
        "placed < size && gather(ring, &w, size)",
    ),
    bug(
        "not mergeable", "net.c", "frames",
        "(size > placed && !net->mergeable)",
        "0",
    ),
    bug(
        "filter's bytes", "net.c", "frames",
        "bad || w.buffer[w.first_buffer].iov_len < HEADER + START",
        "bad",
    ),
    bug(
        "filter's tag", "net.c", "frames",
        "if (frame[12] == 0x81 && !frame[13])\n\t\treturn 0;",
        "",
    ),
    bug(
        "smallest frame", "net.c", "frames",
        "if (size < HEADER + FRAME_MIN || size > (size_t)",
        "if (size > (size_t)",
    ),
    bug(
        "smallest frame sent", "net.c", "frames",
        "size < HEADER + FRAME_MIN || size > HEADER + FRAME_MAX",
        "size > HEADER + FRAME_MAX",
    ),
    bug(
        "largest frame sent", "net.c", "frames",
        " || size > HEADER + FRAME_MAX ||",
        " ||",
    ),
    bug(
        "number of buffers", "net.c", "frames",
        "memcpy(header + NUM_BUFFERS, &count, 2);",
        "",
    ),
    bug(
        "room of a chain", "net.c", "frames",
        "w->room -= room;",
        "w->room -= part;",
    ),
    bug(
        "bytes of a chain", "net.c", "frames rings",
        "part = size < room ? size : room;",
        "part = room;",
    ),
)  # fmt: skip
