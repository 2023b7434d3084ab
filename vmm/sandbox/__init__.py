"""What a process, or one of its threads, can give up for good: files (Landlock), system calls
(seccomp), capabilities.

All three belong to a thread, and to the threads and programs that it starts afterwards. Nothing
here knows what is confined.
"""
