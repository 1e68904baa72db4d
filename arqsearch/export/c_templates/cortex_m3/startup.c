/* From reset to main on a Cortex-M: vector table, initialised data, exit through semihosting. */
#include "semihosting.h"

#include <stdint.h>

int main(int argc, char **argv);

/* Defined by the linker script. */
extern uint32_t image_stack_top, image_data_load, image_data_start, image_data_end, image_bss_start, image_bss_end;

void reset_handler(void);
void fault_handler(void);

void reset_handler(void)
{
    const uint32_t *from = &image_data_load;
    for (uint32_t *to = &image_data_start; to < &image_data_end;) {
        *to++ = *from++;
    }
    for (uint32_t *to = &image_bss_start; to < &image_bss_end;) {
        *to++ = 0;
    }
    semihosting_exit(main(0, (char **)0));
}

void fault_handler(void)
{
    semihosting_exit(1);
}

typedef union vector {
    const uint32_t *stack;
    void (*handler)(void);
} vector;

/* Stack, reset, NMI, hard fault, memory, bus and usage faults; nothing here enables an interrupt. */
extern const vector vectors[7];
const vector vectors[7] __attribute__((section(".vectors"), used)) = {
    {&image_stack_top},        {.handler = reset_handler}, {.handler = fault_handler}, {.handler = fault_handler},
    {.handler = fault_handler}, {.handler = fault_handler}, {.handler = fault_handler},
};
