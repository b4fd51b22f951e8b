/* dispatch.h: from the table of kernel sets (isa.def) and the CPU to the one merged set that a model runs on. */
#ifndef FB_DISPATCH_H
#define FB_DISPATCH_H

#include "kernels.h"

/* The kernel sets in this build, best first. */
typedef struct fb_isa_row {
    const fb_kernels *kernels;
    int supported; /* this CPU and OS can run it */
} fb_isa_row;
int fb_isa_count(void);
fb_isa_row fb_isa_at(int index);

/* Fills *merged with the best supported rows from `isa` down (NULL: environment FASTBERT_ISA, else no cap).
 * A slot is taken from the best row that has it. An unknown or unsupported name is FB_EINVAL; the text lists the
 * valid ones. */
fb_status fb_select_kernels(const char *isa, fb_kernels *merged, fb_error *err);

#endif
