/* Serial port, clock, command line, the end. */

#include "guest.h"

#define SERIAL 0x3f8
#define EXIT 0xf4 /* ours; QEMU's isa-debug-exit makes 2 * value + 1 of it */

extern volatile struct { /* struct pvclock_vcpu_time_info (asm/pvclock-abi.h), filled by KVM */
    u32 version, pad;
    u64 tsc_timestamp, system_time;
    u32 tsc_to_system_mul;
    signed char tsc_shift;
    u8 flags, pad2[2];
} pvclock;

static const char *command_line;
static int results;

void print(const char *text)
{
    while (*text) {
        while (!(in8(SERIAL + 5) & 0x20))
            ;
        out8(SERIAL, *text++);
    }
}

void print_number(u64 value)
{
    char text[21], *at = text + 20;
    *at = 0;
    do
        *--at = '0' + value % 10;
    while (value /= 10);
    print(at);
}

static void stop(u8 status)
{
    print("\n");
    while (!(in8(SERIAL + 5) & 0x40)) /* until it is on the wire */
        ;
    out8(EXIT, status);
    for (;;)
        pause();
}

void failed(const char *why)
{
    print("\nfailed: ");
    print(why);
    stop(3);
    __builtin_unreachable();
}

void finish(void)
{
    stop(0);
    __builtin_unreachable();
}

void result(const char *name, u64 value)
{
    print(results++ ? " " : "\nresult ");
    print(name);
    print("=");
    print_number(value);
}

void guest_fault(u64 *stack)
{
    print("\nfault, stack:");
    for (int i = 0; i < 6; i++) {
        print(" ");
        print_number(stack[i]);
    }
    stop(3);
}

u64 nanoseconds(u64 ticks)
{
    int shift = pvclock.tsc_shift;
    ticks = shift < 0 ? ticks >> -shift : ticks << shift;
    return (u64)((unsigned __int128)ticks * pvclock.tsc_to_system_mul >> 32);
}

u64 ticks_in(u64 wanted)
{
    u64 unit = nanoseconds(1ull << 30) / 1000; /* microseconds: 64 bits do, and no library */
    if (!unit)
        failed("no kvmclock: how long a tick is is not known");
    return (wanted / 1000 << 30) / unit;
}

int next_job(const char *text)
{
    if (text)
        command_line = text;
    else {
        while (*command_line && *command_line != ';')
            command_line++;
        if (!*command_line)
            return 0;
        command_line++;
    }
    results = 0;
    return 1;
}

u64 argument(const char *name, u64 otherwise)
{
    for (const char *at = command_line; *at && *at != ';';) {
        const char *letter = name;
        while (*letter && *at == *letter)
            at++, letter++;
        if (!*letter && *at == '=') {
            u64 value = 0;
            for (at++; *at >= '0' && *at <= '9'; at++)
                value = 10 * value + *at - '0';
            return value;
        }
        while (*at && *at != ' ' && *at != ';')
            at++;
        while (*at == ' ')
            at++;
    }
    return otherwise;
}

u64 percentile(u32 *samples, u64 count, u64 percent)
{
    for (u64 gap = count / 2; gap; gap /= 2) /* Shell's sort */
        for (u64 i = gap; i < count; i++) {
            u32 value = samples[i];
            u64 j = i;
            for (; j >= gap && samples[j - gap] > value; j -= gap)
                samples[j] = samples[j - gap];
            samples[j] = value;
        }
    return count ? samples[(count - 1) * percent / 100] : 0;
}
