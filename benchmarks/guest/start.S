/* PVH entry (Xen's docs/misc/pvh.pandoc): 32-bit protected mode, ebx the start info. To long mode
 * with the first 4 GiB mapped one to one and open to user code, then to privilege level 3 with every port
 * open, because that is what kvm_pvm runs on the processor itself; level 0 it interprets. */

#define CODE 0x08
#define DATA 0x10
#define USER_DATA (0x20 | 3)
#define USER_CODE (0x28 | 3)
#define TASK 0x30
#define MSR_EFER 0xc0000080
#define MSR_KVM_SYSTEM_TIME_NEW 0x4b564d01

    .section .note.pvh, "a", @note
    .long 4, 4, 18              /* XEN_ELFNOTE_PHYS32_ENTRY */
    .asciz "Xen"
    .long start

    .text
    .code32
    .globl start
start:
    cli
    mov %ebx, %esi
    lgdt gdt_pointer
    mov $pml4, %eax
    mov %eax, %cr3
    mov $0x20, %eax             /* PAE */
    mov %eax, %cr4
    mov $MSR_EFER, %ecx
    xor %edx, %edx
    mov $0x100, %eax            /* LME */
    wrmsr
    mov $0x80000031, %eax       /* PG, NE, ET, PE */
    mov %eax, %cr0
    ljmp $CODE, $long_mode

    .code64
long_mode:
    mov $DATA, %eax
    mov %eax, %ss
    mov %eax, %ds
    mov %eax, %es
    mov $kernel_stack, %esp
    mov $task, %eax             /* its base; it lies below 16 MiB */
    mov %ax, task_descriptor + 2
    shr $16, %eax
    mov %al, task_descriptor + 4
    mov $TASK, %eax
    ltr %ax

    mov $idt, %edi              /* every exception ends it, with a word */
    mov $32, %ecx
1:  mov $fault, %eax
    mov %ax, (%rdi)
    movl $(0x8e00 << 16), 4(%rdi)
    movw $CODE, 2(%rdi)
    shr $16, %eax
    mov %ax, 6(%rdi)
    add $16, %edi
    dec %ecx
    jnz 1b
    lidt idt_pointer

    mov $MSR_KVM_SYSTEM_TIME_NEW, %ecx
    mov $(pvclock + 1), %eax    /* its rate turns time stamps into nanoseconds */
    xor %edx, %edx
    wrmsr

    pushq $USER_DATA
    pushq $user_stack
    pushq $0x3002               /* IOPL 3 */
    pushq $USER_CODE
    pushq $user
    iretq
user:
    mov $USER_DATA, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %esi, %edi
    call guest_main
    ud2

fault:
    mov %rsp, %rdi
    and $-16, %rsp
    call guest_fault

    .data
    .balign 16
gdt:
    .quad 0, 0x00af9b000000ffff, 0x00cf93000000ffff, 0
    .quad 0x00cff3000000ffff, 0x00affb000000ffff
task_descriptor:
    .quad 0x0000890000002068, 0
gdt_pointer:
    .word . - gdt - 1
    .quad gdt
idt_pointer:
    .word 32 * 16 - 1
    .quad idt

task:                           /* all ports open, for where IOPL is not looked at */
    .long 0
    .quad kernel_stack
    .fill 0x66 - 12, 1, 0
    .word 0x68
    .fill 8192, 1, 0
    .byte 0xff

    .balign 4096
pml4:
    .quad pdpt + 7
    .fill 511, 8, 0
pdpt:
    .quad directories + 7, directories + 0x1007, directories + 0x2007, directories + 0x3007
    .fill 508, 8, 0
directories:
    .set page, 0
    .rept 2048
    .quad (page << 21) + 0x87   /* 2 MiB: present, writable, user */
    .set page, page + 1
    .endr

    .globl pvclock
    .balign 64
pvclock:
    .fill 64, 1, 0

    .bss
    .balign 4096
idt:
    .skip 4096
    .skip 16384
kernel_stack:
    .skip 65536
user_stack:
    .section .note.GNU-stack, "", @progbits
