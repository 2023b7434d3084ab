/* The disk: depth=N requests of size=N bytes in flight for milliseconds=N, write=0 or 1, random=0 or 1;
 * or identify=1: requests that move no data (GET_ID), one at a time.
 *
 * The first 8 bytes of each request's data are its offset on the disk: written, or compared
 * (check=1) with what is read. */

#include "guest.h"

#define F_FLUSH (1 << 9) /* without it every write goes to the disk at once (5.2.5.2) */
#define T_IN 0
#define T_OUT 1
#define T_GET_ID 8
#define DEPTH_MAX 128
#define SAMPLES_MAX 262144
#define WARM_UP 20 /* milliseconds */

static struct device device;
static struct queue queue;
static struct request {
    struct desc table[4];
    struct {
        u32 type, reserved;
        u64 sector;
    } header;
    u64 started;
    volatile u8 status;
} __attribute__((aligned(128))) requests[DEPTH_MAX];
static u32 samples[SAMPLES_MAX];

static u64 size, span, position, seed = 88172645463325252ull;
static int is_random, is_write, check, identify;

static u64 next_offset(void)
{
    u64 blocks = span / size;
    if (is_random) {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        return seed % blocks * size;
    }
    u64 offset = position;
    position = position + 2 * size > span ? 0 : position + size;
    return offset;
}

static u8 *data(u64 slot) { return (u8 *)BUFFERS + slot * size; }

static void prepare(u64 slot)
{
    struct request *request = &requests[slot];
    request->table[0] = (struct desc){(u64)&request->header, 16, DESC_F_NEXT, 1};
    request->table[1] =
        (struct desc){(u64)data(slot), identify ? 20 : size, DESC_F_NEXT | (is_write ? 0 : DESC_F_WRITE), 2};
    request->table[2] = (struct desc){(u64)&request->status, 1, DESC_F_WRITE, 0};
    request->header.type = identify ? T_GET_ID : is_write ? T_OUT : T_IN;
    if (device.features & F_INDIRECT_DESC) {
        queue.desc[slot] = (struct desc){(u64)request->table, 48, DESC_F_INDIRECT, 0};
        return;
    }
    for (int i = 0; i < 3; i++) {
        struct desc desc = request->table[i];
        desc.next = 3 * slot + i + 1;
        queue.desc[3 * slot + i] = desc;
    }
}

static void submit(u64 slot)
{
    struct request *request = &requests[slot];
    u64 offset = identify ? 0 : next_offset();
    request->header.sector = offset / 512;
    request->status = 0xff;
    if (is_write)
        *(volatile u64 *)data(slot) = offset;
    request->started = ticks();
    add(&queue, device.features & F_INDIRECT_DESC ? slot : 3 * slot);
}

static void complete(u64 slot, u32 written)
{
    struct request *request = &requests[slot];
    if (request->status)
        failed("a request came back with an error");
    if (written != (identify ? 21 : is_write ? 1 : size + 1))
        failed("a request came back with another length");
    if (check && *(volatile u64 *)data(slot) != request->header.sector * 512)
        failed("what was read is not what is there");
}

void measure_blk(void)
{
    u64 depth = argument("depth", 1);
    u64 features = F_EVENT_IDX | F_INDIRECT_DESC;

    device = (struct device){0};
    queue = (struct queue){0};
    position = 0;
    size = argument("size", 4096);
    is_write = argument("write", 0);
    is_random = argument("random", 0);
    identify = argument("identify", 0);
    check = argument("check", 0) && !is_write && !identify;
    find_device(&device, 2);
    negotiate(&device, F_FLUSH | (argument("plain", 0) ? 0 : features));
    make_queue(&device, &queue, 0, QUEUE_SIZE);
    span = config64(&device, 0) * 512;
    if (argument("span", 0) && argument("span", 0) < span)
        span = argument("span", 0);
    u64 most = device.features & F_INDIRECT_DESC ? queue.size : queue.size / 3;
    if (!depth || depth > DEPTH_MAX || depth > most || depth * size > BUFFERS_SIZE || size > span)
        failed("a depth or size that is too large");
    for (u64 slot = 0; slot < depth; slot++) {
        prepare(slot);
        for (u64 at = 0; at < size; at += 4096) /* have it there before it is timed */
            *(volatile u64 *)(data(slot) + at) = 0;
    }
    driver_ok(&device);

    u64 warm = ticks() + ticks_in(WARM_UP * 1000000ull);
    u64 length = ticks_in(argument("milliseconds", 300) * 1000000);
    u64 start = 0, now, done = 0, taken = 0, in_flight = depth;
    int over = 0;
    for (u64 slot = 0; slot < depth; slot++)
        submit(slot);
    publish(&queue);
    do {
        u32 head, written, got = 0;
        while (take(&queue, &head, &written)) {
            u64 slot = device.features & F_INDIRECT_DESC ? head : head / 3;
            if (slot >= depth)
                failed("a chain came back that was not given");
            complete(slot, written);
            got++;
            if (start && !over) {
                done++;
                if (taken < SAMPLES_MAX)
                    samples[taken++] = nanoseconds(ticks() - requests[slot].started);
            }
            if (over)
                in_flight--;
            else
                submit(slot);
        }
        if (got)
            publish(&queue);
        else
            pause();
        now = ticks();
        if (!start && now >= warm) {
            start = now;
            queue.notifies = 0;
        }
        if (start && !over && now - start >= length && done >= depth) {
            over = 1;
            length = now - start;
        }
    } while (!over || in_flight);

    result("requests", done);
    result("nanoseconds", nanoseconds(length));
    result("notifies", queue.notifies);
    result("median", percentile(samples, taken, 50));
    result("p99", percentile(samples, taken, 99));
}
