/* The network: frames of size=N bytes for milliseconds=N, at most depth=N in flight.
 *
 * receive=0: sends them. Frames longer than an Ethernet frame are TCP segments for the host to cut
 * (HOST_TSO4). receive=1: has a program on the host send them (../flood.c): a frame of type
 * 0x88b5 asks for `batch` frames of `size` bytes, so that no more than `depth` are on their way. */

#include "guest.h"

#define F_CSUM (1 << 0)
#define F_GUEST_CSUM (1 << 1)
#define F_GUEST_TSO4 (1 << 7)
#define F_HOST_TSO4 (1 << 11)
#define F_MRG_RXBUF (1 << 15)
#define RX 0
#define TX 1
#define HEADERS (14 + 20 + 20) /* Ethernet, IP, TCP */
#define SEGMENT 1448
#define FRAME_MAX 65550
#define TYPE_CREDIT 0x88b5 /* local experiments (IEEE 802) */
#define WARM_UP 20         /* milliseconds */
#define STALL 50           /* milliseconds without a frame: it is lost, ask again */
#define PIECE 32768        /* of a large frame in one descriptor, as Linux has it */
#define CREDITS 64

struct header { /* struct virtio_net_hdr */
    u8 flags, gso_type;
    u16 hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

static struct frame {
    struct desc table[4];
    struct header header;
    u8 bytes[60];
} __attribute__((aligned(256))) frames[QUEUE_SIZE];

static struct device device;
static struct queue rx, tx;
static u64 size, depth, warm, length, start, done;
static u8 mac[6];

static void put16(u8 *at, u32 value)
{
    at[0] = value >> 8;
    at[1] = value;
}

/* The Ethernet, IP and TCP headers of a frame of `size` bytes, to a station that is nobody. */
static void write_headers(u8 *at)
{
    static const u8 nobody[] = {2, 0xde, 0xad, 0, 0, 1};
    for (int i = 0; i < 6; i++) {
        at[i] = nobody[i];
        at[6 + i] = mac[i];
    }
    put16(at + 12, 0x0800);
    u8 *ip = at + 14;
    ip[0] = 0x45;
    put16(ip + 2, size - 14);
    ip[8] = 64;
    ip[9] = 6;
    ip[12] = 10, ip[15] = 2, ip[16] = 10, ip[19] = 1;
    u32 sum = 0;
    for (int i = 0; i < 20; i += 2)
        sum += ip[i] << 8 | ip[i + 1];
    sum = (sum & 0xffff) + (sum >> 16);
    put16(ip + 10, ~(sum + (sum >> 16)) & 0xffff);
    put16(ip + 20, 1000);
    put16(ip + 22, 2000);
    ip[32] = 0x50;
    ip[33] = 0x10;
}

static int over(u64 now)
{
    if (!start && now >= warm) {
        start = now;
        done = rx.notifies = tx.notifies = 0;
    }
    if (!start || now - start < length || done < depth)
        return 0;
    length = now - start;
    return 1;
}

/* --- sending --- */

static void prepare_frame(u64 slot)
{
    struct frame *frame = &frames[slot];
    u8 *rest = (u8 *)BUFFERS + slot * 65536;

    frame->header = (struct header){0};
    if (size <= 1514) { /* as one piece, header and all */
        for (u64 i = 0; i < 12; i++)
            rest[i] = 0;
        write_headers(rest + 12);
        tx.desc[slot] = (struct desc){(u64)rest, 12 + size, 0, 0};
        return;
    }
    frame->header = (struct header){1, 1, HEADERS, SEGMENT, 34, 16, 0};
    write_headers(frame->bytes);
    frame->table[0] = (struct desc){(u64)&frame->header, 12 + HEADERS, DESC_F_NEXT, 1};
    u64 left = size - HEADERS;
    int last = 0;
    while (left) {
        u64 part = left < PIECE ? left : PIECE;
        for (u64 at = 0; at < part; at += 4096)
            *(volatile u64 *)(rest + at) = at;
        left -= part;
        last++;
        frame->table[last] = (struct desc){(u64)rest, part, left ? DESC_F_NEXT : 0, last + 1};
        rest += part;
    }
    tx.desc[slot] = (struct desc){(u64)frame->table, 16 * (last + 1), DESC_F_INDIRECT, 0};
}

static void transmit(void)
{
    u64 in_flight = depth, sent = depth;
    int ending = 0;
    for (u64 slot = 0; slot < depth; slot++) {
        prepare_frame(slot);
        add(&tx, slot);
    }
    publish(&tx);
    do {
        u32 head, written, got = 0;
        while (take(&tx, &head, &written)) {
            if (head >= depth)
                failed("a frame came back that was not given");
            got++;
            if (ending)
                in_flight--;
            else {
                done++;
                sent++;
                add(&tx, head);
            }
        }
        if (got)
            publish(&tx);
        else
            pause();
        if (!ending)
            ending = over(ticks());
    } while (!ending || in_flight);
    result("sent", sent); /* in all, the warm-up's too */
}

/* --- receiving --- */

static u64 buffer_size, buffers, batch, credits;

static void *buffer(u32 number) { return (void *)(BUFFERS + number * buffer_size); }

static void give_credit(void)
{
    u32 head, written;
    while (take(&tx, &head, &written))
        ;
    struct frame *frame = &frames[credits % CREDITS];
    frame->header = (struct header){0};
    for (int i = 0; i < 6; i++) {
        frame->bytes[i] = 0xff;
        frame->bytes[6 + i] = mac[i];
    }
    put16(frame->bytes + 12, TYPE_CREDIT);
    put16(frame->bytes + 14, batch);
    put16(frame->bytes + 16, size >> 16); /* 32 bits */
    put16(frame->bytes + 18, size);
    tx.desc[credits % CREDITS] = (struct desc){(u64)&frame->header, 12 + 60, 0, 0};
    add(&tx, credits++ % CREDITS);
    publish(&tx);
}

/* One frame is in the buffer `head` and perhaps in more: whether it is one of those asked for. */
static int take_frame(u32 head, u32 written)
{
    const struct header *header = buffer(head);
    const u8 *bytes = (const u8 *)(header + 1);
    u32 count = header->num_buffers, whole = written;
    if (!count)
        failed("a frame in no buffers");
    int wanted = bytes[12] == 8 && bytes[13] == 0;
    for (add(&rx, head); --count; add(&rx, head)) {
        while (!take(&rx, &head, &written)) /* 5.1.6.4: they are made used together */
            pause();
        if (head >= buffers)
            failed("a buffer came back that was not given");
        whole += written;
    }
    return wanted && whole == 12 + size;
}

static void receive(void)
{
    buffer_size = size > 1514 ? 4096 : 1536;
    buffers = rx.size;
    batch = depth / 4 ? depth / 4 : 1;
    credits = 0;
    for (u32 number = 0; number < buffers; number++) {
        *(volatile u64 *)buffer(number) = 0;
        rx.desc[number] = (struct desc){(u64)buffer(number), buffer_size, DESC_F_WRITE, 0};
        add(&rx, number);
    }
    publish(&rx);
    for (u64 i = 0; i < depth / batch; i++)
        give_credit();
    u64 pending = 0, lost = 0, strays = 0, last = ticks();
    for (;;) {
        u32 head, written;
        int got = 0;
        while (take(&rx, &head, &written)) {
            if (head >= buffers)
                failed("a buffer came back that was not given");
            got = 1;
            if (!take_frame(head, written)) {
                strays++;
                continue;
            }
            done++;
            if (++pending == batch) {
                pending = 0;
                give_credit();
            }
        }
        u64 now = ticks();
        if (over(now))
            break;
        if (got) {
            publish(&rx);
            last = now;
        } else if (nanoseconds(now - last) > STALL * 1000000ull) {
            if (++lost == 100)
                failed("frames asked for do not come");
            last = now;
            give_credit();
        } else
            pause();
    }
    for (u32 head, written; tx.seen != tx.added;) /* have those that ask sent, too */
        if (!take(&tx, &head, &written))
            pause();
    result("sent", credits);
    result("stalls", lost);
    result("strays", strays);
}

void measure_net(void)
{
    int receiving = argument("receive", 0);
    device = (struct device){0};
    rx = tx = (struct queue){0};
    start = done = 0;
    size = argument("size", 1514);
    depth = argument("depth", 64);
    if (size < HEADERS || size > FRAME_MAX || !depth || depth > QUEUE_SIZE / 2)
        failed("a size or depth that is too small or too large");
    find_device(&device, 1);
    negotiate(&device, F_EVENT_IDX | F_INDIRECT_DESC | F_CSUM | F_GUEST_CSUM | F_GUEST_TSO4 |
                           F_HOST_TSO4 | F_MRG_RXBUF);
    if (!(device.features & F_MRG_RXBUF) || !(device.features & F_INDIRECT_DESC))
        failed("a device without MRG_RXBUF or INDIRECT_DESC");
    if (size > 1514 && !(device.features & F_HOST_TSO4))
        failed("a network that takes no large frames");
    for (int i = 0; i < 6; i++)
        mac[i] = device.config[i];
    make_queue(&device, &rx, RX, QUEUE_SIZE);
    make_queue(&device, &tx, TX, QUEUE_SIZE);
    driver_ok(&device);
    warm = ticks() + ticks_in(WARM_UP * 1000000ull);
    length = ticks_in(argument("milliseconds", 300) * 1000000);
    if (receiving)
        receive();
    else
        transmit();
    result("frames", done);
    result("nanoseconds", nanoseconds(length));
    result("notifies", receiving ? rx.notifies : tx.notifies);
}
