/* Threads that spin for a moment between jobs and then sleep. They belong to the process: made when first needed, shared by all
engines, ended by end_threads. A process that forks leaves them to its parent; the child makes its own. */
#include "pool.h"

#include <errno.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>

#include "lanes.h"

enum { MOST_THREADS = 255, SPINS_BEFORE_YIELD = 1000, SPINS_BEFORE_SLEEP = 10000 };

typedef struct {
    _Atomic unsigned value;
    char rest_of_line[60];
} Counter;

static struct {
    Counter job __attribute__((aligned(64))); /* 256 x the job's number + its threads; 0 threads ask the workers to end */
    Counter arrived, round, share, sleepers;
    void (*work)(void *, int);
    void *context;
    int threads, made; /* of the running job; of the pool, beside the callers' own */
    pthread_t workers[MOST_THREADS];
} pool;

static pthread_mutex_t one_job = PTHREAD_MUTEX_INITIALIZER, sleep_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t wake = PTHREAD_COND_INITIALIZER;

void meet(void) {
    const unsigned round = atomic_load(&pool.round.value);
    if (atomic_fetch_add(&pool.arrived.value, 1) == (unsigned)pool.threads - 1) {
        atomic_store(&pool.arrived.value, 0);
        atomic_store(&pool.share.value, 0);
        atomic_store(&pool.round.value, round + 1);
        return;
    }
    for (int spins = 0; atomic_load_explicit(&pool.round.value, memory_order_acquire) == round; spins++)
        if (spins < SPINS_BEFORE_YIELD)
            _mm_pause();
        else
            sched_yield(); /* another process may hold the core that the last one needs */
}

int next_share(void) { return (int)atomic_fetch_add_explicit(&pool.share.value, 1, memory_order_relaxed); }

static unsigned wait_for_job(unsigned seen) {
    for (int spins = 0; spins < SPINS_BEFORE_SLEEP; spins++) {
        const unsigned job = atomic_load_explicit(&pool.job.value, memory_order_acquire);
        if (job != seen) return job;
        _mm_pause();
    }
    pthread_mutex_lock(&sleep_lock);
    atomic_fetch_add(&pool.sleepers.value, 1);
    while (atomic_load(&pool.job.value) == seen) pthread_cond_wait(&wake, &sleep_lock);
    atomic_fetch_sub(&pool.sleepers.value, 1);
    pthread_mutex_unlock(&sleep_lock);
    return atomic_load(&pool.job.value);
}

static void announce(int threads) {
    atomic_store(&pool.job.value, ((atomic_load(&pool.job.value) >> 8) + 1) << 8 | threads);
    if (atomic_load(&pool.sleepers.value)) {
        pthread_mutex_lock(&sleep_lock);
        pthread_cond_broadcast(&wake);
        pthread_mutex_unlock(&sleep_lock);
    }
}

/* Numbers too small for the normal format count as zero on every thread, as in the matrix unit. */
static void take_part(int thread) {
    const unsigned before = _mm_getcsr();
    _mm_setcsr(before | 0x8040);
    pool.work(pool.context, thread);
    _mm_setcsr(before);
    meet();
}

typedef struct {
    int thread;
    unsigned seen;
} Start;

static void *serve(void *argument) {
    const Start start = *(Start *)argument;
    free(argument);
    for (unsigned job = start.seen;;) {
        job = wait_for_job(job);
        if ((job & 255) == 0) return NULL;
        if (start.thread < (int)(job & 255)) take_part(start.thread);
    }
}

static int make_worker(void) {
    Start *start = malloc(sizeof *start);
    if (!start) return ENOMEM;
    *start = (Start){pool.made + 1, atomic_load(&pool.job.value)};
    const int error = pthread_create(&pool.workers[pool.made], NULL, serve, start);
    if (error)
        free(start);
    else
        pool.made++;
    return error;
}

static void before_fork(void) { pthread_mutex_lock(&one_job), pthread_mutex_lock(&sleep_lock); }

static void in_parent(void) { pthread_mutex_unlock(&sleep_lock), pthread_mutex_unlock(&one_job); }

static void in_child(void) {
    pool.made = 0;
    atomic_store(&pool.sleepers.value, 0);
    pthread_cond_init(&wake, NULL);
    pthread_mutex_init(&sleep_lock, NULL);
    pthread_mutex_init(&one_job, NULL);
}

__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(before_fork, in_parent, in_child); }

int run_together(void (*work)(void *context, int thread), void *context, int threads) {
    if (threads < 1 || threads > MOST_THREADS) return EINVAL;
    int error = 0;
    pthread_mutex_lock(&one_job);
    while (!error && pool.made < threads - 1) error = make_worker();
    if (!error) {
        pool.work = work, pool.context = context, pool.threads = threads;
        atomic_store(&pool.share.value, 0);
        if (threads > 1) announce(threads);
        take_part(0);
    }
    pthread_mutex_unlock(&one_job);
    return error;
}

/* Ends the workers; the next job makes new ones. */
EXPORT void end_threads(void) {
    pthread_mutex_lock(&one_job);
    announce(0);
    while (pool.made) pthread_join(pool.workers[--pool.made], NULL);
    pthread_mutex_unlock(&one_job);
}
