/* Files and directory trees, as a stream of entries (its other side is vmm/agent/tree.py).
 *
 * A name is one component, a directory is followed by what is in it and an UP: nothing in the
 * stream can say a path that leads elsewhere. Where something fails, its errno (4 bytes) and path
 * go to standard error, and that is the end. */
#include "agent.h"

struct entry {
    u8 kind, zero;
    u16 name_size;
    u32 mode;
    u64 size; /* of a link's target, which follows; a hint for a file, whose data comes in chunks */
    long long seconds;
    u32 nanoseconds, zero2;
    /* then the name; a file: chunks of a u32 size and as many bytes, the last one empty */
};
enum { DIRECTORY = 'd', REGULAR = 'f', LINK = 'l', FIFO = 'p', UP = 'u', LAST = 'e' };

#define DEPTH 256
#define PATH_SIZE 8192

struct getdents {
    u64 inode, offset;
    u16 size;
    u8 type;
    char name[];
};

static char where[PATH_SIZE];
static size_t where_size;
static char data[CHUNK];
static char out[CHUNK + 4096];
static size_t out_size;

static _Noreturn void fail(long error, const char *name)
{
    int number = (int)-error;

    if (name && where_size + strlen(name) + 2 < sizeof where)
        join(where + where_size, sizeof where - where_size,
             where_size && where[where_size - 1] != '/' ? "/" : "", name, (char *)0);
    write_all(2, &number, sizeof number);
    write_all(2, where, strlen(where));
    sys_exit(1);
}

/* Go down to `name`; what to give to `leave`. */
static size_t enter(const char *name)
{
    size_t before = where_size;

    if (where_size + strlen(name) + 2 >= sizeof where)
        fail(-ENAMETOOLONG, 0);
    join(where + where_size, sizeof where - where_size,
         where_size && where[where_size - 1] != '/' ? "/" : "", name, (char *)0);
    where_size += strlen(where + where_size);
    return before;
}

static void leave(size_t before)
{
    where_size = before;
    where[where_size] = 0;
}

/* --- from the host --- */

static void receive(void *to, size_t size)
{
    if (read_all(0, to, size))
        sys_exit(1); /* the host has given up */
}

/* Owner, mode and times are wishes where a file system has none. */
static void settle(int fd, const struct entry *entry)
{
    long times[4] = {entry->seconds, entry->nanoseconds, entry->seconds, entry->nanoseconds};

    SYS2(fchmod, fd, entry->mode & 07777);
    SYS4(utimensat, fd, 0, times, 0);
}

static void put_file(int dir, const char *name, const struct entry *entry)
{
    struct stat found;
    u32 size;
    int flags = O_WRONLY | O_CREAT | O_TRUNC | O_NOCTTY;
    int fd = sys_openat(dir, name, flags, 0600);

    if (fd == -ETXTBSY) { /* a running program goes on with the file it has */
        SYS3(unlinkat, dir, name, 0);
        fd = sys_openat(dir, name, flags, 0600);
    }
    if (fd < 0)
        fail(fd, name);
    for (;;) {
        int error;
        receive(&size, sizeof size);
        if (!size)
            break;
        if (size > sizeof data)
            fail(-EPROTO, name);
        receive(data, size);
        error = write_all(fd, data, size);
        if (error)
            fail(error, name);
    }
    if (!sys_fstatat(fd, "", &found, AT_EMPTY_PATH) && S_ISREG(found.st_mode))
        settle(fd, entry);
    sys_close(fd);
}

/* Times of what is not opened. */
static void stamp(int dir, const char *name, const struct entry *entry)
{
    long times[4] = {entry->seconds, entry->nanoseconds, entry->seconds, entry->nanoseconds};

    SYS4(utimensat, dir, name, times, AT_SYMLINK_NOFOLLOW);
}

static void put_link(int dir, const char *name, const struct entry *entry)
{
    int error;

    if (!entry->size || entry->size >= 4096)
        fail(-ENAMETOOLONG, name);
    receive(data, entry->size);
    data[entry->size] = 0;
    SYS3(unlinkat, dir, name, 0);
    error = (int)SYS3(symlinkat, data, dir, name);
    if (error)
        fail(error, name);
    stamp(dir, name, entry);
}

static void put_fifo(int dir, const char *name, const struct entry *entry)
{
    int error;

    SYS3(unlinkat, dir, name, 0);
    error = (int)SYS4(mknodat, dir, name, S_IFIFO | (entry->mode & 0777), 0);
    if (error)
        fail(error, name);
    stamp(dir, name, entry);
}

static int put_directory(int dir, const char *name)
{
    int error = (int)SYS3(mkdirat, dir, name, 0700), fd;

    if (error && error != -EEXIST)
        fail(error, name);
    fd = sys_openat(dir, name, O_RDONLY | O_DIRECTORY, 0);
    if (fd < 0)
        fail(fd, name);
    return fd;
}

/* Make the directories above `path`, and say where its last part begins. */
static const char *make_parents(const char *path, int *dir)
{
    static char parent[PATH_SIZE];
    size_t last = 0;

    if (strlen(path) >= sizeof parent)
        fail(-ENAMETOOLONG, 0);
    for (size_t at = 0; path[at]; at++) {
        if (path[at] != '/' || !path[at + 1])
            continue;
        last = at + 1;
        memcpy(parent, path, at);
        parent[at] = 0;
        if (at)
            sys_mkdir(parent, 0755);
    }
    memcpy(parent, path, last);
    parent[last] = 0;
    enter(parent);
    *dir = sys_open(last ? parent : ".", O_RDONLY | O_DIRECTORY);
    if (*dir < 0)
        fail(*dir, 0);
    return path + last;
}

int tree_put(const char *path)
{
    static struct {
        int fd;
        size_t before;
        struct entry entry;
    } stack[DEPTH];
    static char name[256];
    const char *top;
    int depth = 0, dir;

    top = make_parents(path, &dir);
    for (;;) {
        struct entry entry;
        const char *called = depth ? name : top;

        receive(&entry, sizeof entry);
        if (entry.name_size >= sizeof name)
            fail(-ENAMETOOLONG, 0);
        receive(name, entry.name_size);
        name[entry.name_size] = 0;
        switch (entry.kind) {
        case DIRECTORY:
            if (depth == DEPTH)
                fail(-ELOOP, name);
            stack[depth].entry = entry;
            stack[depth].fd = dir;
            dir = put_directory(dir, called);
            stack[depth++].before = enter(called);
            break;
        case UP:
            if (!depth)
                fail(-EPROTO, 0);
            settle(dir, &stack[--depth].entry);
            sys_close(dir);
            dir = stack[depth].fd;
            leave(stack[depth].before);
            break;
        case REGULAR:
            put_file(dir, called, &entry);
            break;
        case LINK:
            put_link(dir, called, &entry);
            break;
        case FIFO:
            put_fifo(dir, called, &entry);
            break;
        case LAST:
            return 0;
        default:
            fail(-EPROTO, name);
        }
    }
}

/* --- to the host --- */

static void send_out(void)
{
    if (write_all(1, out, out_size))
        sys_exit(1);
    out_size = 0;
}

static void give(const void *from, size_t size)
{
    if (out_size + size > sizeof out)
        send_out();
    memcpy(out + out_size, from, size);
    out_size += size;
}

static void give_entry(u8 kind, const char *name, const struct stat *found, u64 size)
{
    struct entry entry = {0};

    entry.kind = kind;
    entry.name_size = (u16)strlen(name);
    entry.size = size;
    if (found) {
        entry.mode = found->st_mode & 07777;
        entry.seconds = found->st_mtim.tv_sec;
        entry.nanoseconds = (u32)found->st_mtim.tv_nsec;
    }
    give(&entry, sizeof entry);
    give(name, strlen(name));
}

static void get_file(int dir, const char *name, const char *called, const struct stat *found)
{
    int fd = sys_openat(dir, name, O_RDONLY | O_NOCTTY, 0);
    u32 size;

    if (fd < 0)
        fail(fd, called);
    give_entry(REGULAR, called, found, (u64)found->st_size);
    do {
        long got = sys_read(fd, data, sizeof data);
        if (got == -EINTR)
            continue;
        if (got < 0)
            fail(got, called);
        size = (u32)got;
        give(&size, sizeof size);
        give(data, size);
    } while (size);
    sys_close(fd);
}

static void get(int dir, const char *name, const char *called, int depth);

static void get_directory(
    int dir, const char *name, const char *called, const struct stat *found, int depth)
{
    char entries[4096];
    size_t before = enter(called);
    long got;
    int fd = sys_openat(dir, name, O_RDONLY | O_DIRECTORY, 0);

    if (fd < 0)
        fail(fd, 0);
    if (depth == DEPTH)
        fail(-ELOOP, 0);
    give_entry(DIRECTORY, depth ? called : "", found, 0);
    while ((got = SYS3(getdents64, fd, entries, sizeof entries)) > 0)
        for (long at = 0; at < got;) {
            struct getdents *next = (struct getdents *)(entries + at);
            at += next->size;
            if (strcmp(next->name, ".") && strcmp(next->name, ".."))
                get(fd, next->name, next->name, depth + 1);
        }
    if (got < 0)
        fail(got, 0);
    give_entry(UP, "", 0, 0);
    sys_close(fd);
    leave(before);
}

static void get(int dir, const char *name, const char *called, int depth)
{
    struct stat found;
    /* What was asked for by name may be reached by a link; below, a link is a link. */
    int error = sys_fstatat(dir, name, &found, depth ? AT_SYMLINK_NOFOLLOW : 0);
    long size;

    if (error == -ENOENT && depth)
        return; /* gone since the directory was read */
    if (error)
        fail(error, called);
    switch (found.st_mode & S_IFMT) {
    case S_IFDIR:
        get_directory(dir, name, called, &found, depth);
        return;
    case S_IFLNK:
        size = SYS4(readlinkat, dir, name, data, sizeof data);
        if (size < 0)
            fail(size, called);
        give_entry(LINK, called, &found, (u64)size);
        give(data, (size_t)size);
        return;
    case S_IFSOCK:
        if (depth)
            return; /* nothing to carry, as tar(1) sees it too */
        fail(-ENXIO, called);
    case S_IFIFO:
        if (!depth)
            break;
        give_entry(FIFO, called, &found, 0);
        return;
    case S_IFREG:
        break;
    default: /* a device's contents, where it was asked for by name */
        if (depth)
            fail(-EOPNOTSUPP, called);
    }
    get_file(dir, name, depth ? called : "", &found);
}

int tree_get(const char *path)
{
    struct stat found;
    int error = sys_fstatat(AT_FDCWD, path, &found, 0);

    if (error) {
        enter(path);
        fail(error, 0);
    }
    get(AT_FDCWD, path, path, 0);
    give_entry(LAST, "", 0, 0);
    send_out();
    return 0;
}
