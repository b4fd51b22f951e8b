/* threads.h: one pool of threads for the process; threads.c is the only file that starts threads.
 *
 * A team of `size` threads runs one function; each member knows its rank and splits the work by it:
 *
 *     static void scale(const fb_team *team, void *arg)      is, serially,      for (rank = 0; rank < size; rank++)
 *     {                                                                             scale(rank of size, arg);
 *         rows rank*m/size .. (rank+1)*m/size
 *         fb_barrier(team);            all members have come here before any goes on
 *     }
 *
 * The caller is rank 0 and works too. The pool is made on first use that needs it, grows to the largest team asked for,
 * and is made anew in a forked child. Its threads spin for some microseconds, in a team for up to a millisecond, then
 * sleep: an idle pool uses no CPU. While one caller has the pool, another caller runs its function alone (size 1): it never
 * waits.
 */
#ifndef FB_THREADS_H
#define FB_THREADS_H

#include <stddef.h>

typedef struct fb_team {
    int rank, size;
    struct fb_barrier *barrier; /* NULL when size is 1 */
} fb_team;

typedef void fb_team_fn(const fb_team *team, void *arg);

/* Multiply-adds under which waking a second thread costs more than it saves: about 0.1 ms of one core. */
#define FB_SMALL_WORK 5e6

/* Runs fn on a team of at most `threads`, fewer when the pool is taken or the system grants no more threads. */
void fb_parallel(int threads, fb_team_fn *fn, void *arg);
void fb_barrier(const fb_team *team);

/* Member `rank`'s share of `count` units, in steps of `step` (the last may be shorter): [*begin, *end). */
static inline void fb_split(const fb_team *team, ptrdiff_t count, ptrdiff_t step, ptrdiff_t *begin, ptrdiff_t *end)
{
    ptrdiff_t steps = (count + step - 1) / step;
    ptrdiff_t b = steps * team->rank / team->size * step, e = steps * (team->rank + 1) / team->size * step;
    *begin = b < count ? b : count;
    *end = e < count ? e : count;
}

#endif
