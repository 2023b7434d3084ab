/* What POSIX says of files, tried in the directory given (in the manner of pjdfstest):
 *
 *   posix-files DIRECTORY
 *
 * Prints "failed: LINE: EXPRESSION (errno)" for each check that does not hold, and at the end
 * "checks: N failed: M". Must be root, in an empty directory.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <limits.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define ENTRIES 250

static int checks, failed;

static void report(int holds, int line, const char *text)
{
    checks++;
    if (holds)
        return;
    failed++;
    printf("failed: %d: %s (%s)\n", line, text, strerror(errno));
    fflush(stdout);
}

#define OK(expression) report((expression) != -1, __LINE__, #expression)
#define IS(expression) report(!!(expression), __LINE__, #expression)
#define FAILS(error, expression) \
    (errno = 0, report((expression) == -1 && errno == (error), __LINE__, #expression " " #error))

static struct stat look(const char *path)
{
    struct stat found = {0};

    lstat(path, &found);
    return found;
}

static void put(const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC, 0644);

    IS(fd >= 0 && write(fd, text, strlen(text)) == (ssize_t)strlen(text));
    close(fd);
}

static int holds(const char *path, const char *text)
{
    char buffer[256] = "";
    int fd = open(path, O_RDONLY);
    ssize_t size = fd < 0 ? -1 : read(fd, buffer, sizeof buffer);

    close(fd);
    return size == (ssize_t)strlen(text) && !memcmp(buffer, text, size);
}

/* In a child that is nobody: the errno of `path` opened so, 0 if that works. */
static int as_nobody(const char *path, int flags)
{
    int status;
    pid_t child = fork();

    if (!child) {
        if (setgroups(0, NULL) || setgid(65534) || setuid(65534))
            _exit(255);
        _exit(open(path, flags, 0644) < 0 ? errno : 0);
    }
    waitpid(child, &status, 0);
    return WEXITSTATUS(status);
}

static void opening(void)
{
    char name[300];
    int fd;

    put("file", "hello");
    FAILS(EEXIST, open("file", O_CREAT | O_EXCL | O_RDWR, 0644));
    FAILS(ENOENT, open("none", O_RDONLY));
    FAILS(ENOENT, open("none/file", O_CREAT | O_RDWR, 0644));
    FAILS(ENOTDIR, open("file/file", O_CREAT | O_RDWR, 0644));
    FAILS(ENOTDIR, open("file", O_RDONLY | O_DIRECTORY));
    OK(mkdir("dir", 0755));
    FAILS(EISDIR, open("dir", O_WRONLY));
    FAILS(EISDIR, open("dir", O_CREAT | O_RDWR, 0644));
    OK(symlink("loop", "loop"));
    FAILS(ELOOP, open("loop", O_RDONLY));
    OK(symlink("file", "link"));
    FAILS(ELOOP, open("link", O_RDONLY | O_NOFOLLOW));
    FAILS(EEXIST, open("loop", O_CREAT | O_EXCL | O_RDWR, 0644));
    memset(name, 'x', sizeof name);
    name[256] = 0;
    FAILS(ENAMETOOLONG, open(name, O_CREAT | O_RDWR, 0644));
    name[255] = 0;
    fd = open(name, O_CREAT | O_RDWR, 0644);
    IS(fd >= 0);
    close(fd);
    OK(unlink(name));
    umask(027);
    close(open("masked", O_CREAT | O_RDWR, 0666));
    umask(0);
    IS((look("masked").st_mode & 07777) == 0640);
    OK(open("file", O_RDWR | O_TRUNC));
    IS(look("file").st_size == 0);
}

static void data(void)
{
    char buffer[8192], *map;
    int fd = open("data", O_CREAT | O_RDWR, 0644), append;

    IS(pwrite(fd, "end", 3, 100000) == 3);
    IS(look("data").st_size == 100003);
    IS(pread(fd, buffer, 10, 50000) == 10 && !memcmp(buffer, "\0\0\0\0\0\0\0\0\0\0", 10));
    IS(pread(fd, buffer, 10, 100003) == 0);
    IS(pread(fd, buffer, 10, 100000) == 3 && !memcmp(buffer, "end", 3));
    append = open("data", O_WRONLY | O_APPEND);
    IS(write(append, "more", 4) == 4 && look("data").st_size == 100007);
    IS(pwrite(fd, "X", 1, 0) == 1 && write(append, "!", 1) == 1);
    IS(look("data").st_size == 100008);
    close(append);
    OK(ftruncate(fd, 10));
    OK(ftruncate(fd, 20000));
    IS(pread(fd, buffer, 8192, 5) == 8192 && !buffer[0] && !buffer[8191]);
    FAILS(EINVAL, ftruncate(fd, -1));
    FAILS(EBADF, write(open("data", O_RDONLY), "x", 1));
    FAILS(EINVAL, lseek(fd, -1, SEEK_SET));
    IS(lseek(fd, 5, SEEK_END) == 20005);
    map = mmap(NULL, 20000, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    IS(map != MAP_FAILED);
    if (map != MAP_FAILED) {
        memcpy(map + 12345, "mapped", 6);
        OK(msync(map, 20000, MS_SYNC));
        IS(pread(fd, buffer, 6, 12345) == 6 && !memcmp(buffer, "mapped", 6));
        IS(pwrite(fd, "seen", 4, 15000) == 4 && !memcmp(map + 15000, "seen", 4));
        munmap(map, 20000);
    }
    OK(fsync(fd));
    OK(fdatasync(fd));
    OK(posix_fallocate(fd, 0, 1 << 20) ? -1 : 0);
    IS(look("data").st_size == 1 << 20);
    OK(flock(fd, LOCK_EX));
    FAILS(EWOULDBLOCK, flock(open("data", O_RDWR), LOCK_EX | LOCK_NB));
    OK(unlink("data")); /* it lives on while it is open */
    IS(pwrite(fd, "alive", 5, 7) == 5 && pread(fd, buffer, 5, 7) == 5);
    IS(!memcmp(buffer, "alive", 5));
    FAILS(ENOENT, open("data", O_RDWR));
    close(fd);
}

static void directories(void)
{
    DIR *dir;
    struct dirent *entry;
    struct stat before;
    char name[64];
    int seen = 0, twice = 0, other = 0;
    static char found[ENTRIES];

    OK(mkdir("a", 0755));
    FAILS(EEXIST, mkdir("a", 0755));
    FAILS(ENOENT, mkdir("none/a", 0755));
    FAILS(ENOTDIR, rmdir("file"));
    IS(look("a").st_nlink == 2 || look("a").st_nlink == 1);
    put("a/file", "x");
    IS(rmdir("a") == -1 && (errno == ENOTEMPTY || errno == EEXIST));
    FAILS(EINVAL, rmdir("a/."));
    IS(unlink("a") == -1 && (errno == EISDIR || errno == EPERM));
    OK(unlink("a/file"));
    FAILS(ENOENT, unlink("a/file"));
    before = look("a");
    usleep(20000);
    for (int number = 0; number < ENTRIES; number++) {
        snprintf(name, sizeof name, "a/entry-with-a-longer-name-%d", number);
        close(open(name, O_CREAT | O_RDWR, 0644));
    }
    IS(look("a").st_mtim.tv_nsec != before.st_mtim.tv_nsec);
    dir = opendir("a");
    while ((entry = readdir(dir))) {
        int number;

        if (sscanf(entry->d_name, "entry-with-a-longer-name-%d", &number) == 1) {
            seen++;
            twice += found[number]++;
            other += entry->d_type != DT_REG && entry->d_type != DT_UNKNOWN;
        }
    }
    IS(seen == ENTRIES && !twice && !other);
    rewinddir(dir);
    while ((entry = readdir(dir)))
        if (entry->d_name[0] == 'e')
            unlinkat(dirfd(dir), entry->d_name, 0);
    closedir(dir);
    OK(rmdir("a"));
}

static void links_and_renames(void)
{
    char target[PATH_MAX];
    ino_t number;

    put("one", "one");
    number = look("one").st_ino;
    OK(link("one", "two"));
    IS(look("one").st_nlink == 2 && look("two").st_ino == number);
    FAILS(EEXIST, link("one", "two"));
    FAILS(ENOENT, link("none", "three"));
    FAILS(EPERM, link("dir", "three"));
    put("two", "both");
    IS(holds("one", "both"));
    OK(rename("one", "two")); /* the same file: nothing happens */
    IS(look("one").st_nlink == 2);
    OK(unlink("one"));
    IS(look("two").st_nlink == 1);
    put("over", "gone");
    OK(rename("two", "over"));
    IS(holds("over", "both") && look("over").st_ino == number);
    FAILS(ENOENT, rename("two", "over"));
    FAILS(EISDIR, rename("over", "dir"));
    FAILS(ENOTDIR, rename("dir", "over"));
    OK(mkdir("dir/sub", 0755));
    FAILS(EINVAL, rename("dir", "dir/sub/dir"));
    OK(mkdir("empty", 0755));
    OK(mkdir("full", 0755));
    put("full/file", "x");
    IS(rename("empty", "full") == -1 && (errno == ENOTEMPTY || errno == EEXIST));
    OK(rename("full", "empty"));
    IS(holds("empty/file", "x"));
    FAILS(EEXIST, renameat2(AT_FDCWD, "over", AT_FDCWD, "file", RENAME_NOREPLACE));
    OK(rename("dir/sub", "sub"));
    FAILS(ENOENT, rmdir("dir/sub"));
    OK(symlink("some/where/else", "arrow"));
    IS(readlink("arrow", target, sizeof target) == 15 && !memcmp(target, "some/where/else", 15));
    IS(S_ISLNK(look("arrow").st_mode) && look("arrow").st_size == 15);
    FAILS(EINVAL, readlink("file", target, sizeof target));
    FAILS(EEXIST, symlink("x", "arrow"));
    OK(mkfifo("fifo", 0600));
    IS(S_ISFIFO(look("fifo").st_mode));
    FAILS(ENXIO, open("fifo", O_WRONLY | O_NONBLOCK));
}

static void attributes(void)
{
    struct timespec times[2] = {{1000000001, 123456789}, {1500000002, 987654321}};
    struct statvfs system;
    struct stat before, after;

    put("attributes", "x");
    OK(chmod("attributes", 0604));
    IS((look("attributes").st_mode & 07777) == 0604);
    OK(chmod("attributes", 06755));
    IS((look("attributes").st_mode & 07777) == 06755);
    OK(chown("attributes", 1000, 1001));
    IS(look("attributes").st_uid == 1000 && look("attributes").st_gid == 1001);
    IS(!(look("attributes").st_mode & S_ISUID)); /* a change of owner takes that away */
    OK(lchown("arrow", 5, 6));
    IS(look("arrow").st_uid == 5);
    OK(utimensat(AT_FDCWD, "attributes", times, 0));
    IS(look("attributes").st_atim.tv_sec == 1000000001);
    IS(look("attributes").st_mtim.tv_sec == 1500000002);
    IS(look("attributes").st_mtim.tv_nsec == 987654321);
    before = look("attributes");
    usleep(20000);
    OK(chmod("attributes", 0644));
    after = look("attributes");
    IS(memcmp(&after.st_ctim, &before.st_ctim, sizeof after.st_ctim));
    IS(after.st_mtim.tv_nsec == 987654321);
    OK(statvfs(".", &system));
    IS(system.f_namemax == 255 && system.f_blocks > 0);
    IS(look("file").st_dev == look("dir").st_dev);
}

static void permissions(void)
{
    put("secret", "x");
    OK(chmod("secret", 0600));
    IS(as_nobody("secret", O_RDONLY) == EACCES);
    OK(chmod("secret", 0604));
    IS(as_nobody("secret", O_RDONLY) == 0);
    IS(as_nobody("secret", O_RDWR) == EACCES);
    OK(chown("secret", 65534, 0));
    IS(as_nobody("secret", O_RDONLY) == 0);
    OK(chmod("secret", 0004)); /* the owner's bits count, not the others' */
    IS(as_nobody("secret", O_RDONLY) == EACCES);
    OK(mkdir("closed", 0700));
    put("closed/file", "x");
    IS(as_nobody("closed/file", O_RDONLY) == EACCES);
    OK(mkdir("open", 0777));
    IS(as_nobody("open/made", O_CREAT | O_RDWR) == 0);
    IS(look("open/made").st_uid == 65534);
    IS(as_nobody("made", O_CREAT | O_RDWR) == EACCES);
}

int main(int argc, char **argv)
{
    if (argc != 2 || chdir(argv[1]))
        return 2;
    umask(0);
    OK(chmod(".", 0755));
    opening();
    data();
    directories();
    links_and_renames();
    attributes();
    permissions();
    printf("checks: %d failed: %d\n", checks, failed);
    return failed != 0;
}
