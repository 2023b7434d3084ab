/* vmm's agent: runs commands in the guest for the host. One program in three roles:
 *
 *     /.vmm/init as process 1             what goes before the guest's own init (init.c)
 *     @vmm-agent agent FD                 the daemon; FD is a /proc, or -1
 *     agent listen FD                     the same on a listening socket, for tests on a host
 */
#include "agent.h"

static int console = 2;

void say(const char *text, const char *more, long error)
{
    char line[512], digits[21];

    join(line, sizeof line, "vmm-agent: ", text, more ? " " : "", more ? more : "",
         error ? ": error " : "", error ? decimal(digits, error < 0 ? -error : error) : "", "\n",
         (char *)0);
    if (write_all(console, line, strlen(line)))
        write_all(2, line, strlen(line));
}

int main(int argc, char **argv, char **envp)
{
    if (argc == 3 && !strcmp(argv[1], "agent"))
        daemon(number(argv[2]));
    if (argc == 3 && !strcmp(argv[1], "listen"))
        listen_on(number(argv[2]));
    if (SYS1(getpid, 0) == 1)
        init(argv, envp);
    say("runs as process 1 of a guest, put there by vmm", 0, 0);
    return 2;
}
