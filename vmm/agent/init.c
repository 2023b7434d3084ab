/* Process 1, before the guest's own init: inserts modules, mounts a root file system where one was
 * asked for, starts the agent, and goes on as the init of the guest.
 *
 * /.vmm/config says what to do, a word and its arguments a line:
 *
 *     module PATH                 insert it
 *     init PATH                   the guest's init; without this line, there is none
 *     root virtiofs TAG           mount this at /
 *     root SERIAL TYPE            the virtio disk of that serial number, with that file system
 *     overlay                     what is written to it goes to memory
 *     nosuid                      programs do not run as their owners: root's files are nobody's
 *     mount TAG rw PATH           mount that virtiofs at PATH
 *     mount TAG overlay PATH      the same, and what is written there goes to memory
 *     hostname NAME               the guest's, and /etc/hosts knows it
 *     net NAME dhcp               the card's address by DHCP
 *     net NAME static ADDRESS BITS GATEWAY|- [DNS ...]
 */
#include "agent.h"
#include <net/if.h>

#define CONFIG_MAX (64 << 10)
#define LINES 300 /* of mount and net */
#define MOVE_FROM_DESCRIPTOR 4 /* MOVE_MOUNT_F_EMPTY_PATH, linux/mount.h */
#define MOVE_TO_FOLLOWS 0x10   /* MOVE_MOUNT_T_SYMLINKS */
#define PATIENCE 10000 /* milliseconds for a disk to appear */

static int proc = -1;
static const char *guest_init, *root_kind, *root_name, *hostname;
static char *mounts[LINES], *nets[LINES];
static int mounted[LINES]; /* descriptors of what `mounts` says, before it is at its path */
static int mount_count, net_count;
static int overlay;
static unsigned long root_flags;
static char config[CONFIG_MAX];

static _Noreturn void give_up(const char *text, const char *more, long error)
{
    say(text, more, error);
    sys_exit(1); /* the kernel panics: that is news the host gets */
}

static void insert(const char *path)
{
    int fd = sys_open(path, O_RDONLY);
    long error = fd < 0 ? fd : SYS3(finit_module, fd, "", 0);

    if (error && error != -EEXIST)
        say("not inserted:", path, error); /* others may do */
    if (fd >= 0)
        sys_close(fd);
}

/* End the first word of a line; what is after it. */
static char *part(char *line)
{
    while (*line && *line != ' ')
        line++;
    if (*line)
        *line++ = 0;
    return line;
}

static void read_config(void)
{
    int fd = sys_open("/.vmm/config", O_RDONLY);
    long size = fd < 0 ? fd : sys_read(fd, config, sizeof config - 1);

    if (size < 0)
        give_up("cannot read /.vmm/config", 0, size);
    sys_close(fd);
    for (char *line = config, *end; *line; line = end) {
        const char *rest;
        for (end = line; *end && *end != '\n'; end++)
            ;
        if (*end)
            *end++ = 0;
        if ((rest = after(line, "module "))) {
            insert(rest);
        } else if ((rest = after(line, "init "))) {
            guest_init = rest;
        } else if ((rest = after(line, "root "))) {
            root_kind = rest;
            root_name = part((char *)rest);
        } else if (!strcmp(line, "overlay")) {
            overlay = 1;
        } else if (!strcmp(line, "nosuid")) {
            root_flags = MS_NOSUID;
        } else if ((rest = after(line, "hostname "))) {
            hostname = rest;
        } else if ((rest = after(line, "mount ")) && mount_count < LINES) {
            mounts[mount_count++] = (char *)rest;
        } else if ((rest = after(line, "net ")) && net_count < LINES) {
            nets[net_count++] = (char *)rest;
        }
    }
}

/* A /proc of our own, seen nowhere. */
static void open_proc(void)
{
    sys_mkdir("/.vmm/proc", 0700);
    if (sys_mount("proc", "/.vmm/proc", "proc", 0, 0))
        return;
    proc = (int)SYS4(openat, AT_FDCWD, "/.vmm/proc", O_RDONLY | O_DIRECTORY, 0); /* inherited */
    SYS2(umount2, "/.vmm/proc", MNT_DETACH);
}

/* --- the root file system a host asked for --- */

/* The /dev of the virtio disk with this serial number. */
static int find_disk(const char *serial, char *path, size_t size)
{
    char file[64], found[32], letter[2] = {0};

    for (int waited = 0; waited < PATIENCE; waited += 20) {
        for (letter[0] = 'a'; letter[0] <= 'z'; letter[0]++) {
            join(file, sizeof file, "/.vmm/sys/block/vd", letter, "/serial", (char *)0);
            int fd = sys_open(file, O_RDONLY);
            long got = fd < 0 ? 0 : sys_read(fd, found, sizeof found - 1);
            if (fd >= 0)
                sys_close(fd);
            found[got > 0 ? got : 0] = 0;
            if (!strcmp(found, serial)) {
                join(path, size, "/.vmm/dev/vd", letter, (char *)0);
                return 0;
            }
        }
        sys_sleep(20);
    }
    return -ENODEV;
}

static void mount_or_give_up(
    const char *source, const char *target, const char *type, unsigned long flags, const char *data)
{
    int error;

    sys_mkdir(target, 0755);
    error = sys_mount(source, target, type, flags, data);
    if (error)
        give_up("cannot mount the root file system: mount -t", type, error);
}

/* What every program expects; a root file system without the directories does without. */
static void furnish(void)
{
    static const struct {
        const char *target, *type, *data;
    } usual[] = {
        {"proc", "proc", 0},
        {"sys", "sysfs", 0},
        {"dev", "devtmpfs", 0},
        {"dev/pts", "devpts", "gid=5,mode=620,ptmxmode=666"},
        {"dev/shm", "tmpfs", "mode=1777"},
        {"dev/mqueue", "mqueue", 0},
        {"run", "tmpfs", "mode=755"},
        {"tmp", "tmpfs", "mode=1777"},
        {"sys/fs/cgroup", "cgroup2", 0},
        {"sys/fs/bpf", "bpf", "mode=700"},
        {"sys/kernel/debug", "debugfs", 0},
        {"sys/kernel/tracing", "tracefs", 0},
        {"sys/kernel/security", "securityfs", 0},
        {"sys/kernel/config", "configfs", 0},
    };
    static const char *links[][2] = {
        {"/proc/self/fd", "dev/fd"},
        {"/proc/self/fd/0", "dev/stdin"},
        {"/proc/self/fd/1", "dev/stdout"},
        {"/proc/self/fd/2", "dev/stderr"},
    };
    struct ifreq loopback = {.ifr_name = "lo"};
    int fd;

    for (size_t n = 0; n < sizeof usual / sizeof *usual; n++) {
        sys_mkdir(usual[n].target, 0755);
        sys_mount(usual[n].type, usual[n].target, usual[n].type, 0, usual[n].data);
    }
    for (size_t n = 0; n < sizeof links / sizeof *links; n++)
        SYS3(symlinkat, links[n][0], AT_FDCWD, links[n][1]);
    fd = (int)SYS3(socket, AF_INET, SOCK_DGRAM, 0);
    if (fd >= 0) {
        loopback.ifr_flags = IFF_UP | IFF_RUNNING;
        sys_ioctl(fd, 0x8914 /* SIOCSIFFLAGS */, &loopback);
        sys_close(fd);
    }
}

/* An upper directory is whose the lower one is, as what overlayfs shows for both is the upper's. */
static void make_upper(const char *lower, const char *upper)
{
    struct stat found;

    sys_mkdir(upper, 0755);
    if (sys_fstatat(AT_FDCWD, lower, &found, 0))
        return;
    SYS5(fchownat, AT_FDCWD, upper, found.st_uid, found.st_gid, 0);
    SYS3(fchmodat, AT_FDCWD, upper, found.st_mode & 07777);
}

/* The directory at `path` (absolute), and those above it. */
static void make_directories(char *path)
{
    for (char *at = path + 1; *at; at++)
        if (*at == '/') {
            *at = 0;
            sys_mkdir(path, 0755);
            *at = '/';
        }
    sys_mkdir(path, 0755);
}

/* Mount a directory of the host's below /.vmm, and have the line be its path. */
static void mount_directory(int number)
{
    char *tag = mounts[number], name[21], place[64], lower[64], upper[64], work[64], options[256];
    char *mode = part(tag), *path = part(mode);
    const char *digits = decimal(name, number);
    int error;

    join(place, sizeof place, "/.vmm/directory-", digits, (char *)0);
    sys_mkdir(place, 0755);
    if (!strcmp(mode, "overlay")) {
        join(lower, sizeof lower, "/.vmm/lower-", digits, (char *)0);
        join(upper, sizeof upper, "/.vmm/over-", digits, "/upper", (char *)0);
        join(work, sizeof work, "/.vmm/over-", digits, (char *)0);
        sys_mkdir(lower, 0755);
        sys_mkdir(work, 0755);
        error = sys_mount(tag, lower, "virtiofs", MS_RDONLY, 0);
        if (!error)
            error = sys_mount("over", work, "tmpfs", 0, "mode=755");
        make_upper(lower, upper);
        join(work, sizeof work, "/.vmm/over-", digits, "/work", (char *)0);
        sys_mkdir(work, 0755);
        join(options, sizeof options, "lowerdir=", lower, ",upperdir=", upper, ",workdir=", work,
             (char *)0);
        if (!error)
            error = sys_mount("overlay", place, "overlay", root_flags, options);
    } else {
        error = sys_mount(tag, place, "virtiofs", root_flags, 0);
    }
    mounts[number] = path;
    mounted[number] = error ? error : sys_open(place, O_PATH);
    if (mounted[number] < 0)
        give_up("cannot mount", path, mounted[number]);
}

/* Move such a mount to its path, in the guest's root: a link there leads to places in it. */
static void move_directory(int number)
{
    char *path = mounts[number];
    int error;

    make_directories(path);
    error = (int)SYS5(move_mount, mounted[number], "", AT_FDCWD, path,
                      MOVE_FROM_DESCRIPTOR | MOVE_TO_FOLLOWS);
    if (error)
        give_up("cannot mount", path, error);
    sys_close(mounted[number]);
}

/* Mount it at /.vmm/root and make it this directory. */
static void mount_asked_root(void)
{
    const char *target = overlay ? "/.vmm/lower" : "/.vmm/root";
    char disk[64];
    int error;

    if (!strcmp(root_kind, "virtiofs")) {
        mount_or_give_up(root_name, target, "virtiofs", MS_RDONLY, 0);
    } else {
        mount_or_give_up("sys", "/.vmm/sys", "sysfs", 0, 0);
        mount_or_give_up("dev", "/.vmm/dev", "devtmpfs", 0, 0);
        error = find_disk(root_kind, disk, sizeof disk);
        if (error)
            give_up("the disk of the root file system does not appear", 0, error);
        mount_or_give_up(disk, target, root_name, overlay ? MS_RDONLY : 0, 0);
        SYS2(umount2, "/.vmm/dev", MNT_DETACH);
        SYS2(umount2, "/.vmm/sys", MNT_DETACH);
    }
    if (overlay) {
        mount_or_give_up("over", "/.vmm/over", "tmpfs", 0, "mode=755");
        make_upper("/.vmm/lower", "/.vmm/over/upper");
        sys_mkdir("/.vmm/over/work", 0755);
        mount_or_give_up("root", "/.vmm/root", "overlay", root_flags,
            "lowerdir=/.vmm/lower,upperdir=/.vmm/over/upper,workdir=/.vmm/over/work");
    }
    sys_chdir("/.vmm/root");
    furnish();
    for (int n = 0; n < mount_count; n++)
        mount_directory(n);
}

/* --- the root file system the kernel would have mounted --- */

static char words[4096];

/* The value of the last NAME=VALUE (or NAME) of the kernel's command line; NULL without. */
static const char *parameter(const char *name)
{
    const char *found = 0;
    size_t size = strlen(name);

    for (const char *word = words; *word; word += strlen(word) + 1) {
        if (!strcmp(word, "--"))
            break;
        if (after(word, name) && (word[size] == '=' || !word[size]))
            found = word + size + (word[size] == '=');
    }
    return found;
}

static void read_command_line(void)
{
    int fd = proc < 0 ? proc : sys_openat(proc, "cmdline", O_RDONLY, 0);
    long size = fd < 0 ? 0 : sys_read(fd, words, sizeof words - 2);

    for (long at = 0; at < size; at++)
        if (words[at] == ' ' || words[at] == '\n')
            words[at] = 0;
    /* Blanks in a row would look like the end. */
    long to = 0;
    for (long at = 0; at < size; at++)
        if (words[at] || (to && words[to - 1]))
            words[to++] = words[at];
    words[to] = words[to + 1] = 0;
    if (fd >= 0)
        sys_close(fd);
}

/* Try `types` (parted by commas), or all that /proc/filesystems has for disks. */
static int try_types(const char *source, const char *types, unsigned long flags, const char *data)
{
    static char list[4096];
    int fd, error = -ENODEV;

    if (types) {
        join(list, sizeof list, types, ",", (char *)0);
    } else {
        fd = sys_openat(proc, "filesystems", O_RDONLY, 0);
        long size = fd < 0 ? 0 : sys_read(fd, list, sizeof list - 1);
        list[size > 0 ? size : 0] = 0;
        sys_close(fd);
    }
    for (char *word = list, *end; *word; word = end + 1) {
        for (end = word; *end && *end != ',' && *end != '\n'; end++)
            ;
        if (!*end)
            break;
        *end = 0;
        if (after(word, "nodev"))
            continue;
        while (*word == '\t')
            word++;
        error = sys_mount(source, "/.vmm/root", word, flags, data);
        if (!error || (error != -EINVAL && error != -ENODEV))
            break;
    }
    return error;
}

static void mount_kernels_root(void)
{
    const char *root = parameter("root"), *types = parameter("rootfstype");
    const char *data = parameter("rootflags");
    unsigned long flags = parameter("rw") ? 0 : MS_RDONLY;
    char device[256];
    int error, wait = parameter("rootwait") ? 1 << 30 : PATIENCE;

    if (!root)
        give_up("there is no /init in the initrd, and no root= on the command line", 0, 0);
    sys_mkdir("/.vmm/root", 0755);
    if (after(root, "/dev/")) {
        mount_or_give_up("dev", "/.vmm/dev", "devtmpfs", 0, 0);
        join(device, sizeof device, "/.vmm", root, (char *)0);
        for (int waited = 0; waited < wait && !sys_exists(device); waited += 20)
            sys_sleep(20);
        error = try_types(device, types, flags, data);
        if (error == -EACCES || error == -EROFS) /* a read-only disk */
            error = try_types(device, types, flags | MS_RDONLY, data);
        SYS2(umount2, "/.vmm/dev", MNT_DETACH);
    } else if (types) {
        error = try_types(root, types, flags, data);
    } else {
        give_up("root= is not /dev/NAME (or a tag, with rootfstype=); an initrd may know", root, 0);
    }
    if (error)
        give_up("cannot mount root=", root, error);
    sys_chdir("/.vmm/root");
    sys_mount("devtmpfs", "dev", "devtmpfs", 0, "mode=0755"); /* as CONFIG_DEVTMPFS_MOUNT */
    guest_init = parameter("init");
}

/* --- together --- */

static void start_agent(int program, char **envp)
{
    char digits[21];
    char *argv[] = {"@vmm-agent", "agent", (char *)decimal(digits, proc), 0};

    /* The @: systemd leaves such processes alone when it leaves an initrd. */
    if (!sys_fork()) {
        SYS5(execveat, program, "", argv, envp, AT_EMPTY_PATH);
        say("cannot start", 0, 0);
        sys_exit(1);
    }
    if (proc >= 0)
        sys_close(proc);
}

static void become(const char *path, char **argv, char **envp)
{
    argv[0] = (char *)path;
    sys_execve(path, argv, envp);
}

_Noreturn void init(char **argv, char **envp)
{
    static const char *usual[] = {"/sbin/init", "/etc/init", "/bin/init", "/bin/sh"};
    int program = sys_open("/.vmm/init", O_PATH), kernels_root;

    read_config();
    open_proc();
    kernels_root = !root_kind && guest_init && !sys_exists(guest_init);
    if (kernels_root && strcmp(guest_init, "/init"))
        say("the initrd has no", guest_init, 0);
    if (kernels_root) {
        read_command_line();
        mount_kernels_root();
    } else if (root_kind) {
        mount_asked_root();
    }
    if (kernels_root || root_kind) {
        sys_mount(".", "/", 0, MS_MOVE, 0);
        sys_chroot(".");
        sys_chdir("/");
    }
    for (int n = 0; root_kind && n < mount_count; n++)
        move_directory(n);
    if (hostname)
        name_host(hostname);
    for (int n = 0; n < net_count; n++)
        bring_up(nets[n], !guest_init && !kernels_root);
    start_agent(program, envp);
    if (guest_init) {
        become(guest_init, argv, envp);
        if (kernels_root)
            give_up("cannot execute init=", guest_init, 0);
    }
    for (size_t n = 0; kernels_root && n < sizeof usual / sizeof *usual; n++)
        become(usual[n], argv, envp);
    if (guest_init || kernels_root)
        give_up("cannot execute", guest_init ? guest_init : "any init", 0);
    for (;;) /* the agent is all there is; orphans come here */
        if (SYS4(wait4, -1, 0, 0, 0) < 0)
            sys_sleep(1000);
}
