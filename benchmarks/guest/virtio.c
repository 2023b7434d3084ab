/* Devices over MMIO (virtio 1.2, section 4.2) and PCI (4.1), split rings (2.7). */

#include "guest.h"

#define ACKNOWLEDGE 1
#define DRIVER 2
#define DRIVER_OK 4
#define FEATURES_OK 8

#define MAGIC 0x74726976

/* Registers over MMIO. */
enum {
    DEVICE_ID = 0x008, DEVICE_FEATURES = 0x010, DEVICE_FEATURES_SEL = 0x014,
    DRIVER_FEATURES = 0x020, DRIVER_FEATURES_SEL = 0x024, QUEUE_SEL = 0x030, QUEUE_NUM_MAX = 0x034,
    QUEUE_NUM = 0x038, QUEUE_READY = 0x044, QUEUE_NOTIFY = 0x050, STATUS = 0x070, QUEUE_DESC = 0x080,
    QUEUE_DRIVER = 0x090, QUEUE_DEVICE = 0x0a0, CONFIG = 0x100,
};

/* struct virtio_pci_common_cfg. */
enum {
    C_DEVICE_FEATURE_SELECT = 0, C_DEVICE_FEATURE = 4, C_DRIVER_FEATURE_SELECT = 8,
    C_DRIVER_FEATURE = 12, C_STATUS = 20, C_QUEUE_SELECT = 22, C_QUEUE_SIZE = 24, C_QUEUE_ENABLE = 28,
    C_QUEUE_NOTIFY_OFF = 30, C_QUEUE_DESC = 32, C_QUEUE_DRIVER = 40, C_QUEUE_DEVICE = 48,
};

#define R8(at) (*(volatile u8 *)(at))
#define R16(at) (*(volatile u16 *)(at))
#define R32(at) (*(volatile u32 *)(at))

static u8 rings[4][16 * QUEUE_SIZE + 8 * QUEUE_SIZE + 2 * QUEUE_SIZE + 4096] __attribute__((aligned(4096)));

/* --- where they are --- */

static int find_mmio(struct device *device, u64 base, u64 stride, int count, u32 kind)
{
    for (int number = 0; number < count; number++) {
        volatile u8 *at = (volatile u8 *)(base + number * stride);
        if (R32(at) == MAGIC && R32(at + 4) == 2 && R32(at + DEVICE_ID) == kind) {
            device->common = at;
            device->config = at + CONFIG;
            device->notify = at + QUEUE_NOTIFY;
            return 1;
        }
    }
    return 0;
}

static u32 pci_read(u32 slot, u32 offset)
{
    out32(0xcf8, 0x80000000u | slot << 11 | (offset & 0xfc));
    return in32(0xcfc);
}

static void pci_write(u32 slot, u32 offset, u32 value)
{
    out32(0xcf8, 0x80000000u | slot << 11 | (offset & 0xfc));
    out32(0xcfc, value);
}

static volatile u8 *bar(u32 slot, u32 number)
{
    u32 low = pci_read(slot, 0x10 + 4 * number);
    u64 base = low & ~15u;
    if ((low & 6) == 4)
        base |= (u64)pci_read(slot, 0x14 + 4 * number) << 32;
    if (!base || base >> 32)
        failed("a BAR that is not below 4 GiB");
    return (volatile u8 *)base;
}

static int find_pci(struct device *device, u32 kind)
{
    for (u32 slot = 0; slot < 32; slot++) {
        u32 id = pci_read(slot, 0);
        if (id != ((0x1040 + kind) << 16 | 0x1af4) && id != ((0x0fff + kind) << 16 | 0x1af4))
            continue; /* neither modern nor transitional */
        pci_write(slot, 4, (pci_read(slot, 4) & 0xffff) | 6); /* memory, bus master */
        device->pci = 1;
        for (u32 at = pci_read(slot, 0x34) & 0xfc; at; at = pci_read(slot, at) >> 8 & 0xfc) {
            u32 head = pci_read(slot, at);
            if ((head & 0xff) != 9)
                continue;
            u32 type = head >> 24;
            if (type != 1 && type != 2 && type != 4)
                continue;
            volatile u8 *where = bar(slot, pci_read(slot, at + 4) & 7) + pci_read(slot, at + 8);
            if (type == 1)
                device->common = where;
            else if (type == 4)
                device->config = where;
            else {
                device->notify = where;
                device->notify_multiplier = pci_read(slot, at + 16);
            }
        }
        return device->common && device->config && device->notify;
    }
    return 0;
}

void find_device(struct device *device, u32 kind)
{
    if (argument("pci", 0) ? find_pci(device, kind)
                           : find_mmio(device, 0xd0000000, 0x1000, 8, kind) ||  /* here */
                                 find_mmio(device, 0xfeb00000, 0x200, 24, kind)) /* QEMU's microvm */
        return;
    failed("no such device");
}

/* --- negotiation --- */

static void set_status(struct device *device, u8 status)
{
    if (device->pci)
        R8(device->common + C_STATUS) = status;
    else
        R32(device->common + STATUS) = status;
}

static u8 status(struct device *device)
{
    return device->pci ? R8(device->common + C_STATUS) : R32(device->common + STATUS);
}

void negotiate(struct device *device, u64 wanted)
{
    volatile u8 *at = device->common;
    u32 select = device->pci ? C_DEVICE_FEATURE_SELECT : DEVICE_FEATURES_SEL;
    u32 value = device->pci ? C_DEVICE_FEATURE : DEVICE_FEATURES;
    u64 offered = 0;

    set_status(device, 0);
    while (status(device))
        ;
    set_status(device, ACKNOWLEDGE | DRIVER);
    for (u32 word = 0; word < 2; word++) {
        R32(at + select) = word;
        offered |= (u64)R32(at + value) << 32 * word;
    }
    device->features = offered & (wanted | F_VERSION_1);
    select = device->pci ? C_DRIVER_FEATURE_SELECT : DRIVER_FEATURES_SEL;
    value = device->pci ? C_DRIVER_FEATURE : DRIVER_FEATURES;
    for (u32 word = 0; word < 2; word++) {
        R32(at + select) = word;
        R32(at + value) = device->features >> 32 * word;
    }
    set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK);
    if (!(status(device) & FEATURES_OK))
        failed("the device does not take the features it offers");
}

void make_queue(struct device *device, struct queue *queue, u16 index, u16 size)
{
    volatile u8 *at = device->common;
    u32 max;

    if (device->pci) {
        R16(at + C_QUEUE_SELECT) = index;
        max = R16(at + C_QUEUE_SIZE);
    } else {
        R32(at + QUEUE_SEL) = index;
        max = R32(at + QUEUE_NUM_MAX);
    }
    if (max < size)
        size = max;
    if (!size)
        failed("no such queue");
    u8 *ring = rings[index];
    for (u32 i = 0; i < sizeof rings[index]; i++)
        ring[i] = 0;
    queue->desc = (struct desc *)ring;
    queue->avail = (volatile u16 *)(ring + 16 * QUEUE_SIZE);
    queue->used = (volatile u16 *)(ring + 16 * QUEUE_SIZE + 1024);
    queue->size = size;
    queue->index = index;
    queue->event_idx = !!(device->features & F_EVENT_IDX);
    queue->wide = !device->pci;
    if (queue->event_idx)
        queue->avail[2 + size] = 0x8000;
    else
        queue->avail[0] = 1; /* NO_INTERRUPT */

    u64 where[] = {(u64)queue->desc, (u64)queue->avail, (u64)queue->used};
    u32 to[] = {QUEUE_DESC, QUEUE_DRIVER, QUEUE_DEVICE};
    u32 to_pci[] = {C_QUEUE_DESC, C_QUEUE_DRIVER, C_QUEUE_DEVICE};
    if (device->pci)
        R16(at + C_QUEUE_SIZE) = size;
    else
        R32(at + QUEUE_NUM) = size;
    for (int i = 0; i < 3; i++) {
        u32 offset = device->pci ? to_pci[i] : to[i];
        R32(at + offset) = where[i];
        R32(at + offset + 4) = where[i] >> 32;
    }
    queue->notify = device->notify;
    if (device->pci) {
        queue->notify = device->notify + R16(at + C_QUEUE_NOTIFY_OFF) * device->notify_multiplier;
        R16(at + C_QUEUE_ENABLE) = 1;
    } else
        R32(at + QUEUE_READY) = 1;
}

void driver_ok(struct device *device)
{
    set_status(device, ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
}

u64 config64(struct device *device, u32 offset)
{
    return R32(device->config + offset) | (u64)R32(device->config + offset + 4) << 32;
}

/* --- rings --- */

void add(struct queue *queue, u16 head)
{
    queue->avail[2 + (queue->added++ & (queue->size - 1))] = head;
}

void publish(struct queue *queue)
{
    u16 old = queue->published, new = queue->added;
    if (old == new)
        return;
    barrier();
    queue->avail[1] = new;
    queue->published = new;
    fence();
    if (queue->event_idx) {
        u16 event = queue->used[2 + 4 * queue->size]; /* avail_event */
        if ((u16)(new - event - 1) >= (u16)(new - old))
            return;
    } else if (queue->used[0] & 1)
        return;
    queue->notifies++;
    if (queue->wide)
        R32(queue->notify) = queue->index;
    else
        R16(queue->notify) = queue->index;
}
