/* threads.c: the pool. A team is assembled under one lock; members wait on a generation counter: a short spin, then a
 * condition variable. Barriers are a counter and a generation in the same manner.
 */
#define _GNU_SOURCE /* cpu_set_t */
#include "threads.h"

#include "fastbert.h"

#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#ifdef _WIN32
#define WIN32_LEAN_AND_MEAN
#include <windows.h>
typedef SRWLOCK fb_mutex;
typedef CONDITION_VARIABLE fb_cond;
#define FB_MUTEX_INIT SRWLOCK_INIT
#define FB_COND_INIT CONDITION_VARIABLE_INIT
static void lock(fb_mutex *m) { AcquireSRWLockExclusive(m); }
static int try_lock(fb_mutex *m) { return TryAcquireSRWLockExclusive(m); }
static void unlock(fb_mutex *m) { ReleaseSRWLockExclusive(m); }
static void wait(fb_cond *c, fb_mutex *m) { SleepConditionVariableSRW(c, m, INFINITE, 0); }
static void wake_all(fb_cond *c) { WakeAllConditionVariable(c); }
#else
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>
typedef pthread_mutex_t fb_mutex;
typedef pthread_cond_t fb_cond;
#define FB_MUTEX_INIT PTHREAD_MUTEX_INITIALIZER
#define FB_COND_INIT PTHREAD_COND_INITIALIZER
static void lock(fb_mutex *m) { pthread_mutex_lock(m); }
static int try_lock(fb_mutex *m) { return pthread_mutex_trylock(m) == 0; }
static void unlock(fb_mutex *m) { pthread_mutex_unlock(m); }
static void wait(fb_cond *c, fb_mutex *m) { pthread_cond_wait(c, m); }
static void wake_all(fb_cond *c) { pthread_cond_broadcast(c); }
#endif

#if defined(__x86_64__) || defined(__i386__) || defined(_M_X64)
#include <immintrin.h>
static void pause_cpu(void) { _mm_pause(); }
#elif defined(__aarch64__) || defined(__arm__)
static void pause_cpu(void) { __asm__ volatile("yield"); }
#else
static void pause_cpu(void) {}
#endif

enum {
    MAX_THREADS = 256,
    SPINS = 2000,      /* pauses before sleep: about 20-80 microseconds, the cost of a wake-up or two */
    TEAM_SPINS = 20000 /* in a team, whose members all have a core: who sleeps may wake on the core of another */
};

/* A number that only grows, and those who wait for it to reach a value. */
typedef struct event {
    _Atomic uint32_t value;
    _Atomic int sleepers;
    fb_mutex mutex;
    fb_cond cond;
} event;

static void event_advance(event *e)
{
    atomic_fetch_add(&e->value, 1);
    if (atomic_load(&e->sleepers) > 0) {
        lock(&e->mutex); /* a sleeper between its last look and its wait holds this lock */
        wake_all(&e->cond);
        unlock(&e->mutex);
    }
}

static void event_wait_past(event *e, uint32_t seen, int spins)
{
    for (int i = 0; i < spins; i++) {
        if (atomic_load(&e->value) != seen)
            return;
        pause_cpu();
    }
    lock(&e->mutex);
    atomic_fetch_add(&e->sleepers, 1);
    while (atomic_load(&e->value) == seen)
        wait(&e->cond, &e->mutex);
    atomic_fetch_sub(&e->sleepers, 1);
    unlock(&e->mutex);
}

struct fb_barrier {
    _Atomic int arrived;
    event opened;
};

/* One worker's mailbox, on cache lines of its own. */
typedef struct mailbox {
    _Alignas(128) event work; /* advances once for each team that this worker is in */
} mailbox;

static struct {
    fb_mutex busy; /* held by the caller whose team runs */
    int started;   /* worker threads alive: ranks 1 .. started */
    int size;      /* of the team that runs, how long its members spin, and what it runs */
    int spins;
    fb_team_fn *fn;
    void *arg;
    _Atomic int unfinished; /* workers of the team that have not returned from fn */
    event finished;
    struct fb_barrier barrier;
    mailbox mailboxes[MAX_THREADS]; /* [rank]; 0 is the caller's and unused */
} pool = {.busy = FB_MUTEX_INIT};

static void event_init(event *e)
{
    const event fresh = {.mutex = FB_MUTEX_INIT, .cond = FB_COND_INIT};
    memcpy(e, &fresh, sizeof fresh);
}

void fb_barrier(const fb_team *team)
{
    if (team->size == 1)
        return;
    struct fb_barrier *b = team->barrier;
    const uint32_t seen = atomic_load(&b->opened.value);
    if (atomic_fetch_add(&b->arrived, 1) == team->size - 1) {
        atomic_store(&b->arrived, 0);
        event_advance(&b->opened);
    } else {
        event_wait_past(&b->opened, seen, pool.spins);
    }
}

static void worker(int rank)
{
    for (uint32_t seen = 0;; seen++) {
        event_wait_past(&pool.mailboxes[rank].work, seen, SPINS);
        const fb_team team = {rank, pool.size, &pool.barrier};
        pool.fn(&team, pool.arg);
        if (atomic_fetch_sub(&pool.unfinished, 1) == 1)
            event_advance(&pool.finished);
    }
}

#ifdef _WIN32
static DWORD WINAPI worker_main(void *rank)
{
    worker((int)(intptr_t)rank);
    return 0;
}
static int start_worker(int rank)
{
    HANDLE thread = CreateThread(NULL, 0, worker_main, (void *)(intptr_t)rank, 0, NULL);
    if (thread != NULL)
        CloseHandle(thread);
    return thread != NULL;
}
static void watch_forks(void) {}
#else
static void *worker_main(void *rank)
{
    worker((int)(intptr_t)rank);
    return NULL;
}
static int start_worker(int rank)
{
    pthread_attr_t attributes;
    pthread_t thread;
    sigset_t all, old;
    if (pthread_attr_init(&attributes) != 0)
        return 0;
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    sigfillset(&all); /* signals are for the threads of the application */
    pthread_sigmask(SIG_SETMASK, &all, &old);
    const int failed = pthread_create(&thread, &attributes, worker_main, (void *)(intptr_t)rank);
    pthread_sigmask(SIG_SETMASK, &old, NULL);
    pthread_attr_destroy(&attributes);
    return !failed;
}

/* Fork keeps only the calling thread: the child starts from an empty pool. */
static void forget_pool(void)
{
    const fb_mutex unlocked = FB_MUTEX_INIT;
    memcpy(&pool.busy, &unlocked, sizeof unlocked);
    pool.started = 0;
}
static void watch_forks(void)
{
    static int watched; /* guarded by pool.busy */
    if (!watched)
        watched = pthread_atfork(NULL, NULL, forget_pool) == 0;
}
#endif

/* Called with pool.busy held and no team running. */
static void grow(int workers)
{
    if (pool.started == 0) {
        watch_forks();
        event_init(&pool.finished);
        event_init(&pool.barrier.opened);
        atomic_store(&pool.barrier.arrived, 0);
    }
    for (; pool.started < workers; pool.started++) {
        event_init(&pool.mailboxes[pool.started + 1].work);
        if (!start_worker(pool.started + 1))
            return;
    }
}

static int machine_threads(void);

void fb_parallel(int threads, fb_team_fn *fn, void *arg)
{
    const fb_team alone = {0, 1, NULL};
    if (threads > MAX_THREADS)
        threads = MAX_THREADS;
    if (threads <= 1 || !try_lock(&pool.busy)) {
        fn(&alone, arg);
        return;
    }
    grow(threads - 1);
    const fb_team team = {0, pool.started + 1 < threads ? pool.started + 1 : threads, &pool.barrier};
    if (team.size == 1) {
        unlock(&pool.busy);
        fn(&alone, arg);
        return;
    }
    pool.size = team.size;
    pool.spins = team.size <= machine_threads() ? TEAM_SPINS : SPINS;
    pool.fn = fn;
    pool.arg = arg;
    atomic_store(&pool.unfinished, team.size - 1);
    const uint32_t seen = atomic_load(&pool.finished.value);
    for (int rank = 1; rank < team.size; rank++)
        event_advance(&pool.mailboxes[rank].work);
    fn(&team, arg);
    event_wait_past(&pool.finished, seen, pool.spins);
    unlock(&pool.busy);
}

/* ---- how many threads ---- */

static _Atomic int chosen_threads;

void fb_set_num_threads(int threads)
{
    atomic_store(&chosen_threads, threads < 0 ? 0 : threads > MAX_THREADS ? MAX_THREADS : threads);
}

#ifdef __linux__
/* CPUs that the cgroup's quota is worth, rounded up; 0 without a quota. Version 2 first, then version 1. */
static int quota_cpus(void)
{
    long long quota = -1, period = 0;
    FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
    if (f != NULL) {
        if (fscanf(f, "%lld %lld", &quota, &period) != 2)
            quota = -1;
        fclose(f);
    } else {
        if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", "r")) != NULL) {
            if (fscanf(f, "%lld", &quota) != 1)
                quota = -1;
            fclose(f);
        }
        if ((f = fopen("/sys/fs/cgroup/cpu/cpu.cfs_period_us", "r")) != NULL) {
            if (fscanf(f, "%lld", &period) != 1)
                period = 0;
            fclose(f);
        }
    }
    if (quota <= 0 || period <= 0)
        return 0;
    const long long cpus = (quota + period - 1) / period;
    return cpus < MAX_THREADS ? (int)cpus : MAX_THREADS;
}

/* CPUs of the calling thread's affinity mask, 0 where the system does not say. */
static int allowed_cpus(void)
{
    cpu_set_t mask;
    return sched_getaffinity(0, sizeof mask, &mask) == 0 ? CPU_COUNT(&mask) : 0;
}

/* Those of them that are the first of their core within the mask; every one where /sys says nothing. */
static int allowed_cores(void)
{
    cpu_set_t mask;
    if (sched_getaffinity(0, sizeof mask, &mask) != 0)
        return 0;
    int cores = 0;
    for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
        if (!CPU_ISSET(cpu, &mask))
            continue;
        char path[96];
        snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
        FILE *f = fopen(path, "r");
        int first = cpu, sibling, shared = 0;
        if (f != NULL) {
            /* "0,32" or "0-1": any lower sibling in the mask already stands for this core. */
            while (fscanf(f, "%d", &sibling) == 1) {
                const int separator = fgetc(f);
                int last = sibling;
                if (separator == '-' && fscanf(f, "%d", &last) == 1)
                    fgetc(f);
                for (int s = sibling; s <= last && s < first; s++)
                    shared |= CPU_ISSET(s, &mask);
            }
            fclose(f);
        }
        cores += !shared;
    }
    return cores;
}

static int within_quota(int n)
{
    static _Atomic int counted = -1; /* once: reading files costs as much as a short text */
    int quota = atomic_load(&counted);
    if (quota < 0)
        atomic_store(&counted, quota = quota_cpus());
    if (n < 1)
        n = (int)sysconf(_SC_NPROCESSORS_ONLN);
    return quota > 0 && quota < n ? quota : n;
}
static int count_threads(void) { return within_quota(allowed_cores()); }
static int most_threads(void) { return within_quota(allowed_cpus()); }
#elif defined(_WIN32)
static int count_threads(void)
{
    SYSTEM_INFO info;
    GetSystemInfo(&info);
    return (int)info.dwNumberOfProcessors;
}
static int most_threads(void) { return count_threads(); }
#else
static int count_threads(void) { return (int)sysconf(_SC_NPROCESSORS_ONLN); }
static int most_threads(void) { return count_threads(); }
#endif

/* What this machine allows: counted once, for the files do not change what a call costs. */
static int machine_threads(void)
{
    static _Atomic int counted;
    int n = atomic_load(&counted);
    if (n == 0)
        atomic_store(&counted, n = count_threads());
    return n;
}

/* A whole positive number, or 0. OMP_NUM_THREADS may be a list ("4,2"): its first entry counts. */
static int threads_from(const char *variable)
{
    const char *text = getenv(variable);
    if (text == NULL)
        return 0;
    char *end;
    const long n = strtol(text, &end, 10);
    return end != text && (*end == '\0' || *end == ',') && n > 0 ? (n < MAX_THREADS ? (int)n : MAX_THREADS) : 0;
}

int fb_get_num_threads(void)
{
    int n = atomic_load(&chosen_threads);
    if (n == 0)
        n = threads_from("FASTBERT_NUM_THREADS");
    if (n == 0)
        n = threads_from("OMP_NUM_THREADS");
    if (n == 0)
        n = machine_threads();
    return n < 1 ? 1 : n > MAX_THREADS ? MAX_THREADS : n;
}

int fb_usable_threads(int threads)
{
    if (threads < 1)
        threads = fb_get_num_threads();
    if (threads <= machine_threads())
        return threads;
    const int most = most_threads(); /* not counted once: the mask of this thread may be another */
    return most < 1 ? 1 : threads < most ? threads : most;
}
