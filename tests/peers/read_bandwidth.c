/* Reads memory with a number of threads: the roof of a product with one vector. */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    const uint64_t *from;
    size_t count, ahead;
    int core;
    uint64_t sum;
} part;

#if defined(__x86_64__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
static uint64_t read_all(const uint64_t *from, size_t count, size_t ahead) {
    uint64_t sums[32] = {0}, sum = 0;
    for (size_t i = 0; i + 32 <= count; i += 32) {
        if (ahead)
            for (int line = 0; line < 4; line++)
                __builtin_prefetch((const char *)(from + i) + ahead + line * 64);
        for (int lane = 0; lane < 32; lane++) sums[lane] ^= from[i + lane];
    }
    for (int lane = 0; lane < 32; lane++) sum ^= sums[lane];
    return sum;
}

static void read_part(part *p) { p->sum = read_all(p->from, p->count, p->ahead); }

static void *work(void *argument) {
    part *p = argument;
    cpu_set_t own;
    /* The thread that starts this one may be bound to its core, which a new thread inherits. */
    CPU_ZERO(&own);
    CPU_SET(p->core, &own);
    sched_setaffinity(0, sizeof own, &own);
    read_part(p);
    return NULL;
}

/* `count` numbers; prefetching `ahead` bytes, or not for 0. */
uint64_t read_memory(const uint64_t *from, size_t count, size_t ahead, int threads) {
    part parts[64];
    pthread_t started[64];
    uint64_t sum = 0;
    for (int i = 0; i < threads; i++) {
        size_t first = count / threads * i;
        size_t own = i + 1 < threads ? count / threads : count - first;
        parts[i] = (part){from + first, own, ahead, i, 0};
        if (i > 0) pthread_create(&started[i], NULL, work, &parts[i]);
    }
    read_part(&parts[0]);
    for (int i = 1; i < threads; i++) pthread_join(started[i], NULL);
    for (int i = 0; i < threads; i++) sum ^= parts[i].sum;
    return sum;
}
