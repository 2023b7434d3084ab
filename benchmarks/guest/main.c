/* What a job asks for:
 *
 * test=1 (network) or 2 (disk), pci=0 or 1, milliseconds=N of measuring, and what blk.c and net.c say. */

#include "guest.h"

struct start_info { /* hvm_start_info */
    u32 magic, version, flags, nr_modules;
    u64 modlist, cmdline;
};

void *memset(void *at, int value, unsigned long size)
{
    for (u8 *byte = at; size--;)
        *byte++ = value;
    return at;
}

void *memcpy(void *to, const void *from, unsigned long size)
{
    u8 *byte = to;
    for (const u8 *source = from; size--;)
        *byte++ = *source++;
    return to;
}

void guest_main(struct start_info *info)
{
    for (int more = next_job((const char *)info->cmdline); more; more = next_job(0)) {
        if (argument("test", 0) == 1)
            measure_net();
        else if (argument("test", 0) == 2)
            measure_blk();
        else
            failed("a job without test=1 (network) or test=2 (disk)");
    }
    finish();
}
