/* Vectors of sixteen numbers (AVX-512) and tiles of the matrix unit (AMX): what the kernels share. */
#pragma once
#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef uint16_t bf16;

#define INLINE static inline __attribute__((always_inline))
#define EXPORT __attribute__((visibility("default")))
#define LOG2E 1.44269504088896340736f

INLINE __m512 load16(const bf16 *x) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)x)), 16));
}

INLINE void store16(bf16 *x, __m512 values) { _mm256_storeu_si256((__m256i *)x, (__m256i)_mm512_cvtneps_pbh(values)); }

INLINE __m512 load16_masked(const bf16 *x, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16));
}

INLINE void store16_masked(bf16 *x, __mmask16 mask, __m512 values) {
    _mm256_mask_storeu_epi16(x, mask, (__m256i)_mm512_cvtneps_pbh(values));
}

INLINE float to_float(bf16 x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* 2^x: the integer part goes into the exponent, the rest, within half a unit of 0, through a polynomial (error 4e-6). */
INLINE __m512 exp2_16(__m512 x) {
    __m512 whole = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 rest = _mm512_sub_ps(x, whole);
    __m512 y = _mm512_set1_ps(0.009618129f);
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.055504109f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.240226507f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(0.693147181f));
    y = _mm512_fmadd_ps(y, rest, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(y, whole);
}

INLINE void *aligned(size_t bytes) { return aligned_alloc(64, (bytes + 63) / 64 * 64); }

/* Transposes sixteen rows of sixteen 32-bit numbers in registers. */
INLINE void transpose16(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* Of two rows of 32 bf16, the pairs (first, second) of columns 0-15 and of columns 16-31: how the matrix unit wants its second operand. */
INLINE void interleave(__m512i first, __m512i second, __m512i *low, __m512i *high) {
    const __m512i index = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35,
                                           3, 34, 2, 33, 1, 32, 0);
    *low = _mm512_permutex2var_epi16(first, index, second);
    *high = _mm512_permutex2var_epi16(first, _mm512_add_epi16(index, _mm512_set1_epi16(16)), second);
}

/* rows x columns of bf16, both multiples of 32, to pairs of rows: a panel for every 32 columns holds, for each pair of rows,
(x[row][column], x[row + 1][column]). A panel's lines lie one behind the other, so they do not compete for places in the cache. */
INLINE void pack_pairs(const bf16 *x, size_t stride, int rows, int columns, uint32_t *out) {
    for (int i = 0; i < rows; i += 2)
        for (int j = 0; j < columns; j += 32) {
            __m512i low, high;
            uint32_t *line = out + (size_t)(j / 32) * (rows / 2) * 32 + (i / 2) * 32;
            interleave(_mm512_loadu_si512(x + i * stride + j), _mm512_loadu_si512(x + (i + 1) * stride + j), &low, &high);
            _mm512_storeu_si512(line, low);
            _mm512_storeu_si512(line + 16, high);
        }
}

/* w (F, K) to panels of 32 columns of its transpose, laid out as pack_pairs does. F and K multiples of 32. */
INLINE void pack_columns(const bf16 *w, int F, int K, uint32_t *out) {
    for (int f = 0; f < F; f += 16)
        for (int k = 0; k < K; k += 32) {
            __m512i v[16];
            uint32_t *panel = out + (size_t)(f / 32) * (K / 2) * 32 + (size_t)(k / 2) * 32 + f % 32;
            for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(w + (size_t)(f + i) * K + k);
            transpose16(v);
            for (int i = 0; i < 16; i++) _mm512_store_si512(panel + 32 * i, v[i]);
        }
}

/* The 32 rows from `row` and 32 columns from `column` of what pack_pairs wrote; its lines are 128 bytes apart. */
INLINE const uint32_t *pairs_at(const uint32_t *pairs, int rows, int row, int column) {
    return pairs + (size_t)(column / 32) * (rows / 2) * 32 + (size_t)(row / 2) * 32;
}

/* rows x columns of bf16 to tiles of the transpose: tile (c, r) holds pairs of columns 32c.. by rows 16r.., 1 KB each, r fastest. */
INLINE void pack_transposed(const bf16 *x, size_t stride, int rows, int columns, uint32_t *out) {
    for (int r = 0; r < rows; r += 16)
        for (int c = 0; c < columns; c += 32) {
            __m512i v[16];
            uint32_t *tile = out + ((size_t)(c / 32) * (rows / 16) + r / 16) * 256;
            for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(x + (r + i) * stride + c);
            transpose16(v);
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(tile + i * 16, v[i]);
        }
}

/* Compilers do not know that tile instructions read and write memory: what was stored before must be stored, what is read after be read. */
INLINE void settle_memory(void) { __asm__ volatile("" ::: "memory"); }

/* Eight tiles of sixteen rows of 64 bytes: 0-3 gather results, 4 and 5 hold the first operand, 6 and 7 the second. */
static const struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t bytes_a_row[16];
    uint8_t rows[16];
} tile_config __attribute__((aligned(64))) = {1, 0, {0}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

INLINE void configure_tiles(void) { _tile_loadconfig(&tile_config); }

INLINE void zero_results(void) {
    settle_memory();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

INLINE void load_results(const float *c, size_t stride) {
    settle_memory();
    _tile_loadd(0, c, stride * 4);
    _tile_loadd(1, c + 16, stride * 4);
    _tile_loadd(2, c + 16 * stride, stride * 4);
    _tile_loadd(3, c + 16 * stride + 16, stride * 4);
}

INLINE void store_results(float *c, size_t stride) {
    _tile_stored(0, c, stride * 4);
    _tile_stored(1, c + 16, stride * 4);
    _tile_stored(2, c + 16 * stride, stride * 4);
    _tile_stored(3, c + 16 * stride + 16, stride * 4);
    settle_memory();
}

/* results (32 x 32) += a (32 x 32) b (32 x 32): a as rows of bf16 in two tiles, b as pairs of rows in two tiles. */
INLINE void multiply(const void *a0, const void *a1, size_t a_bytes, const void *b0, const void *b1, size_t b_bytes) {
    _tile_loadd(4, a0, a_bytes);
    _tile_loadd(6, b0, b_bytes);
    _tile_loadd(7, b1, b_bytes);
    _tile_loadd(5, a1, a_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
}
