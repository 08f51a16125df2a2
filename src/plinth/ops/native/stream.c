/* Reading memory and nothing else: the limit of decoding. */
#include "lanes.h"
#include "pool.h"

enum { SHARE_BYTES = 1 << 18 };

typedef struct {
    const char *memory;
    size_t bytes;
} Stream;

static void read_shares(void *context, int thread) {
    const Stream *s = context;
    __m512i all[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
    (void)thread;
    for (size_t start; (start = (size_t)next_share() * SHARE_BYTES) < s->bytes;)
        for (size_t i = start; i < start + SHARE_BYTES && i + 256 <= s->bytes; i += 256)
            for (int j = 0; j < 4; j++) all[j] = _mm512_xor_si512(all[j], _mm512_loadu_si512(s->memory + i + 64 * j));
    for (int j = 0; j < 4; j++) __asm__ volatile("" ::"v"(all[j])); /* so that the compiler keeps the loads */
}

/* Reads memory once, by all threads together. Returns 0 or an error number. */
EXPORT int read_memory(const void *memory, size_t bytes, int threads) {
    Stream s = {memory, bytes};
    return run_together(read_shares, &s, threads);
}
