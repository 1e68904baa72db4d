/* Text output where there is a C library with stdio. */
#include "port.h"

#include <stdio.h>

void port_write(const char *text)
{
    (void)fputs(text, stdout);
}
