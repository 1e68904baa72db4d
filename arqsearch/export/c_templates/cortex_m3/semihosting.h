/* Leaving the emulator (or debugger) with a verdict. */
#ifndef SEMIHOSTING_H
#define SEMIHOSTING_H

/* Never returns; 0 is success. */
void semihosting_exit(int status);

#endif
