/* A guest for tests that kill its monitor: every virtio-mmio device has a driver that works, and
 * each disk gets numbered blocks, one after the other, flushed. Started by PVH: 32-bit protected
 * mode, flat, no interrupts. It reads its command line:
 *
 *   from=N     blocks up to N were acknowledged once: the last BLOCKS of them are looked for first
 *   until=N    power off after block N
 *
 * and says on the serial port: "started", "verified" (or "lost DISK NUMBER"), "ack NUMBER" each.
 */
#include <stdint.h>

#define PORT_SERIAL 0x3f8
#define PORT_ACPI 0x600
/* vmm/layout.py */
#define CMDLINE ((const char *)0x20000)
#define VIRTIO_MMIO_BASE 0xd0000000
#define WINDOWS 13
#define QUEUE 8
#define BLOCK 4096
#define BLOCKS 64
#define NEXT 1
#define WRITE 2
#define ID_NET 1
#define ID_BLK 2
#define ID_VSOCK 19
#define ID_FS 26
#define PORT_VSOCK 1024

struct desc { uint64_t addr; uint32_t len; uint16_t flags, next; };
struct avail { uint16_t flags, idx, ring[QUEUE]; };
struct used { uint16_t flags, idx; struct { uint32_t id, len; } ring[QUEUE]; };
struct queue {
    struct desc desc[QUEUE];
    struct avail avail;
    struct used used __attribute__((aligned(4)));
} __attribute__((aligned(64)));

static struct queue queues[WINDOWS][8];
static uint8_t data[2][BLOCK] __attribute__((aligned(4096)));
static uint8_t ins[WINDOWS][4096], outs[WINDOWS][256], status;
__attribute__((used)) static uint8_t stack[8192];
static volatile uint32_t *disks[4];
static int disk_windows[4], disk_count;

static void outb(uint16_t port, uint8_t value)
{
    __asm__ volatile("outb %0, %1" : : "a"(value), "Nd"(port));
}

static void say(const char *text)
{
    while (*text)
        outb(PORT_SERIAL, *text++);
}

static void say_number(const char *text, uint32_t number)
{
    char digits[11], *at = digits + 10;

    *at = 0;
    do
        *--at = '0' + number % 10;
    while (number /= 10);
    say(text);
    say(at);
}

static uint32_t option(const char *name)
{
    uint32_t value = 0;

    for (const char *at = CMDLINE; *at; at++) {
        const char *here = at, *wanted = name;

        while (*wanted && *here == *wanted)
            here++, wanted++;
        if (!*wanted)
            while (*here >= '0' && *here <= '9')
                value = value * 10 + *here++ - '0';
    }
    return value;
}

static void off(void)
{
    outb(PORT_ACPI, 5 << 2 | 1 << 5);
    for (;;)
        __asm__ volatile("hlt");
}

static volatile uint32_t *window(int number)
{
    return (volatile uint32_t *)(VIRTIO_MMIO_BASE + 0x1000 * number);
}

/* From reset to DRIVER_OK (virtio 1.2, 3.1.1), without any feature but VERSION_1. */
static void start(volatile uint32_t *regs, struct queue *queue)
{
    regs[0x70 / 4] = 0;
    regs[0x70 / 4] = 1;
    regs[0x70 / 4] = 3;
    regs[0x24 / 4] = 0;
    regs[0x20 / 4] = 0;
    regs[0x24 / 4] = 1;
    regs[0x20 / 4] = 1;
    regs[0x70 / 4] = 11;
    for (int index = 0; index < 8; index++, queue++) {
        regs[0x30 / 4] = index;
        if (!regs[0x34 / 4])
            break;
        regs[0x38 / 4] = QUEUE;
        regs[0x80 / 4] = (uint32_t)queue->desc;
        regs[0x84 / 4] = 0;
        regs[0x90 / 4] = (uint32_t)&queue->avail;
        regs[0x94 / 4] = 0;
        regs[0xa0 / 4] = (uint32_t)&queue->used;
        regs[0xa4 / 4] = 0;
        queue->avail.flags = 1;
        regs[0x44 / 4] = 1;
    }
    regs[0x70 / 4] = 15;
}

static void give(struct desc *desc, const void *at, uint32_t len, uint16_t flags, uint16_t next)
{
    desc->addr = (uint32_t)at;
    desc->len = len;
    desc->flags = flags;
    desc->next = next;
}

static void make_available(volatile uint32_t *regs, int index, struct queue *queue)
{
    volatile struct avail *avail = &queue->avail;

    avail->ring[avail->idx % QUEUE] = 0;
    __asm__ volatile("" : : : "memory");
    avail->idx++;
    __asm__ volatile("" : : : "memory");
    regs[0x50 / 4] = index;
}

static void wait_used(struct queue *queue)
{
    volatile struct used *used = &queue->used;

    while (used->idx != queue->avail.idx)
        __asm__ volatile("pause");
    __asm__ volatile("" : : : "memory");
}

static void blk(int disk, uint32_t kind, uint32_t block, void *at)
{
    static struct { uint32_t kind, reserved; uint64_t sector; } head;
    struct queue *queue = &queues[disk_windows[disk]][0];

    head.kind = kind;
    head.sector = block * (BLOCK / 512);
    status = 0xff;
    give(&queue->desc[0], &head, sizeof head, NEXT, at ? 1 : 2);
    give(&queue->desc[1], at, BLOCK, NEXT | (kind ? 0 : WRITE), 2);
    give(&queue->desc[2], &status, 1, WRITE, 0);
    make_available(disks[disk], 0, queue);
    wait_used(queue);
    if (*(volatile uint8_t *)&status) {
        say_number("disk error ", disk);
        off();
    }
}

static void fill(uint32_t *at, uint32_t value)
{
    uint32_t count = BLOCK / 4;

    __asm__ volatile("rep stosl" : "+D"(at), "+c"(count) : "a"(value) : "memory");
}

static void verify(uint32_t last)
{
    uint32_t first = last > BLOCKS - 2 ? last - (BLOCKS - 2) : 1;

    for (int disk = 0; disk < disk_count; disk++)
        for (uint32_t number = first; number <= last; number++) {
            blk(disk, 0, number % BLOCKS, data[0]);
            for (int at = 0; at < BLOCK; at += 512) {
                uint32_t found = *(uint32_t *)(data[0] + at);

                /* Or of a later round: nobody heard of it before the end. */
                if (found < number || (found - number) % BLOCKS) {
                    say_number("lost ", disk);
                    say_number(" ", number);
                    say("\n");
                    off();
                }
            }
        }
}

/* A sign of life from each kind of device that is not a disk. */
static void greet(int number, volatile uint32_t *regs, uint32_t id)
{
    struct queue *queue = queues[number];
    uint8_t *in = ins[number], *out = outs[number];
    uint32_t *words = (uint32_t *)out;

    if (id == ID_NET) {
        give(&queue[0].desc[0], in, sizeof ins[0], WRITE, 0);
        make_available(regs, 0, &queue[0]);
        for (int at = 12; at < 24; at++) /* a broadcast frame, after the header */
            out[at] = 0xff;
        give(&queue[1].desc[0], out, 12 + 60, 0, 0);
        make_available(regs, 1, &queue[1]);
        wait_used(&queue[1]);
    } else if (id == ID_VSOCK) { /* a request to connect to the host */
        words[0] = regs[0x100 / 4];
        words[2] = 2;
        words[4] = 5;
        words[5] = PORT_VSOCK;
        words[7] = 1 << 16 | 1;
        words[9] = 65536;
        give(&queue[0].desc[0], in, sizeof ins[0], WRITE, 0);
        make_available(regs, 0, &queue[0]);
        give(&queue[1].desc[0], out, 44, 0, 0);
        make_available(regs, 1, &queue[1]);
        wait_used(&queue[0]);
        if (*(volatile uint16_t *)(in + 30) != 2)
            say("vsock: refused\n");
    } else if (id == ID_FS) { /* FUSE_INIT */
        words[0] = 56;
        words[1] = 26;
        words[2] = 1;
        words[10] = 7;
        words[11] = 31;
        give(&queue[1].desc[0], out, 56, NEXT, 1);
        give(&queue[1].desc[1], in, sizeof ins[0], WRITE, 0);
        make_available(regs, 1, &queue[1]);
        wait_used(&queue[1]);
        if (*(volatile uint32_t *)(in + 4))
            say("fs: error\n");
    }
}

__asm__(".pushsection .note.pvh, \"a\", @note\n"
        ".long 4, 4, 18; .asciz \"Xen\"; .long start\n"
        ".popsection\n"
        ".globl start; start: mov $stack + 8192, %esp; call run\n");

__attribute__((used)) static void run(void)
{
    uint32_t from = option("from="), until = option("until=");

    for (int number = 0; number < WINDOWS; number++) {
        volatile uint32_t *regs = window(number);
        uint32_t id = regs[0x08 / 4];

        if (regs[0] != 0x74726976 || !id)
            continue;
        start(regs, queues[number]);
        if (id == ID_BLK) {
            disks[disk_count] = regs;
            disk_windows[disk_count++] = number;
        } else
            greet(number, regs, id);
    }
    say("started\n");
    verify(from);
    say("verified\n");
    for (uint32_t number = from + 1;; number++) {
        for (int disk = 0; disk < disk_count; disk++) {
            fill((uint32_t *)data[1], number);
            blk(disk, 1, number % BLOCKS, data[1]);
        }
        for (int disk = 0; disk < disk_count; disk++)
            blk(disk, 4, 0, 0);
        say_number("ack ", number);
        say("\n");
        if (number == until)
            off();
    }
}
