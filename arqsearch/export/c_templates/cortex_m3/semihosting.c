/* Text output and exit by Arm semihosting: breakpoint 0xAB, operation in r0, argument in r1. */
#include "semihosting.h"

#include "port.h"

#include <stdint.h>

enum { SYS_WRITE0 = 0x04, SYS_EXIT = 0x18 };
#define STOPPED_APPLICATION_EXIT 0x20026u
#define STOPPED_RUN_TIME_ERROR 0x20023u

static void call(uint32_t operation, uintptr_t argument)
{
    register uint32_t r0 __asm__("r0") = operation;
    register uintptr_t r1 __asm__("r1") = argument;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
}

void port_write(const char *text)
{
    call(SYS_WRITE0, (uintptr_t)text);
}

void semihosting_exit(int status)
{
    for (;;) {
        call(SYS_EXIT, status == 0 ? STOPPED_APPLICATION_EXIT : STOPPED_RUN_TIME_ERROR);
    }
}
