#include "error.h"

#include <stdarg.h>
#include <stdio.h>

fb_status fb_fail(fb_error *err, fb_status status, const char *format, ...)
{
    if (err != NULL) {
        va_list args;
        va_start(args, format);
        vsnprintf(err->text, sizeof err->text, format, args);
        va_end(args);
        err->status = status;
    }
    return status;
}
