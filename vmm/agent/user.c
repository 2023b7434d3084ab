/* Becoming the user a command is to run as: USER[:GROUP], each a name or a number, looked up in the
 * guest's /etc/passwd and /etc/group as Docker does it. */
#include "agent.h"

#define GROUPS_MAX 64
#define NOBODY ((u32)-1) /* what setresuid(2) takes for "leave it" */

struct lines {
    int fd;
    size_t at, size;
    char buffer[8192];
};

/* The next line of a file, without its end; NULL at the end. A line too long for the buffer comes
 * in pieces, none of which has the fields looked for. */
static char *next_line(struct lines *file)
{
    for (;;) {
        for (size_t end = file->at; end < file->size; end++)
            if (file->buffer[end] == '\n') {
                char *line = file->buffer + file->at;
                file->buffer[end] = 0;
                file->at = end + 1;
                return line;
            }
        memmove(file->buffer, file->buffer + file->at, file->size - file->at);
        file->size -= file->at;
        file->at = 0;
        size_t room = sizeof file->buffer - 1 - file->size;
        long got = room ? sys_read(file->fd, file->buffer + file->size, room) : 0;
        if (got == -EINTR)
            continue;
        if (got > 0) {
            file->size += (size_t)got;
            continue;
        }
        if (!file->size)
            return 0;
        file->buffer[file->size] = 0;
        file->at = file->size = 0;
        return file->buffer;
    }
}

/* Part a line at its colons; how many fields there are. */
static int split(char *line, char *fields[], int most)
{
    int count = 0;

    while (count < most) {
        fields[count++] = line;
        while (*line && *line != ':')
            line++;
        if (!*line)
            break;
        *line++ = 0;
    }
    return count;
}

static int digits(const char *text, u32 *value)
{
    u64 sum = 0;

    if (!*text)
        return 0;
    for (; *text; text++) {
        if (*text < '0' || *text > '9')
            return 0;
        sum = sum * 10 + (u64)(*text - '0');
        if (sum >= NOBODY)
            return 0;
    }
    *value = (u32)sum;
    return 1;
}

/* The line of /etc/passwd with this name, or (NULL) this number. */
static int read_passwd(const char *name, u32 uid, struct user *found)
{
    static struct lines file;
    char *line, *fields[7];
    int hit = 0;

    file.fd = sys_open("/etc/passwd", O_RDONLY);
    file.at = file.size = 0;
    while (!hit && file.fd >= 0 && (line = next_line(&file))) {
        u32 id, group;
        if (split(line, fields, 7) < 7 || !digits(fields[2], &id) || !digits(fields[3], &group))
            continue;
        if (name ? strcmp(fields[0], name) != 0 : id != uid)
            continue;
        hit = 1;
        found->uid = id;
        found->gid = group;
        join(found->name, sizeof found->name, fields[0], (char *)0);
        join(found->home, sizeof found->home, fields[5], (char *)0);
        join(found->shell, sizeof found->shell, *fields[6] ? fields[6] : "/bin/sh", (char *)0);
    }
    if (file.fd >= 0)
        sys_close(file.fd);
    return hit;
}

static int has_member(char *members, const char *name)
{
    for (char *end = members; *members; members = end) {
        while (*end && *end != ',')
            end++;
        if (*end)
            *end++ = 0;
        if (!strcmp(members, name))
            return 1;
    }
    return 0;
}

/* With a group: its number. Without: all that the user is a member of. */
static int read_groups(const char *group, struct user *found)
{
    static struct lines file;
    char *line, *fields[4];
    int hit = 0;

    if (!group)
        found->groups[found->count++] = found->gid;
    file.fd = sys_open("/etc/group", O_RDONLY);
    file.at = file.size = 0;
    while (file.fd >= 0 && (line = next_line(&file))) {
        u32 id;
        if (split(line, fields, 4) < 4 || !digits(fields[2], &id))
            continue;
        if (group && !strcmp(fields[0], group)) {
            found->gid = id;
            hit = 1;
            break;
        }
        if (!group && *found->name && id != found->gid && found->count < GROUPS_MAX && has_member(fields[3], found->name))
            found->groups[found->count++] = id;
    }
    if (file.fd >= 0)
        sys_close(file.fd);
    return hit;
}

int find_user(char *text, struct user *found)
{
    char *group = text;
    u32 number = 0;

    memset(found, 0, sizeof *found);
    while (*group && *group != ':')
        group++;
    if (*group)
        *group++ = 0;
    else
        group = 0;
    if (!read_passwd(text, 0, found)) {
        if (!digits(text, &number))
            return -ENOENT;
        if (!read_passwd(0, number, found)) { /* a number needs no line: it has no name either */
            found->uid = number;
            join(found->home, sizeof found->home, "/", (char *)0);
            join(found->shell, sizeof found->shell, "/bin/sh", (char *)0);
        }
    }
    if (group && !read_groups(group, found)) {
        if (!digits(group, &number))
            return -ESRCH;
        found->gid = number;
    } else if (!group) {
        read_groups(0, found);
    }
    return 0;
}

int become_user(const struct user *user)
{
    int error = (int)SYS2(setgroups, user->count, user->groups);

    if (!error)
        error = (int)SYS3(setresgid, user->gid, user->gid, user->gid);
    if (!error)
        error = (int)SYS3(setresuid, user->uid, user->uid, user->uid);
    return error;
}
