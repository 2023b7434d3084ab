// What /dev/rtc0 does in a guest: an update each second, an alarm, a periodic interrupt.
#include <errno.h>
#include <fcntl.h>
#include <linux/rtc.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

static int wait_for(int fd, const char *what, int seconds)
{
	struct pollfd poll_fd = { .fd = fd, .events = POLLIN };
	unsigned long data;
	int came = poll(&poll_fd, 1, seconds * 1000) == 1 && read(fd, &data, sizeof data) > 0;

	printf("rtc: %s: %s\n", what, came ? "came" : "TIMED OUT");
	return came;
}

int main(void)
{
	int fd = open("/dev/rtc0", O_RDONLY), ticks = 0;
	struct rtc_time time;
	struct rtc_wkalrm alarm = { .enabled = 1 };

	if (fd < 0 || ioctl(fd, RTC_UIE_ON, 0)) {
		printf("rtc: %s\n", strerror(errno));
		return 1;
	}
	for (int i = 0; i < 3; i++)
		ticks += wait_for(fd, "update", 20);
	ioctl(fd, RTC_UIE_OFF, 0);
	ioctl(fd, RTC_RD_TIME, &time);
	time.tm_sec += 3;
	if (time.tm_sec > 59) {
		time.tm_sec -= 60;
		if (++time.tm_min > 59) {
			time.tm_min = 0;
			time.tm_hour = (time.tm_hour + 1) % 24;
		}
	}
	alarm.time = time;
	printf("rtc: RTC_WKALM_SET: %s\n", ioctl(fd, RTC_WKALM_SET, &alarm) ? strerror(errno) : "ok");
	ticks += wait_for(fd, "alarm", 30);
	printf("rtc: %d of 4\n", ticks);
	return 0;
}
