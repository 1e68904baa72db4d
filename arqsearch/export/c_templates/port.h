/* What the example needs of the machine: somewhere to write text. */
#ifndef PORT_H
#define PORT_H

void port_write(const char *text);

#endif
