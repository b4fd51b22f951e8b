/* error.h: how a failure travels: a status as the return value, a sentence in the caller's fb_error. */
#ifndef FB_ERROR_H
#define FB_ERROR_H

#include "fastbert.h"

#if defined(__GNUC__)
#define FB_PRINTF(fmt, args) __attribute__((format(printf, fmt, args)))
#else
#define FB_PRINTF(fmt, args)
#endif

/* Writes the sentence into err (which may be NULL) and returns status: `return fb_fail(err, FB_EINVAL, "...")`. */
fb_status fb_fail(fb_error *err, fb_status status, const char *format, ...) FB_PRINTF(3, 4);

#endif
