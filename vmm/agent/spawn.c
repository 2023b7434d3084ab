/* Starting a command: its streams, its session, and the news of whether it could be started. */
#include "agent.h"

static const char default_path[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

struct news {
    int error;
    u32 what;
};

/* As execvpe(3): the first of PATH that can be executed; a file without permission is remembered.
 */
static int execute(const struct command *command)
{
    static char path[4096];
    const char *name = command->argv[0], *directories = default_path, *found;
    int error = -ENOENT;

    for (char **entry = command->envp; *entry; entry++)
        if ((found = after(*entry, "PATH=")))
            directories = found;
    for (const char *letter = name; *letter; letter++)
        if (*letter == '/')
            return sys_execve(name, command->argv, command->envp);
    while (*name) {
        size_t size = 0;
        int tried;

        while (directories[size] && directories[size] != ':')
            size++;
        if (size + strlen(name) + 2 <= sizeof path) {
            memcpy(path, directories, size);
            path[size] = 0;
            join(path + size, sizeof path - size, size ? "/" : "", name, (char *)0);
            tried = sys_execve(path, command->argv, command->envp);
            if (tried != -ENOENT && tried != -ENOTDIR && tried != -EACCES)
                return tried;
            if (tried == -EACCES)
                error = tried;
        }
        if (!directories[size])
            break;
        directories += size + 1;
    }
    return error;
}

/* Add NAME=VALUE to the environment, where it has no NAME yet; there is room for USUAL_MAX. */
static void add_variable(char **envp, char *buffer, size_t size, const char *name, const char *value)
{
    char **end = envp;

    for (; *end; end++) {
        const char *rest = after(*end, name);
        if (rest && *rest == '=')
            return;
    }
    join(buffer, size, name, "=", value, (char *)0);
    end[0] = buffer;
    end[1] = 0;
}

/* Go on as the command's user: with its own streams, which else are root's to open again by
 * /dev/stdout or /dev/tty, its groups, and its HOME. */
static int become(const struct command *command)
{
    static struct user user;
    static char home[1100], name[100], logname[100], shell[1100];
    int error = find_user(command->user, &user), tty = command->request->flags & TERMINAL;

    if (error)
        return error;
    for (int stream = IN; stream <= ERR; stream++) {
        struct stat found;
        if (!sys_fstatat(stream, "", &found, AT_EMPTY_PATH) &&
            (S_ISFIFO(found.st_mode) || tty))
            SYS3(fchown, stream, user.uid, tty ? found.st_gid : user.gid);
    }
    error = become_user(&user);
    add_variable(command->envp, home, sizeof home, "HOME", *user.home ? user.home : "/");
    add_variable(command->envp, shell, sizeof shell, "SHELL", user.shell);
    if (*user.name) {
        add_variable(command->envp, name, sizeof name, "USER", user.name);
        add_variable(command->envp, logname, sizeof logname, "LOGNAME", user.name);
    }
    return error;
}

static _Noreturn void child(const struct command *command, const int ends[STREAMS], int report)
{
    struct news news = {0, CANNOT_EXECUTE};
    int kind = command->request->kind;

    sys_setsid();
    if (kind == EXECUTE && command->request->flags & TERMINAL)
        sys_ioctl(ends[IN], TIOCSCTTY, 0);
    for (int stream = IN; stream <= ERR; stream++)
        sys_dup2(ends[stream], stream);
    for (int signal = 1; signal <= 64; signal++)
        if (signal != SIGKILL && signal != SIGSTOP)
            sys_signal(signal, SIG_DFL);
    sys_block_signals(0);
    SYS1(umask, 022);
    if (kind != EXECUTE) {
        /* Not executed, so nothing closes these by itself. */
        for (int fd = ERR + 1; fd < 256; fd++)
            sys_close(fd);
        SYS1(umask, 0);
        sys_exit((kind == PUT ? tree_put : tree_get)(command->argv[0]));
    }
    if (command->user) {
        news.error = become(command);
        news.what = CANNOT_BECOME;
    }
    if (!news.error && *command->directory) {
        news.error = sys_chdir(command->directory);
        news.what = CANNOT_CHANGE_DIRECTORY;
    }
    if (!news.error) {
        news.what = CANNOT_EXECUTE;
        news.error = execute(command);
    }
    write_all(report, &news, sizeof news);
    sys_exit(127);
}

/* A new terminal's master. Not every guest has a devpts: an initrd's init, for one, may do without
 * until somebody wants a terminal. */
static int open_master(int in_guest)
{
    int fd = sys_open("/dev/ptmx", O_RDWR | O_NOCTTY);

    if (fd >= 0 || !in_guest)
        return fd;
    sys_mkdir("/dev", 0755);
    sys_mkdir("/dev/pts", 0755);
    if (sys_mount("devpts", "/dev/pts", "devpts", 0, "mode=620,ptmxmode=666"))
        return fd;
    fd = sys_open("/dev/ptmx", O_RDWR | O_NOCTTY);
    return fd >= 0 ? fd : sys_open("/dev/pts/ptmx", O_RDWR | O_NOCTTY);
}

/* The two ends of a new terminal. */
static int terminal(const struct command *command, int ends[2])
{
    struct winsize size = {command->request->rows, command->request->columns, 0, 0};
    int unlocked = 0;

    ends[0] = open_master(command->in_guest);
    if (ends[0] < 0)
        return ends[0];
    sys_ioctl(ends[0], TIOCSPTLCK, &unlocked);
    sys_ioctl(ends[0], TIOCSWINSZ, &size);
    ends[1] = sys_ioctl(ends[0], TIOCGPTPEER, (void *)(long)(O_RDWR | O_NOCTTY | O_CLOEXEC));
    return ends[1] < 0 ? ends[1] : 0;
}

/* Our ends and the command's; /dev/null is our own standard input. */
static int connect_streams(const struct command *command, int ours[STREAMS], int theirs[STREAMS])
{
    const struct request *request = command->request;
    static const int null_flag[STREAMS] = {NULL_IN, NULL_OUT, NULL_ERR};
    int pair[2], error;

    for (int stream = IN; stream <= ERR; stream++) {
        ours[stream] = -1;
        theirs[stream] = 0;
    }
    if (request->kind == EXECUTE && request->flags & TERMINAL) {
        error = terminal(command, pair);
        if (error < 0)
            return error;
        ours[OUT] = pair[0];
        ours[IN] = sys_fcntl(pair[0], F_DUPFD_CLOEXEC, 3);
        theirs[IN] = theirs[OUT] = theirs[ERR] = pair[1];
        return 0;
    }
    for (int stream = IN; stream <= ERR; stream++) {
        if (request->flags & null_flag[stream])
            continue;
        if (stream == ERR && request->flags & ERR_TO_OUT) {
            theirs[ERR] = theirs[OUT];
            continue;
        }
        error = sys_pipe(pair, O_CLOEXEC);
        if (error < 0)
            return error;
        ours[stream] = pair[stream == IN];
        theirs[stream] = pair[stream != IN];
    }
    return 0;
}

int spawn(const struct command *command, int streams[STREAMS], u32 *what)
{
    int theirs[STREAMS], report[2], pid;
    struct news news = {0, 0};

    *what = CANNOT_START;
    pid = connect_streams(command, streams, theirs);
    if (pid >= 0)
        pid = sys_pipe(report, O_CLOEXEC);
    if (pid < 0)
        return pid;
    pid = sys_fork();
    if (!pid)
        child(command, theirs, report[1]);
    sys_close(report[1]);
    for (int stream = IN; stream <= ERR; stream++)
        if (theirs[stream] > ERR && (stream == IN || theirs[stream] != theirs[stream - 1]))
            sys_close(theirs[stream]);
    if (pid > 0 && !read_all(report[0], &news, sizeof news)) {
        SYS4(wait4, pid, 0, 0, 0);
        *what = news.what;
        pid = news.error;
    }
    sys_close(report[0]);
    return pid;
}
