/* Gradient of a matrix from N rows: out (F, D) = grad^T (F, N) x (N, D), summed in fp32 on the matrix unit.

The library's own product takes its first operand transposed at half speed: it repacks both for every call. Here the operand with
fewer columns is transposed in registers, the other only interleaved, a block of rows at a time that stays in the second-level cache. */
#include "lanes.h"
#include <sys/syscall.h>
#include <unistd.h>

#define ROWS 256    /* summed at a time: a block of both operands and of the results stays in the second-level cache */
#define COLUMNS 512

/* rows x 32 columns of a, from its column 0, as tiles of the transpose: two tiles for every 32 rows. */
INLINE void pack_left(const bf16 *a, size_t stride, int rows, uint32_t *tiles) {
    for (int n = 0; n < rows; n += 32)
        for (int half = 0; half < 2; half++) {
            __m512i v[16];
            for (int i = 0; i < 16; i++) {
                const bf16 *p = a + (n + 2 * i) * stride + 16 * half;
                __m512i first = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p));
                __m512i second = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(p + stride)));
                v[i] = _mm512_or_si512(first, _mm512_slli_epi32(second, 16));
            }
            transpose16(v);
            uint32_t *tile = tiles + (size_t)(n / 32) * 512 + 256 * half;
            for (int i = 0; i < 16; i++) _mm512_store_si512(tile + 16 * i, v[i]);
        }
}

/* sums (M, C), fp32, += a^T b, or = where they are fresh; a (N, M), b (N, C) contiguous; N, M and C multiples of 32. */
EXPORT void add_products(const bf16 *a, const bf16 *b, long N, int M, int C, float *sums, int fresh) {
    uint32_t *pairs = aligned((size_t)ROWS * COLUMNS * 2), *left = aligned((size_t)N * M * 2);
    configure_tiles();
    for (long n = 0; n < N; n += ROWS) {
        const int rows = N - n < ROWS ? N - n : ROWS;
        for (int m = 0; m < M; m += 32) pack_left(a + n * M + m, M, rows, left + (n * M + (size_t)m * rows) / 2);
    }
    for (int start = 0; start < C; start += COLUMNS) {
        const int columns = C - start < COLUMNS ? C - start : COLUMNS;
        for (long n = 0; n < N; n += ROWS) {
            const int rows = N - n < ROWS ? N - n : ROWS;
            pack_pairs(b + n * C + start, C, rows, columns, pairs);
            for (int m = 0; m < M; m += 32) {
                const uint32_t *tiles = left + (n * M + (size_t)m * rows) / 2;
                for (int c = 0; c < columns; c += 32) {
                    float *block = sums + (size_t)m * C + start + c;
                    if (fresh && n == 0)
                        zero_results();
                    else
                        load_results(block, C);
                    for (int k = 0; k < rows; k += 32) {
                        const uint32_t *tile = tiles + (size_t)k * 16, *pair = pairs_at(pairs, rows, k, c);
                        multiply(tile, tile + 256, 64, pair, pair + 16, 128);
                    }
                    store_results(block, C);
                }
            }
        }
    }
    _tile_release();
    free(pairs), free(left);
}

/* out (F, D), fp32, (+)= the sum of n blocks of sums (F, D), or of sums (D, F) when transposed. F and D multiples of 16. */
EXPORT void gather_sums(const float **sums, int n, float *out, int F, int D, int transposed, int add) {
    for (int f = 0; f < F; f += 16)
        for (int d = 0; d < D; d += 16) {
            __m512 v[16];
            for (int i = 0; i < 16; i++) {
                const size_t at = transposed ? (size_t)(d + i) * F + f : (size_t)(f + i) * D + d;
                v[i] = _mm512_loadu_ps(sums[0] + at);
                for (int k = 1; k < n; k++) v[i] = _mm512_add_ps(v[i], _mm512_loadu_ps(sums[k] + at));
            }
            if (transposed) transpose16((__m512i *)v);
            for (int i = 0; i < 16; i++) {
                float *row = out + (size_t)(f + i) * D + d;
                _mm512_storeu_ps(row, add ? _mm512_add_ps(v[i], _mm512_loadu_ps(row)) : v[i]);
            }
        }
}

/* out (F, D) in bf16 of sums (F, D), or of sums (D, F) when transposed. */
EXPORT void round_sums(const float *sums, bf16 *out, int F, int D, int transposed) {
    if (!transposed) {
        for (size_t i = 0; i < (size_t)F * D; i += 16) store16(out + i, _mm512_loadu_ps(sums + i));
        return;
    }
    for (int f = 0; f < F; f += 16)
        for (int d = 0; d < D; d += 16) {
            __m512i v[16];
            for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(sums + (size_t)(d + i) * F + f);
            transpose16(v);
            for (int i = 0; i < 16; i++) store16(out + (size_t)(f + i) * D + d, _mm512_castsi512_ps(v[i]));
        }
}

/* Asks Linux for the matrix unit's registers; 0 when this process may use them. */
EXPORT long request_tiles(void) { return syscall(SYS_arch_prctl, 0x1023, 18); }
